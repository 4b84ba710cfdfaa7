"""Checkpoints: written whole or not at all, and verified before they are read.

    step_00001000/state.pt        weights, averages, Adam's moments, step, configuration
    step_00001000/manifest.json   the files' sha256, written last

A machine may die at any moment. So a checkpoint is made under another name, forced to the disk and
renamed; and since disks lie, it counts only if its manifest is there and its bytes are those that
the manifest says. The loop takes the newest that counts. [ours]

Read before: `training.py`. Not here: random states. All randomness is a function of (seed, step,
sample), so there is none to save.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from tinydance.config import Config

KEPT = 2  # whole checkpoints; the older ones go


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write folder/step_N, then drop all but the newest KEPT.

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
            force(file)
        manifest = {"state.pt": sha256(unfinished / "state.pt")}
        with open(unfinished / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=2)
            force(file)
    except (OSError, RuntimeError) as error:  # torch.save may wrap the one in the other
        shutil.rmtree(unfinished, ignore_errors=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{final}: cannot be written: {cause}; older checkpoints stay") from error
    shutil.rmtree(final, ignore_errors=True)  # one that did not count
    os.replace(unfinished, final)
    force_folder(folder)
    for old in [path for path in checkpoints(folder) if path != final][: 1 - KEPT or None]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """All there are, the oldest first, whole or not."""
    return sorted(Path(folder).glob("step_*"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest that is whole; a line for each newer one that is not."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return path
        print(f"note: {path} is damaged or unfinished, and passed over", flush=True)
    return None


def is_whole(path: Path) -> bool:
    """Does the manifest exist, and does every file have the sha256 that it says?"""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return all(sha256(path / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def load_checkpoint(path: Path) -> dict:
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def force(file) -> None:
    """To the disk, and not only to the system's memory."""
    file.flush()
    os.fsync(file.fileno())


def force_folder(path: Path) -> None:
    """The same for a folder's list of names."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# Fields that may differ when a run goes on: where and how fast, not what.
FREE = {"out", "init", "resume", "steps", "guidance", "tau", "device", "dtype", "compile",
        "micro_batch", "zero", "timeout", "gradient_checkpointing", "workers", "save_every",
        "sample_every", "max_skips", "max_bad", "vae_steps", "text_steps", "image_steps",
        "video_steps"}  # fmt: skip


def resume(folder: Path, config: Config, objective: nn.Module, ema: nn.Module, optimizer) -> int:
    """Fill the three from the newest whole checkpoint -> its step, or 0 where there is none.

    Raises ValueError naming the fields in which its configuration is another.
    """
    path = newest_checkpoint(folder) if config.resume == "auto" else None
    if path is None:
        return 0
    state, now = load_checkpoint(path), asdict(config)
    saved = state["config"]
    changed = [
        f"{name} was {saved[name]} and is {now[name]}"
        for name in now
        if name not in FREE and name in saved and saved[name] != now[name]
    ]
    if changed:
        raise ValueError(
            f"{path} was trained with other choices: {'; '.join(changed)}. "
            "Use those, or another --out"
        )
    objective.load_state_dict(state["objective"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
