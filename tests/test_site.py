"""The site: every page has what it needs, no link leads nowhere, nothing is fetched from elsewhere. And what nbdev asks
of notebooks to make pages of its own."""
import ast
import json
import posixpath
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
from conftest import ROOT

from soft_cifar.site import check_place

pytest.importorskip("latex2mathml", reason="the site needs latex2mathml: pip install -e '.[dev]'")
bs4 = pytest.importorskip("bs4", reason="the site needs nbconvert: pip install -e '.[dev]'")

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_stand_in_cells_of_their_own(notebook):
    "nbdev executes each cell that imports to make a page: one that does more would train, measure or fail there."
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    for source in ("".join(cell["source"]) for cell in cells):
        lines = ["pass" if line.startswith(("%", "!")) else line for line in source.splitlines()]
        statements = ast.parse("\n".join(lines)).body
        imports = [isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in statements]
        assert all(imports) or not any(imports), f"imports and other code in one cell of {notebook.name}:\n{source}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built as `make site` does: {path: parsed page}, and the paths of all files."
    place = tmp_path_factory.mktemp("built") / "_site"
    done = subprocess.run([sys.executable, "-m", "soft_cifar.site", place], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    pages = {path: bs4.BeautifulSoup((place / path).read_text(), "html.parser") for path in sorted(files)
             if path.endswith(".html")}
    return pages, files


def test_every_lesson_and_report_is_there(site):
    pages, _ = site
    lessons = {f"nbs/{path.stem}.html" for path in NOTEBOOKS if path.stem != "index"}
    reports = {path.relative_to(ROOT).as_posix() for path in (ROOT / "report").glob("*/index.html")}
    assert set(pages) == {"index.html", "guide.html"} | lessons | reports


@pytest.mark.parametrize("there", ["a folder with a file", "a file"])
def test_what_is_no_site_is_not_removed(tmp_path, there):
    "A folder that somebody names by mistake stays as it is; one that is empty, or a site, makes room."
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    place = tmp_path if there == "a folder with a file" else file
    command = [sys.executable, "-m", "soft_cifar.site", place]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "is no site that was built before" in done.stderr, done
    assert "Traceback" not in done.stderr and file.read_text() == "mine", done
    for name in ("empty", "site"): (tmp_path / name).mkdir()
    (tmp_path / "site" / ".nojekyll").touch()
    for name in ("empty", "site", "free"): check_place(tmp_path / name)


def test_no_link_leads_nowhere(site):
    "Neither to a file nor to a place in one; a link to this project on GitHub names a file that is here."
    pages, files = site
    ours = re.compile(r"https://github\.com/[^/]+/soft_cifar/(?:blob|tree)/[^/]+/(.*)")
    for path, page in pages.items():
        for element in page.select("[href], [src]"):
            link = unquote(element.get("href") or element.get("src"))
            if found := ours.match(link):
                assert (ROOT / found[1].split("#")[0]).exists(), f"{path} links to {link}"
            if re.match(r"(https?|mailto|data):", link): continue
            target, _, part = link.partition("#")
            meant = posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) if target else path
            assert meant in files, f"{path} links to {link}"
            if part and meant in pages: assert pages[meant].find(id=part), f"{path} links to {link}: no such place"


def test_nothing_is_fetched_from_elsewhere(site):
    pages, _ = site
    for path, page in pages.items():
        fetched = [element[name] for name in ("src", "srcset", "data", "poster")
                   for element in page.find_all(attrs={name: True})]
        fetched += [link["href"] for link in page.find_all("link", href=True)]
        styles = " ".join(element.get_text() for element in page.find_all(["style", "script"]))
        styles += " ".join(element["style"] for element in page.find_all(style=True))
        fetched += re.findall(r"(?:https?:)?//[\w.]+\.\w+/[^\s\"')]*|@import.*|url\([^)]*\)", styles)
        elsewhere = [link for link in fetched if re.match(r"(https?:)?//|@import|url\(", link)]
        assert not elsewhere, f"{path} fetches {elsewhere}"


def test_every_page_has_what_a_reader_needs(site):
    "A title of its own, one main heading, navigation, and words for each figure."
    pages, _ = site
    titles = [page.title.get_text() for page in pages.values()]
    assert len(set(titles)) == len(titles), [title for title in titles if titles.count(title) > 1]
    for path, page in pages.items():
        assert len(page.find_all("h1")) == 1, f"{path}: {page.find_all('h1')}"
        assert page.select_one("nav.site a[href$='index.html']"), path
        assert page.html["lang"] == "en" and page.find("meta", attrs={"name": "viewport"}), path
        silent = [image.get("src") for image in page.find_all("img") if not image.get("alt", "").strip()]
        silent += [image.get("src") for image in page.find_all("img", alt=re.compile("No description"))]
        assert not silent, f"{path}: no words for {silent}"


def test_reports_say_where_they_come_from(site):
    "The numbers in files, other pages, and the command that compiles the report again."
    pages, _ = site
    for path, page in pages.items():
        if not path.startswith("report/"): continue
        assert page.select_one(".lead").get_text().strip(), f"{path} has no answer"
        links = [link["href"] for link in page.main.select("a[href]")]
        for what in (r"\.(csv|json)$", r"\.html$"): assert any(re.search(what, link) for link in links), (path, what)
        name = path.split("/")[1]
        commands = " ".join(element.get_text() for element in page.main.find_all(["code", "pre"]))
        made_by = (f"soft-cifar report runs/{name}.yaml", f"make {name}")
        assert any(command in commands for command in made_by), f"{path} names none of {made_by}"


def test_formulas_are_whole(site):
    "No dollars or commands of LaTeX are left beside or within the formulas."
    pages, _ = site
    for path, page in pages.items():
        for element in page.find_all(["pre", "code", "style", "script"]): element.extract()
        left = re.findall(r"\$[^$\n]{1,60}\$|\\[a-z]{2,}\b", page.main.get_text())
        assert not left, f"{path}: {left[:5]}"


def test_readme_links_to_the_site():
    "At the address that settings.ini makes; beside each such link is one that works in a checkout."
    from soft_cifar import site
    text = (ROOT / "README.md").read_text()
    published = set(re.findall(r"\((https://[\w-]+\.github\.io/[^)#]*)\)", text))
    assert published and all(link.startswith(site.address()) for link in published), published
    for link in published - {site.address()}:
        path = link.removeprefix(site.address())
        assert f"({path})" in text and (ROOT / path).exists(), f"{link}, but no link to {path}"
    relative = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert all((ROOT / path).exists() for path in relative), [path for path in relative if not (ROOT / path).exists()]


def test_readme_fits_a_repository_page():
    "A page of a repository is some 830 pixels wide: lines of code longer than 90 characters are cut there."
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    long = [line for block in blocks for line in block.splitlines() if len(line) > 90]
    assert blocks and not long, long
