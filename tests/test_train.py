"""train.ipynb as people run it: with papermill, on the embedded set and on real images, interrupted, with bad input."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, ROOT, differences, kill, started, stopped, stopping, wait_for, watched

from soft_cifar import evaluation, experiment, runs
from soft_cifar.parameters import Run

TINY = dict(preset="demo", depth=8, schedule="one_cycle", epochs=3,
            train_size=300, validation_size=100, test_size=200, ood_size=200)


def command(out, **parameters):
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    return [sys.executable, "-m", "papermill", "nbs/train.ipynb", str(out), "--no-progress-bar", *words]


def papermill(out, cwd=ROOT, **parameters):
    words = command(out, **parameters)
    if cwd != ROOT: words[3] = str(ROOT / "nbs" / "train.ipynb")
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


def only_run(output): return next(Path(output).glob("*/*/seed-*"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "One tiny run on the oracle set."
    place = tmp_path_factory.mktemp("tiny")
    done = papermill(place / "out.ipynb", output=place / "runs", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def test_folder_is_complete(tiny):
    folder = only_run(tiny / "runs")
    assert sorted(p.name for p in folder.iterdir()) == ["history.csv", "metrics.json", "predictions.npz", "train.ipynb"]
    assert [p.name for p in folder.parent.iterdir()] == ["seed-0"]
    record, _, history = runs.load(folder)
    assert (record["parameters"]["epochs"], record["parameters"]["method"], len(history)) == (3, "basic", 3)
    assert record["data"]["oracle"]["encoding"] == "generated" and len(record["data"]["oracle"]["fingerprint"]) == 64
    assert set(record["seconds"]) == {"load", "fit", "evaluate"}
    assert record["hardware"]["threads"] >= 1 and record["versions"]["torch"]
    cells = json.loads((folder / "train.ipynb").read_text())["cells"]
    figures = [cell for cell in cells if any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))]
    assert len(figures) == 7


def test_metrics_come_again_from_predictions(tiny):
    record, predictions, _ = runs.load(only_run(tiny / "runs"))
    assert evaluation.measure(predictions) == {k: v for k, v in record["metrics"].items() if k != "kl_posterior"}


OWN_SCORES = dict(dropout="mutual_information", sngp="gp_variance", duq="max_kernel")


@pytest.mark.parametrize("method, score", OWN_SCORES.items(), ids=OWN_SCORES)
def test_methods(tmp_path, method, score):
    "Every method trains and is measured with its own score; the one that draws at random predicts the same twice."
    names = ("one", "two") if method == "dropout" else ("one",)
    parameters = TINY | dict(method=method, epochs=2, test_size=100, ood_size=100)
    folders = [experiment.execute(Run(**parameters, output=str(tmp_path / name))) for name in names]
    metrics = runs.load(folders[0])[0]["metrics"]
    assert 0 <= metrics[f"auroc_{score}"] <= 1 and (metrics["resampling_flips"] > 0) == (method == "dropout")
    assert differences(folders[0], folders[-1]) == {}


def test_same_run_same_bytes_from_another_folder(tiny, tmp_path):
    done = papermill(tmp_path / "out.ipynb", cwd=tmp_path, output=tmp_path / "runs", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences(only_run(tmp_path / "runs"), only_run(tiny / "runs")) == {}


def test_interrupted_run_resumes_to_the_same_numbers(tiny, tmp_path):
    "Ctrl-C in the middle of training. (The tests of a study kill kernels the hard way.)"
    words = command(tmp_path / "out.ipynb", output=tmp_path / "runs", **TINY)
    said, place = tmp_path / "said", tmp_path / "ipython"
    with started(words, said, **stopping(place, 0)) as process:
        kernel = wait_for(lambda: stopped(place, 0), process, said)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) != 0, said.read_text()
        kill([kernel])     # it ends by itself, sooner or later
    assert [p.name for p in tmp_path.glob("runs/*/*/*")] == ["seed-0.partial"], "a folder that is not complete"
    done = papermill(tmp_path / "again.ipynb", output=tmp_path / "runs", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after epoch 2 of 3" in (tmp_path / "again.ipynb").read_text()
    assert differences(only_run(tmp_path / "runs"), only_run(tiny / "runs")) == {}
    assert [p.name for p in tmp_path.glob("runs/*/*/*")] == ["seed-0"]


BAD = {
    "unknown name": (dict(labelz="hard"), "did you mean 'labels'"),
    "wrong type": (dict(labels=True), "labels=True"),
    "too large a split": (dict(train_size=20_000), "larger than oracle with 10000"),
    "missing data": (dict(data="textures", data_root="no/such/folder"), "no official download"),
    "unwritable": (dict(output="settings.ini"), "cannot write"),
    "diverges": (dict(lr=1e12, warmup=0), "try a smaller lr"),
    "complete already": ({}, "already complete and is kept"),
}


@pytest.mark.parametrize("parameters, message", BAD.values(), ids=BAD)
def test_bad_input(tiny, tmp_path, parameters, message):
    "Exit status not zero, the last lines say what to do without a traceback of ours, and nothing is left in runs/."
    output = tiny / "runs" if not parameters else tmp_path / "runs"
    before = sorted(tiny.rglob("*"))
    done = papermill(tmp_path / "out.ipynb", **(TINY | dict(output=output) | parameters))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and message in last, done.stderr[-2000:]
    assert not [*tmp_path.glob("runs/*/*/seed-0")] and sorted(tiny.rglob("*")) == before


@pytest.mark.parametrize("method", ["basic", "dropout"])
def test_memory_stays_under_two_gigabytes(tmp_path, method):
    """ResNet-20 at the published batch size; `basic` with all 8,000 training images, `dropout` with the ten samples
    that an attack differentiates."""
    size = dict(basic=8000, dropout=500)[method]
    sizes = dict(train_size=size, validation_size=100, test_size=100, ood_size=100)
    short = dict(data="oracle", schedule="one_cycle", epochs=1)
    words = command(tmp_path / "out.ipynb", output=tmp_path / "runs", method=method, **short, **sizes)
    status, said, peak = watched(words, tmp_path / "said")
    assert status == 0, said[-3000:]
    assert 2e8 < peak < 2e9, f"{peak / 1e9:.2f} GB"


def test_real_images(real_data, tmp_path):
    "CIFAR-10H, hard and soft: same split, same initial weights, the same bytes twice, and the figures of the data set."
    few = dict(method="basic", schedule="one_cycle", epochs=2, train_size=500, depth=8, data_root=str(real_data))
    def made(name, labels): return experiment.execute(Run(**few, labels=labels, output=str(tmp_path / name)))
    folders = {name: made(name, labels) for name, labels in dict(soft="soft", hard="hard", again="soft").items()}
    assert differences(folders["soft"], folders["again"]) == {}
    assert "log_probs" in differences(folders["soft"], folders["hard"])
    soft, hard = (np.load(folders[name] / "predictions.npz") for name in ("soft", "hard"))
    for key in ("index", "labels", "gold", "counts", "ood_index"):
        np.testing.assert_array_equal(soft[key], hard[key], key)
    assert len(soft["index"]) == len(soft["ood_index"]) == 1500
    assert (soft["labels"] == soft["gold"]).mean() > .98


def test_cifar10h_is_what_the_paper_describes(real_data):
    from soft_cifar import data, metrics
    images = data.load("cifar10h", real_data)
    votes, probs = images.counts.sum(1), images.probs
    assert (len(images), int(votes.sum()), int(votes.min()), int(votes.max())) == (10_000, 511_000, 47, 63)
    assert round(metrics.entropy(probs).mean().item(), 4) == .1545
    assert int((probs.amax(1) == 1).sum()) == 4393 and int((probs.amax(1) <= .5).sum()) == 74
    first, second = images.counts.topk(2, 1).values.unbind(1)
    assert (first == second).nonzero()[:, 0].tolist() == [7493, 9246, 9386]
    assert int(metrics.definite_second(images.counts).sum()) == 4730
    assert int(metrics.definite_second(images.counts, 2).sum()) == 2374
    assert round((images.majority == images.labels).double().mean().item(), 4) == .9921


def test_explore(tmp_path):
    "The notebook to look around in, on the embedded set."
    words = ["nbs/explore.ipynb", str(tmp_path / "out.ipynb"), "--no-progress-bar", "-p", "name", "oracle"]
    done = subprocess.run([sys.executable, "-m", "papermill", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
