"""The course: every notebook runs, checks tell stubs from solutions, no name or quote is stale."""

import ast
import builtins
import copy
import keyword
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from the_course import COURSE, course, run

ROOT = Path(__file__).resolve().parent.parent

NOTEBOOKS = sorted(COURSE.glob("[0-9]*.ipynb"))
SAVED = {path.stem: run.read(path) for path in NOTEBOOKS}
each_notebook = pytest.mark.parametrize("name", SAVED)


def cells(notebook, kind: str) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


# ------------------------------------------------------------------------------------ they run
@each_notebook
def test_it_runs_in_a_kernel_where_stubs_fail_their_checks_and_solutions_pass(name):
    path = COURSE / f"{name}.ipynb"
    notebook = run.with_solutions(run.read(path), run.solutions(path), stubs=True)
    run.execute(notebook, fast=True)
    verdicts = [printed(cell) for cell in tagged(notebook, "check")]
    stubs, solved = verdicts[::2], verdicts[1::2]
    assert len(stubs) == len(solved) >= 3
    for verdict in stubs:
        assert verdict.startswith("not yet: "), verdict
    for verdict in solved:
        assert verdict.startswith("right: "), verdict


def test_a_notebook_is_saved_in_one_form(tmp_path):
    for number in (1, 2):
        run.save(run.read(NOTEBOOKS[0]), tmp_path / f"{number}.ipynb")
    assert (tmp_path / "1.ipynb").read_bytes() == NOTEBOOKS[0].read_bytes()
    assert (tmp_path / "2.ipynb").read_bytes() == NOTEBOOKS[0].read_bytes()


def test_an_unknown_notebook_is_refused_by_name():
    with pytest.raises(ValueError, match="07_directing"):
        run.notebooks(["77"])


def test_only_what_a_student_sees_is_saved(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--save", "--solutions"])
    with pytest.raises(ValueError, match="without --fast or --solutions"):
        run.main()


def test_without_the_package_the_first_cell_installs_it_from_the_repository(monkeypatch):
    monkeypatch.chdir(COURSE)
    monkeypatch.setitem(sys.modules, "course", None)  # an ImportError, until pip has run
    monkeypatch.setattr(sys, "path", [*sys.path])
    commands = []

    def pip(command, check):
        commands.append(command[1:])
        monkeypatch.setitem(sys.modules, "course", course)

    monkeypatch.setattr(subprocess, "run", pip)
    exec(cells(SAVED["00_the_whole_path"], "code")[0].source, {})
    assert commands == [["-m", "pip", "install", "-q", "-e", "..[notebooks]"]]
    assert sys.path[-1] == str(ROOT)


def test_a_notebook_alone_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "course", None)
    with pytest.raises(ImportError, match="Put the whole repository here"):
        exec(cells(SAVED["00_the_whole_path"], "code")[0].source, {})


# ------------------------------------------------------------------------- how they are made
@each_notebook
def test_it_is_small_and_has_exercises_in_pairs_with_their_checks(name):
    notebook = SAVED[name]
    assert (COURSE / f"{name}.ipynb").stat().st_size < 2_500_000
    assert len(notebook.cells) <= 60
    for cell in cells(notebook, "code"):
        assert len(cell.source.splitlines()) <= 30, cell.source
    assert 3 <= len(tagged(notebook, "exercise")) <= 5
    for before, after in zip(notebook.cells, notebook.cells[1:]):
        assert ("exercise" in before.metadata.get("tags", [])) == (
            "check" in after.metadata.get("tags", [])
        )
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each_notebook
def test_its_first_cell_is_that_of_all(name):
    first = [cells(notebook, "code")[0].source for notebook in (SAVED[name], *SAVED.values())]
    assert len(set(first)) == 1


@each_notebook
def test_its_saved_outputs_are_there_and_tell_nothing_of_the_machine(name):
    shown = 0
    for cell in cells(SAVED[name], "code"):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source
            words = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/tmp|/home|/root|/Users|\\Users|site-packages", words), words
            shown += "image/png" in output.get("data", {})
    assert shown >= 1, "no picture: python notebooks/run.py --save"


@each_notebook
def test_the_papers_words_are_few_and_say_from_where(name):
    for cell in cells(SAVED[name], "markdown"):
        for quote in re.findall(r"(?:^>.*\n?)+", cell.source, re.M):
            assert len(quote.split()) < 60, quote
            assert re.search(r"\((§|abstract|Fig)", quote), quote


# ------------------------------------------------------------------------ what they speak of
def library_names() -> set[str]:
    """Every name that the package and the notebooks' own files define or use."""
    names = set(keyword.kwlist) | set(dir(builtins)) | set(dir(torch)) | set(dir(torch.Tensor))
    files = [*ROOT.glob("*.py"), *ROOT.glob("tinydance/**/*.py"), *COURSE.glob("*.py")]
    for file in files:
        names.add(file.stem)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for field in ("name", "id", "attr", "arg"):
                value = getattr(node, field, None)
                names |= {value} if isinstance(value, str) else set()
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= set(re.findall(r"\w+", node.value))
    return names


LIBRARY = library_names()


def gone(text: str, here: set[str], folder: Path) -> list[str]:
    """Links to no file, and files, folders and names in backquotes that are nowhere.

    A file is named from the repository, the package, the tests or the notebooks: `video/read.py`.
    here: names that the notebook defines itself.
    """
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    found = []
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in link and not (folder / link).exists():
            found.append(link)
    for word in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[\w/]+(\.(py|md|json|ipynb)|/)", word):
            places = (ROOT, ROOT / "tinydance", ROOT / "tests", COURSE)
            found += [] if any((place / word).exists() for place in places) else [word]
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", word):
            parts = word.removesuffix("()").split(".")
            found += [] if all(part in LIBRARY | here for part in parts) else [word]
    return found


@each_notebook
def test_every_file_and_name_that_it_speaks_of_is_there(name):
    own = set()
    for cell in cells(SAVED[name], "code"):
        own |= set(re.findall(r"[A-Za-z_]\w*", cell.source))
    for cell in cells(SAVED[name], "markdown"):
        assert gone(cell.source, own, COURSE) == [], cell.source


def test_the_search_for_names_finds_what_is_gone():
    there = "`schedulers.py` `video/story.py` `weights/` `add_noise` [a](README.md)"
    assert gone(there, set(), ROOT) == []
    not_there = "`nothing.py` `story.py` `nowhere/` `add_noize()` [b](nowhere.md)"
    expected = ["nowhere.md", "nothing.py", "story.py", "nowhere/", "add_noize()"]
    assert gone(not_there, set(), ROOT) == expected


# ------------------------------------------------------------------ what they quote
def find_quotes(cell) -> list[ast.Call]:
    """The calls of `course.code` in a cell, in their order."""
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    quotes = [call for call in calls if ast.unparse(call.func) == "course.code"]
    return sorted(quotes, key=lambda call: (call.lineno, call.col_offset))


def import_names(notebook) -> dict:
    """What the imports of a notebook define. Nothing else of its cells is run."""
    names = {}
    for cell in cells(notebook, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(node), names)
    return names


def stale_quotes(notebook, name: str) -> list[str]:
    """What is wrong with a notebook's quotes: it shows other lines than the library has now."""
    names, found = import_names(notebook), []
    for cell in cells(notebook, "code"):
        shown = [
            output.data["text/markdown"]
            for output in cell.outputs
            if "text/markdown" in output.get("data", {})
        ]
        now = []
        for call in find_quotes(cell):
            try:
                now.append(eval(ast.unparse(call), names).data)
            except (AttributeError, NameError, ValueError) as error:
                found.append(f"{name}, cell {cell.id}: {ast.unparse(call)} fails: {error}")
        for saved, current in zip_longest(shown, now, fillvalue="nothing"):
            if saved != current:
                found.append(
                    f"{name}, cell {cell.id} shows\n{saved}\nand the library has\n{current}"
                )
    return found


@each_notebook
def test_its_saved_quotes_are_what_the_library_says_now(name):
    found = stale_quotes(SAVED[name], name)
    assert not found, "\n\n".join([*found, f"python notebooks/run.py {name} --save mends it"])


def test_the_search_for_stale_quotes_finds_what_has_changed_since():
    notebook = copy.deepcopy(SAVED["01_noise_and_schedules"])
    [cell] = [cell for cell in cells(notebook, "code") if cell.source == "course.code(add_noise)"]
    saved = cell.outputs[0].data["text/markdown"]
    cell.outputs[0].data["text/markdown"] = saved.replace("ab.sqrt()", "ab")
    [report] = stale_quotes(notebook, "01")
    assert report.startswith(f"01, cell {cell.id} shows") and "ab.sqrt() * z_0" in report
    cell.outputs = []
    [report] = stale_quotes(notebook, "01")
    assert report.startswith(f"01, cell {cell.id} shows\nnothing\n")
    cell.source = 'course.code(add_noise, "no such words")'
    [report] = stale_quotes(notebook, "01")
    assert "fails: no line has 'no such words'" in report


def test_the_teachers_page_lists_every_notebook_and_where_each_fact_is_taught():
    text = (COURSE / "README.md").read_text(encoding="utf-8")
    assert gone(text, set(), COURSE) == []
    for path in NOTEBOOKS:
        assert f"({path.name})" in text
    facts = re.findall(r"^\d+\. .*\[(.+?)\]\(([\w.]+\.ipynb)\)", text, re.M)
    assert len(facts) == 10
    for heading, name in facts:
        headings = re.findall(
            r"^#+ (.+)$",
            "\n".join(cell.source for cell in cells(SAVED[Path(name).stem], "markdown")),
            re.M,
        )
        assert heading in headings, (heading, name)


def test_a_line_that_the_library_no_longer_has_is_an_error():
    with pytest.raises(ValueError, match="no line has 'no such words'"):
        course.code(course.play, "no such words")


# --------------------------------------------------------------------------------- the lecture
def test_ten_slides_fill_the_lecture_with_the_courses_own_pictures():
    text = (COURSE / "slides.html").read_text(encoding="utf-8")
    slides = re.findall(r"<section>(.*?)</section>", text, re.S)
    minutes = [int(re.search(r"<aside>(\d+) minutes", slide)[1]) for slide in slides]
    assert len(slides) == 10 and sum(minutes) == 90
    pictures = re.findall(r'<img src="([^"]+)" alt="([^"]{20,})">', text)
    assert len(pictures) == text.count("<img") >= 6
    assert [name for name, _ in pictures if not (COURSE / name).exists()] == []
