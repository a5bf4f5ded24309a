"""The package as others install it: a light core, extras that errors name, a command that works without a checkout."""
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, copy_of_the_project

import soft_cifar
from soft_cifar import site

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# what the core does without: all that extras bring, by the names under which it is imported
EXTRA = ["IPython", "ipykernel", "jupyterlab", "nbclient", "nbconvert", "papermill", "dask", "distributed", "pandas",
         "pyarrow", "scipy", "matplotlib", "seaborn", "yaml", "tqdm", "torchmetrics"]
# the modules that need them
WITH_EXTRAS = {"adapters", "benchmark", "budget", "claims", "distance", "findings", "kernels", "peterson", "plots",
               "spending", "stats", "study", "tables", "worker"}

# A Python that starts with this finds none of EXTRA.
BLOCK = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    "Finds nothing that extras bring, as where they are not installed."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {EXTRA} else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def python(code, *words):
    "What a new Python says that runs `code`, with the package of this checkout."
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, env=environment,
                          capture_output=True, text=True)


def cells_of(lesson):
    "The cells of a notebook, as pairs of kind and source."
    cells = json.loads((ROOT / "nbs" / f"{lesson}.ipynb").read_text())["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def example():
    "The code of the thirty lines in the lesson for those who bring their own network, with less to do."
    cells = cells_of("43_library")
    start = next(n for n, (_, text) in enumerate(cells) if text.startswith("## Thirty lines"))
    stop = next(n for n, (_, text) in enumerate(cells) if text.startswith("## Any source"))
    code = "\n\n".join(text for kind, text in cells[start:stop] if kind == "code")
    lines = code.split("mean = ")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 30, lines
    assert "size, epochs = 1000, 4" in lines, lines
    return lines.replace("size, epochs = 1000, 4", "size, epochs = 128, 1")     # two steps


EXPERIMENT = """
from soft_cifar import experiment, runs
from soft_cifar.parameters import Run
sizes = dict(train_size=100, validation_size=100, test_size=100, ood_size=100)
folder = experiment.execute(Run(preset="demo", depth=8, schedule="one_cycle", epochs=1, output=sys.argv[1], **sizes))
assert "torch._dynamo" not in sys.modules, "a compiler was imported, for seconds, that nothing uses"
print(f"measured {len(runs.record(folder)['metrics'])}")
"""


def test_the_core_trains_without_what_extras_bring(tmp_path):
    "Every module but those that need extras is imported, the lesson's example runs, and an experiment to its folder."
    folder = Path(soft_cifar.__file__).parent
    names = [".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")]
    core = sorted(name.removesuffix(".__init__") for name in names if name not in WITH_EXTRAS and name != "__init__")
    assert {"labels", "losses", "metrics", "experiment", "cli"} <= {*core}, core
    code = BLOCK + "".join(f"import soft_cifar.{name}\n" for name in core) + EXPERIMENT + example()
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "KL to people" in done.stdout and "measured" in done.stdout, done.stdout


IMPORTED = """
import importlib
for name in sys.argv[1:]:
    try: importlib.import_module(f"soft_cifar.{name}")
    except ModuleNotFoundError: continue
    print(name)
print("and no more")
"""


def test_what_is_listed_as_needing_extras_does():
    done = python(BLOCK + IMPORTED, *sorted(WITH_EXTRAS))
    assert done.stdout == "and no more\n", f"these belong to the core: {done.stdout}, or: {done.stderr}"


@pytest.mark.parametrize("words", ["study runs/demo.yaml", "status runs/demo.yaml", "report runs/demo.yaml",
                                   "data --pack runs/demo.yaml"])
def test_a_command_names_the_extra_that_it_lacks(words):
    done = python(f"{BLOCK}from soft_cifar.cli import main\nmain(sys.argv[1:])", *words.split())
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    assert "is not installed" in done.stderr and "pip install 'soft_cifar[study]'" in done.stderr, done


def test_the_core_prepares_data_and_says_its_version():
    code = f"{BLOCK}from soft_cifar.cli import main\nmain(sys.argv[1:])"
    assert "oracle: 10,000 images" in python(code, "data", "oracle").stdout
    assert python(code, "--version").stdout.strip() == f"soft_cifar {soft_cifar.__version__}"


def test_adapters_name_their_extra():
    done = python(f"{BLOCK}import soft_cifar.adapters")
    assert "pip install 'soft_cifar[torchmetrics]'" in done.stderr, done


def test_every_package_and_file_is_in_the_wheel(tmp_path):
    "The wheel, built without a network, holds every module, the marker of types, and what the command reads."
    source = tmp_path / "source"
    copy_of_the_project(source)
    for path in [ROOT / "README.md", ROOT / "LICENSE", *(ROOT / "runs").glob("*.yaml")]:
        copy(path, source / path.relative_to(ROOT))
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
             "--wheel-dir", tmp_path, source]
    done = subprocess.run(words, capture_output=True, text=True)
    if "No module named 'setuptools" in done.stderr or "BackendUnavailable" in done.stderr:
        pytest.skip("needs setuptools beside pip")
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("soft_cifar/")}
    package = Path(soft_cifar.__file__).parent
    wanted = {f"soft_cifar/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    wanted |= {f"soft_cifar/project/runs/{path.name}" for path in (ROOT / "runs").glob("*.yaml")}
    wanted |= {f"soft_cifar/project/nbs/{name}.ipynb" for name in ("train", "report", "explore")}
    wanted.add("soft_cifar/py.typed")
    assert there == wanted, there ^ wanted


@pytest.fixture
def installed(tmp_path):
    "A folder where the package lies as pip installs it, outside of any checkout."
    place = tmp_path / "site" / "soft_cifar"
    package = Path(soft_cifar.__file__).parent
    for path in package.rglob("*.py"): copy(path, place / path.relative_to(package))
    for path in (ROOT / "runs").glob("*.yaml"): copy(path, place / "project" / "runs" / path.name)
    for name in ("train", "report"): copy(ROOT / "nbs" / f"{name}.ipynb", place / "project" / "nbs" / f"{name}.ipynb")
    return place.parent


def copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


SMALL = """
shared: {preset: demo, depth: 8, schedule: one_cycle, epochs: 2, train_size: 200, validation_size: 100}
models: {basic: {test_size: 100, ood_size: 100}}
labels: [soft, hard]
seeds: [0]
"""


def test_a_study_and_its_report_from_an_empty_folder(installed, tmp_path):
    """Outside a checkout the command brings its study file and its notebooks along; runs and report go below the
    current folder, and what git says there about another project is not taken for ours."""
    folder = tmp_path / "empty"
    folder.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    theirs = ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "theirs"]
    subprocess.run(["git", *theirs], cwd=folder, check=True)

    def command(*words):
        environment = os.environ | dict(PYTHONPATH=str(installed), OMP_NUM_THREADS="1")
        done = subprocess.run([sys.executable, "-m", "soft_cifar.cli", *words], cwd=folder, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done
        return done.stdout

    carried = installed / "soft_cifar" / "project" / "runs"
    (carried / "again.yaml").write_text((carried / "demo.yaml").read_text() + "reuse: [methods]\n")
    said = command("study", "runs/again.yaml", "--dry-run")
    assert "a copy of the one in the package" in said and "pending" in said, said
    assert sorted(os.listdir(folder / "runs")) == ["again.yaml", "methods.yaml"], os.listdir(folder / "runs")

    (folder / "runs" / "small.yaml").write_text(SMALL)
    assert "2 runs made" in command("study", "runs/small.yaml", "--jobs", "2")
    assert "2 done" in command("status", "runs/small.yaml")
    command("report", "runs/small.yaml")
    assert (folder / "report" / "small" / "index.html").is_file(), [*folder.rglob("*")]
    records = [json.loads(path.read_text()) for path in folder.glob("runs/small/*/*/metrics.json")]
    assert [record["commit"] for record in records] == [None, None], records


def test_a_commit_is_that_of_the_code_that_runs(tmp_path):
    "Within another checkout, whose notebooks and runs are meant, there is no commit: its code is not what runs."
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    git = ["git", "-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    said = "from soft_cifar.checks import checkout, commit; print(checkout(), commit())"

    def says(folder):
        done = subprocess.run([sys.executable, "-c", said], cwd=folder, env=os.environ | dict(PYTHONPATH=str(ROOT)),
                              capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert says(tmp_path) == [str(tmp_path.resolve()), "None"], says(tmp_path)
    head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode: return     # a copy without its history
    assert says(ROOT / "nbs") == [str(ROOT), head.stdout.strip() + "+" * says(ROOT)[1].endswith("+")]


def recipes():
    "The recipes of the lesson by the package that each needs, as code that defines `progress`."
    text = "\n".join(text for kind, text in cells_of("43_library") if kind == "markdown")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = {re.search(r"tensorboard|mlflow|wandb", block)[0]: block for block in blocks}
    assert {*found} == {"tensorboard", "mlflow", "wandb"}, found
    return found


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_recipe_writes_what_it_is_told(name, tmp_path, monkeypatch):
    "Each recipe, where its package is installed, writes a history of two epochs below the current folder."
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    row = dict(epoch=1, lr=.1, train_loss=2., validation_loss=2., validation_accuracy=.3, seconds=1.)
    names = {}
    exec(recipes()[name], names)
    for history in ([row], [row, row | dict(epoch=2)]): names["progress"](history)
    for end in ("writer.close()", "mlflow.end_run()", "wandb.finish()"):
        if end.split(".")[0] in names: exec(end, names)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert written, name


def test_the_shell_completes_words_and_files():
    "What shtab prints for bash knows the commands and their options."
    pytest.importorskip("shtab")
    words = [sys.executable, "-m", "shtab", "--shell=bash", "soft_cifar.cli.parser_of_words"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    asks = done.stdout + """
COMP_WORDS=(soft-cifar study --dr) COMP_CWORD=2 COMP_LINE="soft-cifar study --dr" COMP_POINT=21
_shtab_soft_cifar
echo "found ${COMPREPLY[@]}"
"""
    found = subprocess.run(["bash", "-c", asks], capture_output=True, text=True)
    assert "found --dry-run" in found.stdout, found


def test_what_a_repository_says_about_itself():
    """The version stands in settings.ini, and CITATION.cff and CHANGELOG.md know it; pyproject.toml says where the
    project is; a page shows no `skip_exec`."""
    version = soft_cifar.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    urls = PROJECT["project"]["urls"]
    assert (urls["Documentation"], urls["Source"]) == (site.address(), site.repository()), urls
    assert f"repository-code: {urls['Source']}\n" in (ROOT / "CITATION.cff").read_text()
    for path in (ROOT / "nbs").glob("*.ipynb"):
        for kind, text in cells_of(path.stem):
            visible = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
            assert kind != "markdown" or "skip_exec:" not in visible, path


def test_the_extras_hold_what_the_core_does_without():
    "What is no part of the core's requirements stands in an extra, once."
    extras = PROJECT["project"]["optional-dependencies"]
    names = [re.match(r"[\w-]+", line)[0] for line in extras["study"] + extras["notebook"] if "soft_cifar" not in line]
    core = {re.match(r"[\w-]+", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert len({*names}) == len(names) and not core & {*names}, (core, names)
    assert core == {"torch", "torchvision", "numpy", "pillow", "psutil"}, core
