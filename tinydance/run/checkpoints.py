"""Checkpoints: written whole or not at all, and verified before they are read.

    step_00001000/state.pt        weights, averages, Adam's moments, step, configuration
    step_00001000/manifest.json   the sha256 of that file, written last

Machines die, and disks lie: a checkpoint counts only if its bytes are those that its manifest says.
A folder without one is what a killed run left, and one by any other name is not the run's. [ours]
Not here: random states. All randomness is a function of (seed, step, sample).
"""

import hashlib
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch

from tinydance.config import Config
from tinydance.training import Trainee
from tinydance.weights.files import read_json, whole_file, write_json


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write folder/step_N; of those before it the last stays. OSError: the disk is full, say."""
    path = folder / f"step_{step:08d}"
    shutil.rmtree(path, ignore_errors=True)  # a damaged one: `resume` went back behind it
    try:
        with whole_file(path / "state.pt") as file:
            torch.save(state, file)
        write_json(path / "manifest.json", {"state.pt": sha256(path / "state.pt")})
    except (OSError, RuntimeError) as error:  # torch.save may wrap an OSError in a RuntimeError
        shutil.rmtree(path, ignore_errors=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: cannot be written: {cause}; older checkpoints stay") from error
    found = checkpoints(folder)
    for old in found[: max(0, found.index(path) - 1)]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """All by the names that a run gives, the oldest first, whole or not."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest that is whole; a line is printed for each newer one that is not."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return path
        print(f"note: {path} is damaged or unfinished, and passed over", flush=True)
    return None


def is_whole(path: Path) -> bool:
    """Does the manifest exist, and does the state have the sha256 that the manifest says?"""
    try:
        return read_json(path / "manifest.json")["state.pt"] == sha256(path / "state.pt")
    except (OSError, ValueError, KeyError):
        return False


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resume(folder: Path, config: Config, trainee: Trainee) -> int:
    """Load the newest whole checkpoint into the trainee; -> its step, or 0 where there is none.
    Raises ValueError naming the fields in which its configuration differs."""
    newest = newest_checkpoint(folder)
    for path in checkpoints(folder):
        if not all((path / name).exists() for name in ("state.pt", "manifest.json")):
            shutil.rmtree(path, ignore_errors=True)  # what a kill left
    if (path := newest) is None:
        return 0
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if changes := compare_configs(state["config"], config):
        other = f"{path} was trained with other choices: {'; '.join(changes)}"
        raise ValueError(f"{other}. Use those, or another --out")
    trainee.load(state)
    return state["step"]


def compare_configs(saved: dict, config: Config) -> list[str]:
    """What differs, in words. Free fields may: they say where and how fast a run computes."""
    now, free = asdict(config), {f.name for f in fields(config) if f.metadata["free"]}
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
