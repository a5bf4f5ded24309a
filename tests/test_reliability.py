"""What damage, misuse and accidents must not do: change a number in silence, or end in a traceback. Each case failed once."""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from dask import config
from distributed import as_completed
from conftest import ROOT

from soft_cifar import study
from soft_cifar.checks import StudyError, error_of

STUDY = """
shared: {preset: demo, depth: 8, epochs: 1, train_size: 64, validation_size: 20, test_size: 50, ood_size: 50}
models:
  basic: {method: basic}
labels: [soft]
seeds: [0, 1]
"""


def soft_cifar(*words, **how):
    return subprocess.run([sys.executable, "-m", "soft_cifar.cli", *map(str, words)], cwd=ROOT, capture_output=True, text=True, **how)


def study_in(place, text=STUDY):
    (place / "runs").mkdir(exist_ok=True)
    file = place / "runs" / "small.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def bomb(levels, last):
    "YAML whose anchors name each other: ten to the power of `levels` values in so many lines."
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + f"\n{last.replace('BOMB', f'*a{levels - 1}')}\n"


WRONG_FILES = {
    "not UTF-8": (STUDY.encode() + b"# \xff\xfe", "UTF-8"),
    "a NUL": (STUDY + "# \0", "UTF-8"),
    "an impossible date": (STUDY.replace("[0, 1]", "[2020-99-99]"), "line 6"),
    "no int": (STUDY.replace("[0, 1]", "[!!int x]"), "line 6"),
    "400 digits": (STUDY.replace("[0, 1]", f"[{'9' * 400}]"), "seeds[0]"),
    "5,000 digits": (STUDY.replace("[0, 1]", f"[{'9' * 5000}]"), "line 6"),
    "sexagesimal": (STUDY.replace("[0, 1]", "[1:30]"), "seeds[0]='1:30'"),
    "a nested seed": (STUDY.replace("[0, 1]", "[[0]]"), "seeds[0]"),
    "nested teachers": (STUDY.replace("{method: basic}", "{teachers: [[basic]]}"), "expected a list of model types"),
    "teachers by name": (STUDY.replace("{method: basic}", "{teachers: {a: b}}"), "expected a list of model types"),
    "shared teachers": (STUDY.replace("depth: 8", "teachers: [basic]"), "belong to a model"),
    "data_root 5": (STUDY.replace("{method: basic}", "{data: x, data_root: 5, if_present: true}"), "data"),
    "if_present maybe": (STUDY.replace("{method: basic}", "{data: x, if_present: maybe}"), "if_present"),
    "if_present of nothing": (STUDY.replace("{method: basic}", "{if_present: true}"), "if_present"),
    "deep nesting": ("[" * 2000, "nested too deeply"),
    "a bomb of seeds": (bomb(9, STUDY.replace("[0, 1]", "BOMB")), "more than 10,000 entries"),
    "a bomb of values": (bomb(9, STUDY.replace("method: basic", "depth: BOMB")), "more than 10,000 entries"),
    "one that holds itself": (STUDY.replace("[0, 1]", "&a [0, *a]"), "more than 10,000 entries"),
    "no mapping": (STUDY.replace("{method: basic}", "!!map x"), "expected a mapping"),
    "a seed of its own": (STUDY.replace("method: basic", "seed: 3"), "no effect"),
    "an output of its own": (STUDY.replace("depth: 8", "output: elsewhere"), "no effect"),
    "a long name": (STUDY.replace("method: basic", f"data: {'long' * 80}"), "bytes"),
    "a list of no labels": (STUDY.replace("[soft]", "[[soft]]"), "labels=['soft']"),
}


@pytest.mark.parametrize("text, said", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_study_file_gets_a_sentence(tmp_path, text, said):
    message = error_of(study.load, study_in(tmp_path, text))
    assert said in message and "small.yaml" in message and len(message) < 1500, message


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    "A leading zero means nothing, and an exponent needs no point."
    found = study.load(study_in(tmp_path, STUDY.replace("[0, 1]", "[010, 0o10, 0x1F]").replace("method: basic", "lr: 5e-2, weight_decay: .5, decay: 1.")))
    assert [run.seed for run in found.runs] == [10, 8, 31]
    assert {(run.lr, run.weight_decay, run.decay) for run in found.runs} == {(.05, .5, 1.)}


ODD_NOTEBOOKS = [b"", b"{", b"\xff", b"[]", b"7", b"null", b"{}", *(json.dumps(dict(cells=cells)).encode() for cells in (
    None, 3, "text", [None], [[]], [{"outputs": None}], [{"outputs": [None]}], [{"outputs": [{}]}], [{"outputs": [{"output_type": "error"}]}]))]


@pytest.mark.parametrize("content", ODD_NOTEBOOKS, ids=range(len(ODD_NOTEBOOKS)))
def test_an_odd_notebook_is_no_failed_run(tmp_path, content):
    run = study.load(study_in(tmp_path)).runs[0]
    notebook = study.notebook_of(run)
    notebook.parent.mkdir(parents=True)
    notebook.write_bytes(content)
    assert study.state(run) == ("pending", "")
    failed = dict(cells=[dict(outputs=[dict(output_type="error", ename="InputError", evalue="no\nsuch thing")])])
    notebook.write_text(json.dumps(failed))
    assert study.state(run) == ("failed", "such thing")


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


WORKER = ("--nthreads", 1, "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")


def dask(*words, cwd, **more):
    environment = os.environ | dict(PYTHONPATH=str(cwd)) | more
    return subprocess.Popen([sys.executable, "-m", "dask", *map(str, words)], cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stop(processes):
    for process in processes: process.kill()
    for process in processes: process.wait(30)


def copy_of_the_code(place, version):
    shutil.copytree(ROOT / "soft_cifar", place / "soft_cifar")
    (place / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "train.ipynb", place / "nbs")
    shutil.copy(ROOT / "settings.ini", place)
    (place / "soft_cifar" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    return place


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    "(the address of a scheduler, the clone of another version in which its one worker was started)."
    there = copy_of_the_code(tmp_path_factory.mktemp("there"), "9.9.9")
    address = f"tcp://127.0.0.1:{port()}"
    started = [dask("scheduler", "--host", address, "--no-dashboard", cwd=there), dask("worker", address, *WORKER, cwd=there)]
    yield address, there
    stop(started)


def test_a_worker_of_another_clone_is_refused(strangers, tmp_path):
    "Its runs would lie in its own folders. The study lies inside the checkout: its path is relative, and means another folder there."
    address, there = strangers
    here = copy_of_the_code(tmp_path / "here", "9.9.9")
    command = [sys.executable, "-m", "soft_cifar.cli", "study", study_in(here), "--scheduler", address]
    done = subprocess.run(command, cwd=here, env=os.environ | dict(PYTHONPATH=str(here)), capture_output=True, text=True)
    assert done.returncode == 1 and "sees other folders" in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert not [*here.rglob("seed-*"), *here.rglob("*.here"), *there.rglob("seed-*")]


def test_a_worker_of_another_version_is_refused(strangers, tmp_path):
    "The study lies outside both checkouts, so that folders agree and the code does not."
    address, _ = strangers
    done = soft_cifar("study", study_in(tmp_path), "--scheduler", address)
    assert done.returncode == 1 and "version 9.9.9 instead of" in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert not [*tmp_path.rglob("seed-*"), *tmp_path.rglob("*.here")]


def test_a_scheduler_that_is_killed_gives_a_sentence():
    "While a run of two minutes is under way."
    address = f"tcp://127.0.0.1:{port()}"
    started = [dask("scheduler", "--host", address, "--no-dashboard", cwd=ROOT), dask("worker", address, *WORKER, cwd=ROOT)]
    try:
        with config.set({"distributed.comm.timeouts.connect": "1s"}), pytest.raises(StudyError, match="is gone: finished runs are kept"):
            with study.workers(1, address, 1, patience=60) as (client, sharing):
                assert sharing == {"127.0.0.1": 1}
                task = client.submit(time.sleep, 120)
                started[0].kill()
                for done in as_completed([task]): done.result()
    finally: stop(started)


def certificate(place):
    "A certificate for both ends of a connection, signed by itself, and its key."
    made, key = place / "cert.pem", place / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=soft_cifar", "-keyout", key, "-out", made]
    subprocess.run(words, check=True, capture_output=True)
    return made, key


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_a_scheduler_behind_tls(tmp_path):
    "As the README says it: who has the certificate takes part, who has none gets no answer."
    made, key = certificate(tmp_path)
    settings = {"tls.ca-file": str(made), "require-encryption": True}
    for role in ("scheduler", "worker", "client"): settings |= {f"tls.{role}.cert": str(made), f"tls.{role}.key": str(key)}
    secure = {f"DASK_DISTRIBUTED__COMM__{name.upper().replace('.', '__').replace('-', '_')}": str(value) for name, value in settings.items()}
    address = f"tls://127.0.0.1:{port()}"
    started = [dask("scheduler", "--host", address, "--no-dashboard", cwd=ROOT, **secure), dask("worker", address, *WORKER[:-1], "tls://127.0.0.1", cwd=ROOT, **secure)]
    try:
        with config.set({f"distributed.comm.{name}": value for name, value in settings.items()}), study.workers(1, address, 1, patience=60) as (client, sharing):
            assert client.submit(max, 3, 5).result(60) == 5 and sharing == {"127.0.0.1": 1}
        for stranger, said in ((address, "needs certificates"), (address.replace("tls", "tcp"), "no Dask scheduler answers")):
            message = error_of(contextlib.ExitStack().enter_context, study.workers(1, stranger, 1, patience=2))
            assert said in message, message
    finally: stop(started)
