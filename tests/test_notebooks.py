"""Every lesson runs, top to bottom, in a fresh process; what is generated is up to date; what papermill needs is there."""
import ast
import json
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT

from soft_cifar.parameters import Run, parameters_cell

LESSONS = sorted(path for path in (ROOT / "nbs").glob("*.ipynb") if path.stem[:2].isdigit() or path.stem == "index")


def source(notebook, tag=None):
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return ["".join(c["source"]) for c in cells if tag is None or tag in c["metadata"].get("tags", [])]


processes = multiprocessing.get_context("forkserver")     # its children start with the libraries imported, and share no more
processes.set_forkserver_preload(["torch", "pandas", "seaborn", "scipy.stats", "nbdev.test"])


def run_lesson(notebook, said):
    "Execute `notebook` in this process; what it prints goes to the file `said`. The exit status is 0 if it went well."
    os.chdir(notebook.parent)
    with open(said, "w") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    from nbdev.test import test_nb
    sys.exit(not test_nb(notebook)[0])


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda path: path.stem)
def test_lesson(notebook, tmp_path):
    "What `nbdev_test` does for one notebook, in a process of its own so that no lesson sees another's state."
    process = processes.Process(target=run_lesson, args=(notebook, tmp_path / "said"))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()[-8000:]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The tracked and new files of the project, copied, so that exporting and cleaning cannot touch the original."
    folder = tmp_path_factory.mktemp("copy")
    wanted = "settings.ini", "pyproject.toml", "nbs", "soft_cifar"
    words = ["git", "ls-files", "-co", "--exclude-standard", *wanted]
    files = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((ROOT / file).read_bytes())
    return folder, files


@pytest.mark.parametrize("command", ["nbdev_export", "nbdev_clean"])
def test_leaves_no_diff(copy, command):
    folder, files = copy
    subprocess.run([Path(sys.executable).with_name(command)], cwd=folder, check=True)
    changed = [file for file in files if (folder / file).read_bytes() != (ROOT / file).read_bytes()]
    assert not changed, f"{command} changes {changed}: run `make notebooks` and commit"


def test_parameters_cell_is_run():
    """The parameters cell of train.ipynb is tagged (papermill would silently train the defaults), is the one that is
    written from the declarations, and names the fields of Run, with their defaults."""
    [cell] = source(ROOT / "nbs" / "train.ipynb", "parameters")
    assert cell == parameters_cell(), "run `make notebooks` and commit"
    named = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell).body}
    assert named == {field.name: field.default for field in fields(Run)}


def test_outputs_are_clean_and_nothing_is_skipped():
    "No error, no warning (it would name a file of one machine), no cell that is not run."
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"], path
        assert not [cell for cell in cells if "eval:false" in "".join(cell["source"]).replace(" ", "")], path


def test_imports_point_down():
    """A module imports only from floors below its own; the floors are those of the table in index.ipynb, which names
    every lesson."""
    text = "".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"])
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", text, re.M)
    floor_of = {name: int(number) for number, named in rows for name in re.findall(r"`(\d\d_\w+)`", named)}
    assert set(floor_of) == {path.stem for path in LESSONS} - {"index"}, "the table names other notebooks than there are"
    exports = {path.stem: re.search(r"default_exp (\S+)", "\n".join(source(path))) for path in LESSONS}
    module_of = {stem: "soft_cifar." + found[1].removesuffix(".__init__") for stem, found in exports.items() if found}
    floor = {module: floor_of[stem] for stem, module in module_of.items()}
    for path in (path for path in LESSONS if path.stem in module_of):
        exported = ast.parse("\n".join(cell for cell in source(path) if "#| export" in cell))
        imports = [node for node in ast.walk(exported) if isinstance(node, ast.ImportFrom)]
        for node in (node for node in imports if node.module.split(".")[0] == "soft_cifar"):
            names = [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
            for target in [node.module] if node.module in floor else names:
                assert floor[target] < floor[module_of[path.stem]], f"{path.stem} imports {target}, which is not below it"
        for package in re.findall(r'modules_of\("(\S+)"\)', "\n".join(source(path))):     # what it finds, it imports
            for target in (module for module in floor if module.startswith(f"{package}.")):
                assert floor[target] < floor[module_of[path.stem]], f"{path.stem} finds {target}, which is not below it"
