"""Where the samples are: folders, CSV tables and tar shards, each as an index of rows.

An index has len(), [i], `kind` (the class of its rows), `where` and `notes` for messages,
`missing_captions`, and `hashes` (n,) of its rows' names. It holds few Python objects, of which
every worker has a copy: ten million rows are 120 MB as numbers, and 3 GB as tuples.
track(items, what, unit) may show a bar meanwhile.
Not here: downloads, Parquet, zip, compressed tar.
"""

import codecs
import csv
import hashlib
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from tinydance.data.rows import MAX_TEXT, Row, Video, confine
from tinydance.weights.safetensors import load_safetensors, save_safetensors
from tinydance.weights.untrusted import open_file, parse_json

WEBVID = {"videoid", "page_dir", "name"}  # the columns of its CSV
HUGGING_FACE = {"file_name": "path", "text": "caption"}  # its names for ours
# What the saved index of shards holds. table: shard; offset, size; those of the text (size -1: no
# text), is it JSON; begin and end in `names`; hash. states: size and time of each shard.
INDEX = {"table": (torch.int64, (9,)), "names": (torch.uint8, ()), "notes": (torch.uint8, ())}
INDEX |= {"states": (torch.int64, (2,))}


def untracked(items: Iterable, what: str, unit: str) -> Iterable:
    return items


def hash_name(name: str) -> int:
    """31 bits of the name alone: `Files` holds out the rows for which this number is small."""
    return crc32(name.encode("utf-8", "surrogateescape")) >> 1


class Strings:
    """Many strings as one run of bytes and their ends, which processes share."""

    def __init__(self, strings: Iterable[str]):
        parts = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.ends, self.bytes = np.cumsum([0, *map(len, parts)]), b"".join(parts)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return self.bytes[self.ends[i] : self.ends[i + 1]].decode("utf-8", "surrogateescape")


class Folder:
    """All files in a folder with a suffix of their kind; `b.txt` is the caption of `b.mp4`.
    root: links are followed as far as they stay in this folder; by default the same."""

    def __init__(self, path: str | Path, kind: type[Row] = Video, track=untracked, root=""):
        self.where, self.kind, self.notes, self.root = path, kind, [], Path(root or path)
        self.path = os.path.abspath(path) if root else ""  # of the names, from `root`
        if not os.path.isdir(path):
            raise ValueError(f"{path}: no such folder; give one that holds {kind.what}")
        found = set()
        for folder, _, files in track(os.walk(path, followlinks=bool(root)), "indexing", "folder"):
            inside = Path(folder).relative_to(path)
            found |= {(inside / file).as_posix() for file in files}
        names = sorted(filter(kind.fits, found))
        if not names:
            raise ValueError(f"{path}: no {kind.what} inside; use {' or '.join(kind.suffixes)}")
        self.names, self.hashes = Strings(names), np.array([*map(hash_name, names)])
        self.has_text = np.array([os.path.splitext(name)[0] + ".txt" in found for name in names])
        self.missing_captions = int((~self.has_text).sum())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Row:
        name = os.path.join(self.path, self.names[i])
        text = Row(os.path.splitext(name)[0] + ".txt", self.root)
        return self.kind(name, self.root, text.decode() if self.has_text[i] else "")


class JsonLines:
    """An object {...} a line, as csv.DictReader gives the rows of a table."""

    fieldnames = ("path", "caption")  # each row's, which `Table.parse` looks for

    def __init__(self, lines: Iterable[str]):
        self.lines, self.line_num = iter(lines), 0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, str]:
        row, self.line_num = parse_json(next(self.lines)), self.line_num + 1
        return {HUGGING_FACE.get(k, k): "" if x is None else str(x) for k, x in row.items()}


class Table:
    """A CSV, or JSON lines, with path, caption and maybe start and end in seconds; or Hugging
    Face's file_name and text; or WebVid's. root: where its paths begin; by default its own folder.
    Raises ValueError, with the line's number, where a column is missing or a line is damaged."""

    def __init__(self, path: str | Path, kind: type[Row] = Video, track=untracked, root=""):
        self.where, self.path, self.kind, self.notes = path, Path(path), kind, []
        self.root = Path(root or self.path.parent)
        self.missing_captions, number, self.columns = 0, 1, None
        try:
            with open_file(path) as file:
                file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
                lines = (line.decode("utf-8") for line in track(file, "indexing", "line"))
                reader = self.read(lines)
                names = (name.strip().lower() for name in reader.fieldnames or [])
                self.columns = [HUGGING_FACE.get(name, name) for name in names]
                reader.fieldnames = self.columns
                if not any(names <= {*self.columns} for names in (WEBVID, {"path", "caption"})):
                    raise ValueError(f"no columns path and caption among {self.columns}")
                offsets, hashes = array("q", [file.tell()]), array("i")
                number = reader.line_num + 1
                for row in map(self.parse, reader):  # of one line, or several in quotes
                    self.missing_captions += not row["caption"].strip()
                    hashes.append(hash_name(row["name"]))
                    offsets.append(file.tell())
                    number = reader.line_num + 1
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        self.hashes, self.offsets = np.array(hashes), np.array(offsets)  # and the last row's end
        if not len(self):
            raise ValueError(f"{path}: no row below the names of the columns")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Row:
        begin, end = int(self.offsets[i]), int(self.offsets[i + 1])
        text = Row("", self.path, offset=begin, size=end - begin).open().read().decode("utf-8")
        [row] = self.read(io.StringIO(text, newline=""))
        return self.kind(root=self.root, **self.parse(row))

    def read(self, lines: Iterable[str]):
        if self.path.suffix.lower() == ".jsonl":
            return JsonLines(lines)
        return csv.DictReader(lines, self.columns, strict=True)

    def parse(self, row: dict) -> dict[str, str | float]:
        """The fields of a `Row` that a row of the table gives. Raises ValueError."""
        if None in row or None in row.values():  # more fields than columns, or fewer
            raise ValueError(f"not {len(self.columns)} columns; put text with commas in quotes")
        if WEBVID <= row.keys():
            path = f"videos/{row['page_dir']}/{row['videoid']}.mp4"
            row = {"path": path, "caption": row["name"]}
        if missing := {"path", "caption"} - row.keys():
            raise ValueError(f"{' and '.join(sorted(missing))} missing among {[*row]}")
        start, end = float(row.get("start") or 0), float(row.get("end") or inf)
        if not 0 <= start < end:
            raise ValueError(f"start {start} is not before end {end}")
        return {"name": row["path"], "caption": row["caption"], "start": start, "end": end}


class Shards:
    """Tar files as img2dataset and video2dataset write them: the text of a.mp4 is a.txt, or else
    "caption" in a.json. A shard is used up to its damage, and `notes` has a line about it.

    The index is saved beside the first shard, or in the folder `out` where that one cannot be
    written, and holds until the size or the time of a shard changes. It is mapped into memory, so
    that processes share it. ValueError: it is damaged; OSError: neither folder takes it."""

    def __init__(self, paths: list[str | Path], kind: type[Row] = Video, track=untracked, out="."):
        self.paths, self.kind, self.notes = [Path(path) for path in paths], kind, []
        self.where = f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]
        stats = [path.stat() if path.exists() else None for path in self.paths]
        states = torch.tensor([(x.st_size, x.st_mtime_ns) if x else (-1, -1) for x in stats])
        listed = json.dumps([kind.suffixes, *map(os.path.abspath, self.paths)]).encode()
        name = f"tinydance_{kind.what}_{hashlib.sha256(listed).hexdigest()[:16]}.index"
        places = [Path(folder) / name for folder in (self.paths[0].parent, out)]
        saved = {place: read_index(place) for place in places if place.is_file()}
        index = next((x for x in saved.values() if torch.equal(x["states"], states)), None)
        if index is None:
            self.notes += [f"{place}: made anew, for a shard has changed" for place in saved]
            index = index_tars(self.paths, kind, track) | {"states": states}
            try:
                save_safetensors(index, place := places[0])
            except OSError:  # the folder is another's, or the disk is full
                save_safetensors(index, place := places[1])
            index = read_index(place)
        self.table, self.names = index["table"], index["names"]
        self.notes += decode(index["notes"]).splitlines()
        self.missing_captions, self.hashes = int((self.table[:, 4] < 0).sum()), self.table[:, 8]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Row:
        shard, *place, text_offset, text_size, is_json, begin, end, _ = self.table[i].tolist()
        path, name = self.paths[shard], decode(self.names[begin:end])
        text = Row("", path, offset=text_offset, size=max(0, min(text_size, MAX_TEXT))).decode()
        try:
            caption = str(json.loads(text)["caption"] or "") if is_json else text
        except Exception:  # no JSON, or no caption
            caption = ""
        return self.kind(f"{path.name}/{name}", path, caption, *place)


def index_tars(paths: list[Path], kind: type[Row], track) -> dict[str, Tensor]:
    """Make what INDEX describes, but the states. Raises ValueError where there is no sample."""
    table, names, notes = array("q"), bytearray(), []
    for k, path in enumerate(track(paths, "indexing", "shard")):
        media, texts = {}, {}
        try:
            for name, *place in tar_members(confine(path.parent, path.name)):
                stem, suffix = os.path.splitext(name)
                is_json = suffix.lower() == ".json"
                if kind.fits(name):
                    media.setdefault(stem, (name, place))
                elif suffix.lower() == ".txt" or is_json and stem not in texts:
                    texts[stem] = *place, is_json
        except (OSError, ValueError) as error:
            notes.append(f"{path}: {error}; {len(media)} samples before that are used")
        for stem, (name, place) in media.items():
            begin, hashed = len(names), hash_name(f"{path.name}/{name}")
            names += name.encode("utf-8", "surrogateescape")
            table.extend((k, *place, *texts.get(stem, (0, -1, False)), begin, len(names), hashed))
    if not table:
        reason = "; ".join([f"no {kind.what} in {len(paths)} shards", *notes[:1]])
        raise ValueError(f"{paths[0]}: {reason}")
    numbers = torch.frombuffer(table, dtype=torch.int64).view(-1, 9)
    lines = torch.tensor([*"\n".join(notes).encode("utf-8", "surrogateescape")]).byte()
    return {"table": numbers, "names": torch.frombuffer(names, dtype=torch.uint8), "notes": lines}


def read_index(path: Path) -> dict[str, Tensor]:
    """A saved index, mapped into memory. Raises ValueError unless it is as INDEX says. Its numbers
    are trusted no more than the shards are: a wrong one costs its own sample."""
    try:
        index = load_safetensors(path)
        if {name: (x.dtype, x.shape[1:]) for name, x in index.items()} != INDEX:
            raise ValueError(f"{path}: damaged, or another program's")
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and it is made anew") from None
    return index


def decode(text: Tensor) -> str:
    return text.numpy().tobytes().decode("utf-8", "surrogateescape")


def tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of each plain file in a tar; nothing is extracted. Raises
    ValueError for a tar that is compressed, cut or damaged."""
    count = 0
    try:
        with open_file(path) as file, tarfile.open(path, "r:", file, encoding="utf-8") as tar:
            length = os.path.getsize(path)
            for member in tar:
                if not member.offset_data <= tar.offset <= length:  # tar.offset: the next header
                    raise ValueError(f"cut within member {count + 1}")
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    yield member.name, member.offset_data, member.size
                    count += 1
            # `tarfile` takes a damaged header for the end; but a whole tar ends in zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise ValueError(f"damaged or cut after {count} members, at byte {tar.offset}")
    except (OSError, ValueError):
        raise
    except Exception as error:  # headers that lie raise anything
        what = f"damaged after {count} members" if count else "compressed, or no tar"
        raise ValueError(f"{what}: {error}") from None
