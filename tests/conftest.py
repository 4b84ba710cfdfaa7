"""Two processes share the tests, since most machines have two cores: whoever is free takes the next
file. The second's reports are told by the first, at the end."""

import json
import os
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: a second thread waits more than it works

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # tests import `reference`, and the two scripts

LONG = ["test_training.py", "test_notebooks.py", "test_commands.py", "test_device.py"]
SHARED = "TINYDANCE_SHARED_TESTS"  # for the second process: the folder that says what is taken


def pytest_collection_modifyitems(items):
    place = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))  # so both end together


def pytest_runtestloop(session):
    config, option = session.config, session.config.option
    if SHARED in os.environ:
        run(session, Path(os.environ[SHARED]))
        return True
    is_one_file = len({item.path for item in session.items}) < 2
    if is_one_file or option.collectonly or option.usepdb or session.testsfailed:
        return None  # alone, as ever
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
        printed, reports = Path(folder) / "printed", Path(folder) / "reports"
        with printed.open("w") as file:
            to_file = {"stdout": file, "stderr": subprocess.STDOUT}
            with subprocess.Popen(command, env=os.environ | {SHARED: folder}, **to_file) as second:
                run(session, Path(folder))
        assert second.returncode in (0, 1), printed.read_text()
        for line in reports.read_text().splitlines() if reports.exists() else ():
            told = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            config.hook.pytest_runtest_logreport(report=told)
    return True


def run(session, folder: Path) -> None:
    """Run the tests of every file that the other process has not taken."""
    ours = take(folder, session.items)
    item = next(ours, None)
    while item and not session.shouldstop and not session.shouldfail:
        following = next(ours, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following


def take(folder: Path, items: list):
    for path, tests in groupby(items, key=lambda item: item.path):
        try:
            (folder / path.name).mkdir()
        except FileExistsError:
            continue
        yield from tests


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if SHARED in os.environ:
        data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        with (Path(os.environ[SHARED]) / "reports").open("a") as file:
            file.write(json.dumps(data) + "\n")
    return report
