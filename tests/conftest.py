import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: a second thread waits more than it works

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # tests import `reference`, and the two scripts


def pytest_configure(config):
    config.addinivalue_line("markers", "beside(work): what the test's fixture `beside` computes")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "beside" in item.fixturenames)  # to the end, in their order


@pytest.fixture(scope="session", autouse=True)
def working(request):
    """What takes minutes is begun before the first test, one after another, in a process that no
    test disturbs, on the second core; the tests that look at it come last."""
    items = [item for item in request.session.items if "beside" in item.fixturenames]
    if not items:
        yield {}
        return
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        futures = {}
        for item in items:
            given = item.callspec.params.values() if hasattr(item, "callspec") else ()
            futures[item.name] = pool.submit(
                item.get_closest_marker("beside").kwargs["work"], *given
            )
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def beside(request, working):
    """What the function in the test's mark returns, for the test's parameters."""
    return working[request.node.name].result()
