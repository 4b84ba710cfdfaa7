"""Checkpoints: written whole or not at all, and verified before they are read.

    step_00001000/state.pt        weights, averages, Adam's moments, step, configuration
    step_00001000/manifest.json   the sha256 of that file, written last

A machine may die at any moment. So a checkpoint is made under another name, forced to the disk and
renamed; and since disks lie, it counts only if its manifest is there and its bytes are those that
the manifest says. A run resumes from the newest that counts. [ours]
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

KEPT = 2  # checkpoints; older ones are deleted


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write folder/step_N, then delete all but the newest KEPT.

    Raises OSError where the disk does not take it (it may be full); what was there before stays.
    """
    final, unfinished = folder / f"step_{step:08d}", folder / f"unfinished_{step:08d}"
    if is_whole(final):
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with open(unfinished / "state.pt", "wb") as file:
            torch.save(state, file)
            force_file(file)
        manifest = {"state.pt": sha256(unfinished / "state.pt")}
        with open(unfinished / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=2)
            force_file(file)
    except (OSError, RuntimeError) as error:  # torch.save may wrap an OSError in a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{final}: cannot be written: {cause}; older checkpoints stay") from error
    shutil.rmtree(final, ignore_errors=True)  # a damaged one
    os.replace(unfinished, final)  # from here on it counts
    force_folder(folder)
    newest_first = [path for path in reversed(checkpoints(folder)) if path != final]
    for old in newest_first[KEPT - 1 :]:
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


def load_checkpoint(path: Path) -> dict:
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def resume(folder: Path, config: Config, trainee: Trainee) -> int:
    """Load the newest whole checkpoint into the trainee; return its step, or 0 where there is none.

    Raises ValueError naming the fields in which its configuration differs.
    """
    path = newest_checkpoint(folder) if config.resume == "auto" else None
    if path is None:
        return 0
    state = load_checkpoint(path)
    if changes := compare_configs(state["config"], config):
        raise ValueError(
            f"{path} was trained with other choices: {'; '.join(changes)}. "
            "Use those, or another --out"
        )
    trainee.load(state)
    return state["step"]


def compare_configs(saved: dict, config: Config) -> list[str]:
    """What differs, in words. Free fields may: they say where and how fast a run computes."""
    now = asdict(config)
    free = {f.name for f in fields(config) if f.metadata["free"]}
    changes = []
    for name, value in saved.items():  # a field that is newer than the checkpoint is not among them
        if name not in now and value:  # a feature that no longer exists, and was used
            changes.append(f"{name} was {value}, a field that no longer exists")
        elif name in now and name not in free and now[name] != value:
            changes.append(f"{name} was {value} and is {now[name]}")
    return changes


def set_aside(folder: Path) -> None:
    """Rename what another run left, so that a new one starts from nothing and nothing is lost."""
    n = 1
    while (other := folder.with_name(f"{folder.name}_{n}")).exists():
        n += 1
    if folder.exists():
        folder.rename(other)
        print(f"{folder} is now {other}", flush=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def force_file(file) -> None:
    """Write it to the disk, and not only to the system's memory."""
    file.flush()
    os.fsync(file.fileno())


def force_folder(path: Path) -> None:
    """The same for a folder's list of names."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
