"""Checkpoints: written whole or not at all, and verified before they are read.

    step_00001000/state.pt        weights, averages, Adam's moments, step, configuration
    step_00001000/manifest.json   the sha256 of that file, written last

Machines die: a checkpoint is made under another name and then renamed. Disks lie: it counts only if
its bytes are those that its manifest says. [ours]
Not here: random states. All randomness is a function of (seed, step, sample).
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch

from tinydance.config import Config
from tinydance.training import Trainee
from tinydance.weights.files import whole_file, write_json


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write folder/step_N, and delete all others but the newest. OSError: the disk is full, say."""
    final, unfinished = folder / f"step_{step:08d}", folder / f"unfinished_{step:08d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with whole_file(unfinished / "state.pt") as file:
            torch.save(state, file)
        write_json(unfinished / "manifest.json", {"state.pt": sha256(unfinished / "state.pt")})
    except (OSError, RuntimeError) as error:  # torch.save may wrap an OSError in a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{final}: cannot be written: {cause}; older checkpoints stay") from error
    shutil.rmtree(final, ignore_errors=True)  # a damaged one: `resume` went back behind it
    os.replace(unfinished, final)  # from here on it counts
    for old in [path for path in checkpoints(folder) if path != final][:-1]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """All there are, the oldest first, whole or not."""
    return sorted(Path(folder).glob("step_*"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest that is whole; a line is printed for each newer one that is not."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return path
        print(f"note: {path} is damaged or unfinished, and passed over", flush=True)
    return None


def is_whole(path: Path) -> bool:
    """Does the manifest exist, and does every file have the sha256 that the manifest says?"""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return all(sha256(path / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resume(folder: Path, config: Config, trainee: Trainee) -> int:
    """Load the newest whole checkpoint into the trainee; -> its step, or 0 where there is none.
    Raises ValueError naming the fields in which its configuration differs."""
    if (path := newest_checkpoint(folder)) is None:
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
