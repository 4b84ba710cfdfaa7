"""A checkpoint is whole or does not count, whatever happens while it is written."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from dataclasses import asdict

import pytest
import torch

from tinydance.config import make_config
from tinydance.run.checkpoints import (
    checkpoints,
    compare_configs,
    is_whole,
    newest_checkpoint,
    resume,
    save_checkpoint,
)


def state(step, size=10):
    return {"step": step, "weights": torch.full((size,), float(step))}


def save(folder, *steps, size=10):
    for step in steps:
        save_checkpoint(folder, step, state(step, size))


def test_the_newest_is_read_back_and_two_are_kept(tmp_path):
    save(tmp_path, 10, 20, 30)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000020", "step_00000030"]
    loaded = read(newest_checkpoint(tmp_path))
    assert loaded["step"] == 30 and torch.equal(loaded["weights"], torch.full((10,), 30.0))
    manifest = json.loads((tmp_path / "step_00000030" / "manifest.json").read_text())
    assert set(manifest) == {"state.pt"}


def read(path):
    return torch.load(path / "state.pt", weights_only=True)


def flip_a_byte(path):
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1  # torch.load would not notice it in a tensor
    (path / "state.pt").write_bytes(data)


def cut(path):
    os.truncate(path / "state.pt", 100)


def empty(path):
    (path / "state.pt").write_bytes(b"")


def lose_the_manifest(path):
    (path / "manifest.json").unlink()


def garble_the_manifest(path):
    (path / "manifest.json").write_text("[1")


def empty_the_manifest(path):
    (path / "manifest.json").write_text("{}")


def lose_the_state(path):
    (path / "state.pt").unlink()


DAMAGES = [flip_a_byte, cut, empty, lose_the_manifest, garble_the_manifest, empty_the_manifest]
DAMAGES += [lose_the_state]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_written_anew(tmp_path, capsys, damage):
    save(tmp_path, 10, 20)
    damage(tmp_path / "step_00000020")
    assert newest_checkpoint(tmp_path).name == "step_00000010"
    assert "step_00000020 is damaged or unfinished" in capsys.readouterr().out
    save(tmp_path, 20)
    assert newest_checkpoint(tmp_path).name == "step_00000020"


def test_without_any_there_is_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_that_a_kill_left_half_written_is_not_read_but_deleted(tmp_path):
    config = make_config("toy")
    resume_from(tmp_path, config, asdict(config))
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "step_00000009" / "state.pt.123.part").write_bytes(b"half")
    assert newest_checkpoint(tmp_path).name == "step_00000007"
    assert resume(tmp_path, config, Part()) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


@pytest.mark.parametrize(
    "name", ["step_best", "step_00000010_backup", "step_00000010.old", "step_9"]
)
def test_a_users_copy_is_neither_taken_nor_deleted(tmp_path, name):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step_00000010", tmp_path / name)
    save(tmp_path, 20, 30, 40)
    assert newest_checkpoint(tmp_path).name == "step_00000040"
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000030", "step_00000040"]
    assert is_whole(tmp_path / name)


def test_steps_are_sorted_as_numbers(tmp_path):
    save(tmp_path, 99_999_999, 100_000_000)
    assert newest_checkpoint(tmp_path).name == "step_100000000"


def save_forever(folder):
    """From the newest on, as a run that resumes."""
    resume(folder, config := make_config("toy"), part := Part())
    for step in range(part.state["step"] + 1, 10**6):
        state = {"step": step, "weights": torch.full((300_000,), float(step))}
        save_checkpoint(folder, step, state | {"config": asdict(config)})


def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path):
    """kill -9, at twenty different moments of writing."""
    save_checkpoint(tmp_path, 0, state(0) | {"config": asdict(make_config("toy"))})
    fork = multiprocessing.get_context("fork")
    for k in range(20):
        process = fork.Process(target=save_forever, args=(tmp_path,))
        process.start()
        time.sleep(0.02 + 0.003 * k)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        loaded = read(newest_checkpoint(tmp_path))
        assert torch.equal(loaded["weights"], torch.full_like(loaded["weights"], loaded["step"]))


def save_on_a_full_disk(folder, answers):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save(folder, 20, size=300_000)
    except OSError as error:
        answers.put(str(error))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 10)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    process = fork.Process(target=save_on_a_full_disk, args=(tmp_path, answers))
    process.start()
    message = answers.get(timeout=300)
    process.join()
    assert "step_00000020: cannot be written" in message and "File too large" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    assert is_whole(tmp_path / "step_00000010")


class Part:
    """Of a trainee: it is loaded, and that is all."""

    def load(self, state):
        self.state = state


def resume_from(folder, config, saved_config):
    save_checkpoint(folder, 7, {"step": 7, "config": saved_config, "objective": {}})
    part = Part()
    return resume(folder, config, part), part.state


def test_a_run_goes_on_where_only_free_fields_differ(tmp_path):
    config = make_config("toy", save_every=7, workers=3, out="elsewhere", video_steps=5)
    step, state = resume_from(tmp_path, config, asdict(make_config("toy")))
    assert step == 7 and state["objective"] == {}


def test_a_run_that_learns_something_else_is_refused_with_what_differs(tmp_path):
    saved = asdict(make_config("toy", eta=0.2))
    with pytest.raises(ValueError, match=r"step_00000007 .*: eta was 0\.2 and is 0\.6\. Use those"):
        resume_from(tmp_path, make_config("toy"), saved)


def test_a_checkpoint_from_before_a_field_was_made_or_dropped_goes_on(tmp_path):
    """`rich` was a field once; `max_skips` is one now."""
    config = make_config("toy")
    saved = asdict(config) | {"rich": False}
    del saved["max_skips"], saved["seed"]
    assert resume_from(tmp_path, config, saved)[0] == 7


def test_a_checkpoint_of_a_feature_that_is_gone_is_refused_in_one_line():
    changes = compare_configs(asdict(make_config("toy")) | {"rich": True}, make_config("toy"))
    assert changes == ["rich was True and is gone"]
