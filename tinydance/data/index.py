"""Where the samples are: folders, CSV tables and tar shards, each as an index of rows.

An index has len(), [i], `kind` (the class of its rows), `where` and `notes` for messages, and
`missing_captions`. It holds few Python objects, of which every worker has a copy: ten million rows
are 80 MB as offsets, and 3 GB as tuples. track(items, what, unit) may show a bar meanwhile.
Not here: downloads, Parquet, zip, compressed tar.
"""

import codecs
import csv
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path

import numpy as np

from tinydance.data.rows import MAX_TEXT, Row, Video, confine
from tinydance.weights.untrusted import open_file

WEBVID = {"videoid", "page_dir", "name"}  # the columns of its CSV
HUGGING_FACE = {"file_name": "path", "text": "caption"}  # its names for ours


def untracked(items: Iterable, what: str, unit: str) -> Iterable:
    return items


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
    """All files under `root` with a suffix of their kind; `b.txt` is the caption of `b.mp4`."""

    def __init__(self, root: str | Path, kind: type[Row] = Video, track=untracked):
        self.where, self.root, self.kind, self.notes = root, Path(root), kind, []
        if not self.root.is_dir():
            raise ValueError(f"{root}: no such folder; give one that holds {kind.what}")
        found = set()
        for folder, _, files in track(os.walk(self.root), "indexing", "folder"):
            inside = Path(folder).relative_to(self.root)
            found |= {(inside / file).as_posix() for file in files}
        names = sorted(filter(kind.fits, found))
        if not names:
            raise ValueError(f"{root}: no {kind.what} inside; use {' or '.join(kind.suffixes)}")
        self.names = Strings(names)
        self.has_text = np.array([os.path.splitext(name)[0] + ".txt" in found for name in names])
        self.missing_captions = int((~self.has_text).sum())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Row:
        name = self.names[i]
        text = Row(os.path.splitext(name)[0] + ".txt", self.root)
        return self.kind(name, self.root, text.decode() if self.has_text[i] else "")


class Table:
    """A CSV with the columns path, caption and maybe start and end in seconds; or Hugging Face's
    file_name and text; or WebVid's.
    Raises ValueError, with the line's number, where a column is missing or a line is damaged."""

    def __init__(self, path: str | Path, kind: type[Row] = Video, track=untracked):
        self.where, self.path, self.kind, self.notes = path, Path(path), kind, []
        self.missing_captions, number = 0, 1
        try:
            with open_file(path) as file:
                file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
                lines = (line.decode("utf-8") for line in track(file, "indexing", "line"))
                reader = csv.DictReader(lines, strict=True)
                names = (name.strip().lower() for name in reader.fieldnames or [])
                self.columns = [HUGGING_FACE.get(name, name) for name in names]
                reader.fieldnames = self.columns
                if not any(names <= {*self.columns} for names in (WEBVID, {"path", "caption"})):
                    raise ValueError(f"no columns path and caption among {self.columns}")
                offsets, number = array("q", [file.tell()]), reader.line_num + 1
                for row in reader:  # of one line, or several where text in quotes has some
                    self.missing_captions += not self.parse(row)["caption"].strip()
                    offsets.append(file.tell())
                    number = reader.line_num + 1
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        self.offsets = np.array(offsets)  # of each row, and the end of the last
        if not len(self):
            raise ValueError(f"{path}: no row below the names of the columns")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Row:
        begin, end = int(self.offsets[i]), int(self.offsets[i + 1])
        text = Row("", self.path, offset=begin, size=end - begin).open().read().decode("utf-8")
        [row] = csv.DictReader(io.StringIO(text, newline=""), self.columns, strict=True)
        return self.kind(root=self.path.parent, **self.parse(row))

    def parse(self, row: dict) -> dict[str, str | float]:
        """The fields of a `Row` that a row of the table gives. Raises ValueError."""
        if None in row or None in row.values():  # more fields than columns, or fewer
            raise ValueError(f"not {len(self.columns)} columns; put text with commas in quotes")
        if WEBVID <= row.keys():
            path = f"videos/{row['page_dir']}/{row['videoid']}.mp4"
            row = {"path": path, "caption": row["name"]}
        start, end = float(row.get("start") or 0), float(row.get("end") or inf)
        if not 0 <= start < end:
            raise ValueError(f"start {start} is not before end {end}")
        return {"name": row["path"], "caption": row["caption"], "start": start, "end": end}


class Shards:
    """Tar files as img2dataset and video2dataset write them: the text of a.mp4 is a.txt, or else
    "caption" in a.json. A shard is used up to its damage, and `notes` has a line about it."""

    def __init__(self, paths: list[str | Path], kind: type[Row] = Video, track=untracked):
        self.paths, self.kind, self.notes = [Path(path) for path in paths], kind, []
        self.where = f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]
        # shard, offset, size; offset and size of the text (-1: none), whether the text is JSON
        names, numbers = [], array("q")
        for k, path in enumerate(track(self.paths, "indexing", "shard")):
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
                self.notes.append(f"{path}: {error}; {len(media)} samples before that are used")
            for stem, (name, place) in media.items():
                names.append(name)
                numbers.extend((k, *place, *texts.get(stem, (0, -1, False))))
        if not names:
            reason = "; ".join([f"no {kind.what} in {len(paths)} shards", *self.notes[:1]])
            raise ValueError(f"{paths[0]}: {reason}")
        self.names, self.table = Strings(names), np.array(numbers).reshape(-1, 6)
        self.missing_captions = int((self.table[:, 4] < 0).sum())

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Row:
        shard, offset, size, text_offset, text_size, is_json = self.table[i].tolist()
        path = self.paths[shard]
        text = Row("", path, offset=text_offset, size=max(0, min(text_size, MAX_TEXT))).decode()
        try:
            caption = str(json.loads(text)["caption"] or "") if is_json else text
        except Exception:  # no JSON, or no caption
            caption = ""
        return self.kind(f"{path.name}/{self.names[i]}", path, caption, offset, size)


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
