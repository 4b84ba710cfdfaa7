"""Weights in and out: .safetensors, .ckpt, a folder of the hub; and the rules that rename tensors.

Our modules are named as the hub's checkpoints name theirs, so Stable Diffusion's and ModelScope's
files load with no rule at all. The rules below are for checkpoints in the older LDM layout.

    bytes <-> tensors     load_safetensors, save_safetensors, load_weights
    config.json <-> dict  read_config, write_config
    tensors -> module     load_into: strict, so that a wrong file is an error, not a bad picture
    old names -> ours     unet_from_ldm, vae_from_ldm, vae_attention_names, text_from_openclip

A file from the internet is not trusted: pickled code is refused, and every offset is checked.
Read `clip.py` before this file, `data.py` after it. Not here: downloads; resuming a training run.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path):
    """Yields a binary file that takes the name `path` once all of it is on the disk, or never.

    A run that is killed here, or a full disk, leaves the file that was there as it was [ours]."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict:
    """The JSON object in a file, as a dict. ValueError names a file that is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def write_json(path: str | Path, content: dict) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_config(folder: str | Path) -> dict:
    """The dict in `folder`/config.json [hub format]. ValueError as `read_json`."""
    return read_json(Path(folder) / "config.json")


def write_config(folder: str | Path, config: dict) -> None:
    """Writes the dict to `folder`/config.json [hub format]; makes the folder if there is none."""
    write_json(Path(folder) / "config.json", config)
