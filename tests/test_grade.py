"""The homework and its grader: a right student gets all points, nobody more than is earned."""

import contextlib
import csv
import inspect
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from the_course import COURSE, grade, run

ROOT = Path(__file__).parent.parent

HOMEWORK = sorted(COURSE.glob("homework/h*.ipynb"))
each_homework = pytest.mark.parametrize("path", HOMEWORK, ids=lambda path: path.stem)


def read_answers(path: Path) -> dict:
    return runpy.run_path(str(path.parent / "answers" / f"{path.stem}.py"))


# ------------------------------------------------------------------------------- the homework
@each_homework
def test_a_homework_has_ten_points_and_its_answers_earn_them_and_its_stubs_none(path):
    [exercises] = grade.read_exercises([path.stem]).values()
    answers, stubs = read_answers(path), {}
    assert sum(exercise.points for exercise in exercises) == 10
    for cell in run.read(path).cells:
        if cell.cell_type == "code":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(cell.source, stubs)
    for function, _, check in exercises:
        for names, verdict in ((answers, "right: "), (stubs, "not yet: ")):
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                check(names[function])
            assert shown.getvalue().startswith(verdict), shown.getvalue()


@each_homework
def test_a_homework_holds_nothing_of_its_answers(path):
    given = path.read_text(encoding="utf-8")
    for name, value in read_answers(path).items():
        if inspect.isfunction(value) and name not in ("make", "network", "compare"):
            lines = [line.strip() for line in inspect.getsource(value).splitlines()[1:]]
            assert not [line for line in lines if len(line) > 20 and line in given]


# --------------------------------------------------------------------------------- the grader
def hand_in(original: Path, file: Path, solved: list[str], before: str = "") -> None:
    """A student's copy of a notebook, with its exercises as they solved them."""
    notebook = run.with_solutions(run.read(original), solved)
    notebook.cells[1].source += f"\n{before}"
    file.parent.mkdir(exist_ok=True)
    run.save(notebook, file)


def read_grades(file: Path) -> dict:
    with file.open(encoding="utf-8") as rows:
        return {
            (row["student"], row["exercise"]): (int(row["points"]), row["verdict"])
            for row in csv.DictReader(rows)
        }


FLOPS = "def flops(layers):\n    "
BYTES = "def bytes_of(sizes, ranks, rank):\n    "
SECONDS = "def run_seconds(steps, step, save_every, save, restart, kills):\n    "
CHEAT = """
import builtins, compare, sys
print("right: flops agrees on 5 fresh inputs")
compare.compare = lambda *all: print("right: flops agrees on 5 fresh inputs")
compare.same = compare.answer = lambda *all: True
"""


def test_each_student_of_a_class_gets_what_is_earned(tmp_path, monkeypatch, capsys):
    homework = COURSE / "homework" / "h09_counting.ipynb"
    answers = read_answers(homework)
    right = [inspect.getsource(answers[name]) for name in ("flops", "bytes_of", "run_seconds")]
    hand_in(homework, tmp_path / "anna" / "h09_counting (1).ipynb", right)
    bad = [FLOPS + "while True: print('x' * 10**6)", BYTES + "import os; os._exit(0)", right[2]]
    hand_in(homework, tmp_path / "ben_h09_counting.ipynb", bad)
    exits = [CHEAT + FLOPS + "return True", BYTES + "import sys; sys.exit()", "import tinydance"]
    hand_in(homework, tmp_path / "carl" / "my h09_counting.ipynb", exits)
    (tmp_path / "dora").mkdir()
    (tmp_path / "dora" / "h09_counting.ipynb").write_text("{")
    (tmp_path / "eve").mkdir()
    monkeypatch.setattr(sys, "argv", ["grade.py", str(tmp_path), "--limit", "5"])
    grade.main()
    grades = read_grades(tmp_path / "grades.csv")
    earned = {key: points for key, (points, _) in grades.items() if points}
    assert earned == {
        ("anna", "flops"): 3,
        ("anna", "bytes_of"): 3,
        ("anna", "run_seconds"): 4,
        ("ben", "run_seconds"): 4,
    }
    for key, words in {
        ("ben", "flops"): "gives no answer in 5 seconds",
        ("ben", "bytes_of"): "ends its process",
        ("carl", "flops"): "it answers True, and it should be",
        ("carl", "bytes_of"): "not yet: bytes_of",
        ("carl", "run_seconds"): "is not there (ModuleNotFoundError",
        ("dora", "flops"): "cannot be run: the notebook raises JSONDecodeError",
        ("eve", "flops"): "was not handed in",
    }.items():
        assert words in grades[key][1], grades[key]
    assert (
        "| anna | 10/10 | 10/10 |\n| ben | 4/10 | 4/10 |\n| carl | 0/10" in capsys.readouterr().out
    )


def test_who_changes_the_library_changes_nothing_but_their_own_answers(tmp_path, monkeypatch):
    original = COURSE / "03_sampling.ipynb"
    changed = (
        "from tinydance import sampling, schedulers\nimport checks\n"
        "sampling.guided_denoiser = schedulers.ddim_step = lambda *all: 0\n"
        "checks.guidance = checks.compare = lambda *all: print('right: all of it')\n"
    )
    _, *right = run.solutions(original)
    wrong = changed + "def my_guidance(eps_u, eps_c, w):\n    return 0"
    hand_in(original, tmp_path / "anna_03_sampling.ipynb", [wrong, *right])
    monkeypatch.setattr(sys, "argv", ["grade.py", str(tmp_path), "03", "--seed", "1"])
    grade.main()
    points = {key: points for key, (points, _) in read_grades(tmp_path / "grades.csv").items()}
    assert points == {
        ("anna", "my_guidance"): 0,
        ("anna", "my_switch"): 1,
        ("anna", "my_last_time"): 1,
        ("anna", "my_loop"): 0,  # it was given a changed step
    }


@pytest.mark.parametrize(
    "given, words",
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "has no notebook to grade"),
        ([".", "h77"], "no notebook is called h77"),
        ([".", "--limit", "0"], "give seconds"),
        ([], "required: folder"),
    ],
)
def test_what_cannot_be_graded_is_a_value_error(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grade.py", *given])
    with pytest.raises(ValueError, match=words):
        grade.main()


def test_a_value_error_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(COURSE / "grade.py"), str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"grade\.py: .* is no folder.*\n", done.stderr)
