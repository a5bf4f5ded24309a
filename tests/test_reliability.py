"""What damage, misuse and accidents must not do: change a number in silence, or end in a traceback. Each case failed
once."""
import contextlib
import gc
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from dask import config
from distributed import Client, as_completed
from distributed.utils import LoopRunner
from conftest import ROOT

from soft_cifar import data, evaluation, models, runs, study, training
from soft_cifar.checks import StudyError, error_of
from soft_cifar.parameters import Run

STUDY = """
shared: {preset: demo, depth: 8, epochs: 1, schedule: one_cycle,
         train_size: 64, validation_size: 20, test_size: 50, ood_size: 50}
models:
  basic: {method: basic}
labels: [soft]
seeds: [0, 1]
"""


def soft_cifar(*words, **how):
    command = [sys.executable, "-m", "soft_cifar.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **how)


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
    "an impossible date": (STUDY.replace("[0, 1]", "[2020-99-99]"), "line 7"),
    "no int": (STUDY.replace("[0, 1]", "[!!int x]"), "line 7"),
    "400 digits": (STUDY.replace("[0, 1]", f"[{'9' * 400}]"), "seeds[0]"),
    "5,000 digits": (STUDY.replace("[0, 1]", f"[{'9' * 5000}]"), "line 7"),
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
    "reuse of a path": (STUDY + 'reuse: ["../other"]\n', "expected the name of a study"),
    "reuse of nothing": (STUDY + 'reuse: [""]\n', "expected the name of a study"),
    "a long name": (STUDY.replace("method: basic", f"data: {'long' * 80}"), "bytes"),
    "a list of no labels": (STUDY.replace("[soft]", "[[soft]]"), "labels=['soft']"),
}


@pytest.mark.parametrize("text, said", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_study_file_gets_a_sentence(tmp_path, text, said):
    message = error_of(study.load, study_in(tmp_path, text))
    assert said in message and "small.yaml" in message and len(message) < 1500, message


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    "A leading zero means nothing, and an exponent needs no point."
    text = STUDY.replace("[0, 1]", "[010, 0o10, 0x1F]")
    text = text.replace("method: basic", "lr: 5e-2, weight_decay: .5, fgsm_eps: 1.")
    found = study.load(study_in(tmp_path, text))
    assert [run.seed for run in found.runs] == [10, 8, 31]
    assert {(run.lr, run.weight_decay, run.fgsm_eps) for run in found.runs} == {(.05, .5, 1.)}


ODD_OUTPUTS = [None, [None], [{}], [{"output_type": "error"}]]
ODD_CELLS = [None, 3, "text", [None], [[]], *([dict(outputs=outputs)] for outputs in ODD_OUTPUTS)]
ODD_NOTEBOOKS = [b"", b"{", b"\xff", b"[]", b"7", b"null", b"{}"]
ODD_NOTEBOOKS += [json.dumps(dict(cells=cells)).encode() for cells in ODD_CELLS]


@pytest.mark.parametrize("content", ODD_NOTEBOOKS, ids=range(len(ODD_NOTEBOOKS)))
def test_an_odd_notebook_is_no_failed_run(tmp_path, content):
    run = study.load(study_in(tmp_path)).runs[0]
    notebook = study.notebook_of(run.folder)
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


def dask(*words, cwd, **more):
    "A process of Dask's own command, started in the folder `cwd` and with the package that is there."
    command = [sys.executable, "-m", "dask", *map(str, words)]
    environment = os.environ | dict(PYTHONPATH=str(cwd)) | more
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def scheduler_and_worker(address, cwd=ROOT, **more):
    "The two processes, a scheduler that listens at `address` and one worker of it."
    host = address.rsplit(":", 1)[0] if address.startswith("tls") else "127.0.0.1"
    scheduler = dask("scheduler", "--host", address, "--no-dashboard", cwd=cwd, **more)
    alone = "--nthreads", 1, "--no-nanny", "--no-dashboard"
    return [scheduler, dask("worker", address, *alone, "--host", host, cwd=cwd, **more)]


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
    started = scheduler_and_worker(address, there)
    yield address, there
    stop(started)


def assert_refused(done, message):
    "The process that is `done` ended in `message`, without a traceback."
    said = done.stdout + done.stderr
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, said


def test_a_worker_of_another_clone_is_refused(strangers, tmp_path):
    """Its runs would lie in its own folders. The study lies inside the checkout: its path is relative, and means
    another folder there."""
    address, there = strangers
    here = copy_of_the_code(tmp_path / "here", "9.9.9")
    command = [sys.executable, "-m", "soft_cifar.cli", "study", study_in(here), "--scheduler", address]
    environment = os.environ | dict(PYTHONPATH=str(here))
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert_refused(done, "sees other folders")
    assert not [*here.rglob("seed-*"), *here.rglob("*.here"), *there.rglob("seed-*")]


def test_a_worker_of_another_version_is_refused(strangers, tmp_path):
    "The study lies outside both checkouts, so that folders agree and the code does not."
    address, _ = strangers
    done = soft_cifar("study", study_in(tmp_path), "--scheduler", address)
    assert_refused(done, "version 9.9.9 instead of")
    assert not [*tmp_path.rglob("seed-*"), *tmp_path.rglob("*.here")]


def test_a_scheduler_that_is_killed_gives_a_sentence():
    "While a run of two minutes is under way."
    address = f"tcp://127.0.0.1:{port()}"
    started, gone = scheduler_and_worker(address), pytest.raises(StudyError, match="is gone: finished runs are kept")
    try:
        with config.set({"distributed.comm.timeouts.connect": "1s"}), gone:
            with study.workers(1, address, 1, patience=60) as (client, sharing):
                assert sharing == {"127.0.0.1": 1}
                task = client.submit(time.sleep, 120)
                started[0].kill()
                for done in as_completed([task]): done.result()
    finally: stop(started)


def certificate(place):
    "A certificate for both ends of a connection, signed by itself, and its key."
    made, key = place / "cert.pem", place / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=soft_cifar -keyout".split()
    subprocess.run([*command, key, "-out", made], check=True, capture_output=True)
    return made, key


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_a_scheduler_behind_tls(tmp_path):
    "As the README says it: who has the certificate takes part, who has none gets no answer."
    made, key = certificate(tmp_path)
    settings = {"tls.ca-file": str(made), "require-encryption": True}
    for role in ("scheduler", "worker", "client"):
        settings |= {f"tls.{role}.cert": str(made), f"tls.{role}.key": str(key)}
    def variable(name): return f"DASK_DISTRIBUTED__COMM__{name.upper().replace('.', '__').replace('-', '_')}"
    secure = {variable(name): str(value) for name, value in settings.items()}
    address = f"tls://127.0.0.1:{port()}"
    started = scheduler_and_worker(address, **secure)
    try:
        ours = config.set({f"distributed.comm.{name}": value for name, value in settings.items()})
        with ours, study.workers(1, address, 1, patience=60) as (client, sharing):
            assert client.submit(max, 3, 5).result(60) == 5 and sharing == {"127.0.0.1": 1}
        plain = address.replace("tls", "tcp")
        for stranger, patience, said in ((address, 60, "needs certificates"), (plain, 2, "no Dask scheduler answers")):
            message = error_of(contextlib.ExitStack().enter_context, study.workers(1, stranger, 1, patience))
            assert said in message, message
    finally: stop(started)


class Abandoned:
    "As a client that was given up: the garbage collector finds it, and ending it takes Dask's lock."
    def __init__(self, ended): self.itself, self.ended = self, ended
    def __del__(self): self.ended.append(LoopRunner._lock.locked())


def test_dask_on_a_machine_that_stands_still(monkeypatch):
    """Its thread begins too late once, and work goes on, also where there are clients that were given up; it never
    begins, and a sentence says so."""
    begin, calls, ended_under_lock = LoopRunner._start_unlocked, [], []
    def late_once(self):
        calls.append(self)
        gc.collect()
        if len(calls) == 1:
            Abandoned(ended_under_lock)
            raise AssertionError
        begin(self)
    monkeypatch.setattr(LoopRunner, "_start_unlocked", late_once)
    Abandoned(ended_under_lock)
    with study.begun(Client, n_workers=1, processes=False, dashboard_address=None) as client:
        assert client.submit(max, 3, 5).result(60) == 5 and len(calls) > 1
    assert ended_under_lock == [False, False], "one that ends there waits for ever"
    def never(self): raise AssertionError
    monkeypatch.setattr(LoopRunner, "_start_unlocked", never)
    assert "three times" in error_of(contextlib.ExitStack().enter_context, study.workers(1, None, 1))


@contextlib.contextmanager
def no_file_above(size):
    "As on a disk that is full: no file can grow beyond `size` bytes."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


TINY = Run(preset="demo", depth=8, epochs=5, warmup=0, milestones=(4,),
           train_size=64, validation_size=20, test_size=50, ood_size=50)


@pytest.fixture(scope="module")
def parts():
    return data.split(data.load("oracle"), (TINY.train_size, TINY.validation_size, TINY.test_size), TINY.seed)


def fitted(parts, folder=None, progress=None):
    "A trained classifier's weights and its losses."
    classifier = models.create("basic", TINY.seed, **TINY.model)
    train, validation, _ = parts
    history = training.fit(
        classifier, train, validation, TINY, folder, progress or (lambda history: None), checkpoint_seconds=0)
    return classifier.state_dict(), [row["train_loss"] for row in history]


def same(one, other):
    "Whether two that are `fitted` have the same weights and losses."
    (weights, losses), (others, other_losses) = one, other
    return losses == other_losses and all(map(torch.equal, weights.values(), others.values()))


def after(epochs, action):
    "A progress that does something when so many epochs are done."
    def progress(history):
        if len(history) == epochs: action()
    return progress


def test_training_on_a_full_disk_resumes_when_there_is_room(parts, tmp_path, capsys):
    "Its last checkpoint stays, whole, and nothing else does."
    undisturbed = fitted(parts)
    with contextlib.ExitStack() as full:
        message = error_of(fitted, parts, tmp_path, after(3, lambda: full.enter_context(no_file_above(1000))))
    for part in ("cannot write the checkpoint", "checkpoint.pt", "File too large"): assert part in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert same(undisturbed, fitted(parts, tmp_path))
    assert "resumed after epoch 3 of 5" in capsys.readouterr().out


def test_training_in_a_folder_that_is_removed(parts, tmp_path):
    place = tmp_path / "partial"
    place.mkdir()
    message = error_of(fitted, parts, place, after(2, lambda: shutil.rmtree(place)))
    assert "the folder was removed" in message and "partial/checkpoint.pt" in message, message


def damaged(content, change):
    "A checkpoint whose sha256 is right and whose state is not."
    state = torch.load(io.BytesIO(content[64:]), weights_only=True)
    change(state)
    content = runs.as_bytes(state)
    return runs.digest(content).encode() + content


DAMAGE = {
    "no identity": lambda state: state.pop("identity"),
    "no classifier": lambda state: state.pop("classifier"),
    "no optimiser": lambda state: state.pop("optimiser"),
    "no best": lambda state: state.pop("best"),
    "no source": lambda state: state.pop("source"),
    "no history": lambda state: state.update(history=[]),
    "history of nothing": lambda state: state.update(history=3),
    "too long": lambda state: state.update(history=state["history"] * 9),
    "one weight less": lambda state: state["classifier"].popitem(),
    "another shape": lambda state: state["best"].update({"mean": torch.zeros(7)}),
    "another average": lambda state: state["optimiser"]["state"][0].update(momentum_buffer=torch.zeros(2)),
    "a list": lambda state: state.update(classifier=[1]),
}


def test_a_checkpoint_that_is_damaged_is_not_used(parts, tmp_path, capsys):
    "Whatever is wrong with it, the run starts over, and says so. (Flipped bits are the lesson's.)"
    undisturbed = fitted(parts)
    def stop(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fitted(parts, tmp_path, after(3, stop))
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for name, change in DAMAGE.items():
        (tmp_path / "checkpoint.pt").write_bytes(damaged(whole, change))
        assert same(undisturbed, fitted(parts, tmp_path)), name
        assert "starting over" in capsys.readouterr().out, name
    for content in (whole[:64], whole[64:], b"", whole[:-1]):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert same(undisturbed, fitted(parts, tmp_path))
        assert "starting over" in capsys.readouterr().out
    (tmp_path / "checkpoint.pt").write_bytes(whole)
    assert same(undisturbed, fitted(parts, tmp_path)) and "resumed after epoch 3" in capsys.readouterr().out


def saved(place, weights=None):
    run = Run(preset="demo", output=str(place), keep_weights=weights is not None)
    record, predictions = dict(metrics=dict(accuracy=.5)), dict(labels=torch.zeros(3, dtype=torch.long))
    return runs.save(run, record, predictions, [dict(epoch=1, loss=1.)], weights)


@pytest.mark.parametrize("size, weights", [(100, None), (10_000, dict(w=torch.zeros(20_000)))])
def test_a_run_saved_on_a_full_disk(tmp_path, size, weights):
    "A sentence, nothing half written, and the same once there is room."
    with no_file_above(size): message = error_of(saved, tmp_path, weights)
    assert "File too large" in message and "make room" in message and "the run starts over" in message, message
    assert not [*tmp_path.rglob("seed-*")]
    assert saved(tmp_path, weights).is_dir()


def test_a_stale_notebook_in_the_environment_fails_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFT_CIFAR_NOTEBOOK", str(tmp_path / "gone.ipynb"))
    assert "metrics.json" in os.listdir(saved(tmp_path))


@pytest.mark.parametrize("method, size", [("basic", 1), ("basic", 2), ("sngp", 2)])
def test_a_training_set_of_one_image(method, size):
    "Features without covariance, or with next to none: measured, not a traceback after training."
    tight = dict(bound=1e-30) if method == "sngp" else {}
    sizes = dict(train_size=size, validation_size=3, test_size=5, ood_size=5)
    run = Run(preset="demo", method=method, depth=8, **sizes, **tight)
    train, validation, test = data.split(data.load("oracle"), (run.train_size, run.validation_size, run.test_size), 0)
    classifier = models.create(method, 0, **run.model).eval()
    classifier.finish(train.pixels())
    found, _ = evaluation.evaluate(classifier, train, validation, test, data.load("oracle_ood").first(5), run)
    assert 0 <= found["auroc_mahalanobis"] <= 1, found["auroc_mahalanobis"]
