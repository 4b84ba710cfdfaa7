"""A checkpoint is whole or does not count, whatever happens while it is written."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tinydance.config import make_config
from tinydance.model import Batch
from tinydance.run.checkpoints import (
    Writer,
    checkpoints,
    compare_configs,
    is_whole,
    newest_checkpoint,
    resume,
)
from tinydance.run.fit import fit
from tinydance.training import Machine, Stage, Trainee
from tinydance.weights.safetensors import load_safetensors, save_safetensors

CONFIG = make_config("toy")
ALONE = Machine(CONFIG)


def make_trainee(size=10, value=0.0):
    objective = nn.Linear(size, 1)
    nn.init.constant_(objective.weight, value)
    return Trainee(Stage("x", objective, objective, 9, 1e-2, None, None), CONFIG, ALONE)


def make_writer(folder, config=CONFIG):
    return Writer(folder, config, ALONE, lambda ema: None)


def save(folder, *steps, size=10, config=CONFIG):
    """The weight is the step's number."""
    writer = make_writer(folder, config)
    for step in steps:
        writer.save(step, make_trainee(size, step))
    writer.finish()


def read(path):
    return load_safetensors(path / "rank_0_of_1.safetensors")


def newest(folder):
    return newest_checkpoint(folder, ALONE)


def test_the_newest_is_read_back_and_two_are_kept(tmp_path):
    save(tmp_path, 10, 20, 30)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000020", "step_00000030"]
    assert torch.equal(read(newest(tmp_path))["weight.weight"], torch.full((1, 10), 30.0))
    note = json.loads((tmp_path / "step_00000030" / "rank_0_of_1.json").read_text())
    assert set(note) == {"sha256", "config"}


def state(path):
    return path / "rank_0_of_1.safetensors"


def flip_a_byte(path):
    data = bytearray(state(path).read_bytes())
    data[-1] ^= 1  # in a tensor, which no reader would notice
    state(path).write_bytes(data)


def cut(path):
    os.truncate(state(path), 100)


def empty(path):
    state(path).write_bytes(b"")


def lose_the_note(path):
    (path / "rank_0_of_1.json").unlink()


def garble_the_note(path):
    (path / "rank_0_of_1.json").write_text("[1")


def empty_the_note(path):
    (path / "rank_0_of_1.json").write_text("{}")


def lose_the_state(path):
    state(path).unlink()


def add_a_rank_of_another_run(path):
    for file in list(path.iterdir()):
        shutil.copy(file, path / file.name.replace("0_of_1", "1_of_2"))


DAMAGES = [flip_a_byte, cut, empty, lose_the_note, garble_the_note, empty_the_note]
DAMAGES += [lose_the_state, add_a_rank_of_another_run]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_written_anew(tmp_path, capsys, damage):
    save(tmp_path, 10, 20)
    damage(tmp_path / "step_00000020")
    assert newest(tmp_path).name == "step_00000010"
    assert "step_00000020 is damaged or unfinished" in capsys.readouterr().out
    save(tmp_path, 20)
    assert newest(tmp_path).name == "step_00000020"


def test_a_checkpoint_is_written_from_a_copy_behind_the_training(tmp_path):
    """What is trained while it is written does not come into it."""
    writer, trainee = make_writer(tmp_path), make_trainee(300_000, 1.0)
    writer.save(1, trainee)
    with torch.no_grad():
        trainee.own["weight"].fill_(2.0)
    writer.finish()
    saved = read(newest(tmp_path))
    assert float(saved["weight.weight"].min()) == float(saved["weight.weight"].max()) == 1.0


def test_weights_are_shared_out_evenly_and_each_has_one_owner():
    objective = nn.Sequential(*(nn.Linear(n % 7 + 1, 50) for n in range(40)))
    stage = Stage("x", objective, objective, 9, 1e-2, None, None)
    ranks = [SimpleNamespace(rank=k, world_size=4, device="cpu") for k in range(4)]
    owned = [Trainee(stage, CONFIG, machine).own for machine in ranks]
    assert sorted(name for own in owned for name in own) == sorted(
        dict(objective.named_parameters())
    )
    sizes = [sum(p.numel() for p in own.values()) for own in owned]
    assert max(sizes) - min(sizes) <= 350  # the largest weight


def test_a_checkpoint_of_another_network_or_of_an_older_tinydance_is_refused(tmp_path):
    save(tmp_path, 5, size=12)
    with pytest.raises(
        ValueError, match=r"step_00000005.*: other weights than this network's: use another"
    ):
        resume(tmp_path, CONFIG, make_trainee(10))
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "step_00000009" / "state.pt").write_bytes(b"older")
    with pytest.raises(ValueError, match=r"state\.pt is a checkpoint of an older tinydance: use"):
        resume(tmp_path, CONFIG, make_trainee(10))
    assert (tmp_path / "step_00000009" / "state.pt").exists()


def test_without_any_there_is_none(tmp_path):
    assert newest(tmp_path) is None


def test_a_checkpoint_that_a_kill_left_half_written_is_not_read_but_deleted(tmp_path):
    save(tmp_path, 7)
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "step_00000009" / "rank_0_of_1.safetensors.123.part").write_bytes(b"half")
    assert newest(tmp_path).name == "step_00000007"
    assert resume(tmp_path, CONFIG, make_trainee()) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


@pytest.mark.parametrize(
    "name", ["step_best", "step_00000010_backup", "step_00000010.old", "step_9"]
)
def test_a_users_copy_is_neither_taken_nor_deleted(tmp_path, name):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step_00000010", tmp_path / name)
    save(tmp_path, 20, 30, 40)
    assert newest(tmp_path).name == "step_00000040"
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000030", "step_00000040"]
    assert is_whole(tmp_path / name, ALONE)


def test_steps_are_sorted_as_numbers(tmp_path):
    save(tmp_path, 99_999_999, 100_000_000)
    assert newest(tmp_path).name == "step_100000000"


def save_forever(folder):
    """From the newest on, as a run that resumes."""
    step, writer = resume(folder, CONFIG, trainee := make_trainee(300_000)), make_writer(folder)
    for step in range(step + 1, 10**6):
        with torch.no_grad():
            trainee.own["weight"].fill_(step)
        writer.save(step, trainee)


def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path):
    """kill -9, at twenty different moments of writing."""
    save(tmp_path, 0, size=300_000)
    fork = multiprocessing.get_context("fork")
    for k in range(20):
        process = fork.Process(target=save_forever, args=(tmp_path,))
        process.start()
        time.sleep(0.02 + 0.003 * k)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        path = newest(tmp_path)
        weight = read(path)["weight.weight"]
        assert torch.equal(weight, torch.full_like(weight, int(path.name[5:])))


class Distance(nn.Module):
    """The mean distance of some weights from a number that comes with each sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ParameterList(torch.randn(40_000 + n) for n in range(5))

    def forward(self, batch):
        goals = torch.tensor([n % 7 / 7 for n in batch.sample_ids])
        distances = [(part[:, None] - goals).square().mean() for part in self.parts]
        return {"loss": sum(distances) / len(self.parts)}


def train_on_ranks(folder, ranks, rank, steps):
    """A training of 60 steps of four samples, saved at each, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    if ranks > 1:
        store = f"file://{folder}.store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    config = make_config("toy", out=str(folder), save_every=1, device="cpu", dtype="float32")

    def stream(first, last):
        for step in range(first, last):
            numbers = range(4 * step + rank, 4 * step + 4, ranks)
            frames = torch.zeros(len(numbers), 1, 3, 2, 2, dtype=torch.uint8)
            yield Batch(step, frames, [""] * len(numbers), [*numbers], [""] * len(numbers))

    objective = Distance()
    publish = partial(save_weights_of, folder)
    fit(Stage("x", objective, objective, steps, 1e-2, stream, publish), config, Machine(config))


def save_weights_of(folder, ema):
    save_safetensors(ema.state_dict(), folder / "x" / "model.safetensors")


def start_ranks(folder, ranks, steps=60):
    folder.with_name(f"{folder.name}.store").unlink(missing_ok=True)
    fork = multiprocessing.get_context("fork")
    given = [(folder, ranks, rank, steps) for rank in range(ranks)]
    processes = [fork.Process(target=train_on_ranks, args=each) for each in given]
    for process in processes:
        process.start()
    return processes


def train_and_kill(folder, kills):
    """Killed at random moments of its steps, each time gone on with by another number of ranks;
    -> the losses of all steps, and how many of the kills came before the end."""
    rng, log, came = random.Random(0), folder / "x" / "log.jsonl", 0
    for k in range(kills):
        before = log.stat().st_size if log.exists() else 0
        processes = start_ranks(folder, (2, 1, 2, 4)[k % 4])
        while all(process.is_alive() for process in processes):
            if log.exists() and log.stat().st_size != before:  # its steps have begun
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        came += all(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    for process in start_ranks(folder, 2):
        process.join()
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()], came


def test_ranks_that_are_killed_while_they_save_go_on_as_one_straight_run(tmp_path):
    (straight,) = start_ranks(tmp_path / "straight", 1)
    straight.join()
    lines = (tmp_path / "straight" / "x" / "log.jsonl").read_text().splitlines()
    losses, came = train_and_kill(tmp_path / "killed", 8)
    assert came >= 4
    assert losses == pytest.approx([json.loads(line)["loss"] for line in lines], abs=1e-5)
    a, b = (load_safetensors(tmp_path / x / "x/model.safetensors") for x in ("straight", "killed"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5


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
    assert "step_00000020 cannot be written" in message and "File too large" in message
    assert newest(tmp_path).name == "step_00000010"
    assert is_whole(tmp_path / "step_00000010", ALONE)


def resume_from(folder, config, saved_config):
    save(folder, 7)
    note = folder / "step_00000007" / "rank_0_of_1.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"config": saved_config}))
    return resume(folder, config, make_trainee())


def test_a_run_goes_on_where_only_free_fields_differ(tmp_path):
    config = make_config("toy", save_every=7, workers=3, out="elsewhere", video_steps=5)
    assert resume_from(tmp_path, config, asdict(CONFIG)) == 7


def test_a_run_that_learns_something_else_is_refused_with_what_differs(tmp_path):
    saved = asdict(make_config("toy", eta=0.2))
    with pytest.raises(ValueError, match=r"step_00000007 .*: eta was 0\.2 and is 0\.6\. Use those"):
        resume_from(tmp_path, make_config("toy"), saved)


def test_a_checkpoint_from_before_a_field_was_made_or_dropped_goes_on(tmp_path):
    """`rich` was a field once; `max_skips` is one now."""
    config = make_config("toy")
    saved = asdict(config) | {"rich": False}
    del saved["max_skips"], saved["seed"]
    assert resume_from(tmp_path, config, saved) == 7


def test_a_checkpoint_of_a_feature_that_is_gone_is_refused_in_one_line():
    changes = compare_configs(asdict(make_config("toy")) | {"rich": True}, make_config("toy"))
    assert changes == ["rich was True and is gone"]
