"""Checkpoints: written whole or not at all, by all ranks at once; verified before they are read.

    step_00001000/rank_0_of_2.safetensors   weights that rank 0 owns, their averages and moments
    step_00001000/rank_0_of_2.json          the sha256 of that file, and the configuration

Machines die, and disks lie: a checkpoint counts only if every rank's bytes are those that its note
says, which is written last. Any number of ranks can go on from it. [ours]
Not here: random states. All randomness is a function of (seed, step, sample).
"""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinydance.config import Config
from tinydance.training import Machine, Trainee
from tinydance.weights.files import read_json, write_json
from tinydance.weights.safetensors import load_safetensors, save_safetensors
from tinydance.weights.untrusted import reading


class Writer:
    """Writes behind the training, from copies in host memory, and never two at once."""

    def __init__(self, folder: Path, config: Config, machine: Machine, publish: Callable):
        self.folder, self.config, self.machine, self.publish = folder, config, machine, publish
        self.thread, self.job = ThreadPoolExecutor(1), None

    def save(self, step: int, trainee: Trainee) -> None:
        """Begin to write folder/step_N; all ranks call it. Raises what `finish` raises."""
        path, machine = self.folder / f"step_{step:08d}", self.machine
        self.finish()
        if machine.rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # a damaged one: `resume` went back behind it
        machine.wait()
        state = {name: x.to("cpu", copy=True) for name, x in collect(trainee).items()}
        file = path / f"rank_{machine.rank}_of_{machine.world_size}.safetensors"
        ema = average_weights(trainee)
        ema = ema.cpu() if machine.rank == 0 else None
        self.job = self.thread.submit(self.write, file, state, ema)

    @torch.no_grad()
    def write(self, file: Path, state: dict[str, Tensor], ema: nn.Module | None) -> None:
        try:
            if ema is not None:
                # The model folder before the checkpoint: if the run is killed between the two, it
                # resumes before this step and writes both again.
                self.publish(ema)
            save_safetensors(state, file)
            note = {"sha256": sha256(file), "config": asdict(self.config)}
            write_json(file.with_suffix(".json"), note)
        except OSError as error:
            place = f"{file.parent} cannot be written: {error}"
            raise OSError(f"{place}; older checkpoints stay") from error

    def finish(self) -> None:
        """Wait until the last one is whole on all ranks; of those before it one stays. Raises
        OSError: the disk is full, say."""
        if self.job:
            self.job.result()
            self.machine.wait()
            for old in checkpoints(self.folder)[:-2] if self.machine.rank == 0 else ():
                shutil.rmtree(old, ignore_errors=True)
        self.job = None


def checkpoints(folder: Path) -> list[Path]:
    """All by the names that a run gives, the oldest first, whole or not."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=read_step)


def read_step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def newest_checkpoint(folder: Path, machine: Machine) -> Path | None:
    """The newest that is whole; a line is printed for each newer one that is not."""
    for path in reversed(checkpoints(folder)):
        if machine.mean(float(is_whole(path, machine))) == [1.0]:
            return path
        if machine.rank == 0:
            print(f"note: {path} is damaged or unfinished, and passed over", flush=True)
    return None


def is_complete(path: Path) -> bool:
    """Has every rank's file its note?"""
    names = {file.stem for file in path.glob("rank_*.safetensors")}
    names &= {file.stem for file in path.glob("rank_*.json")}
    ranks = {int(name.split("_")[-1]) for name in names}
    return len(ranks) == 1 and len(names) == ranks.pop()


def is_whole(path: Path, machine: Machine) -> bool:
    """Have the files the sha256 that their notes say? Each rank looks at its share of them."""
    files = sorted(path.glob("rank_*.safetensors"))[machine.rank :: machine.world_size]
    try:
        notes = [read_json(file.with_suffix(".json"))["sha256"] for file in files]
        return is_complete(path) and notes == [sha256(file) for file in files]
    except (OSError, ValueError, KeyError):
        return False


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resume(folder: Path, config: Config, trainee: Trainee) -> int:
    """Load the newest whole checkpoint into the trainee; -> its step, or 0 where there is none.
    Raises ValueError naming the fields in which its configuration differs."""
    if olds := sorted(folder.glob("step_*/state.pt")):
        cure = "use another --out, or --resume none"
        raise ValueError(f"{olds[-1]} is a checkpoint of an older tinydance: {cure}")
    newest = newest_checkpoint(folder, trainee.machine)
    for path in checkpoints(folder) if trainee.machine.rank == 0 else ():
        if not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)  # what a kill left
    if (path := newest) is None:
        return 0
    files = sorted(path.glob("rank_*.safetensors"))
    saved = read_json(files[0].with_suffix(".json"))["config"]
    if changes := compare_configs(saved, config):
        other = f"{path} was trained with other choices: {'; '.join(changes)}"
        raise ValueError(f"{other}. Use those, or another --out")
    with reading(path):
        load(trainee, {name: x for file in files for name, x in load_safetensors(file).items()})
    return read_step(path)


def collect(trainee: Trainee) -> dict[str, Tensor]:
    """What this rank owns, by name: of each weight itself, its average and its moments."""
    state = {}
    for name, p in trainee.own.items():
        parts = {"weight": p.detach(), "ema": trainee.ema[name]} | trainee.optimizer.state[p]
        state |= {f"{part}.{name}": x for part, x in parts.items()}
    return state


@torch.no_grad()
def load(trainee: Trainee, state: dict[str, Tensor]) -> None:
    """Take what the ranks of a checkpoint owned. ValueError: not the weights of this network."""
    saved = {name: state[name].shape for name in state if name.startswith("weight.")}
    if saved != {f"weight.{name}": p.shape for name, p in trainee.weights.items()}:
        raise ValueError("other weights than this network's: use another --out")
    for name, p in trainee.weights.items():
        p.copy_(state[f"weight.{name}"])
    for name, p in trainee.own.items():
        trainee.ema[name].copy_(state[f"ema.{name}"])
        if f"step.{name}" in state:  # else it has had no gradient yet, as temporal layers of images
            moments = {part: state[f"{part}.{name}"] for part in ("step", "exp_avg", "exp_avg_sq")}
            moments = {part: x.to(p.device, copy=True) for part, x in moments.items()}
            trainee.optimizer.state[p] = moments


@torch.no_grad()
def average_weights(trainee: Trainee) -> nn.Module:
    """A copy of what is trained, with averages for weights. All ranks call it."""
    trained, names = trainee.trained, {p: name for name, p in trainee.weights.items()}
    copied = copy.deepcopy(trained).eval().requires_grad_(False)
    for p, mean in zip(trained.parameters(), copied.parameters()):
        if name := names.get(p):  # what is frozen is its own average
            mean.copy_(trainee.ema.get(name, mean))
            if trainee.machine.world_size > 1:
                dist.broadcast(mean, trainee.owners[name])
    return copied


def compare_configs(saved: dict, config: Config) -> list[str]:
    """What differs, in words. Free fields may: they say where and how fast a run computes."""
    now = json.loads(json.dumps(asdict(config)))  # as a note has it
    free = {f.name for f in fields(config) if f.metadata["free"]}
    # Of fields that are gone, those count that were used; fields that are newer have no old value.
    old = {name: x for name, x in saved.items() if name not in free and (name in now or x)}
    pairs = ((name, x, now.get(name, "gone")) for name, x in old.items())
    return [f"{name} was {x} and is {y}" for name, x, y in pairs if x != y]


def set_aside(folder: Path) -> None:
    """Rename what another run left, so that a new one starts from nothing and nothing is lost."""
    n = 1
    while (other := folder.with_name(f"{folder.name}_{n}")).exists():
        n += 1
    if folder.exists():
        folder.rename(other)
        print(f"{folder} is now {other}", flush=True)
