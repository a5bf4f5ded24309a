"""Break it for as long as you like: kill studies, damage files, and stop at the first number that changes in silence.

    make soak MINUTES=30        or        python tests/soak.py --minutes 30 [--seed 7]

Not part of `make test`. Each time other accidents, at random moments and to every kind of file, from the seed that it
prints first; with that seed, the same damage again.
"""
import argparse
import collections
import contextlib
import io
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from soft_cifar import data, models, runs, study, training
from soft_cifar.checks import StudyError
from soft_cifar.parameters import Run

STUDY = """
shared: {preset: demo, depth: 8, epochs: 5, warmup: 0, milestones: [4],
         train_size: 300, validation_size: 50, test_size: 100, ood_size: 50}
models:
  teacher: {labels: hard}
  taught: {labels: off_ldl, teachers: [teacher]}
seeds: [0]
"""
counted = collections.Counter()


class Silent(Exception):
    "Something changed, and nobody said so."


def file_in(place):
    place.mkdir(parents=True, exist_ok=True)
    (place / "small.yaml").write_text(STUDY)
    return place / "small.yaml"


def start(file):
    "The process that makes the study in `file`, in a session of its own."
    words = [sys.executable, "-m", "soft_cifar.cli", "study", str(file), "--jobs", "1", "--repair"]
    heard = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(words, cwd=ROOT, **heard, start_new_session=True)


def numbers(file):
    "What the runs of a study hold, by cell: predictions, weights, and metrics."
    found = {}
    for run in study.load(file).runs:
        record, predictions, _ = runs.load(run.folder)
        weights = runs.weights(run.folder, record) if run.keep_weights else b""
        found[run.cell] = (predictions, runs.digest(weights), record["metrics"])
    return found


def equal(one, other):
    "Whether two nested values hold the same, tensors and NaN included."
    if type(one) is not type(other): return False
    if isinstance(one, dict): return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)): return len(one) == len(other) and all(map(equal, one, other))
    if torch.is_tensor(one): return one.dtype == other.dtype and torch.equal(one, other)
    return one == other or one != one and other != other


def kill_once(file, chance):
    "Start the study and kill one of its processes at a random moment; whoever is left ends by itself or is ended."
    process = start(file)
    deadline = time.monotonic() + chance.uniform(1, 25)
    while process.poll() is None and time.monotonic() < deadline: time.sleep(.1)
    with contextlib.suppress(psutil.Error):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        victim = chance.choice(family)
        counted[f"killed {'the command' if victim.pid == process.pid else 'a child'}"] += 1
        victim.kill()
    said, _ = process.communicate(timeout=600)
    return said


def kills(place, wanted, chance):
    """A study that is killed up to three times and then left alone: complete, once, the same numbers, and nothing else
    in its folders."""
    file = file_in(place)
    for _ in range(chance.randint(1, 3)): kill_once(file, chance)
    process = start(file)
    said, _ = process.communicate(timeout=600)
    if process.returncode: raise Silent(f"a study that was killed cannot be finished:\n{said[-3000:]}")
    if not equal(numbers(file), wanted): raise Silent("a study that was killed ends in other numbers")
    again = start(file)     # whoever finds runs done sweeps up around them
    said, _ = again.communicate(timeout=600)
    left = sorted(path.name for path in file.parent.glob("small/*/*"))
    if again.returncode or left != ["seed-0"] * len(wanted): raise Silent(f"left behind: {left}\n{said[-2000:]}")
    counted["studies killed, whole in the end"] += 1


def mutate(content, chance):
    "`content`, damaged in one of six ways."
    content, at = bytearray(content), chance.randrange(max(1, len(content)))
    kind = chance.choice(["flip", "flip", "cut", "zeros", "insert", "swap", "repeat"])
    if kind == "flip" and content: content[at] ^= 1 << chance.randrange(8)
    if kind == "cut": del content[at:]
    if kind == "zeros": content[at:at + 512] = bytes(len(content[at:at + 512]))
    if kind == "insert": content[at:at] = chance.randbytes(chance.randint(1, 40))
    if kind == "swap": content[:] = content[at:] + content[:at]
    if kind == "repeat": content += content[at:]
    return bytes(content)


def changes(whole, damaged):
    "How `damaged` differs from `whole`, in words."
    return f"{len(whole)} bytes, {sum(map(int.__ne__, whole, damaged))} differ, {len(damaged)} now"


def damage(name, path, read, chance):
    "Damage the file `path`; what `read()` says afterwards is an error of ours, or what it said before."
    whole = path.read_bytes()
    with contextlib.redirect_stdout(io.StringIO()): before = read()
    damaged = mutate(whole, chance)
    try:
        path.write_bytes(damaged)
        with contextlib.redirect_stdout(io.StringIO()): after = read()
        if after is None: counted[f"{name}: noticed"] += 1
        elif equal(before, after): counted[f"{name}: harmless"] += 1
        else: raise Silent(f"{name}: {path.name} was damaged ({changes(whole, damaged)}), and reads as something else")
    except StudyError: counted[f"{name}: noticed"] += 1
    except Silent: raise
    except Exception as error:
        ending = f"{type(error).__name__}: {error}"
        raise Silent(f"{name}: {path.name} was damaged, and reading it ends in {ending}") from error
    finally: path.write_bytes(whole)


def contents(image_set):
    "What must not change in silence of an image set."
    return image_set.images, image_set.labels, image_set.counts, image_set.classes, image_set.encoding


def readers(place, file):
    "(name, file, what reads it) of every kind of file that numbers come from."
    teacher, taught = study.load(file).runs
    for folder in (teacher.folder, taught.folder):
        for name in ("metrics.json", "predictions.npz", "history.csv"):
            yield name, folder / name, lambda folder=folder: runs.load(folder)
    yield "weights", teacher.folder / "weights.pt", lambda: runs.classifier(teacher.folder).state_dict()
    made = data.load("oracle").subset(torch.arange(200))
    archive = data.write_archive(replace(made, name="some", posterior=None, index=None), place)
    yield "archive", archive, lambda: contents(data.read_archive(archive))
    run = Run(preset="demo", depth=8, epochs=5, warmup=0, milestones=(4,),
              train_size=64, validation_size=20, test_size=50, ood_size=50)
    train, validation, _ = data.split(data.load("oracle"), (64, 20, 50), 0)
    classifier, checkpoint = models.create("basic", 0, **run.model), place / "checkpoint.pt"
    training.fit(classifier, train, validation, run, place, lambda history: None, checkpoint_seconds=0)
    yield "checkpoint", checkpoint, lambda: training.read_checkpoint(checkpoint, training.identity(run, train), "cpu")
    # it may mean another study, and must not end in a traceback
    yield "study file", file, lambda: bool(study.load(file))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory() as place:
        try:
            file = file_in(Path(place) / "whole")
            said, _ = start(file).communicate(timeout=1200)
            wanted = numbers(file)
            files = list(readers(Path(place), file))
            # from here on: making what is then broken does not count
            rounds, end = 0, time.monotonic() + 60 * arguments.minutes
            while time.monotonic() < end:
                for _ in range(200): damage(*chance.choice(files), chance)
                if time.monotonic() < end: kills(Path(place) / f"killed-{rounds}", wanted, chance)
                shutil.rmtree(Path(place) / f"killed-{rounds}", ignore_errors=True)
                rounds += 1
        except Silent as error:
            print(f"{error}\nAgain with --seed {arguments.seed}")
            return 1
        finally:
            for name, n in sorted(counted.items()): print(f"{n:6d}  {name}")
    print("nothing changed in silence")
    return 0


if __name__ == "__main__": sys.exit(main())
