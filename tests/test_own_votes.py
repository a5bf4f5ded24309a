"""Votes of one's own: a folder of images and a table become a data set that is trained on, looked at and reported on;
what does not fit is refused with its file and line, and leaves nothing behind."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, copy_of_the_project
from PIL import Image

from soft_cifar import data, own, runs
from soft_cifar.checks import StudyError
from soft_cifar.labels import create, crowd

CLASSES, PEOPLE = ("check", "dot", "ring", "stripe"), ("Ada", "Ben", "Cleo", "Dan", "Eve")
HEADER = "image,annotator,label"


def paint(folder, n, size):
    "`n` images of noise, of `size` (width, height), in `folder`."
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(generator.integers(256, size=(*size[::-1], 3), dtype=np.uint8)).save(folder / f"{i}.png")


def votes_on(n, generator):
    """Lines of a table: each of `n` images, of class i % 4, is seen by four people, who are right in most cases; Eve
    guesses."""
    lines = []
    for i in range(n):
        for who in generator.choice(5, 4, replace=False):
            right = generator.random() < (.25 if who == 4 else .8)
            lines.append(f"{i}.png,{PEOPLE[who]},{CLASSES[i % 4 if right else generator.integers(4)]}")
    return lines


@pytest.fixture
def case(tmp_path):
    "A folder with six tiny images, a table that fits, and an empty data root."
    paint(tmp_path / "images", 6, (8, 8))
    (tmp_path / "votes.csv").write_text("\n".join([HEADER, *votes_on(6, np.random.default_rng(1))]))
    (tmp_path / "root").mkdir()
    return tmp_path


def refusal(case, **changes):
    "What `own.prepare` says about a case with `changes`; nothing may be in the data root afterwards."
    given = dict(images=case / "images", votes=case / "votes.csv", name="mine", root=case / "root") | changes
    with pytest.raises(StudyError) as caught: own.prepare(**given)
    assert not list((case / "root").iterdir())
    return str(caught.value)


def table_of(case, *lines, header=HEADER, before=("0", "1", "2", "3", "4", "5")):
    "A table with a vote for each of the images `before`, and then `lines`."
    ones = [f"{i}.png,Ada,dot" for i in before]
    (case / "votes.csv").write_text("\n".join([header, *ones, *lines]))
    return case


WRONG_LINES = {
    "unknown image": ("9.png,Ben,dot", r"votes\.csv, line 8: image '9\.png' is not among the 6 there are"),
    "image outside": ("../images/0.png,Ben,dot", r"votes\.csv, line 8: image '\.\./images/0\.png' is not among"),
    "unknown class": ("0.png,Ben,dit",
                      r"votes\.csv, line 8: label 'dit' is not among the 4 there are, did you mean 'dot'"),
    "second vote": ("0.png,Ada,ring", r"votes\.csv, line 8: Ada votes on 0\.png for the second time, after line 2"),
    "empty label": ("0.png,Ben,", r"votes\.csv, line 8: label is empty"),
    "a cell too many": ("0.png,Ben,dot,ring", r"votes\.csv, line 8: 4 cells, expected 3"),
    "quotes": ('0.png,"Ben"x,dot', r"votes\.csv, line 8: is no CSV"),
}


@pytest.mark.parametrize("line, message", WRONG_LINES.values(), ids=WRONG_LINES)
def test_a_wrong_line_is_named(case, line, message):
    said = refusal(table_of(case, line), classes=CLASSES)
    assert re.search(message, said), said


WRONG_COUNTS = {
    "no number": ("0.png,1,many", r"line 2: ring is 'many', expected a number of votes"),
    "negative": ("0.png,1,-1", r"line 2: ring is '-1', expected a number of votes"),
    "nobody": ("0.png,0,0", r"line 2: image 0\.png has no votes"),
    "twice": ("0.png,1,0\n0.png,1,0", r"line 3: image 0\.png is there twice, after line 2"),
}


@pytest.mark.parametrize("lines, message", WRONG_COUNTS.values(), ids=WRONG_COUNTS)
def test_wrong_counts_are_named(case, lines, message):
    (case / "votes.csv").write_text(f"image,dot,ring\n{lines}\n")
    said = refusal(case)
    assert re.search(r"votes\.csv, " + message, said), said


def test_a_column_of_row_numbers_is_no_class(case):
    (case / "votes.csv").write_text("\n".join([",image,dot,ring", *[f"{i},{i}.png,1,2" for i in range(6)]]))
    said = refusal(case)
    assert "votes.csv, line 1: a column has no name" in said, said


def test_an_image_without_votes(case):
    said = refusal(table_of(case, before="01245"))
    assert "votes.csv: no line votes on 1 of the 6 images: '3.png'" in said, said


@pytest.mark.parametrize("header, missing", [("image,label,who", "annotator"), ("image,annotator,class", "label"),
                                             ("file,annotator,label", "image")])
def test_missing_columns(case, header, missing):
    said = refusal(table_of(case, header=header))
    assert "votes.csv, line 1: columns " in said and f"{missing} is missing" in said, said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_that_is_not_utf8(case, encoding):
    (case / "votes.csv").write_bytes("\n".join([HEADER, "0.png,Ada,dot", "1.png,Zoë,ring"]).encode(encoding))
    said = refusal(case)
    line = dict([("latin-1", 3), ("utf-16", 1)])[encoding]
    assert f"votes.csv, line {line}: is no text in UTF-8" in said, said


def test_a_table_with_a_mark_and_windows_lines(case):
    text = (case / "votes.csv").read_text().replace("\n", "\r\n")
    (case / "votes.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    own.prepare(case / "images", case / "votes.csv", "mine", root=case / "root")
    assert data.load("mine", case / "root").counts.sum() == 24


def test_mixed_sizes(case):
    Image.new("RGB", (12, 8)).save(case / "images" / "4.png")
    said = refusal(case)
    assert "4.png: 12 x 8 pixels, but 0.png has 8 x 8" in said and "--size" in said, said
    own.prepare(case / "images", case / "votes.csv", "mine", size=16, root=case / "root")
    made = data.load("mine", case / "root")
    assert made.images.shape == (6, 16, 16, 3) and made.encoding == "png, resized", made


def test_unreadable_images(case):
    whole = (case / "images" / "2.png").read_bytes()
    for content in (b"no image", whole[:len(whole) // 2], b""):
        (case / "images" / "2.png").write_bytes(content)
        said = refusal(case)
        assert "images/2.png: cannot be read as an image" in said, said


def test_sixteen_bits_are_not_cut_off(case):
    Image.new("I;16", (8, 8), 30_000).save(case / "images" / "2.png")
    said = refusal(case)
    assert "images/2.png: has more than 8 bits a channel" in said, said


def test_greys_and_transparency_and_orientation(case):
    Image.new("L", (8, 8), 77).save(case / "images" / "0.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(case / "images" / "1.png")
    turned = Image.new("RGB", (8, 8))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = turned.getexif()
    exif[0x112] = 3     # upside down
    turned.save(case / "images" / "2.png", exif=exif)
    own.prepare(case / "images", case / "votes.csv", "mine", root=case / "root")
    images = data.load("mine", case / "root").images
    assert (images[0] == 77).all() and (images[1] == torch.tensor([1, 2, 3])).all()
    assert (images[2].sum(2) > 0).nonzero().tolist() == [[7, 7]], "upright, as people saw it"


def test_what_was_there_stays(case):
    "A table that does not fit leaves an archive of that name as it was; one that fits replaces it."
    path = own.prepare(case / "images", case / "votes.csv", "mine", root=case / "root")
    before = path.read_bytes()
    wrong = table_of(case, "x,y,z") / "votes.csv"
    with pytest.raises(StudyError): own.prepare(case / "images", wrong, "mine", root=case / "root")
    assert path.read_bytes() == before and [file.name for file in (case / "root").iterdir()] == ["mine.npz"]
    own.prepare(case / "images", table_of(case, "0.png,Ben,ring") / "votes.csv", "mine", root=case / "root")
    assert data.load("mine", case / "root").classes == ("dot", "ring")


def test_votes_are_those_of_the_table(case):
    "Counts, annotations and majority against a count by hand; numbers as names are in numeric order."
    generator = np.random.default_rng()
    said = {(i, who): str(generator.integers(9, 12)) for i in range(6) for who in ("2", "10", "Ada")
            if generator.random() < .8 or who == "2"}
    lines = [f"{label},3 s,{who},{i}.png" for (i, who), label in said.items()]
    (case / "votes.csv").write_text("\n".join(["label,time,annotator,image", *lines]))
    own.prepare(case / "images", case / "votes.csv", "mine", classes=["9", "10", "11"], root=case / "root")
    made = data.load("mine", case / "root")
    assert made.annotators == ("2", "10", "Ada") and made.classes == ("9", "10", "11")
    back = {(i, made.annotators[a]): made.classes[k] for i, a, k in made.annotations.tolist()}
    assert back == said
    for i in range(6):
        counted = [sum(label == name for (j, _), label in said.items() if j == i) for name in made.classes]
        assert made.counts[i].tolist() == counted and made.labels[i] == counted.index(max(counted))


def test_two_classes(case):
    (case / "votes.csv").write_text("\n".join(["image,yes,no", *[f"{i}.png,{300 + i},{i}" for i in range(6)]]))
    own.prepare(case / "images", case / "votes.csv", "mine", root=case / "root")
    made = data.load("mine", case / "root")
    assert made.classes == ("yes", "no") and made.counts[5].tolist() == [305, 5] and not made.annotators
    with pytest.raises(StudyError, match="does not say who cast its votes"): create("dawid_skene", made)


def test_dawid_skene_is_that_of_crowd_kit():
    "Beliefs and confusions against crowd-kit's, on a random crowd in which not everybody sees everything."
    aggregation = pytest.importorskip("crowdkit.aggregation")
    import pandas as pd
    generator = np.random.default_rng()
    lines = [line.split(",") for line in votes_on(300, generator)]
    said = torch.tensor([[int(image[:-4]), PEOPLE.index(who), CLASSES.index(label)] for image, who, label in lines])
    said = said[(said[:, 0] * 5 + said[:, 1]).argsort()]
    counts = torch.zeros(300, 4, dtype=torch.long)
    counts.index_put_((said[:, 0], said[:, 2]), torch.tensor(1), accumulate=True)
    votes = data.ImageSet("few", torch.zeros(300, 1, 1, 3, dtype=torch.uint8), counts.argmax(1), counts, "none",
                          CLASSES, annotations=said, annotators=PEOPLE)
    table = pd.DataFrame(said.numpy(), columns=["task", "worker", "label"])
    theirs = aggregation.DawidSkene(n_iter=2000, tol=0).fit(table)
    belief, confusion = crowd.estimate(votes, prior=1e-9, rounds=2000)
    expected = torch.from_numpy(theirs.probas_.sort_index()[range(4)].to_numpy().copy())
    torch.testing.assert_close(belief, expected, atol=.01, rtol=0)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the project, with 80 images of four classes at 64 x 64 and a table of annotations beside it."
    place = tmp_path_factory.mktemp("project")
    copy_of_the_project(place)
    paint(place / "photos", 80, (64, 64))
    (place / "votes.csv").write_text("\n".join([HEADER, *votes_on(80, np.random.default_rng(2))]))
    return place


def command(place, *words):
    "What `python -m WORDS` in `place` says."
    environment = os.environ | dict(PYTHONPATH=str(place), SOFT_CIFAR_DATA="data")
    whole = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(whole, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_from_a_table_to_a_report(project):
    """The command makes archive and study; a small form of the study runs, and its report compares soft, majority and
    aggregated labels."""
    said = command(project, "soft_cifar.cli", "data", "--images", "photos", "--votes", "votes.csv", "--name", "mine")
    assert "mine: 80 images, 4 classes, 4.0 votes each, png" in said and "soft-cifar study runs/mine.yaml" in said, said
    file = project / "runs" / "mine.yaml"
    asked = yaml.safe_load(file.read_text())
    assert asked["labels"] == ["soft", "hard", "dawid_skene"] and len(asked["models"]) == 4, asked
    asked["shared"] |= dict(epochs=1, milestones=[], warmup=0)
    asked["models"] = {"all votes": {}}     # three cells
    file.write_text(yaml.safe_dump(asked))
    command(project, "soft_cifar.cli", "data", "--images", "photos", "--votes", "votes.csv", "--name", "mine")
    assert yaml.safe_load(file.read_text()) == asked, "a study that is there stays"
    command(project, "soft_cifar.cli", "study", "runs/mine.yaml", "--seeds", "0", "--jobs", "2")
    folders = sorted((project / "runs" / "mine").glob("*/seed-0"))
    assert len(folders) == 3, folders
    record, predictions, _ = runs.load(folders[0])
    assert record["data"]["mine"]["size"] == [64, 64] and predictions["log_probs"].shape == (16, 4)
    command(project, "soft_cifar.cli", "report", "runs/mine.yaml")
    page = (project / "report" / "mine" / "index.html").read_text()
    assert "dawid_skene" in page and "Soft minus hard" in page


def test_explore_shows_who_disagrees(project):
    """The notebook to look around in, on four classes at 64 x 64 with annotators, and on counts of two classes by
    nobody in particular."""
    own.prepare(project / "photos", project / "votes.csv", "looked_at", root=project / "data")
    lines = ["image,yes,no", *[f"{i}.png,{1 + i % 3},{i % 2}" for i in range(80)]]
    (project / "counts.csv").write_text("\n".join(lines))
    own.prepare(project / "photos", project / "counts.csv", "counted", root=project / "data")
    for name in ("looked_at", "counted"):
        command(project, "papermill", "nbs/explore.ipynb", f"{name}.ipynb", "--no-progress-bar", "-p", "name", name)
    assert "Eve" in (project / "looked_at.ipynb").read_text()
    assert "nobody knows who said what" in (project / "counted.ipynb").read_text()
