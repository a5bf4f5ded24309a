"""Whatever comes in, a number in its range or a sentence comes out: parameters, metrics and study files on inputs that
nobody chose."""
import math
from dataclasses import asdict, fields

import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st

from soft_cifar import metrics, study
from soft_cifar.checks import InputError, StudyError, brief, number, one_of
from soft_cifar.parameters import Run

quick = settings(max_examples=100, deadline=None, derandomize=False, database=None)

words = st.sampled_from(["soft", "hard", "oracle", "auto", "sngp", 10**400, "no\nsuch", "a" * 500])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@quick
@given(st.dictionaries(st.sampled_from([f.name for f in fields(Run)]), plain, max_size=3))
def test_parameters_make_a_run_or_a_sentence(parameters):
    "And a run that is made can be made again from what it says."
    try: run = Run.of(parameters)
    except InputError as error:
        assert len(str(error)) < 2000, error
        return
    assert Run.of(asdict(run)) == run and len(run.cell) > 0


@quick
@given(plain, st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_a_number_is_in_its_range_or_refused(value, low, high):
    for kind in (int, float):
        try: found = number("x", value, kind, low=low, high=high)
        except InputError as error: assert len(str(error)) < 1000, error
        else: assert type(found) is kind and low <= found <= high and found == value and not isinstance(value, bool)


@quick
@given(plain, st.lists(st.text(max_size=5), max_size=5))
def test_one_of_these_or_a_short_refusal(value, valid):
    try: assert one_of("x", value, valid) in valid
    except InputError as error: assert value not in valid and len(str(error)) < 1000, error


@quick
@given(plain)
def test_what_messages_show_is_short(value): assert len(brief([value, {"deep": [value] * 50}] * 50)) <= 200


def write(folder, text):
    file = folder / "any.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("studies")


def test_a_study_file_is_a_study_or_a_sentence(folder):
    "Texts, and files that look like studies with anything in them."
    keys = st.fixed_dictionaries({}, optional={name: plain for name in study.KEYS})
    parameters = st.sampled_from(["labels", "teachers", "data", "if_present", "seed", "epochs"])
    model = st.dictionaries(parameters, plain, max_size=2)
    models = st.dictionaries(st.text(max_size=4), model, max_size=2)
    likely = st.fixed_dictionaries(dict(models=models, seeds=st.lists(plain, max_size=2)))
    def encodable(text): return not any(0xd800 <= ord(c) < 0xe000 for c in text)

    @quick
    @given(st.text(max_size=60).filter(encodable) | (keys | likely).map(yaml.safe_dump))
    def check(text):
        try: study.load(write(folder, text))
        except StudyError as error: assert len(str(error)) < 3000 and "any.yaml" in str(error), error

    check()


@st.composite
def predictions(draw):
    "(log-probabilities [N,K], labels [N], votes [N,K]) of any size, some of them very sure."
    n, k, seed = draw(st.integers(1, 30)), draw(st.integers(3, 12)), draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    logits = draw(st.sampled_from([.1, 1., 30., 1000.])) * torch.randn(n, k, generator=g, dtype=torch.float64)
    labels, votes = torch.randint(k, (n,), generator=g), torch.randint(0, 9, (n, k), generator=g)
    one_more = torch.eye(k, dtype=torch.long)[torch.randint(k, (n,), generator=g)]     # no image is without votes
    return logits.log_softmax(1), labels, votes + one_more


@quick
@given(predictions())
def test_metrics_are_in_their_range(made):
    p, y, votes = made
    q = votes.double() / votes.sum(1, keepdim=True)
    errors = metrics.ece, metrics.ece_equal_mass, metrics.ece_debiased, metrics.ece_true_class, metrics.uce
    unit = [f(p, y) for f in (metrics.accuracy, *errors)] + [metrics.ece_votes(p, q), metrics.tv_to_humans(p, q)]
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in unit), unit
    assert 0 <= metrics.brier(p, y) <= 2 and 0 <= metrics.brier(p, q) <= 2 and metrics.nll(p, y) >= 0
    assert -1e-6 <= metrics.js_to_humans(p, q) <= math.log(2) + 1e-6 and metrics.kl_to_humans(p, q) >= -1e-6
    assert metrics.ce_to_humans(p, q) >= metrics.kl_to_humans(p, q) - 1e-9


@quick
@given(predictions(), st.integers(0, 2**31))
def test_metrics_do_not_depend_on_the_order_of_images_or_the_names_of_classes(made, seed):
    p, y, votes = made
    q, g = votes.double() / votes.sum(1, keepdim=True), torch.Generator().manual_seed(seed)
    images, classes = torch.randperm(len(p), generator=g), torch.randperm(p.shape[1], generator=g)
    there = classes.argsort()[y][images]
    moved_p, moved_q = p[images][:, classes], q[images][:, classes]
    for f in (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece, metrics.ece_true_class, metrics.uce):
        assert math.isclose(f(p, y), f(moved_p, there), rel_tol=1e-9, abs_tol=1e-9), f.__name__
    for f in (metrics.brier, metrics.kl_to_humans, metrics.js_to_humans, metrics.tv_to_humans, metrics.ece_votes):
        assert math.isclose(f(p, q), f(moved_p, moved_q), rel_tol=1e-6, abs_tol=1e-6), f.__name__


score = st.integers(-3, 3) | st.floats(-5, 5)
scores = st.lists(score, min_size=1, max_size=30).map(lambda values: torch.tensor(values, dtype=torch.float64))


@quick
@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_order(inside, outside):
    pairs = (outside[:, None] > inside).double() + .5 * (outside[:, None] == inside)
    assert math.isclose(metrics.auroc(inside, outside), pairs.mean().item(), abs_tol=1e-9)
    assert math.isclose(metrics.auroc(inside, outside) + metrics.auroc(outside, inside), 1, abs_tol=1e-9)
    assert 0 < metrics.aupr(inside, outside) <= 1 + 1e-9 and 0 <= metrics.fpr95(inside, outside) <= 1
