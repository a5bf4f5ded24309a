"""Data sets from their official files: each is built through `data.load` from a small archive of the official form, and
what is damaged, missing or another file ends in a sentence that names it, and leaves no archive behind."""
import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from soft_cifar import cli, data, experiment, official
from soft_cifar.checks import DataError, InputError
from soft_cifar.datasets import cifar, photographs
from soft_cifar.labels import create, parameters_of, sources
from soft_cifar.labels.online import noisy
from soft_cifar.parameters import Run

CIFAR10 = data.CIFAR10
STL10 = "airplane bird car cat deer dog horse monkey ship truck".split()
TINY = "tiny-imagenet-200"


def pack(path, contents):
    "Writes the tar or zip archive `path`, with `contents` by name."
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") if path.suffix == ".zip" else tarfile.open(path, "w:gz") as archive:
        for name, what in contents.items():
            if path.suffix == ".zip": archive.writestr(name, what)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(what)
                archive.addfile(member, io.BytesIO(what))


def picture(g, size, kind):
    "(pixels as they are decoded, bytes of the file) of a new image of `size` x `size` in a format without loss."
    pixels = g.integers(256, size=(size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return pixels, file.getvalue()


def stl10(g):
    "Contents of STL-10's archive, and what is expected of it."
    pixels, labels = g.integers(256, size=(30, 96, 96, 3), dtype=np.uint8), g.integers(10, size=30)
    contents = {"stl10_binary/unlabeled_X.bin": b"skipped", "stl10_binary/class_names.txt": "\n".join(STL10).encode()}
    for split, rows in dict(train=slice(10), test=slice(10, None)).items():
        contents[f"stl10_binary/{split}_X.bin"] = pixels[rows].transpose(0, 3, 2, 1).tobytes()
        contents[f"stl10_binary/{split}_y.bin"] = (labels[rows] + 1).astype(np.uint8).tobytes()
    return contents, (pixels, labels, STL10, 20)


def cinic10(g):
    "Contents of CINIC-10's archive, from last to first, and what is expected of it."
    made = {f"{split}/{name}/n0{i}.png": picture(g, 32, "png")
            for split in ("train", "valid", "test") for name in CIFAR10 for i in range(2)}
    contents = {name: content for name, (_, content) in reversed(made.items())}
    expected = np.stack([pixels for pixels, _ in made.values()]), np.tile(np.repeat(np.arange(10), 2), 3), CIFAR10, 20
    return contents, expected


def tinyimagenet200(g):
    "Contents of Tiny ImageNet's archive, in which the order of the validation images is not that of their classes."
    numbers = ["n01443537", "n01629819", "n01641577"]
    train = {f"{TINY}/train/{number}/images/{number}_{i}.JPEG": picture(g, 64, "png")
             for number in numbers for i in range(2)}
    val = {f"{TINY}/val/images/val_{i}.JPEG": picture(g, 64, "png") for i in range(3)}
    table = "".join(f"val_{i}.JPEG\t{number}\t0\t0\t1\t1\n" for i, number in enumerate(reversed(numbers)))
    words = "".join(f"{number}\t{name}, other name\n" for number, name in zip(numbers, ("fish", "newt", "frog")))
    contents = {name: content for name, (_, content) in (val | train).items()}
    contents |= {f"{TINY}/words.txt": words.encode(), f"{TINY}/val/val_annotations.txt": table.encode()}
    pixels = [pixels for pixels, _ in (*train.values(), *reversed(val.values()))]
    return contents, (np.stack(pixels), np.array([0, 0, 1, 1, 2, 2, 0, 1, 2]), ("fish", "newt", "frog"), 3)


ARCHIVES = dict(stl10=(stl10, "stl10_binary.tar.gz"), cinic10=(cinic10, "CINIC-10.tar.gz"),
                tinyimagenet200=(tinyimagenet200, f"{TINY}.zip"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    "An empty data root without a network, for which small archives have the number of images that is expected."
    def no_network(url, part): raise OSError("Name or service not known")
    monkeypatch.setattr(official, "retrieve", no_network)
    monkeypatch.setattr(photographs, "STL10_IMAGES", dict(train=10, test=20))
    monkeypatch.setattr(photographs, "CINIC10_IMAGES", dict(train=20, valid=20, test=20))
    monkeypatch.setattr(photographs, "TINY_IMAGES", dict(train=6, val=3))
    monkeypatch.setattr(photographs, "TINY_CLASSES", 3)
    return tmp_path / "root"


@pytest.fixture
def trusting(root, monkeypatch):
    "The same, where every file has the checksum that is expected of it."
    monkeypatch.setattr(official, "checksum", lambda path, like: like)
    return root


def refusal(name, root):
    "What `data.load` says about the set `name`; there must be no archive afterwards."
    with pytest.raises(DataError) as caught: data.load(name, root)
    assert not list(root.glob("*.npz")) and not list(root.glob("*.tmp")), list(root.iterdir())
    return str(caught.value)


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_becomes_a_set(trusting, name):
    "Pixels, labels, classes and test split are those of the files; the second call needs no files."
    make, file = ARCHIVES[name]
    contents, (pixels, labels, classes, tested) = make(np.random.default_rng())
    pack(trusting / "official" / file, contents)
    made = data.load(name, trusting)
    assert np.array_equal(made.images, pixels) and made.labels.tolist() == labels.tolist()
    assert made.classes == tuple(classes) and made.encoding == "official" and made.verified and made.counts is None
    assert made.held_out.tolist() == [False] * (len(labels) - tested) + [True] * tested
    shutil.rmtree(trusting / "official")
    assert data.load(name, trusting).fingerprint == made.fingerprint


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_cut_is_noticed(trusting, name):
    "An archive that ends early, wherever, is damaged or lacks a file, and named."
    make, file = ARCHIVES[name]
    contents, _ = make(np.random.default_rng(0))
    path = trusting / "official" / file
    pack(path, contents)
    whole = path.read_bytes()
    for share in (0, .001, .3, .7, .99):
        path.write_bytes(whole[:int(share * len(whole))])
        said = refusal(name, trusting)
        assert file in said and f"soft-cifar data {name}" in said, said


@pytest.mark.parametrize("name", ARCHIVES)
def test_each_file_is_needed(trusting, name):
    "Without one of its files, an image or a table, the archive is refused; without what is skipped, it is not."
    make, file = ARCHIVES[name]
    contents, _ = make(np.random.default_rng(0))
    for left_out in [*contents][::7] + [*contents][-2:]:
        pack(trusting / "official" / file, {name: content for name, content in contents.items() if name != left_out})
        if "unlabeled" in left_out: continue
        said = refusal(name, trusting)
        assert file in said and ("expected {'" in said or f"has no {left_out}" in said), said


@pytest.mark.parametrize("name", ARCHIVES)
def test_another_file_is_refused(root, name):
    "What lies where the official file should, but has another checksum, is named, and stays."
    make, file = ARCHIVES[name]
    path = root / "official" / file
    pack(path, make(np.random.default_rng(0))[0])
    said = refusal(name, root)
    assert f"{file} is not the official file" in said and f"prepare it again: soft-cifar data {name}" in said, said
    assert path.is_file()


def test_no_network(root):
    "Each set says what failed, how to have it, and where to put the file."
    for name in data.builders():
        said = refusal(name, root)
        assert "Name or service not known" in said and f"soft-cifar data {name}" in said and "official" in said, said
    assert not list((root / "official").rglob("*.*")), list((root / "official").iterdir())


def test_an_interrupted_download_goes_on(trusting, monkeypatch):
    "What has come stays in a file of its own, the next call gets the rest, and the set is built."
    make, file = ARCHIVES["tinyimagenet200"]
    contents, (pixels, *_) = make(np.random.default_rng())
    pack(trusting / "elsewhere" / file, contents)
    whole, asked = (trusting / "elsewhere" / file).read_bytes(), []
    def half(url, part):
        here = part.read_bytes() if part.exists() else b""
        asked.append(len(here))
        part.write_bytes(here + whole[len(here):len(here) + len(whole) // 2 + 1])
        if part.stat().st_size < len(whole): raise OSError("the connection ended")
    monkeypatch.setattr(official, "retrieve", half)
    said = refusal("tinyimagenet200", trusting)
    assert "the connection ended" in said and "takes up what has come" in said, said
    assert [path.name for path in (trusting / "official").iterdir()] == [f"{file}.part"]
    assert np.array_equal(data.load("tinyimagenet200", trusting).images, pixels)
    assert asked == [0, len(whole) // 2 + 1] and os.listdir(trusting / "official") == [file], asked


def test_a_wrong_download_is_removed_and_the_next_address_tried(root, monkeypatch):
    asked = []
    def page(url, part):
        asked.append(url)
        part.write_bytes(b"<html>moved</html>")
    monkeypatch.setattr(official, "retrieve", page)
    said = refusal("cinic10", root)
    assert said.count("has another file") == 2 and asked == [*photographs.CINIC10_URLS], said
    assert not list((root / "official").iterdir())


@pytest.fixture
def images(trusting, monkeypatch):
    "50 images in place of what torchvision has of CIFAR-10 and CIFAR-100, of which ten are for the test."
    g = np.random.default_rng()
    pixels, labels = g.integers(256, size=(50, 32, 32, 3), dtype=np.uint8), g.integers(10, size=50)
    def torchvision(self, kind, file, url, md5, train):
        rows = slice(40) if train else slice(40, None)
        classes = CIFAR10 if kind.__name__ == "CIFAR10" else [f"class {i}" for i in range(100)]
        return SimpleNamespace(data=pixels[rows], targets=labels[rows].tolist(), classes=classes)
    monkeypatch.setattr(official.Files, "torchvision", torchvision)
    (trusting / "official").mkdir(parents=True)
    return pixels, labels


def test_cifar_with_votes(trusting, images):
    "The labels of people become votes on the images that they belong to; CIFAR-100 holds out its test split."
    pixels, labels = images
    g, folder = np.random.default_rng(), trusting / "official"
    said = {name: g.integers(10, size=40) for name in cifar.THREE}
    torch.save(dict(said, clean_label=labels[:40]), folder / "CIFAR-10_human.pt")
    torch.save(dict(noisy_label=g.integers(100, size=40), clean_label=labels[:40]), folder / "CIFAR-100_human.pt")
    made = data.load("cifar10n", trusting)
    for row, *votes in zip(made.counts.tolist(), *said.values()): assert row == [Counter(votes)[k] for k in range(10)]
    assert np.array_equal(made.images, pixels[:40]) and made.classes == CIFAR10 and made.annotations is None
    one_each = data.load("cifar100n", trusting)
    assert one_each.counts.shape == (40, 100) and (one_each.counts.sum(1) == 1).all()
    whole, test = data.load("cifar100", trusting), data.load("cifar100_test", trusting)
    assert whole.held_out.nonzero()[:, 0].tolist() == list(range(40, 50)) and whole.counts is None
    assert torch.equal(whole.images[40:], test.images) and whole.classes == test.classes == one_each.classes
    train, validation, tested = data.split(whole, (30, 10, 10), seed=1)
    assert sorted(tested.index.tolist()) == list(range(40, 50)), tested.index


def test_labels_of_other_images_are_refused(trusting, images):
    _, labels = images
    path = trusting / "official" / "CIFAR-100_human.pt"
    torch.save(dict(noisy_label=labels[:40], clean_label=(labels[:40] + 1) % 10), path)
    assert "these are other images, or in another order" in refusal("cifar100n", trusting)
    path.write_bytes(b"half a file")
    assert "CIFAR-100_human.pt: is no dictionary of arrays" in refusal("cifar100n", trusting)


ADDED = '''
import torch

def rows(n): return torch.arange(n)

def shades(files) -> dict:
    "Grey squares."
    grey = rows(8)[:, None, None, None].expand(8, 32, 32, 3).to(torch.uint8).contiguous()
    return dict(images=grey, labels=rows(8) % 2, classes=("even", "odd"))
'''


def test_another_set_is_one_file(root, tmp_path, monkeypatch):
    "A module in the package is all that a new set takes: it is built, listed, and a name that nobody else may have."
    from soft_cifar import datasets, own
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "added.py").write_text(ADDED)
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path / "more")])
    data.builders.cache_clear()
    try:
        assert "shades" in data.builders() and "rows" not in data.builders()
        made = data.load("shades", root)
        assert made.classes == ("even", "odd") and made.images[7].unique().tolist() == [7], made
        with pytest.raises(InputError, match="did you mean 'shades'"): data.load("shade", root)
        with pytest.raises(InputError, match="choose another"): own.check_name("shades")
    finally:
        data.builders.cache_clear()
        del sys.modules["soft_cifar.datasets.added"]


def folders(place, *names, size=32):
    "Images of noise under these `names` below `place`."
    g = np.random.default_rng(len(names))
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(picture(g, size, "png")[1])


def test_folders_of_classes(tmp_path, root, capsys):
    "The command makes a set of an ImageNet-like folder; a run learns from its labels and tests on its own test split."
    sizes = dict(train=30, val=10)
    names = [f"{split}/{kind}/{i}.png" for split, n in sizes.items() for kind in ("b", "a") for i in range(n)]
    folders(tmp_path / "photos", *names, size=40)
    words = ["data", "--images", str(tmp_path / "photos"), "--name", "mine", "--root", str(root)]
    cli.main([*words, "--size", "32"])
    said = capsys.readouterr().out
    assert "mine: 80 images, 2 classes, no votes, png, resized" in said and "by label: a 40, b 40" in said, said
    assert "-p data mine -p labels gold" in said, said
    made = data.load("mine", root)
    run = Run(preset="demo", data="mine", labels="gold", data_root=str(root), train_size=50, validation_size=10,
              test_size=20, ood_size=20)
    parts = experiment.prepare(run)
    assert parts.test.held_out.all() and not parts.train.held_out.any() and made.held_out.sum() == 20
    cli.main(["data", "--images", "mine", "--name", "less", "--size", "16", "--root", str(root)])
    less = data.load("less", root)
    assert less.images.shape == (80, 16, 16, 3) and torch.equal(less.held_out, made.held_out)
    assert torch.equal(less.labels, made.labels) and less.encoding == "png, resized, resized", less


WRONG_FOLDERS = {
    "no folders": (["0.png", "1.png"], "0.png: is in no folder of a class, expected CLASS/0.png; or a table of votes"),
    "one is outside": (["a/0.png", "b/1.png", "2.png"], "2.png: is in no folder of a class"),
    "one class": (["a/0.png", "a/1.png"], "has one class, a"),
    "no class in a split": (["train/a/0.png", "test/1.png"], "is in no folder of a class, expected SPLIT/CLASS/1.png"),
}


@pytest.mark.parametrize("names, message", WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_wrong_folders_are_named(tmp_path, root, names, message):
    folders(tmp_path / "photos", *names)
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "--images", str(tmp_path / "photos"), "--name", "mine", "--root", str(root)])
    assert message in str(ended.value) and not root.exists(), ended.value


def test_soft_labels_that_are_no_votes(trusting, images):
    "CIFAR-10S by official position: sources of distributions take it, and those that draw votes say why they do not."
    pixels, labels = images
    g = np.random.default_rng()
    answers = {str(i): g.dirichlet(np.ones(10), size=g.integers(1, 9)) for i in (9, 0, 4)}
    as_json = {i: given.tolist() for i, given in answers.items()}
    (trusting / "official" / "cifar10s_t2clamp_redist10.json").write_text(json.dumps(as_json))
    data.load("cifar10s", trusting)
    made = data.load("cifar10s", trusting)     # out of its archive
    expected = np.stack([answers[i].mean(0) for i in ("0", "4", "9")])
    which = [40, 44, 49]
    assert np.array_equal(made.images, pixels[which]) and made.labels.tolist() == labels[which].tolist()
    assert np.allclose(made.soft, expected, atol=1e-12) and made.counts is None and "soft labels" in repr(made)
    assert np.allclose(create("soft", made).table, expected, atol=1e-6)
    assert create("hard", made).table.argmax(1).tolist() == expected.argmax(1).tolist()
    others = [source for source in sources() if "teachers" not in parameters_of(source)]
    for source in {*others} - {"votes", "dawid_skene"}: create(source, made)
    with pytest.raises(DataError, match="no votes that could be drawn"): create("votes", made)
    with pytest.raises(DataError, match="does not say who cast"): create("dawid_skene", made)
    other = noisy(made, 1., seed=0)
    assert torch.allclose(other.soft.sort(1).values, made.soft.sort(1).values), "classes change places"
    assert not (other.majority == made.majority).any()
