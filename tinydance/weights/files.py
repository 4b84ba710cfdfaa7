"""JSON files and `config.json`, and files that appear on the disk whole or not at all: never half a
file under a good name, even when a run is killed or the disk is full [ours]."""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from glob import escape
from pathlib import Path
from typing import BinaryIO, get_type_hints

from tinydance.weights.untrusted import check_types, parse_json, read_text, reading


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
        with suppress(OSError):  # Windows syncs no folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # a crash may lose the rename
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def clear_parts(path: str | Path) -> None:
    """Delete what killed writers of this file left, where none is at work: see `hold`."""
    for left in Path(path).parent.glob(f"{escape(Path(path).name)}.[0-9]*.part"):
        left.unlink(missing_ok=True)


@contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Keep the folder for one process, until the block ends or the process dies, however that is.
    Raises BlockingIOError where another has it."""
    lock = Path(folder) / ".tinydance.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    # A lock of SQLite's is the operating system's, on all of them, and no child inherits it.
    connection = sqlite3.connect(lock, 0, isolation_level=None)
    try:
        connection.executescript("PRAGMA journal_mode=OFF; BEGIN EXCLUSIVE")
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):  # else this file system has no locks: go on without
            cure = "wait for its end, or choose another --out"
            raise BlockingIOError(f"{folder} is in use by another process: {cure}") from None
    try:
        yield
    finally:
        connection.close()  # Windows removes no open file
        lock.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty
            lock.parent.rmdir()


def storable(x):
    """x as UTF-8 can hold it: names may be any bytes, which Python reads as half characters."""
    return json.loads(json.dumps(x, ensure_ascii=False).encode("utf-8", "replace"))


def read_json(path: str | Path) -> dict:
    """Read a JSON object. Raises ValueError that names a file that is missing or damaged."""
    with reading(path):
        return parse_json(read_text(path))


def build(kind: type, config: dict, path: str | Path):
    """Return the dataclass `kind` with the items of `config` that it knows. Raises ValueError."""
    with reading(path):
        check_types(config, get_type_hints(kind))
        return kind(**pick(config, kind))


def write_json(path: str | Path, content: dict) -> None:
    """Write a dict as JSON, and its folder if there is none."""
    with whole_file(path) as file:
        file.write(
            (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        )


def check_folder(path: str | Path) -> Path:
    """Return the path of a folder. Raises ValueError that says what to do with what is none."""
    path, cure = Path(path), "give a model folder, with unet/ and vae/ in it"
    if path.is_file():
        cure = f"`python -m tinydance.weights {path} --to FOLDER` makes one of it"
    elif len(path.parts) == 2:
        cure = f"of huggingface.co, `hf download {path} --local-dir {path.name}` makes one, where"
        cure += " that name still is: see tinydance/weights/README.md"
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; {cure}")
    return path


def read_config(folder: str | Path) -> dict:
    """Read FOLDER/config.json [hub format]. Raises ValueError as `read_json` does."""
    return read_json(Path(folder) / "config.json")


def pick(config: dict, names) -> dict:
    """Return the items of these names (a list, or a dataclass) that are there, lists as tuples."""
    names = names if isinstance(names, list) else [field.name for field in fields(names)]
    found = {name: config[name] for name in names if name in config}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
