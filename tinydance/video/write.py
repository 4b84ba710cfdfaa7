"""Clips into files: mp4, GIF, animated PNG, a film strip, or a folder of numbered pictures.

A file appears whole or not at all, and keeps how it was made: its metadata, a dict, is a comment
inside, as JSON; a folder has it in NAME.json beside. A film needs no more memory than a clip.
"""

import json
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from glob import escape
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from PIL import Image, PngImagePlugin
from torch import is_tensor

from tinydance.video.read import bound, open_picture, open_video, printable
from tinydance.video.strips import film_strip, scaled_pictures
from tinydance.weights.files import read_json, storable, whole_file, write_json
from tinydance.weights.untrusted import parse_json, reading

SUFFIXES = (".mp4", ".gif", ".apng", ".png")


def check_output(path: str | Path, overwrite: bool = False) -> tuple[Path, str]:
    """The path and its suffix, "/" for a folder. Raises ValueError where `save_video` does not know
    the suffix, FileExistsError where the name is taken."""
    suffix = "/" if str(path).endswith(("/", os.sep)) else Path(path).suffix.lower()
    path = Path(path)
    if suffix not in (*SUFFIXES, "/"):
        known = f"{' or '.join(SUFFIXES)}, or in / for a folder of pictures"
        raise ValueError(f"{path}: cannot write {path.suffix!r}; end it in {known}")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise FileExistsError(f"{parent} is a file, not a folder; choose another name")
    if path.exists() and path.is_dir() != (suffix == "/"):
        kind = "folder" if path.is_dir() else "file"
        raise FileExistsError(f"{path} exists already, as a {kind}; choose another name")
    for name in [*path.glob("*"), Path(f"{path}.json")] if suffix == "/" else [path]:
        if name.exists() and not overwrite:
            raise FileExistsError(f"{name} exists already; choose another name or use --overwrite")
    return path, suffix


def save_video(
    frames, path, fps=4.0, overwrite=False, caption="", first=None, last=None, metadata=None
) -> Path:
    """Write uint8 (f, 3, H, W), or one such clip after another, to what `path` ends in: .mp4, .gif,
    .apng, .png (a film strip with a row for each clip), or "/" for a folder of numbered pictures.
    caption, first, last: what a film strip shows beside the frames. Raises like `check_output`."""
    path, suffix = check_output(path, overwrite)
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    clips = [frames] if is_tensor(frames) else frames
    scale = None if suffix in (".mp4", ".gif") else 1
    pictures = chain.from_iterable(map(scaled_pictures, clips, repeat(scale)))  # holds one clip
    caption, metadata = storable([caption, metadata])
    comment = json.dumps(metadata, ensure_ascii=False) if metadata else ""
    if suffix == "/":
        write_folder(pictures, path)
        if metadata:
            write_json(f"{path}.json", metadata)
        return path
    note = {"comment": comment.encode(), "pnginfo": PngImagePlugin.PngInfo()}  # of a GIF, of a PNG
    note["pnginfo"].add_itxt("comment", comment)
    with whole_file(path) as file:
        if suffix == ".mp4":  # by its name: FFmpeg opens the file again, to move the index
            write_mp4(pictures, file.name, Fraction(fps).limit_denominator(1001), comment)
        elif suffix == ".png":
            rows = list(clips)
            none = [None] * (len(rows) - 1)
            titles, given = [caption] + [""] * len(none), ([first, *none], [*none, last])
            film_strip(rows, titles, 1, None, *given).save(file, "PNG", **note)
        else:
            kind, tick = ("GIF", 10) if suffix == ".gif" else ("PNG", 1)  # tick: milliseconds
            start, *others = pictures
            ends = [round(1000 * k / fps / tick) * tick for k in range(len(others) + 2)]
            note |= {"duration": np.diff(ends).tolist(), "loop": 0}  # 0: for ever
            start.save(file, kind, save_all=True, append_images=others, **note)
    return path


def write_mp4(pictures: Iterator[Image.Image], path: str, rate: Fraction, comment: str) -> None:
    """H.264 as browsers and phones play it: yuv420p, even sides, the index before the pictures."""
    codec, options = "libx264", {"crf": "18", "g": "16"}
    if codec not in av.codecs_available:  # FFmpeg can be built without it, for its licence
        codec, options = "mpeg4", {"qmin": "2", "qmax": "4", "g": "16"}
    begin = next(pictures)
    width, height = begin.size
    with av.open(path, "w", "mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        for picture in chain([begin], pictures):
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, "rgb24")))
        container.mux(stream.encode(None))


def write_folder(pictures: Iterator[Image.Image], path: Path) -> None:
    """000000.png, 000001.png, ... instead of those that are there; other files stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*.part"):  # by killed writers
        shutil.rmtree(left)
    with TemporaryDirectory(".part", f".{path.name}.", path.parent) as part:
        for k, picture in enumerate(pictures):
            picture.save(f"{part}/{k:06d}.png")
        path.mkdir(exist_ok=True)
        for old in path.glob("[0-9]" * 6 + ".png"):
            old.unlink()
        for new in sorted(Path(part).iterdir()):
            os.replace(new, path / new.name)


def read_metadata(path: str | Path) -> dict:
    """The metadata that `save_video` was given for this file; {} where there is none."""
    path, beside = Path(path), Path(f"{Path(path)}.json")
    if path.is_dir():
        return read_json(beside) if beside.exists() else {}
    with reading(path):
        if path.suffix.lower() == ".mp4":
            with open_video(path) as (container, _):
                comment = container.metadata.get("comment", "")
        else:
            with bound(path) as file, open_picture(file) as picture:
                comment = picture.info.get("comment", "")
        comment = comment.decode() if isinstance(comment, bytes) else comment
        if comment and not comment.startswith("{"):
            raise ValueError(f"made by another program, which says {printable(comment)[:100]!r}")
        return parse_json(comment) if comment else {}
