"""Killed before any event of a file, each job goes on to the same bytes and leaves nothing else."""

import builtins
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys

import pytest
from reference import tiny_model
from test_video import make_video
from tiny_training import tiny_train

import sample
from tinydance.data import cache
from tinydance.run.cli import run_main

FILMS = {
    "story": ["--story", "story.toml", "--out", "film.mp4"],
    "prompts": ["--prompts", "prompts.txt", "--out", "many/x.apng"],
    "pictures": ["red", "--clips", "2", "--out", "folder/"],
}
STORY = "".join(f'[[shot]]\nprompt = "{colour}"\n' for colour in ("red", "blue"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What the jobs read."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(timestep_spacing="trailing", prediction_type="v_prediction").save(folder / "model")
    for k in range(3):
        (folder / "videos").mkdir(exist_ok=True)
        make_video(folder / "videos" / f"{k}.mp4", frames=20, size=(16, 16))
    (folder / "story.toml").write_text(STORY)
    (folder / "prompts.txt").write_text("red\nblue\n")
    return folder


def work(job, resume):
    if job == "training":
        tiny_train("text", out="run", text_steps=4, image_batch=2, save_every=2)
    elif job == "latents":
        cache.SHARD = 2
        tiny_train("latents", out="cache", data="videos", init="model")
    else:
        sys.argv = ["sample.py", *FILMS[job], "--model", "model", *["--resume"] * resume]
        run_main(sample.main)


def run(job, folder, n, resume=False):
    """Do the job in `folder` until the n-th event; -> exit code, the number of events."""
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()

    def child():
        os.chdir(folder)
        events = count_events(n)
        work(job, resume)
        answers.put(len(events))

    process = fork.Process(target=child)
    process.start()
    count = answers.get(timeout=300) if n == 0 else None
    process.join()
    return process.exitcode, count


def count_events(n):
    """The list of what happens to files, which ends the process at its n-th item."""
    events, open_ = [], io.open

    def note(function):
        def noted(*arguments, **options):
            events.append(function)
            if len(events) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return noted

    def open_noted(file, mode="r", *rest, **options):
        opened = open_(file, mode, *rest, **options)
        if set(mode) & set("wxa") and not isinstance(file, int):
            note(os.path.exists)(file)  # between the opening and the first byte
        return opened

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, note(getattr(os, name)))
    builtins.open = io.open = open_noted
    return events


def read(folder):
    """What is there, by its name; of a log what does not depend on the clock."""
    found = {}
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if path.name == "log.jsonl":
            content = [json.loads(line)["loss"] for line in content.splitlines()]
        found[str(path.relative_to(folder))] = content
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a run is a fork here")
@pytest.mark.parametrize("job", ["training", "latents", *FILMS])
def test_a_killed_job_goes_on_as_if_undisturbed(base, tmp_path, job):
    shutil.copytree(base, tmp_path / "straight")
    code, count = run(job, tmp_path / "straight", 0)
    wanted = read(tmp_path / "straight")
    assert code == 0 and count > 10
    for k in range(2):
        n = random.Random(f"{job} {k}").randint(1, count)
        folder = tmp_path / f"killed_{n}"
        shutil.copytree(base, folder)
        assert run(job, folder, n)[0] == -signal.SIGKILL
        assert run(job, folder, -1, resume=True)[0] == 0
        made = read(folder)
        assert made.keys() == wanted.keys(), n
        assert [name for name in wanted if made[name] != wanted[name]] == [], n
