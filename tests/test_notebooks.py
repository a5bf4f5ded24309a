"""Every lesson runs, top to bottom, in a fresh process; what is generated is up to date; what papermill needs is there."""
import ast
import json
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from soft_cifar.runs import Run

LESSONS = sorted(path for path in (ROOT / "nbs").glob("*.ipynb") if path.stem[:2].isdigit() or path.stem == "index")


def source(notebook, tag=None):
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return ["".join(c["source"]) for c in cells if tag is None or tag in c["metadata"].get("tags", [])]


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda path: path.stem)
def test_lesson(notebook):
    "What `nbdev_test` does for one notebook, in a process of its own so that no lesson sees another's state."
    code = f"from nbdev.test import test_nb; import sys; sys.exit(not test_nb({str(notebook)!r})[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=notebook.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The tracked and new files of the project, copied, so that exporting and cleaning cannot touch the original."
    folder = tmp_path_factory.mktemp("copy")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "settings.ini", "pyproject.toml", "nbs", "soft_cifar"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((ROOT / file).read_bytes())
    return folder, files


@pytest.mark.parametrize("command", ["nbdev_export", "nbdev_clean"])
def test_leaves_no_diff(copy, command):
    folder, files = copy
    subprocess.run([sys.executable, "-c", f"from nbdev.export import nbdev_export; from nbdev.clean import nbdev_clean; {command}()"], cwd=folder, check=True)
    changed = [file for file in files if (folder / file).read_bytes() != (ROOT / file).read_bytes()]
    assert not changed, f"{command} changes {changed}: run `make notebooks` and commit"


def test_parameters_cell_is_run():
    "The parameters cell of train.ipynb is tagged (papermill would silently train the defaults) and names the fields of Run, with their defaults."
    [cell] = source(ROOT / "nbs" / "train.ipynb", "parameters")
    named = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell).body}
    assert named == {field.name: field.default for field in fields(Run)}
    assert list(named) == [field.name for field in fields(Run)]


def test_no_error_outputs_and_nothing_skipped():
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"], path
        assert not [c for c in cells if "eval: false" in "".join(c["source"]).replace("eval:false", "eval: false")], path


def test_imports_point_down():
    "A module imports only from floors below its own; the floors are those of the house in index.ipynb."
    floors = [["checks"], ["oracle", "losses", "metrics", "models.resnet", "augment"], ["data", "models"], ["labels", "attacks"], ["runs"], ["training", "plots"], ["evaluation", "cli"]]
    floor = {f"soft_cifar.{name}": level for level, names in enumerate(floors) for name in names}
    for notebook in LESSONS:
        exported = [cell for cell in source(notebook) if "#| export" in cell]
        [name] = [cell.split("default_exp")[1].strip() for cell in source(notebook) if "default_exp" in cell] or [None]
        if name is None: continue
        name = "soft_cifar." + name.removesuffix(".__init__")
        assert name in floor, f"{name} has no floor: add it to this test and to the table in index.ipynb"
        for node in [n for cell in exported for n in ast.walk(ast.parse(cell)) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("soft_cifar")]:
            targets = [node.module] if node.module in floor else [f"{node.module}.{alias.name}" for alias in node.names]
            for target in targets:
                if target != "soft_cifar.__version__": assert floor[target] < floor[name], f"{name} imports {target} from its own floor or above"
