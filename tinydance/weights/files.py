"""JSON files and `config.json`, and files that appear on the disk whole or not at all: never half a
file under a good name, even when a run is killed or the disk is full [ours]."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name `path` once all of it is on the disk, or never."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: a crash may keep that and lose the bytes
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict:
    """Read a JSON object. Raises ValueError that names a file that is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot read: {error}") from error
    return content


def write_json(path: str | Path, content: dict) -> None:
    """Write a dict as JSON, and its folder if there is none."""
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_config(folder: str | Path) -> dict:
    """Read FOLDER/config.json [hub format]. Raises ValueError as `read_json` does."""
    return read_json(Path(folder) / "config.json")


def pick(config: dict, names) -> dict:
    """Return the items of these names (a list, or a dataclass) that are there, lists as tuples."""
    names = names if isinstance(names, list) else [field.name for field in fields(names)]
    found = {name: config[name] for name in names if name in config}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
