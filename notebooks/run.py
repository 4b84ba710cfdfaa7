"""Run the notebooks in a real Jupyter kernel: as they stand, or with their solutions.

    python notebooks/run.py                     all of them, as a student meets them
    python notebooks/run.py 03 --solutions      one, its exercises solved
    python notebooks/run.py --fast              smaller numbers: what the tests run
    python notebooks/run.py --save              and write what they show into the .ipynb files

A cell has a tag where it is more than an example: `exercise` (a stub to fill in) and, right behind
it, `check` (what grades it). A file in `solutions/` has a block for each exercise of its notebook,
in the same order, each begun by a line `# %%`; what stands before the first goes with the first.
Not here: what a check compares (`checks.py`), how a clip is shown (`course.py`).
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

HERE = Path(__file__).parent
MINUTES = 30  # that one cell may take, on a machine that is busy


def notebooks(words: list[str] = ()) -> list[Path]:
    """The notebooks whose names contain one of the words, or all. ValueError where none does."""
    found = [
        path
        for path in sorted(HERE.glob("[0-9]*.ipynb"))
        if not words or any(word in path.name for word in words)
    ]
    if not found:
        known = ", ".join(path.stem for path in sorted(HERE.glob("[0-9]*.ipynb")))
        raise ValueError(f"no notebook is called {' or '.join(words)!r}; there are {known}")
    return found


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def save(notebook: NotebookNode, path: Path) -> None:
    """Write it in one canonical form: of a run that showed the same, the same bytes."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    nbformat.write(notebook, path)


def solutions(path: Path) -> list[str]:
    """The solved exercises of a notebook, in its order."""
    text = (HERE / "solutions" / f"{path.stem}.py").read_text(encoding="utf-8")
    head, *blocks = text.split("\n# %%")
    blocks = [block.partition("\n")[2] for block in blocks]  # the rest of the line is a title
    return [f"{head}\n{blocks[0]}", *blocks[1:]]


def with_solutions(notebook: NotebookNode, solved: list[str], stubs: bool = False) -> NotebookNode:
    """A copy with every exercise solved. stubs: each stub and its check first, then both again."""
    cells, todo = [], list(solved)
    for cell in notebook.cells:
        kinds = cell.metadata.get("tags", [])
        if "exercise" in kinds:
            stub, cell = cell, copy.deepcopy(cell)
            cell.source, cell.id = todo.pop(0), f"{cell.id}-solved"
            if stubs:
                cells.append(stub)
        if "check" in kinds and stubs:
            *cells, solution = cells
            again = copy.deepcopy(cell)
            again.id = f"{cell.id}-again"
            cells += [cell, solution, again]
        else:
            cells.append(cell)
    if todo:
        raise ValueError(f"{len(todo)} more solutions than exercises")
    return NotebookNode({**notebook, "cells": cells})


def execute(notebook: NotebookNode, fast: bool = False) -> None:
    """Run every cell in a new kernel, and keep what it shows. Raises CellExecutionError."""
    client = NotebookClient(
        notebook,
        timeout=60 * MINUTES,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
        extra_arguments=["--log-level=ERROR"],
    )
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {
            "TINYDANCE_FAST": str(int(fast)),
            "IPYTHONDIR": scratch,  # no history of ours in the user's home
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        client.execute(env=environment)


def where(notebook: NotebookNode) -> str:
    """The cell at which a run stopped."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kinds = [{output.output_type for output in cell.outputs} for cell in code]
    return next((c.source for c, kind in zip(code, kinds) if "error" in kind), "its kernel")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts of names, such as 03; default: all")
    parser.add_argument("--solutions", action="store_true", help="with the exercises solved")
    parser.add_argument("--fast", action="store_true", help="smaller numbers, as the tests do")
    parser.add_argument("--save", action="store_true", help="write the outputs into the files")
    args = parser.parse_args()
    if args.save and (args.fast or args.solutions):
        raise ValueError("--save keeps what a student sees: give it without --fast or --solutions")
    failed = 0
    print("| notebook | seconds |\n| --- | --- |", flush=True)
    for path in notebooks(args.words):
        notebook, begun = read(path), time.perf_counter()
        if args.solutions:
            notebook = with_solutions(notebook, solutions(path))
        try:
            execute(notebook, args.fast)
        except CellExecutionError as error:
            failed += 1
            print(
                f"{path.name} stops at:\n\n{where(notebook)}\n\n{error.ename}: {error.evalue}",
                file=sys.stderr,
            )
            continue
        print(f"| {path.stem} | {time.perf_counter() - begun:.0f} |", flush=True)
        if args.save:
            save(notebook, path)
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)
