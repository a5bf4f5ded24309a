"""A new method, label source, network or data set is one file: each is added to a copy of the project, and a run uses
them all."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, copy_of_the_project

from soft_cifar import runs

METHOD = '''
import torch, torch.nn.functional as F
from torch import Tensor
from soft_cifar.arguments import checked, real, whole
from soft_cifar.classifier import Classifier

class Evidential(Classifier):
    "Evidence for a Dirichlet distribution (Sensoy et al. 2018)."
    @checked
    def __init__(self, network, strength:real("weight of the pull towards no evidence", low=0)=.1,
                 annealing:whole("epochs until it pulls in full", 1)=10, **others):
        super().__init__(network, **others)
        self.strength, self.annealing = strength, annealing
        self.register_buffer("pull", torch.zeros(()))

    def start_epoch(self, epoch:int=0) -> None: self.pull.fill_(self.strength * min(1, (epoch + 1) / self.annealing))
    def alpha(self, outputs): return 1 + F.softplus(outputs)

    def criterion(self, outputs, y):
        alpha = self.alpha(outputs)
        return (y * (alpha.sum(1, keepdim=True).digamma() - alpha.digamma())).sum(1).mean()

    def regulariser(self, outputs): return self.pull * self.alpha(outputs).log().sum(1).mean()

    def answer(self, outputs):
        alpha = self.alpha(outputs)
        return (alpha / alpha.sum(1, keepdim=True)).log()

    def predict(self, x):
        outputs = self(x)
        alpha = self.alpha(outputs)
        return self.answer(outputs), dict(max_logit=-alpha.amax(1), vacuity=alpha.shape[1] / alpha.sum(1))
'''

SOURCE = '''
import torch
from soft_cifar.arguments import checked, whole
from soft_cifar.data import ImageSet
from soft_cifar.labels.static import Table

@checked
def one_confusion(image_set:ImageSet, rounds:whole("of expectation and maximisation", 1)=5) -> Table:
    "What votes say of the class if all voters share one confusion matrix (Dawid & Skene 1979, with one annotator)."
    belief = image_set.probs
    for _ in range(rounds):
        confusion = belief.T @ image_set.counts.double() + .01
        confusion = confusion / confusion.sum(1, keepdim=True)
        belief = (image_set.counts.double() @ confusion.log().T + belief.mean(0).log()).softmax(1)
    return Table(belief)
'''

NETWORK = '''
import torch
from torch import nn
from soft_cifar.arguments import checked, whole
from soft_cifar.backbone import Backbone

class Plain(Backbone):
    "Two blocks, each a convolution, a ReLU and the largest of 2x2 pixels."
    tiny = dict(channels=4)

    @checked
    def __init__(self, channels:whole("of the first block", 1)=8, classes:int=10):
        super().__init__()
        def block(inputs, outputs): return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*block(3, channels), *block(channels, 2 * channels))
        self.head, self.num_features = nn.Linear(2 * channels, classes), 2 * channels
'''

DATASET = '''
import torch

def four(files) -> dict:
    "Noise in four classes at 64 x 64 pixels, with up to 32 votes."
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (120, 64, 64, 3), generator=g).to(torch.uint8)
    labels, counts = torch.randint(4, (120,), generator=g), torch.randint(1, 9, (120, 4), generator=g)
    return dict(images=images, labels=labels, counts=counts, encoding="made up", classes=tuple("abcd"))
'''


def notebook(module, code):
    "A notebook that exports `code` to `module`, as JSON."
    sources = [f"#| default_exp {module}", f"#| export{code}"]
    empty = dict(cell_type="code", metadata={}, execution_count=None, outputs=[])
    cells = [empty | dict(id=str(i), source=text.splitlines(keepends=True)) for i, text in enumerate(sources)]
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))


def its_own(place):
    "An environment in which the package is the one in `place`."
    return os.environ | dict(PYTHONPATH=str(place))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    "A copy of the project with one notebook more for each extension, exported, and its parameters cell written anew."
    place = tmp_path_factory.mktemp("extended")
    copy_of_the_project(place)
    added = [(26, "models.evidential", METHOD), (9, "labels.confusion", SOURCE), (27, "backbones.plain", NETWORK),
             (1, "datasets.made_up", DATASET)]
    for number, module, code in added:
        (place / "nbs" / f"{number:02d}_added.ipynb").write_text(notebook(module, code))
    export = [Path(sys.executable).with_name("nbdev_export")]
    write = [sys.executable, "-c", "from soft_cifar import parameters; parameters.write_parameters_cell()"]
    for command in (export, write): subprocess.run(command, cwd=place, env=its_own(place), check=True)
    return place


def test_each_is_one_file(extended):
    "Nothing else in the copy differs from the project but the index of the module and the parameters cell."
    # not those of the project: its lessons may be running
    there = [path for folder in ("nbs", "soft_cifar") for path in (extended / folder).rglob("*")]
    files = [path.relative_to(extended) for path in there if path.suffix in (".py", ".ipynb")]
    def as_before(file): return (ROOT / file).exists() and (ROOT / file).read_bytes() == (extended / file).read_bytes()
    changed = {str(file) for file in files if not as_before(file)}
    added = {f"nbs/{number}_added.ipynb" for number in ("01", "09", "26", "27")}
    modules = "models/evidential.py", "labels/confusion.py", "backbones/plain.py", "datasets/made_up.py", "_modidx.py"
    made = {f"soft_cifar/{name}" for name in modules}
    assert changed == added | made | {"nbs/train.ipynb"}, changed
    cell = (extended / "nbs" / "train.ipynb").read_text()
    assert "of evidential: epochs until it pulls in full" in cell and "of plain: of the first block" in cell


def test_a_run_of_four_classes_at_64_pixels_uses_them(extended):
    "The new data set, the new method with its parameters, the new source and the new network."
    parameters = dict(
        preset="demo", data="four", ood="oracle_ood", data_root="data", epochs=2, schedule="one_cycle",
        method="evidential", strength=.2, annealing=2, labels="one_confusion", rounds=3, backbone="plain", channels=4,
        train_size=60, validation_size=20, test_size=40, ood_size=40)
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "nbs/train.ipynb", "out.ipynb", *words]
    done = subprocess.run(command, cwd=extended, env=its_own(extended), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [folder] = (extended / "runs").glob("*/*/seed-0")
    record, predictions, history = runs.load(folder)
    assert record["data"]["four"]["classes"] == 4 and record["data"]["four"]["size"] == [64, 64]
    assert predictions["log_probs"].shape == (40, 4) and "score_vacuity" in predictions and len(history) == 2
    assert {"annealing=2", "rounds=3", "channels=4"} <= set(folder.parent.name.split("_")), folder.parent.name
