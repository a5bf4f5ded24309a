"""Every lesson runs, top to bottom, in a fresh process, and its committed outputs are what it prints; what is generated
is up to date; what papermill needs is there."""
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
from conftest import ROOT, copy_of_the_project

from soft_cifar.parameters import Run, parameters_cell

LESSONS = sorted(path for path in (ROOT / "nbs").glob("*.ipynb") if path.stem[:2].isdigit() or path.stem == "index")


def source(notebook, tag=None):
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return ["".join(c["source"]) for c in cells if tag is None or tag in c["metadata"].get("tags", [])]


# Its children start with the libraries imported, and share no more.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "torch", "pandas", "seaborn", "scipy.stats", "distributed", "papermill", "execnb.shell"])


def run_lesson(notebook, executed, said):
    """Execute `notebook` in this process, as `nbdev_test` does, and write it with its outputs to the file `executed`.
    What goes wrong is in the file `said`, and then the exit status is 1. A cell that ends in a semicolon must not
    print: this shell would not show it."""
    os.chdir(notebook.parent)
    with open(said, "w") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    shell, lesson = CaptureShell(notebook), read_nb(notebook)
    for cell in lesson.cells:
        if cell.cell_type == "code": cell.outputs = []     # a cell that prints nothing any more would keep them
    try: shell.run_all(lesson, exc_stop=True)
    except Exception:
        sys.stderr.write(shell.prettytb(notebook))
        sys.exit(1)
    write_nb(lesson, executed)


# What differs from run to run or from machine to machine, and what stands for it in a comparison, in this order.
NUMBER = r"(?<![A-Za-z_\d.])[-+]?(\d{1,3}(,\d{3})+|\d+|(?=\.\d))(\.\d*)?(e[-+]?\d+)?\.?"
PLACEHOLDERS = [
    (r"\b\d+(\.\d+){2,}[\w+.]*", "#"),             # a version
    (r"\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7,}\b\+?", "#"),     # a digest, a commit, one with changes
    (r"[█▏▎▍▌▋▊▉]+", "|"),                         # a bar of progress
    (NUMBER + r"|\b(nan|inf)\b", "#"),
    (r"# h # min\b|# min\b|# h\b", "# s"),         # how long it takes, on whatever machine
    (r"[-=]{3,}", "-"),                            # rules and columns are as wide as their numbers
    (r"\s+", " "),
    (r"\[ (?=#)", "["),                            # where a tensor leaves room for a sign
]
# In the markup of a table pandas names the cells at random.
MARKUP = re.compile(r"<style.*?</style>|<[^<>]*>", re.DOTALL)
# The line that training shows and renews in Jupyter, and nowhere else.
LIVE = re.compile(r"\d+ epochs in .*, weights of epoch \d+ kept")
# A cell may say why its words are not the same on each machine. Then only how many outputs it has is compared.
DIFFERS = re.compile(r"^# outputs differ: \w.*", re.M)


def words_of(text):
    "`text` as far as it should be the same each time: with a placeholder for each number."
    for pattern, placeholder in PLACEHOLDERS: text = re.sub(pattern, placeholder, text)
    return text.strip()


def text_of(data):
    "What a reader sees of a value that is shown: of several forms of one table, the richest."
    if "text/html" in data: return MARKUP.sub(" ", "".join(data["text/html"]))
    return "".join(data.get("text/markdown") or data.get("text/plain", ""))


def telling(cell):
    """What a code cell tells its reader: all that it printed, each table and value that it shows, and how many figures.
    Jupyter cuts what is printed where it likes and shows a figure before or after a value, so the order of these three
    says nothing."""
    outputs = cell["outputs"]
    printed = [output for output in outputs if output["output_type"] == "stream" and output["name"] == "stdout"]
    shown = [output["data"] for output in outputs if "data" in output]
    figures = [data for data in shown if any(kind.startswith("image/") for kind in data)]
    values = [text_of(data) for data in shown if data not in figures]
    return dict(printed=words_of("".join("".join(output["text"]) for output in printed)),
                shown=[words_of(text) for text in values if not LIVE.fullmatch(text)], figures=len(figures))


def stale(committed, executed):
    """Yields a message for each code cell of the notebook `committed` that tells something else in the notebook
    `executed`; both as JSON holds them."""
    for number, (before, now) in enumerate(zip(committed["cells"], executed["cells"], strict=True)):
        if before["cell_type"] != "code": continue
        old, new = telling(before), telling(now)
        if DIFFERS.search("".join(before["source"])):
            old, new = ({part: len(what) if isinstance(what, list) else bool(what) for part, what in one.items()}
                        for one in (old, new))
        for part in old:
            if old[part] == new[part]: continue
            yield f"cell {number} ({before['id']}), {part}:\n  committed: {old[part]}\n  now:       {new[part]}"


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda path: path.stem)
def test_lesson(notebook, tmp_path):
    """A lesson runs in a process of its own, so that none sees another's state, and its committed outputs are what it
    prints now: the words, the tables and that there is a figure; numbers are drawn anew each time."""
    executed, said = tmp_path / notebook.name, tmp_path / "said"
    process = processes.Process(target=run_lesson, args=(notebook, executed, said))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text()[-8000:]
    messages = list(stale(json.loads(notebook.read_text()), json.loads(executed.read_text())))
    assert not messages, f"outputs of {notebook.name} are stale, run `make notebooks`:\n" + "\n".join(messages)


def cell_of(*outputs, source="f()"):
    "A code cell, as JSON holds it, with these `outputs`: printed texts, or mappings of what is shown."
    as_json = [dict(output_type="stream", name="stdout", text=[output]) if isinstance(output, str)
               else dict(output_type="execute_result", data=output) for output in outputs]
    return dict(cell_type="code", id="0", source=[source], outputs=as_json)


FIGURE = {"image/png": "", "text/plain": "<Figure size 640x480 with 1 Axes>"}
TABLE = {"text/html": '<style>#T_1</style><table id="T_1"><td>basic</td><td>0.81</td></table>', "text/plain": "..."}
SAME = {
    "other numbers": (cell_of("loss 2.3, 1,500 images, 1e-05\n"), cell_of("loss  12.34., 7 images, .5\n")),
    "more digits": (cell_of("[-1.0, 3]"), cell_of("[-0.9999998807907104, 1234567.5]")),
    "another sign": (cell_of("tensor([0.1, 2.0])"), cell_of("tensor([ 0.1, -2.0])")),
    "another time": (cell_of("about 3 h 15 min, 7 min left"), cell_of("about 42 s, 0 s left")),
    "another digest": (cell_of("commit 9adf77d+ of 0.1.0"), cell_of("commit 41f7e6e of 2.15.0+cu132")),
    "cut elsewhere": (cell_of("a\n", FIGURE, "b\n"), cell_of("a\nb\n", FIGURE)),
    "another table": (cell_of(TABLE), cell_of({"text/html": TABLE["text/html"].replace("1", "7")})),
    "another machine": [cell_of(f"AMD {n}", source="# outputs differ: processors\nf()") for n in ("EPYC", "Ryzen")],
}
OTHER = {
    "a word": (cell_of("lr=0 is out of range"), cell_of("lr=0 is not usable")),
    "a word in brackets": (cell_of("<folder>/a"), cell_of("<root>/a")),
    "a name with a number": (cell_of("resnet20"), cell_of("resnet56")),
    "no figure": (cell_of(FIGURE), cell_of()),
    "two figures": (cell_of(FIGURE), cell_of(FIGURE, FIGURE)),
    "nothing printed": (cell_of("lr=0 is not usable"), cell_of()),
    "another column": (cell_of(TABLE), cell_of({"text/html": TABLE["text/html"].replace("basic", "sngp")})),
    "no reason": [cell_of(f"AMD {n}", source="# outputs differ:\nf()") for n in ("EPYC", "Ryzen")],
    "nothing, for a reason": (cell_of("AMD", source="# outputs differ: processors"), cell_of()),
}


def messages_of(before, now):
    "What `stale` says of two notebooks of one cell each."
    return list(stale(dict(cells=[before]), dict(cells=[now])))


@pytest.mark.parametrize("before, now", SAME.values(), ids=SAME)
def test_numbers_and_cuts_make_nothing_stale(before, now):
    assert not messages_of(before, now), messages_of(before, now)


@pytest.mark.parametrize("before, now", OTHER.values(), ids=OTHER)
def test_words_and_figures_that_differ_are_stale(before, now):
    [message] = messages_of(before, now)
    assert "cell 0" in message and "committed: " in message and "now: " in message, message


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The tracked and new files of the project, copied, so that exporting and cleaning cannot touch the original."
    folder = tmp_path_factory.mktemp("copy")
    return folder, copy_of_the_project(folder)


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
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", text, re.M)
    floor_of = {name: int(number) for number, named in rows for name in re.findall(r"`(\d\d_\w+)`", named)}
    lessons = {path.stem for path in LESSONS} - {"index"}
    assert set(floor_of) == lessons, f"nbs/index.ipynb, the table of floors: add or remove {set(floor_of) ^ lessons}"
    exports = {path.stem: re.search(r"default_exp (\S+)", "\n".join(source(path))) for path in LESSONS}
    module_of = {stem: "soft_cifar." + found[1].removesuffix(".__init__") for stem, found in exports.items() if found}
    floor = {module: floor_of[stem] for stem, module in module_of.items()}
    for path in (path for path in LESSONS if path.stem in module_of):
        exported = ast.parse("\n".join(cell for cell in source(path) if "#| export" in cell))
        imports = [node for node in ast.walk(exported) if isinstance(node, ast.ImportFrom)]
        for node in (node for node in imports if node.module.split(".")[0] == "soft_cifar"):
            names = [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
            for target in [node.module] if node.module in floor else names:
                below = floor[target] < floor[module_of[path.stem]]
                assert below, f"{path.stem} imports {target}, which is not below it"
        texts = {node.value for node in ast.walk(exported) if isinstance(node, ast.Constant)}
        for target in texts & floor.keys() - {module_of[path.stem]}:     # imported by name, when it is needed
            below = floor[target] < floor[module_of[path.stem]]
            assert below, f"{path.stem} names {target}, which is not below it"
        # the packages whose modules it finds
        packages = {f"soft_cifar.{name}" for name in ("models", "backbones", "labels", "datasets")}
        for package in texts & packages:
            for target in (module for module in floor if module.startswith(f"{package}.")):
                below = floor[target] < floor[module_of[path.stem]]
                assert below, f"{path.stem} finds {target}, which is not below it"
