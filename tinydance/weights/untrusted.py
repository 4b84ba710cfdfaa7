"""The one place where text that others wrote becomes a configuration: JSON and TOML files, headers
of .safetensors, comments in pictures. Strict about size, types and range, for what comes from the
internet is not trusted [ours]. Not here: pixels (`video/read.py`)."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, get_args

MAX_TEXT = 2**23  # bytes of JSON or TOML: as objects they take 25 times as much memory
# Loops run over these, or memory is taken, before anything is compared with the size of a file.
LARGEST = {"layers_per_block": 16, "num_hidden_layers": 100, "num_train_timesteps": 100_000}
LARGEST |= {"frames": 10_000, "height": 10_000, "width": 10_000, "shards": 10**6, "clips": 10**6}


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever a file makes its reader raise is one ValueError that names the file."""
    try:
        yield
    except Exception as error:  # damaged bytes raise anything
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise  # it names the file already, or a file in this folder
        is_told = isinstance(error, (OSError, ValueError))
        raise ValueError(f"{path}: {error if is_told else repr(error)[:300]}") from error


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file: a pipe would make us wait for ever, and a device has no end."""
    if not os.path.isfile(path):
        raise FileNotFoundError(2, "no such file", str(path))
    return open(path, "rb")


def read_text(path: str | Path) -> str:
    """Read a text file. Raises OSError, or ValueError for one that is too large or not UTF-8."""
    with open_file(path) as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise ValueError(f"a text above {MAX_TEXT} bytes")
    return content.decode("utf-8")


def parse_json(text: str) -> dict:
    """Read a JSON object. Raises ValueError for all else, or RecursionError for a deep nesting."""
    content = json.loads(text, object_pairs_hook=refuse_twins)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def refuse_twins(pairs: list[tuple]) -> dict:
    """Return a JSON object as a dict. Raises ValueError for a key twice: readers take either."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def check_types(config: dict, types: dict) -> None:
    """Raises ValueError that names the first key of `types`, {key: type}, whose value in `config`
    is of another type, or a number that is negative or larger than anyone needs."""
    for key, kind in types.items():
        if key not in config:
            continue
        value, kinds = config[key], get_args(kind) or (kind,)  # of a union, or of tuple[int, ...]
        is_list = isinstance(value, (list, tuple)) and len(value) <= 16
        for x in [value] if ... not in kinds else value if is_list else [None]:
            if type(x) not in kinds and not (float in kinds and type(x) is int):
                name = kind.__name__ if kinds == (kind,) else kind
                raise ValueError(f"{key} is {value!r:.100}; it must be {name}")
            if isinstance(x, (int, float)) and not 0 <= x <= LARGEST.get(key, 2**63):
                raise ValueError(f"{key} is {value!r:.100}; use 0 to {LARGEST.get(key, 2**63)}")
