"""A row of the data: one video or picture of the user, which can be read wherever its bytes are.

Nobody else opens a file of the data. What users download is not trusted: a path that leads out of
its folder is a BadSample `unsafe`, and lengths are bounded before memory is taken.
Not here: how bytes become pixels (`video/read.py`).
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from tinydance.video import read as video
from tinydance.video.read import BadSample, decoding
from tinydance.weights.untrusted import open_file

MAX_TEXT = 2**16  # bytes of a caption that are read
MAX_MEMBER = 2**30  # bytes of a file in a tar, which is read whole


@dataclass
class Row:
    """A file, and its caption. Its methods raise BadSample."""

    name: str  # a path from `root`; in a tar only a name for messages
    root: Path  # the folder that the path must not leave, or the tar
    caption: str = ""
    offset: int = 0  # in the tar
    size: int = -1  # bytes in the tar; -1: a file of its own
    start: float = 0.0  # seconds of a video; what lies before is not used
    end: float = inf

    def open(self) -> BinaryIO:
        with decoding():
            if self.size > MAX_MEMBER:
                raise BadSample("too_large", f"{self.size} bytes in a tar")
            if self.size < 0:
                return open_file(confine(self.root, self.name))
            with open_file(self.root) as file:
                file.seek(self.offset)
                return io.BytesIO(file.read(self.size))

    def decode(self) -> str:
        with self.open() as file:
            return file.read(MAX_TEXT).decode("utf-8-sig", "replace")

    @classmethod
    def fits(cls, name: str) -> bool:
        """Whether a file of this name is of this kind; ._b.mp4 is not: a Mac leaves such files."""
        return name.lower().endswith(cls.suffixes) and os.path.basename(name)[:1] != "."


class Video(Row):
    what = "videos"
    suffixes = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".ts", ".mts", ".m2ts", ".gif")
    suffixes += (".3gp", ".flv", ".ogv", ".mpg", ".mpeg", ".wmv")

    def read(self, choose_start: Callable[[float], float], frames, fps, size, at) -> Tensor:
        """A clip, uint8 (frames, 3, *size), cropped at the place `at`, see `resize_crop`.
        choose_start: from the seconds that there are to the start."""

        def start(length: float) -> float:
            return self.start + choose_start(min(length, self.end) - self.start)

        with self.open() as file:
            return video.read_clip(file, start, frames, fps, size, self.end, at)

    def pieces(self, fps: float, size: tuple[int, int]) -> Iterator[Tensor]:
        """Yield the whole video, or what comes before a damage, in parts: uint8 (f, 3, H, W)."""
        with self.open() as file:
            yield from video.read_pieces(file, fps, size, self.start, self.end)


class Picture(Row):
    what = "pictures"
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

    def read(self, choose_start, frames, fps, size, at) -> Tensor:
        with self.open() as file:
            return video.read_picture(file, size, at)[None]  # 1 3 H W


def confine(root: Path, name: str) -> Path:
    """The path of `name` under root. Raises BadSample `unsafe` for one that leads out of root, by
    `..`, by a symbolic link or being absolute, and for an address such as http://host."""
    if "\0" in name or re.match(r"[\w+.-]+:(?! )", name):
        raise BadSample("unsafe", f"{name!r:.200} is no path in {root}")
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(os.path.realpath(root)):
        raise BadSample("unsafe", f"{name!r:.200} leads out of {root}")
    return path
