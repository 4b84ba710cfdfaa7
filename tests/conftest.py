import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: a second thread waits more than it works

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # tests import `reference`, and the two scripts


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "running" in item.fixturenames)  # to the end, in their order


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """What `running` gives takes a while: it begins before the first test."""
    if any("running" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("running")


@pytest.fixture(scope="session")
def running(request):
    """The notebooks, run one after another beside the tests, in a process that none disturbs."""
    items = [item for item in request.session.items if "running" in item.fixturenames]
    names = [item.callspec.params["name"] for item in items]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield {name: pool.submit(run_notebook, name) for name in names}
        pool.shutdown(cancel_futures=True)


def run_notebook(name: str):
    from test_notebooks import COURSE, run

    path = COURSE / f"{name}.ipynb"
    notebook = run.with_solutions(run.read(path), run.solutions(path), stubs=True)
    run.execute(notebook, fast=True)
    return notebook
