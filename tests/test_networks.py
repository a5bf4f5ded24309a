"""One step of every method on every network, with every kind of label source, mix and loss, two at a time: what is
allowed works, what is not is refused with a reason; and what draws at random or remembers resumes to the same bits."""
import itertools
import math
from dataclasses import replace

import pytest
import torch

from conftest import ROOT
from soft_cifar import data, labels, losses, models, study, training
from soft_cifar.checks import error_of
from soft_cifar.parameters import MIXES, Run

TINY = {name: kind.tiny for name, kind in models.backbones().items()}


@pytest.fixture(scope="module")
def images():
    "Eight images with votes, of which it is known who cast them: the first on each image is the first person's."
    few = data.load("oracle").subset(torch.arange(8))
    said = [torch.arange(10).repeat_interleave(votes) for votes in few.counts]
    rows = [torch.stack([torch.full((len(one),), i), torch.arange(len(one)), one], 1) for i, one in enumerate(said)]
    people = tuple(map(str, range(max(map(len, said)))))
    return replace(few, annotations=torch.cat(rows), annotators=people)


@pytest.fixture(scope="module")
def teachers():
    return [models.create("basic", seed=seed, depth=8).eval() for seed in (1, 2)]


def kinds(images, teachers):
    """The label sources by what makes them differ for a network: their class, whether they ask teachers at each step,
    and whether the gradient goes through their target."""
    found = {}
    for name in labels.sources():
        source = labels.create(name, images, **taught(name, teachers))
        kind = type(source).__name__, getattr(source, "online", False), getattr(source, "through", False)
        found.setdefault(kind, []).append(name)
    return found


def taught(name, teachers):
    "The argument `teachers` of the label source `name`, where it takes one."
    if "teachers" not in labels.parameters_of(name): return {}
    return dict(teachers=teachers if "_en_" in name or "_mt_" in name else teachers[:1])


def pairs(row):
    "The pairs of values in `row`, each with its places."
    return set(itertools.combinations(enumerate(row), 2))


def covering(*factors):
    """Rows with a value of each of `factors`, such that any two values of two of them meet in a row. Each row takes a
    pair that has not been yet, and then, factor by factor, the value that makes most new pairs."""
    missing = {pair for one, other in itertools.combinations(range(len(factors)), 2)
               for pair in itertools.product([(one, v) for v in factors[one]], [(other, v) for v in factors[other]])}
    while missing:
        row = dict(min(missing, key=repr))
        for place, values in enumerate(factors):
            if place in row: continue
            def gain(value): return sum(tuple(sorted([(place, value), known])) in missing for known in row.items())
            row[place] = max(values, key=gain)
        row = tuple(row[place] for place in range(len(factors)))
        missing -= pairs(row)
        yield row


def test_covering_meets_all_pairs():
    factors = "ab", "wxyz", "123"
    rows = list(covering(*factors))
    met = set().union(*map(pairs, rows))
    assert len(met) == 2*4 + 2*3 + 4*3, rows
    assert len(rows) < 2 * 4 * 3, rows


def test_studies_take_networks_of_a_million_parameters_at_most():
    "One of each family, which two cores can train."
    runs = study.load(ROOT / "runs" / "architectures.yaml").runs
    with torch.device("meta"): made = {run.backbone: models.create("basic", **run.model) for run in runs}
    counted = {name: sum(p.numel() for p in network.parameters()) for name, network in made.items()}
    assert len(counted) > 1 and max(counted.values()) <= 1_000_000, counted


def test_one_step_of_all_that_is_allowed(images, teachers):
    """Any two of method, network, kind of source, mix and loss meet in one step: it is finite, changes the weights, and
    answers have the right shapes. All sources have their turn."""
    sources = {kind: itertools.cycle(names) for kind, names in kinds(images, teachers).items()}
    pixels, tried = images.pixels(), set()
    rows = list(covering(*map(list, (TINY, models.methods(), sources, MIXES, losses.OBJECTIVES))))
    for backbone, method, kind, mix, loss in rows:
        name = next(sources[kind])
        if labels.sums_losses(name) and loss != "cross_entropy":
            name = name.replace("_mt_", "_en_")     # a sum of other losses is refused, below
        tried.add(name)
        asked, mixed = taught(name, teachers), {} if mix == "none" else dict(mix_probability=.999)
        run = Run(preset="demo", method=method, backbone=backbone, labels=name, mix=mix, loss=loss, train_size=8,
                  cutout=8, teachers=("a",) if asked else (), warmup=0, **mixed, **TINY[backbone])
        classifier = models.create(method, **run.model)
        first = dict(classifier.network.body[0].named_parameters())
        before = {key: p.detach().clone() for key, p in first.items()}
        source = labels.create(name, images, **run.source, **asked)
        trainer = training.Trainer(classifier, training.sgd(classifier, run), pixels, source, run)
        words = backbone, method, name, mix, loss
        assert math.isfinite(trainer.epoch(0)), words
        state = classifier.state_dict()
        assert all(tensor.isfinite().all() for tensor in state.values()), words
        assert any(not torch.equal(first[key], p) for key, p in before.items()), words
        with torch.no_grad(): log_probs, scores = classifier.eval().predict(pixels)
        assert log_probs.shape == (8, 10) and (log_probs.exp().sum(1) - 1).abs().max() < 1e-4, words
        assert all(score.shape == (8,) and score.isfinite().all() for score in scores.values()), words
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())
    unheard = set(labels.sources()) - tried
    assert unheard <= {"off_mt_ldl", "on_mt_ldl"}, f"{len(rows)} steps, without {unheard}"


REFUSED = [
    (dict(backbone="resnat"), "did you mean 'resnet'"),
    (dict(backbone="wrn", width=4), "width=4 has no effect on backbone 'wrn'"),
    (dict(backbone="vgg", widening=2), "widening=2 has no effect on backbone 'vgg'"),
    (dict(method="basic", het_rank=3), "het_rank=3 has no effect on method 'basic'"),
    (dict(method="het", dropout=.2), "dropout=0.2 has no effect on method 'het'"),
    (dict(backbone="wrn", depth=20), "expected 6n + 4"),
    (dict(backbone="preact", depth=20, method="sngp", bound=0), "bound=0"),
    (dict(backbone="resnet4", depth=20), "depth=20 is not known"),
    (dict(labels="on_ldl"), "without teachers"),
    (dict(labels="on_mt_ldl", teachers=["a", "b"], loss="symmetric_ce"), "holds for cross_entropy only"),
    (dict(labels="hard", ols_alpha=.3), "ols_alpha=0.3 has no effect on labels 'hard'"),
    (dict(mix_alpha=.4), "mix_alpha=0.4 has no effect on mix 'none'"),
    (dict(cutout=-1), "cutout=-1")]


@pytest.mark.parametrize("wrong, reason", REFUSED, ids=lambda value: "" if isinstance(value, dict) else value)
def test_what_is_not_allowed_is_refused(wrong, reason):
    message = error_of(Run.of, wrong)
    assert reason in message, message


# what draws at every step, or has a memory of its own
RESUMED = dict(
    shake=dict(backbone="shake", **TINY["shake"]), byot=dict(method="byot", labels="ols", depth=8),
    reweight=dict(labels="reweight", depth=8), meta_weight_net=dict(labels="meta_weight_net", depth=8),
    meta_labels=dict(labels="meta_labels", depth=8), two_views=dict(labels="two_views", depth=8))


@pytest.mark.parametrize("parameters", RESUMED.values(), ids=RESUMED)
def test_training_resumes_to_the_same_bits(parameters, images, tmp_path):
    "Killed after an epoch, it goes on to the weights that it would have had."
    run = Run(preset="demo", train_size=8, epochs=3, schedule="one_cycle", batch_size=4, **parameters)
    def trained(folder=None, stop=False):
        classifier = models.create(run.method, run.seed, **run.model)
        def progress(history):
            if stop and len(history) == 1: raise KeyboardInterrupt
        try: training.fit(classifier, images, images, run, folder, progress, checkpoint_seconds=0)
        except KeyboardInterrupt: return None
        return classifier.state_dict()
    whole = trained()
    trained(tmp_path, stop=True)
    resumed = trained(tmp_path)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
