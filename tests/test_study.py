"""Studies as people run them: killed in the middle, on a scheduler over TCP, with a run that fails; 150 runs, one
report."""
import json
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PATIENCE, ROOT, differences, kill, started, stopped, stopping, wait_for, watched
from distributed import Client

from soft_cifar import evaluation, runs, study, worker

SMALL = """
shared: {preset: demo, depth: 8, schedule: one_cycle, epochs: 4,
         train_size: 300, validation_size: 100, test_size: 200, ood_size: 200}
models:
  basic: {method: basic}
labels: [soft, hard]
seeds: [0, 1]
"""


def command(*words): return [sys.executable, "-m", "soft_cifar.cli", *map(str, words)]
def soft_cifar(*words): return subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True)


def study_in(place, text=SMALL):
    (place / "runs").mkdir()
    file = place / "runs" / "small.yaml"
    file.write_text(text)
    return file


def finished(file): return {(run.cell, run.seed): run.folder for run in study.load(file).runs if run.folder.exists()}


def assert_same_runs(file, undisturbed, seeds=(0, 1)):
    "The study in `file` has made the runs of `undisturbed` with one of `seeds`, no others, to the same numbers."
    found, wanted = finished(file), {key: folder for key, folder in finished(undisturbed).items() if key[1] in seeds}
    assert sorted(found) == sorted(wanted)
    apart = {key: differences(found[key], wanted[key]) for key in wanted}
    assert not any(apart.values()), apart


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    file = study_in(tmp_path_factory.mktemp("undisturbed"))
    done = soft_cifar("study", file, "--jobs", 2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return file


def test_a_study_is_complete(undisturbed):
    "Every run is there with its executed notebook, nothing else is, and the same command finds nothing to do."
    wanted = study.load(undisturbed)
    assert len(finished(undisturbed)) == 4 and set(study.status(wanted).state) == {"done"}
    for pattern in ("*.partial", "*.tmp", "seed-*.ipynb"): assert not [*undisturbed.parent.rglob(pattern)], pattern
    for run in wanted.runs:
        cells = json.loads((run.folder / "train.ipynb").read_text())["cells"]
        counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
        assert counts == [*range(1, len(counts) + 1)], (run.cell, run.seed, counts)
    again = soft_cifar("study", undisturbed, "--jobs", 2)
    assert again.returncode == 0 and "4 done and 0 to do" in again.stdout, again.stdout + again.stderr


def test_killed_kernel_and_killed_worker(undisturbed, tmp_path):
    """SIGKILL in the middle of training, for a kernel, and later for a worker that has made a run already: every run
    ends complete, none is there twice, those that were killed go on from their checkpoints, and the numbers are those
    of the undisturbed study."""
    file, said, place = study_in(tmp_path), tmp_path / "said", tmp_path / "ipython"
    with started(command("study", file, "--jobs", 2), said, **stopping(place, 0, 1)) as process:
        kernel = wait_for(lambda: stopped(place, 0), process, said)
        kernel.kill()
        orphan = wait_for(lambda: finished(file) and stopped(place, 1), process, said)
        kill([orphan.parent(), orphan])     # without its worker, the kernel would end a little later
        assert process.wait(PATIENCE) == 0, said.read_text()[-3000:]
    assert_same_runs(file, undisturbed)
    assert sorted(p.name for p in file.parent.glob("small/*/*")) == ["seed-0", "seed-0", "seed-1", "seed-1"]
    executed = {run: (run.folder / "train.ipynb").read_text() for run in study.load(file).runs}
    resumed = [run.seed for run, text in executed.items() if "resumed after epoch 2 of 4" in text]
    assert sorted(resumed) == [0, 1], resumed


def test_what_is_made_is_not_made_again(undisturbed, monkeypatch):
    "When a worker dies, Dask computes again what it had made; the run is there, and nothing is started or written."
    monkeypatch.setattr(worker, "make_in_kernel", lambda *_: pytest.fail("a kernel was started"))
    run, before = study.load(undisturbed).runs[0], sorted(undisturbed.parent.rglob("*"))
    with Client(n_workers=1, processes=False, dashboard_address=None) as client:
        assert client.submit(worker.run_notebook, run.as_json(), str(run.folder), {}, []).result() == ""
    assert sorted(undisturbed.parent.rglob("*")) == before


def test_two_commands_on_one_study(undisturbed, tmp_path):
    """Both make the same runs at the same time: each is there once, whole, with its executed notebook, and nothing else
    is."""
    file, words = study_in(tmp_path), ("--jobs", 2, "--seeds", 0)
    with started(command("study", file, *words), tmp_path / "one") as one:
        other = soft_cifar("study", file, *words)
        ended = one.wait(PATIENCE), other.returncode
        assert ended == (0, 0), (tmp_path / "one").read_text() + other.stdout + other.stderr
    assert_same_runs(file, undisturbed, seeds=[0])
    assert [p.name for p in file.parent.glob("small/*/*")] == ["seed-0", "seed-0"]
    for run in study.load(file, seeds=[0]).runs:
        cells = json.loads((run.folder / "train.ipynb").read_text())["cells"]
        assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"], run.folder
        assert cells[-1]["outputs"], run.folder


def test_scheduler_over_tcp_and_a_run_that_fails(undisturbed, tmp_path):
    """Two workers of a Dask scheduler at an address: the same numbers. A run that diverges is reported with its
    notebook; the others are made."""
    file = study_in(tmp_path, SMALL.replace("labels:", "  wild: {method: basic, lr: 1.0e+12, warmup: 0}\nlabels:"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    address = f"tcp://{host}:{port}"
    def dask(name, *words):
        whole = [sys.executable, "-m", "dask", *words, "--host", host, "--no-dashboard"]
        return stack.enter_context(started(whole, tmp_path / name))
    with ExitStack() as stack:
        dask("scheduler", "scheduler", "--port", str(port))
        for name in ("one", "two"): dask(name, "worker", address, "--nthreads", "1", "--local-directory", str(tmp_path))
        # both have joined: cores are shared as in the undisturbed study
        with Client(address, timeout=PATIENCE) as client: client.wait_for_workers(2, timeout=PATIENCE)
        done = soft_cifar("study", file, "--scheduler", address, "--seeds", "0")
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout + done.stderr
    assert_same_runs(file, undisturbed, seeds=[0])
    said = soft_cifar("status", file)
    assert said.stdout.count("try a smaller lr") == 2, said.stdout
    for wanted in ("seed-0.ipynb", "2 done", "2 failed"): assert wanted in said.stdout, said.stdout


SCHOOL = """
shared: {preset: demo, depth: 8, schedule: one_cycle, epochs: 1, batch_size: 32,
         train_size: 128, validation_size: 50, test_size: 100, ood_size: 100}
models:
  first: {labels: hard}
  wild: {labels: hard, lr: 1.0e+12, warmup: 0}
  taught: {labels: off_ldl, teachers: [first]}
  misled: {labels: kd, teachers: [wild]}
seeds: [0]
"""


def test_teachers_come_first(tmp_path):
    """A taught run waits for its teacher and learns from it; it is not made where the teacher fails. Where the teacher's
    weights are gone, nothing is started."""
    file = study_in(tmp_path, SCHOOL)
    done = soft_cifar("study", file, "--jobs", 2)
    assert done.returncode == 1 and "one of its teachers failed" in done.stdout, done.stdout + done.stderr
    wanted = study.load(file)
    found = study.status(wanted).set_index("model").state.to_dict()
    assert found == dict(first="done", wild="failed", taught="done", misled="pending")
    first, _, taught, _ = wanted.runs
    assert [path.parent for path in file.parent.rglob("weights.pt")] == [first.folder]
    assert study.gather(wanted).model.tolist() == ["first", "taught"]
    (first.folder / "weights.pt").unlink()
    shutil.rmtree(taught.folder)
    again = soft_cifar("study", file, "--only", "taught")
    assert again.returncode == 1 and "1 of the 1 runs to do need the network of another run" in again.stderr, again.stderr
    assert "holds no weights" in again.stderr and "workers on" not in again.stdout, again.stdout + again.stderr


ONE = """
shared: {preset: demo, depth: 8, schedule: one_cycle, epochs: 1,
         train_size: 64, validation_size: 20, test_size: 50, ood_size: 50}
models: {basic: {}}
seeds: [0]
"""


def test_a_copy_runs_its_own_code(tmp_path):
    """As on a host where the package is not installed: command, worker and kernel take it from the folder they are
    started in."""
    for name in ("soft_cifar", "nbs"): shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "soft_cifar" / "__init__.py").write_text('__version__ = "a copy"\n')
    file = study_in(tmp_path, ONE)
    done = subprocess.run(command("study", file), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = study.load(file).runs
    assert runs.record(run.folder)["versions"]["soft_cifar"] == "a copy"


def test_150_runs_in_one_report(tmp_path):
    "The published grid, made of random predictions: gathered and reported in less than 2 GB."
    (tmp_path / "runs").mkdir()
    file = tmp_path / "runs" / "grid.yaml"
    file.write_text((ROOT / "runs" / "grid.yaml").read_text().replace("reuse: [primary]\n", ""))
    rng = torch.Generator().manual_seed(0)
    def log_probs(n): return (3 * torch.randn(n, 10, generator=rng)).log_softmax(1)
    counts = torch.randint(1, 30, (1500, 10), generator=rng).to(torch.uint8)
    whole = {kind: dict(fingerprint="made up", encoding="made up") for kind in ("cifar10h", "svhn")}
    for run in study.load(file).runs:
        p, labels = log_probs(1500), torch.randint(10, (1500,), generator=rng)
        index, score, ood_score = torch.arange(1500), torch.randn(1500, generator=rng), torch.randn(1500, generator=rng)
        kept = dict(index=index, labels=labels, gold=labels, counts=counts, log_probs=p, fgsm_log_probs=log_probs(1500))
        kept |= dict(ood_index=index, ood_log_probs=log_probs(1500))
        kept |= dict(score_max_logit=score, ood_score_max_logit=ood_score)
        kept |= dict(validation_labels=labels[:500], validation_log_probs=log_probs(500))
        found = evaluation.label_metrics(p, labels, counts.long()) | dict(auroc_max_logit=.5, fgsm_drop=.1)
        seconds = dict(load=1., fit=1., evaluate=1.)
        record = dict(data=whole, parameter_count=1, seconds=seconds, metrics=found)
        runs.save(run, record, kept, [dict(epoch=1, loss=1.)])
    status, said, peak = watched(command("report", file), tmp_path / "said")
    assert status == 0, said[-3000:]
    assert 1e8 < peak < 2e9, f"{peak / 1e9:.2f} GB"
    page = tmp_path / "report" / "grid"
    assert "150 of 150 runs" in (page / "index.html").read_text()
    assert (page / "table1.tex").read_text().count(r"\\") == 32
    names = ("table1.csv", "table1.md", "runs.csv", "runs.parquet", "claims.csv",
             "soft_minus_hard.svg", "soft_minus_hard.png")
    assert {*names} <= {p.name for p in page.iterdir()}


def test_a_report_comes_again_from_its_table(tmp_path):
    "Where the runs are gone: the committed table of what they measured, of before there were backbones, says the same."
    there = ROOT / "report" / "annotators_demo"
    file = study_in(tmp_path, (ROOT / "runs" / "annotators_demo.yaml").read_text())
    page = tmp_path / "report" / "small"
    page.mkdir(parents=True)
    shutil.copy(there / "runs.csv", page)
    done = soft_cifar("report", file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The runs are not at hand" in (page / "index.html").read_text()
    assert (page / "table1.csv").read_text() == (there / "table1.csv").read_text()
    pd.testing.assert_frame_equal(*(pd.read_csv(folder / "against_all.csv") for folder in (page, there)))
    assert "20 votes of an image are enough" in (page / "index.html").read_text()


STUDIES = "primary", "grid", "paper"
PUBLISHED = sorted(folder for name in STUDIES for folder in (ROOT / "runs" / name).glob("*/seed-*"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_published_numbers_come_again_from_other_libraries(folder):
    "The metrics of a committed run, recomputed from its predictions by scikit-learn, torchmetrics and SciPy."
    import sklearn.metrics as sk
    from scipy.stats import entropy
    from torchmetrics.functional.classification import multiclass_calibration_error
    record, kept, _ = runs.load(folder)
    m, y, people = record["metrics"], kept["labels"].numpy(), kept["counts"].double().numpy()
    as_kept = kept["log_probs"].double().exp()
    p = torch.nn.functional.normalize(as_kept, p=1, dim=1)     # some of the libraries insist on rows that sum to 1
    again = dict(
        accuracy=sk.accuracy_score(y, p.argmax(1)), f1=sk.f1_score(y, p.argmax(1), average="macro"),
        nll=sk.log_loss(y, p.numpy(), labels=range(10)), brier=sk.brier_score_loss(y, p.numpy(), scale_by_half=False),
        ece=multiclass_calibration_error(as_kept, kept["labels"], 10, 15).item(),
        kl_humans=entropy(people, p.numpy(), axis=1).mean(),
        entropy_correlation=np.corrcoef(entropy(people, axis=1), entropy(p.numpy(), axis=1))[0, 1])
    for score in ("max_logit", "entropy", "mahalanobis"):
        inside, outside = kept[f"score_{score}"].numpy(), kept[f"ood_score_{score}"].numpy()
        truth, value = np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside])
        again[f"auroc_{score}"] = sk.roc_auc_score(truth, value)
        again[f"aupr_{score}"] = sk.average_precision_score(truth, value)
    right = kept["log_probs"].argmax(1) == kept["labels"]
    again["fgsm_drop"] = 1 - sk.accuracy_score(y[right], kept["fgsm_log_probs"].argmax(1)[right]) if right.any() else 0
    again["fgsm_drop"] *= right.double().mean().item()
    apart = {name: (m[name], value) for name, value in again.items() if not abs(m[name] / value - 1) < 1e-3}
    assert not apart, apart


def test_report_of_nothing(tmp_path):
    done = soft_cifar("report", study_in(tmp_path))
    assert done.returncode == 1 and "no finished run yet" in done.stderr and "Traceback" not in done.stderr
