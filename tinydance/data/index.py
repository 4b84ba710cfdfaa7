"""Where the bytes are: folders, CSV tables and tar shards, each as an indexed table of rows.

The paper trains on WebVid-10M, a CSV beside a folder of videos; its images come from LAION-400M,
which travels in tar shards [paper §4.1]. The three kinds differ only in how their index is built.
It is read once, holds numbers and no Python objects (ten million rows as tuples would be 3 GB in
every process), and leads to a row by its offset; so any order costs the same as the written one.

What users download is not trusted: a row that leads out of its root is `unsafe`, names are never
opened as addresses, nothing is extracted from a tar, and texts are read up to MAX_TEXT bytes.
Read `data.py` before, `video.py` after. Not included: downloads, Parquet, zip, compressed tar.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from tinydance.run.cli import progress
from tinydance.video.read import BadSample

VIDEO_FILES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".ts")


PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


TEXT_FILES = (".txt", ".json")


MAX_TEXT = 2**16  # bytes of a caption or of a tar's long name that are read


WEBVID = "videoid", "page_dir", "name"  # the columns of its CSV


class Row(NamedTuple):
    """One video or picture: where its bytes are, and what is said of it."""

    name: str            # for messages
    path: Path           # the file, or the tar
    caption: str = ""
    offset: int = 0      # in the tar
    size: int = -1       # bytes there; -1: a file of its own
    start: float = 0.0   # seconds; what lies before is not used
    end: float = math.inf


class Texts:
    """Many strings in two arrays, which processes share."""

    def __init__(self, texts: Iterable[str]):
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.ends = np.cumsum([0, *map(len, parts)])
        self.bytes = b"".join(parts)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return self.bytes[self.ends[i]:self.ends[i + 1]].decode("utf-8", "surrogateescape")


class Folder:
    """All files under `root` with one of the suffixes; the caption of `a/b.mp4` is in `a/b.txt`.

    ValueError where the folder is missing or holds none.
    """

    def __init__(self, root: str | Path, suffixes: tuple[str, ...] = VIDEO_FILES):
        self.where, self.root, self.notes = root, Path(root), []
        if not self.root.is_dir():
            raise ValueError(f"{root}: no such folder; give one that holds {_said(suffixes)}")
        names, texts = [], set()
        for folder, _, files in progress(os.walk(self.root), "indexing", "folder"):
            inside = Path(folder).relative_to(self.root)
            for file in files:
                if file.startswith("."):  # macOS leaves a ._b.mp4 beside b.mp4
                    continue
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in suffixes:
                    names.append((inside / file).as_posix())
                elif suffix == ".txt":
                    texts.add((inside / stem).as_posix())
        if not names:
            what = "video" if suffixes == VIDEO_FILES else "picture"
            raise ValueError(f"{root}: no {what} inside; they end in {' or '.join(suffixes)}")
        names.sort()
        self.has_text = np.array([os.path.splitext(name)[0] in texts for name in names])
        self.missing_captions = int((~self.has_text).sum())
        self.names = Texts(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Row:
        return Row(self.names[i], confined(self.root, self.names[i]), self.caption(i))

    def caption(self, i: int) -> str:
        if not self.has_text[i]:
            return ""
        path = confined(self.root, os.path.splitext(self.names[i])[0] + ".txt")
        try:
            with open(path, "rb") as file:
                return _text(file.read(MAX_TEXT))
        except OSError as error:
            raise BadSample("missing", error.strerror) from None


class Table:
    """A CSV with the columns path, caption and maybe start and end in seconds, or with WebVid's.

    Paths are relative to the folder of the CSV; WebVid's are videos/{page_dir}/{videoid}.mp4. All
    columns are text: page_dir 000123_000150 keeps its zeros. ValueError, with the line's number,
    where a column is missing or a line is damaged.
    """

    def __init__(self, path: str | Path):
        self.path, self.root = Path(path), Path(path).parent
        self.where, self.notes = path, []
        rows = _records(self.path)
        header = next(rows, (0, 0, []))[2]
        self.columns = {name.strip().lower(): k for k, name in enumerate(header)}
        self.webvid = not set(WEBVID) - self.columns.keys()
        for name in () if self.webvid else ("path", "caption"):
            if name not in self.columns:
                raise ValueError(f"{path}: no column {name!r} among {', '.join(header) or 'none'}; "
                                 "the first line must name path and caption")
        offsets, self.missing_captions = array("q"), 0
        for offset, line, fields in rows:
            if len(fields) != len(header):
                raise ValueError(f"{path}, line {line}: {len(fields)} columns, not {len(header)}; "
                                 "put text with a comma in quotes")
            try:
                row = self._row(fields)
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            offsets.append(offset)
            self.missing_captions += not row.caption.strip()
        if not offsets:
            raise ValueError(f"{path}: no row below the names of the columns")
        self.offsets = np.array([*offsets, self.path.stat().st_size])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Row:
        row = self._row(next(csv.reader(io.StringIO(self._line(i), newline=""), strict=True)))
        return row._replace(path=confined(self.root, row.name))

    def caption(self, i: int) -> str:
        return self._row(next(csv.reader(io.StringIO(self._line(i), newline="")))).caption

    def _line(self, i: int) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return file.read(self.offsets[i + 1] - self.offsets[i]).decode("utf-8")

    def _row(self, fields: list[str]) -> Row:
        said = {name: fields[k] for name, k in self.columns.items()}
        if self.webvid:
            videoid, page_dir, caption = (said[name] for name in WEBVID)
            return Row(f"videos/{page_dir}/{videoid}.mp4", self.path, caption)
        start, end = float(said.get("start") or 0), float(said.get("end") or math.inf)
        if not 0 <= start < end:
            raise ValueError(f"start {start} and end {end} are no stretch of time")
        return Row(said["path"], self.path, said["caption"], start=start, end=end)


class Shards:
    """Tar files as img2dataset and video2dataset write them: a.mp4 beside a.txt, or a.json.

    Members with one stem belong together; the text is a.txt's, or else "caption" in a.json. A
    shard that is damaged or cut gives what comes before, and a line in `notes`. ValueError where
    all of them together hold nothing.
    """

    def __init__(self, paths: list[str | Path], suffixes: tuple[str, ...] = VIDEO_FILES):
        self.paths, self.notes = [Path(path) for path in paths], []
        self.where = f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]
        names, tables = [], []
        for k, path in enumerate(progress(self.paths, "indexing", "shard")):
            found = self._samples(path, suffixes)
            names += found
            table = [(k, *place, *text) for place, text in found.values()]
            tables.append(np.array(table, np.int64).reshape(-1, 6))
        self.table, self.names = np.concatenate(tables), Texts(names)
        if not names:
            raise ValueError(f"{paths[0]}: no {_said(suffixes)} in {len(paths)} shards"
                             f"{''.join('; ' + note for note in self.notes[:1])}")
        self.missing_captions = int((self.table[:, 4] < 0).sum())

    def _samples(self, path: Path, suffixes) -> dict[str, tuple]:
        """{member: ((offset, size), (offset, size, is JSON))} of one shard; a size of -1: none."""
        media, texts, twice = {}, {}, 0
        try:
            with open(path, "rb") as file:
                for count, (name, offset, size) in enumerate(tar_members(file)):
                    stem, suffix = os.path.splitext(name)
                    suffix = suffix.lower()
                    if os.path.basename(name).startswith("."):
                        continue
                    if suffix in suffixes:
                        twice += stem in media
                        media.setdefault(stem, (name, (offset, size)))
                    elif suffix in TEXT_FILES and (suffix == ".txt" or stem not in texts):
                        texts[stem] = offset, size, suffix == ".json"
        except (OSError, ValueError) as error:
            self.notes.append(f"{path}: {error}; {len(media)} samples before that are used")
        if twice:
            self.notes.append(f"{path}: {twice} names come twice, of which the first is used")
        return {name: (place, texts.get(stem, (0, -1, 0))) for stem, (name, place) in media.items()}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Row:
        path, offset, size = self.paths[self.table[i, 0]], *self.table[i, 1:3].tolist()
        return Row(f"{path.name}/{self.names[i]}", path, self.caption(i), offset, size)

    def caption(self, i: int) -> str:
        shard, _, _, offset, size, is_json = self.table[i].tolist()
        if size < 0:
            return ""
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            text = _text(file.read(min(size, MAX_TEXT)))
        if not is_json:
            return text
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return ""
        return str(said.get("caption") or "") if isinstance(said, dict) else ""


Rows = Folder | Table | Shards


def confined(root: Path, name: str) -> Path:
    """The path of `name` under root. BadSample `unsafe` for one that leads out of it, by `..`, by
    a symbolic link or from the start, and for an address such as http://host or concat:a."""
    if "\0" in name or re.match(r"[\w+.-]+:(?! )", name):
        raise BadSample("unsafe", f"{name!r:.200} is no path in {root}")
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(os.path.realpath(root)):
        raise BadSample("unsafe", f"{name!r:.200} leads out of {root}")
    return path


class Member(io.RawIOBase):
    """The bytes of a tar's member, as a file that has nothing before and nothing after them."""

    def __init__(self, path: Path, offset: int, size: int, name: str):
        self.file, self.offset, self.size, self.name = open(path, "rb"), offset, size, name
        self.file.seek(offset)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell() - self.offset

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        place += {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.size}[whence]
        return self.file.seek(self.offset + max(0, place)) - self.offset

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.tell())
        return self.file.read(left if count is None or count < 0 else min(count, left))

    def close(self) -> None:
        self.file.close()
        super().close()


def open_row(row: Row) -> BinaryIO:
    """The row's bytes as a file. BadSample `missing` where there is none; a pipe is none."""
    try:
        if row.size >= 0:
            return Member(row.path, row.offset, row.size, row.name)
        if not row.path.is_file():
            raise BadSample("missing", "no such file")
        return open(row.path, "rb")
    except OSError as error:
        raise BadSample("missing", error.strerror) from None


def tar_members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of each plain file in a tar; links and devices are passed over.

    A tar is a row of headers of 512 bytes, each before its file's bytes, and ends in zeros.
    Python's `tarfile` takes a damaged header for the end and keeps silent; here that raises
    ValueError, as do an end without zeros, a member that is cut, and a compressed tar.
    """
    length = file.seek(0, os.SEEK_END)
    offset, count, long = 0, 0, {}
    while True:
        file.seek(offset)
        header = file.read(512)
        if header[:2] == b"\x1f\x8b":
            raise ValueError("compressed, so that nothing can be found by its offset; unpack it")
        if len(header) < 512:
            raise ValueError(f"cut after {count} members, or never finished")
        if not any(header):
            return
        if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError(f"damaged after {count} members, at byte {offset}")
        kind, size = header[156:157], long.pop("size", None) or _octal(header[124:136])
        offset += 512
        if offset + size > length:
            raise ValueError(f"cut within member {count + 1}")
        if kind == b"L":  # GNU: the next member's name, which is too long for its header
            long = {"name": file.read(min(size, MAX_TEXT)).rstrip(b"\0")}
        elif kind == b"x":  # POSIX: the same, as lines "length path=name", and sizes above 8 GiB
            said = dict(re.findall(rb"\d+ (path|size)=([^\n]*)\n", file.read(min(size, MAX_TEXT))))
            long = {"name": said[b"path"]} if b"path" in said else {}
            if said.get(b"size", b"").isdigit():
                long["size"] = int(said[b"size"])
        else:
            name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
            if header[257:263] == b"ustar\0" and prefix:
                name = prefix + b"/" + name
            if kind in b"0\0":
                yield long.get("name", name).decode("utf-8", "surrogateescape"), offset, size
                count += 1
            long = {}
        offset += -(-size // 512) * 512


def _octal(field: bytes) -> int:
    """A number in a tar's header: octal digits, or from 8 GiB on a byte 128 and binary."""
    if field[0] == 128:
        return int.from_bytes(field[1:])
    digits = field.strip(b"\0 ")
    return int(digits, 8) if digits.isdigit() else 0


def _records(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (offset, line number, fields) of each record; text in quotes may hold several lines."""
    place = 0

    def lines(file) -> Iterator[str]:
        nonlocal place
        for line in progress(file, "indexing", "line"):
            text = line.decode("utf-8-sig" if place == 0 else "utf-8")
            place += len(line)
            yield text

    try:
        with open(path, "rb") as file:
            reader, offset, line = csv.reader(lines(file), strict=True), 0, 1
            for fields in reader:
                if fields:
                    yield offset, line, fields
                offset, line = place, reader.line_num + 1
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {line}: not UTF-8; save the table as that") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace")


def _said(suffixes) -> str:
    return "videos" if suffixes == VIDEO_FILES else "pictures"
