"""Grade a class: every student's exercises and homework on fresh cases, into a table and a CSV.

    python notebooks/grade.py FOLDER                 all that was handed in
    python notebooks/grade.py FOLDER h03 --seed 7    one notebook, on the cases of an earlier run

FOLDER has a folder for each student, or files such as `anna_h03_second_order.ipynb`. A student's
code runs in another process (`student.py`), which is told cases and returns answers. They are
judged here, so nothing that a notebook prints or changes can make it right. In homework `tinydance`
cannot be imported. Students' code runs with your rights: grade strangers in a container.
Not here: the cases, and what is right (`checks.py`, `homework/answers/`).
"""

import contextlib
import csv
import io
import json
import random
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from compare import Trouble
from student import Student

HERE = Path(__file__).parent


class Exercise(NamedTuple):
    function: str
    points: int
    check: Callable


def read_exercises(words: list[str]) -> dict[str, list[Exercise]]:
    """notebook -> its exercises: of the course one point each, of homework as the cell says."""
    import checks  # here, because the student's process imports this file too

    found = {}
    for path in [*HERE.glob("[0-9]*.ipynb"), *HERE.glob("homework/h*.ipynb")]:
        if words and not any(word in path.stem for word in words):
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [[*cell["metadata"].get("tags", [""]), "".join(cell["source"])] for cell in cells]
        answers = HERE / "homework" / "answers" / f"{path.stem}.py"
        if path.parent == HERE:
            sources = "".join(source for tag, source in tagged if tag == "check")
            graded = re.findall(r"checks\.(\w+)\((\w+)\)", sources)
            found[path.stem] = [Exercise(f, 1, getattr(checks, check)) for check, f in graded]
        elif answers.exists():
            sources = "\n".join(source for tag, source in tagged if tag == "exercise")
            graded = re.findall(r"\((\d+) points?\)\s+def (\w+)", sources)
            known = runpy.run_path(str(answers))
            found[path.stem] = [Exercise(f, int(n), known[f"check_{f}"]) for n, f in graded]
    return dict(sorted(found.items()))


def find_work(folder: Path, notebooks: list[str]) -> dict[str, dict[str, Path]]:
    """student -> notebook -> file, of two the newer. A name contains that of the notebook."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that has each student's work")
    work = {path.name: {} for path in folder.iterdir() if path.is_dir()}
    for path in sorted(folder.rglob("*.ipynb"), key=lambda path: path.stat().st_mtime):
        name = next((name for name in notebooks if name in path.stem), None)
        parts = path.relative_to(folder).parts
        if name and not any(part.startswith(".") for part in parts):
            alone = path.stem.replace(name, "").strip(" _-") or path.stem
            work.setdefault(parts[0] if len(parts) > 1 else alone, {})[name] = path
    if not any(work.values()):
        known = ", ".join(notebooks)
        raise ValueError(f"{folder} has no notebook to grade; names contain one of: {known}")
    return {student: files for student, files in sorted(work.items()) if student[0] != "."}


def grade(exercise: Exercise, student: Student | None, seed: int) -> str:
    """The verdict on one function: a line that begins with "right: " or "not yet: "."""

    def yours(*case):
        if student is None:
            raise Trouble("was not handed in")
        return student.ask(exercise.function, case)

    yours.__name__ = exercise.function
    random.seed(seed)
    torch.manual_seed(seed)
    line = io.StringIO()
    try:
        with contextlib.redirect_stdout(line):
            exercise.check(yours)
    except Exception as error:  # an answer so strange that it cannot be compared
        return f"not yet: {exercise.function} cannot be compared: {type(error).__name__}"
    return " ".join(line.getvalue().split())[:200]


def main() -> None:
    from tinydance.run.cli import Parser, progress

    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "words", nargs="*", default=[], help="parts of notebooks' names, such as h03"
    )
    parser.add_argument("--limit", type=float, default=60, help="seconds for an answer")
    parser.add_argument("--seed", type=int, help="of the cases; default: another one each time")
    parser.add_argument("--out", type=Path, help="the CSV; default: FOLDER/grades.csv")
    args = parser.parse_args()
    if not 0 < args.limit < 1e6:
        raise ValueError(f"--limit is {args.limit:g}; give seconds, such as 60")
    exercises = read_exercises(args.words)
    if not exercises:
        raise ValueError(f"no notebook is called {' or '.join(args.words)}; try 03, or h03")
    work = find_work(args.folder, [*exercises])
    due = [name for name in exercises if any(name in files for files in work.values())]
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    out = args.out or args.folder / "grades.csv"
    of = {name: sum(exercise.points for exercise in exercises[name]) for name in due}
    points = {student: dict.fromkeys(due, 0) for student in work}
    jobs = [(student, name) for student in work for name in due]
    with out.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["student", "notebook", "exercise", "points", "verdict"])
        for student, name in progress(jobs, "grading", "notebook"):
            path = work[student].get(name)
            at_work = Student(path, name.startswith("h"), args.limit) if path else None
            for exercise in exercises[name]:
                verdict = grade(exercise, at_work, seed)
                earned = exercise.points if verdict.startswith("right: ") else 0
                points[student][name] += earned
                rows.writerow([student, name, exercise.function, earned, verdict])
            if at_work:
                at_work.end()
    print(f"| student | {' | '.join(due)} | all |\n|{' --- |' * (len(due) + 2)}")
    for student, earned in points.items():
        parts = [f"{earned[name]}/{of[name]}" for name in due]
        print(f"| {student} | {' | '.join(parts)} | {sum(earned.values())}/{sum(of.values())} |")
    print(f"\nEach verdict is in {out}. The cases are those of --seed {seed}.")


if __name__ == "__main__":
    from tinydance.run.cli import run_main

    run_main(main)
