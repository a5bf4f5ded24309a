"""A network goes on from the weights of another, fold by fold, and is refused where it has seen what it is scored
on."""
import contextlib
import io
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, differences

from soft_cifar import claims, data, evaluation, experiment, oracle, peterson, runs, shift, stats, study, training
from soft_cifar.checks import DataError, InputError
from soft_cifar.data import ImageSet
from soft_cifar.parameters import Run

SMALL = dict(preset="demo", depth=8, schedule="one_cycle", ood="oracle_ood", ood_size=40)
LEARNT = SMALL | dict(data="oracle", labels="gold", epochs=1, train_size=150, validation_size=30, test_size=20)
TUNED = SMALL | dict(data="mine", labels="soft", test_labels="gold", epochs=2, validation_size=20)


def mine(seed=7, name="mine"):
    "120 images of the oracle's kind, with votes."
    drawn = oracle.generate(120, seed=seed)
    return ImageSet(name, drawn["images"], drawn["labels"], drawn["counts"], classes=oracle.CLASSES)


def quietly(function, *arguments, **parameters):
    with contextlib.redirect_stdout(io.StringIO()): return function(*arguments, **parameters)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A data root with `mine`, and the network that learnt from the oracle set."
    place = tmp_path_factory.mktemp("finetune")
    data.write_archive(mine(), place)
    return place


@pytest.fixture(scope="module")
def start(place):
    return str(quietly(experiment.execute, Run(**LEARNT, output=str(place), study="before", keep_weights=True)))


def tuned(place, start, **parameters):
    there = dict(folds=4, fold=1, data_root=str(place), output=str(place), init=start)
    return Run(**(TUNED | there | parameters))


def refused(call, *parts):
    with pytest.raises((DataError, InputError)) as caught: call()
    for part in parts: assert part in str(caught.value), str(caught.value)


def test_starts_where_the_other_ended_and_gives_the_same_bytes_twice(place, start):
    first, again = (tuned(place, start, study=name) for name in ("first", "again"))
    parts = experiment.prepare(first)
    made, weights = experiment.classifier(first, parts), runs.state(start)
    for name, tensor in made.state_dict().items(): assert torch.equal(tensor, weights[name]), name
    folders = [quietly(experiment.execute, run) for run in (first, again)]
    assert differences(*folders) == {}
    record = runs.record(folders[0])
    assert record["init"] == runs.record(start)["weights"] == training.identity(first, parts.train)["started"]
    assert record["sizes"] == dict(train=70, validation=20, test=30)


def test_no_epochs_leave_the_network_as_it_is(place, start):
    folder = quietly(experiment.execute, tuned(place, start, epochs=0, keep_weights=True, study="as_it_is"))
    for name, tensor in runs.state(folder).items(): assert torch.equal(tensor, runs.state(start)[name]), name
    _, _, history = runs.load(folder)
    assert [row["epoch"] for row in history] == [0] and history[0]["train_loss"] > 0
    refused(lambda: Run(**TUNED | dict(epochs=0)), "epochs=0", "init")


def test_what_has_seen_the_test_is_refused(place, start, tmp_path):
    """Image by image, whatever the set is called; by its name where pixels were encoded otherwise; through a teacher,
    too."""
    run = tuned(place, start)
    tested, learnt = experiment.prepare(run).test.index, quietly(experiment.prepare, Run(**LEARNT)).train.images
    copied = replace(mine(), images=mine().images.index_copy(0, tested[-1:], learnt[:1]))
    data.write_archive(copied, tmp_path)
    there = dict(data_root=str(tmp_path))
    refused(lambda: experiment.prepare(replace(run, **there)), "has seen 1 of the 30 images of mine")
    taught = replace(run, init="", labels="off_ldl", teachers=(start,))
    experiment.prepare(taught)
    refused(lambda: experiment.prepare(replace(taught, **there)), "has seen 1 of the 30 images of mine")

    # images that another fold trained on are in this one's test, whose network therefore cannot start from it
    before = quietly(experiment.execute, tuned(place, start, fold=0, epochs=1, keep_weights=True, study="folds"))
    refused(lambda: experiment.prepare(tuned(place, str(before), fold=1)), "has fold=0, this run fold=1")
    assert set(runs.record(before)["trained_on"]) == {"oracle", "mine"}
    run, whole = tuned(place, str(before), fold=0), data.load("oracle")
    known = quietly(experiment.prepare, Run(**LEARNT)).train
    darker = replace(whole, images=whole.images // 2)
    refused(lambda: runs.check_unseen(run, [(known, whole)]), "has seen 150 of the 150 images of oracle")
    refused(lambda: runs.check_unseen(run, [(darker, darker)]), "in another encoding")


def test_what_a_teacher_has_seen_its_pupil_has_seen(place, start):
    "A network taught on the oracle set by one that learnt from `mine` cannot start a run that is tested on `mine`."
    taught_on_mine = Run(**TUNED | dict(epochs=1, train_size=70, test_size=30), data_root=str(place), output=str(place),
                         study="teacher", keep_weights=True)
    teacher = quietly(experiment.execute, taught_on_mine)
    pupil = Run(**LEARNT | dict(labels="off_ldl"), teachers=[str(teacher)], output=str(place), study="pupil",
                keep_weights=True)
    pupil = quietly(experiment.execute, pupil)
    assert set(runs.record(pupil)["trained_on"]) == {"oracle", "mine"}
    assert torch.isin(runs.seen(teacher), runs.seen(pupil)).all()
    experiment.prepare(tuned(place, start))
    refused(lambda: experiment.prepare(tuned(place, str(pupil))), "of the 30 images of mine that this run is scored on")


def test_a_shift_set_that_was_learnt_from_is_refused_and_others_are_scored(place, start):
    drawn = oracle.generate(80, seed=3)
    new = ImageSet("new", drawn["images"], drawn["labels"], classes=oracle.CLASSES)
    known = quietly(experiment.prepare, Run(**LEARNT)).train.first(50)
    for images in (new, replace(known, name="known")): data.write_archive(images, place)
    shifted = tuned(place, start, shift_sets=["known"])
    refused(lambda: experiment.prepare(shifted), "has seen 50 of the 50 images of known")
    refused(lambda: experiment.prepare(tuned(place, start, ood_sets=["known"])), "has seen")
    refused(lambda: experiment.prepare(tuned(place, start, shift_sets=["svhm"])), "is not known")

    run = tuned(place, start, study="shift", shift_sets=["new", "cifar10_1_v6"], pgd_steps=2, data_root=str(place))
    folder = quietly(experiment.execute, run)
    record, kept, _ = runs.load(folder)
    assert record["absent"] == ["cifar10_1_v6"], record["absent"]
    assert record["metrics"]["shift_accuracy_new"] == kept["shift_new_right"].double().mean().item()
    assert len(kept["pgd_path_nll"]) == 3 and "new" in record["data"]


def test_a_further_set_of_what_the_run_itself_learns_from_is_refused(tmp_path):
    """500 images of the oracle set under another name. Some of them train the network, some choose its weights, and
    some are its test, which may be tested again, and are not unfamiliar. Positions in the set say which."""
    whole, usual = data.load("oracle"), Run(preset="demo")
    sizes = usual.train_size, usual.validation_size, usual.test_size
    train, validation, test = (part.index[part.index < 500] for part in data.split(whole, sizes, usual.seed))
    for part in (train, validation, test): assert len(part), (train, validation, test)
    first = whole.first(500)
    for name, which in (("again", first.index), ("tested", test)):
        data.write_archive(replace(first.subset(which), name=name, posterior=None), tmp_path)
    def asks(**sets): return Run(preset="demo", data_root=str(tmp_path), **sets)
    common, few = len(train) + len(validation), len(test)
    refused(lambda: experiment.prepare(asks(shift_sets=["again"])),
            f"shift_sets names again, and {common} of its 500 images", "training and validation images")
    refused(lambda: experiment.prepare(asks(ood_sets=["again"])),
            f"ood_sets names again, and {common + few} of its 500 images")
    refused(lambda: experiment.prepare(asks(ood_sets=["tested"])), f"ood_sets names tested, and {few} of its {few}")
    shifted = experiment.prepare(asks(shift_sets=["tested"])).further.shifted
    assert [len(one) for one in shifted] == [few], shifted


def test_a_shift_set_without_labels_is_refused_before_training(place, start):
    drawn = oracle.generate(30, seed=4)
    words = ImageSet("words", drawn["images"], drawn["labels"] % 2, classes=("yes", "no"))
    data.write_archive(words, place)
    refused(lambda: experiment.prepare(tuned(place, start, shift_sets=["words"])), "no labels of the classes of mine")


WRONG = {
    "another depth": (dict(depth=14), "depth=8, this run depth=14"),
    "another method": (dict(method="sngp"), "method=basic, this run method=sngp"),
    "a fold too many": (dict(fold=4), "fold=4"),
    "no fold": (dict(fold=None), "folds=4 without fold"),
    "no folds": (dict(folds=None), "fold=1 has no effect"),
    "folds and a size": (dict(train_size=50), "train_size=50 beside folds=4"),
    "more folds than images": (dict(folds=500), "folds=500"),
    "no training images": (dict(validation_size=90), "validation_size=90"),
    "not there": (dict(init="runs/nothing"), "is no complete run"),
}


@pytest.mark.parametrize("parameters, part", WRONG.values(), ids=WRONG)
def test_bad_input_is_refused_before_training(place, start, parameters, part):
    before = sorted(place.rglob("*"))
    refused(lambda: quietly(experiment.execute, tuned(place, start, study="bad", **parameters)), part)
    assert sorted(place.rglob("*")) == before


def test_other_classes_are_refused(place, start):
    images = mine()
    two = ImageSet("two", images.images, images.labels % 2, classes=("yes", "no"))
    data.write_archive(two, place)
    run = tuned(place, start, data="two", labels="gold", study="bad")
    refused(lambda: quietly(experiment.execute, run), "has classes=10, this run classes=2")


def test_weights_that_are_no_tensors_are_never_run(place, tmp_path):
    run = Run(**LEARNT, output=str(tmp_path), keep_weights=True)
    folder = runs.save(run, dict(trained_on={}), {}, [dict(epoch=1)], dict(weight=Path("x")))
    refused(lambda: runs.state(folder), "holds no tensors")


def test_pretrained_weights_survive_a_clone(place, start, tmp_path):
    "Git takes the weights of runs/pretrain, and no others; a clone has them whole."
    there, clone = tmp_path / "project", tmp_path / "clone"
    def git(*words): subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *words], check=True)
    git("init", "-q", str(there))
    shutil.copyfile(ROOT / ".gitignore", there / ".gitignore")
    kept = ["runs/pretrain/cell/seed-0", "runs/elsewhere/cell/seed-0"]
    for folder in kept: shutil.copytree(start, there / folder)
    git("-C", str(there), "add", "-A")
    git("-C", str(there), "commit", "-qm", "runs")
    git("clone", "-q", str(there), str(clone))
    for name, tensor in runs.state(clone / kept[0]).items(): assert torch.equal(tensor, runs.state(start)[name]), name
    assert len(runs.seen(clone / kept[0])) == 180
    refused(lambda: runs.state(clone / kept[1]), "holds no weights")


STUDY = """
shared:
  {preset: demo, depth: 8, schedule: one_cycle, data: mine, ood: oracle_ood, ood_size: 40, test_labels: gold,
   data_root: ROOT, validation_size: 20, epochs: 1, folds: 3}
models:
  first: {data: oracle, labels: gold, train_size: 150, test_size: 20, validation_size: 30, folds: null}
  tuned: {init: first, epochs: 0}
labels: [soft, hard]
seeds: [0, 1]
"""


def test_a_study_makes_the_start_first_and_pools_over_folds(place, tmp_path):
    file = tmp_path / "folded.yaml"
    file.write_text(STUDY.replace("ROOT", str(place)))
    folded = study.load(file)
    assert [folded.models[run.cell] for run in folded.runs[:7]] == ["first"] + ["tuned"] * 6
    assert [run.unit for run in folded.runs[:7]] == [(0, None)] + [(0, fold) for fold in range(3) for _ in range(2)]
    for run in folded.runs: quietly(experiment.execute, run)
    assert set(study.status(folded).state) == {"done"}
    moved = Path("/elsewhere", *Path(folded.runs[1].init).parts[-3:])
    assert study.state(replace(folded.runs[1], init=str(moved)))[0] == "done"     # the same network, in another place
    other = study.state(replace(folded.runs[1], init=str(moved.with_name("seed-1"))))
    assert "init differ" in other[1], other

    gathered = study.gather(folded)
    rows = gathered[gathered.model == "tuned"]
    assert sorted(rows[rows.labels == "soft"].seed) == list(range(6)), "seed * folds + fold"
    assert set(rows.train_size) == {60} and set(rows.test_size) == {40} and set(rows.fold) == {0, 1, 2}
    predictions = study.Predictions(folded, gathered)
    for seed in (0, 1):     # three folds test every image once
        tested = torch.cat([predictions["tuned", "soft", "none", 3 * seed + fold]["index"] for fold in range(3)])
        assert sorted(tested.tolist()) == list(range(120))

    results = claims.results(rows, {key: kept for key, kept in predictions.items() if key[0] == "tuned"})
    contrast = [(("tuned", "soft", "none"), ("tuned", "hard", "none"))]
    pool, own = claims.for_new_pool(results, "nll", contrast), claims.from_runs(results, "nll", contrast)
    # two networks were tuned on each fold, whose mean counts
    pairs = [rows[rows.labels == labels].groupby("fold").nll.mean() for labels in ("soft", "hard")]
    expected = stats.nadeau_bengio(*pairs, test=40, train=60)     # folds share training images
    assert pool == expected and own.n == 3 and results.share == 40 / 60, (pool, expected, own)


NEARER = dict(soft=1.2, sampled=1.2, class_mean=1.)     # how much more of the votes a network says; on other labels .8


def made_up(run, rng):
    """What `run` could have predicted of 100 test images and 80 of each further set: metrics, predictions. The more
    images it has learnt from, the better."""
    where = run.seed if run.fold is None else run.fold     # the test images
    spread = .3 if run.folds else .6 * (450 / run.train_size)**.5
    def around(truth):
        noise = torch.randn(truth.shape, generator=rng)
        return (NEARER.get(run.labels, .8) * (truth + .05).log() + spread * noise).log_softmax(1)
    def scores(n): return torch.randn(n, generator=rng)
    counts = torch.randint(1, 30, (100, 10), generator=torch.Generator().manual_seed(where))     # the same images
    people, labels = counts / counts.sum(1, keepdim=True), counts.argmax(1)
    kept = dict(index=torch.arange(100) + 100 * where, labels=labels, gold=labels, counts=counts.to(torch.uint8))
    kept |= {f"{name}log_probs": around(people) for name in ("", "fgsm_", "pgd_")}
    kept |= dict(ood_index=torch.arange(80), ood_log_probs=around(people[:80]), again_predicted=labels.to(torch.uint8))
    kept |= dict(score_max_logit=scores(100), ood_score_max_logit=scores(80))
    kept |= {f"unfamiliar_{name}": scores(80) for name in ("tinyimagenet", "textures", "svhn")}
    kept |= dict(validation_labels=labels[:50], validation_log_probs=around(people[:50]))
    kept |= shift.kept_of("cinic10_imagenet", around(people[:80]), labels[:80], 1.)
    return evaluation.measure(kept), kept


def reported(place, name, **changes):
    """(The study `name` with other entries, `changes`, whose runs below the folder `place` are made up, the folder of
    its report.)"""
    file, rng = place / "runs" / f"{name}.yaml", torch.Generator().manual_seed(0)
    file.parent.mkdir()
    given = yaml.safe_load((ROOT / "runs" / file.name).read_text())
    for other in given.get("reuse", []): shutil.copy(ROOT / "runs" / f"{other}.yaml", file.parent)
    file.write_text(yaml.safe_dump(given | changes, sort_keys=False))
    asked = study.load(file)
    whole = {name: dict(fingerprint="made up", encoding="made up") for name in ("cifar10h", "svhn")}
    for run in asked.runs:
        found, kept = made_up(run, rng)
        record = dict(data=whole, parameter_count=1, seconds=dict(load=1., fit=1., evaluate=1.), metrics=found,
                      sizes=dict(train=8000, validation=1000, test=1000))
        runs.save(run, record, kept, [dict(epoch=1, loss=1.)])
    command = [sys.executable, "-m", "soft_cifar.cli", "report", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return asked, place / "report" / name


def test_its_report_compares_with_gold_and_asks_other_claims(tmp_path):
    """Two folds of finetune.yaml, made of random predictions: its page compares with gold labels, ever further from
    home, and every claim of Peterson et al. is tested whose images are here."""
    asked, report = reported(tmp_path, "finetune", seeds=[0], fold=[0, 1])
    made = {path.name for path in report.iterdir()}
    assert {"from_gold.csv", "by_distance.svg", "claims.csv", "against_hard.csv"} <= made, made
    assert "soft_minus_hard.csv" not in made, made
    page = (report / "index.html").read_text()
    assert "Ever further from home" in page and "From gold labels to votes" in page and "(0.35;" in page
    assert "Is it softness?" in page
    judged = pd.read_csv(report / "claims.csv").set_index("claim")
    assert list(judged.index) == [claim.name for claim in peterson.CLAIMS]
    absent = judged.metric.str.contains("cifar10_1|imagenet_far")
    assert (judged.compared_ours == judged.of * ~absent).all(), judged[["compared_ours", "of"]]

    table = pd.read_csv(report / "from_gold.csv").set_index(["metric", "model", "labels"])
    cells = study.gather(asked).query("model == 'tuned'").pivot(index="seed", columns="labels")
    for metric in ("ce_humans", "shift_nll_cinic10_imagenet", "pgd_nll", "far_ood_auroc", "nll_scaled",
                   "shift_nll_scaled_cinic10_imagenet"):
        difference = cells[metric].soft - cells[metric].gold
        soft, gold = (table.loc[(metric, "tuned", labels)] for labels in ("soft", "gold"))
        assert abs(soft.estimate - difference.mean()) < 1e-4 and soft.n == 2, (metric, soft, difference)
        assert soft.low < soft.estimate < soft.high and pd.isna(gold.estimate), (soft, gold)


def test_a_budget_is_compared_at_the_same_cost(tmp_path):
    "budget_tuned.yaml, made of predictions that get better with images alone: its page says so, pair by pair."
    asked, report = reported(tmp_path, "budget_tuned", seeds=[0, 1, 2])
    pairs = pd.read_csv(report / "same_cost.csv").set_index(["metric", "more", "fewer"])
    assert len(pairs) == 30 and set(pairs.n) == {3}, pairs
    by_model = study.gather(asked).pivot(index="seed", columns="model", values="kl_humans")
    difference = by_model["8,000 images, 1 vote"] - by_model["4,000 images, 2 votes"]
    row = pairs.loc[("kl_humans", "8,000 × 1", "4,000 × 2")]
    assert abs(row.estimate - difference.mean()) < 1e-4 and row.low < row.estimate < row.high, (row, difference)
    found = pairs.loc["kl_humans"].better.value_counts()
    assert found.filter(like="more images").sum() > 2 and not found.filter(like="more votes").sum(), found
    page = (report / "index.html").read_text()
    assert "At the same cost" in page and "Of two ways to spend the same number of votes" in page
    assert {"spending.svg", "table1.csv"} <= {path.name for path in report.iterdir()}


def test_a_study_runs_them_as_notebooks(place, tmp_path):
    "One fold and its start, by papermill, in the order in which one needs the other."
    file = tmp_path / "one.yaml"
    file.write_text(STUDY.replace("ROOT", str(place)).replace("[0, 1]", "[0]") + "fold: [2]\n")
    one = study.load(file, only="soft")
    assert len(one.runs) == 2, one.runs
    failures = quietly(study.execute, one, jobs=2)
    assert not failures, failures
    assert set(study.status(one).state) == {"done"}


def test_committed_networks_hold_their_weights():
    "What other studies start from is in the repository as a whole: its weights are no large files to be left out."
    folders = [file.parent for file in (ROOT / "runs").glob("*/*/seed-*/metrics.json")]
    kept = [folder for folder in folders if runs.record(folder)["parameters"].get("keep_weights")]
    assert {folder.parts[-3] for folder in kept} >= {"pretrain"}, kept
    for folder in kept: runs.weights(folder, runs.record(folder))


def test_records_from_before_there_were_folds_still_count():
    "Committed runs know nothing of folds, starts or further sets, and are what their study files ask for."
    primary = study.load(ROOT / "runs" / "primary.yaml")
    done = [run for run in primary.runs if run.folder.exists()][:2]
    assert done
    for run in done:
        assert not {"folds", "fold", "init", "shift_sets", "ood_sets"} & set(runs.record(run.folder)["parameters"])
        assert study.state(run) == ("done", "")
