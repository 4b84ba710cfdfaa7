"""Pictures and clips, in and out: everything that touches a file with pixels in it.

In come pictures (`read_image`), and clips to train on (`read_clip`): "16 consecutive frames with
4 fps" [paper §4.1], picked by time, not by frame number. No file is trusted: what cannot be read,
or claims to be huge, is a `BadSample` before it takes memory. Out go mp4, GIF, animated PNG, the
film strip in which the paper prints its videos, a folder of pictures or an array, each with how it
was made (`save_video`).

Frames are uint8 (f, 3, H, W); `to_pixels` and `to_frames` lead to the network's floats and back.
Not included: sound, mirrored or non-square pixels, colour management.
Read `sources.py` and `toyworld.py` before, `config.py` and `sample.py` after.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from fractions import Fraction
from math import ceil
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, PngImagePlugin

from tinydance.video.strips import _pictures, film_strip
from tinydance.weights.files import read_json, write_json

SUFFIXES = (".mp4", ".gif", ".apng", ".png", ".npy")


# --------------------------------------------------------------------------------------------------
# Writing clips and film strips


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Raise ValueError for a name that `save_video` cannot write, FileExistsError for one that is
    taken; to be asked before the work that fills it."""
    folder, path = str(path).endswith(("/", os.sep)), Path(path)
    if not folder and path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: cannot write {path.suffix!r}; end it in {' or '.join(SUFFIXES)}"
                         ", or in / for a folder of pictures")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise FileExistsError(f"{parent} is a file, not a folder; choose another name")
    if path.exists() and path.is_dir() != folder:
        raise FileExistsError(f"{path} exists already, as {'a file' if folder else 'a folder'}; "
                              "choose another name")
    taken = [path] if not folder or path.exists() and any(path.iterdir()) else []
    if folder or path.suffix.lower() == ".npy":
        taken.append(_beside(path))
    for name in taken:
        if name.exists() and not overwrite:
            raise FileExistsError(f"{name} exists already; choose another name or allow "
                                  "overwriting (--overwrite)")


def save_video(frames: torch.Tensor | Iterable[torch.Tensor], path: str | Path, fps: float = 4,
               scale: float | None = None, overwrite: bool = False, caption: str = "",
               first: torch.Tensor | None = None, last: torch.Tensor | None = None,
               about: dict | None = None, unfinished: Path | None = None) -> Path:
    """Write uint8 (f, 3, H, W), or one clip after another as they come, to what `path` ends in:

    .mp4, .gif, .apng (animated); .png, a film strip with a row a clip; .npy, uint8 (f, 3, H, W);
    or "/", a folder of numbered pictures. All but mp4 and GIF keep every pixel; mp4, .npy and a
    folder never hold more than one clip in memory.
    scale: enlarges; by default mp4 and GIF to 256 pixels or more. caption, first, last: what a film
    strip shows beside the frames. about: how the video was made, kept inside the file as a comment,
    for .npy and folders in a .json beside.
    unfinished: the folder where the file grows and stays if writing stops (an mp4 can be watched
    there); by default beside `path`, and nothing stays. `path` appears whole or not at all.
    Returns the path. Raises FileExistsError rather than replace a file, unless `overwrite`.
    """
    check_output(path, overwrite)
    folder, path = str(path).endswith(("/", os.sep)), Path(path)
    suffix = "/" if folder else path.suffix.lower()
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    clips = map(_checked, [frames] if torch.is_tensor(frames) else frames)
    begin = next(clips)
    clips = itertools.chain([begin], clips)
    if scale is None and suffix in (".mp4", ".gif"):
        scale = ceil(256 / min(256, *begin.shape[-2:]))
    pictures = (picture for clip in clips for picture in _pictures(clip, scale or 1))
    comment = json.dumps(about, ensure_ascii=False) if about else ""

    path.parent.mkdir(parents=True, exist_ok=True)
    grows = (unfinished or path.parent) / f".{path.stem}.{os.getpid()}{suffix.strip('/')}"
    if unfinished:
        grows = unfinished / f"unfinished{suffix.strip('/')}"
        _remove(grows)
    try:
        if suffix == ".png":
            rows = list(clips)
            strip = film_strip(rows, [caption] + [""] * (len(rows) - 1), scale=scale,
                               first=[first] + [None] * (len(rows) - 1),
                               last=[None] * (len(rows) - 1) + [last])
            strip.save(grows, pnginfo=_png_text(comment))
        elif suffix == ".mp4":
            _write_mp4(pictures, grows, Fraction(fps).limit_denominator(1001), comment)
        elif suffix == ".npy":
            _write_npy(clips, grows)
        elif folder:
            grows.mkdir()
            for k, picture in enumerate(pictures):
                picture.save(grows / f"{k:06d}.png")
        else:
            _write_animation(list(pictures), grows, fps, comment)
        if folder and path.exists():  # keeps what is no frame of ours
            for old in path.glob("[0-9]" * 6 + ".png"):
                old.unlink()
            for picture in sorted(grows.iterdir()):
                os.replace(picture, path / picture.name)
        else:
            os.replace(grows, path)
        if about and suffix in ("/", ".npy"):
            write_json(_beside(path), about)
    finally:
        if not unfinished:
            _remove(grows)
    return path


def read_about(path: str | Path) -> dict:
    """What `save_video` was told about a file; {} where it holds nothing of that kind."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".npy":
        return read_json(_beside(path)) if _beside(path).exists() else {}
    if path.suffix.lower() == ".mp4":
        with av.open(str(path)) as container:
            comment = container.metadata.get("comment")
    else:
        with Image.open(path) as picture:
            comment = picture.info.get("comment")
    return json.loads(comment) if comment else {}


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _checked(clip: torch.Tensor) -> torch.Tensor:
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3 or not len(clip):
        raise ValueError(f"frames are {clip.dtype} {tuple(clip.shape)}, "
                         "not uint8 (f, 3, H, W); use to_frames")
    return clip.cpu()


def _remove(path: Path) -> None:
    """A file, or a folder of pictures."""
    if path.is_dir():
        for picture in path.iterdir():
            picture.unlink()
        path.rmdir()
    path.unlink(missing_ok=True)


def _write_mp4(pictures: Iterable[Image.Image], path: Path, rate: Fraction, comment: str) -> None:
    """H.264 as browsers and phones play it: yuv420p, even sides, the index before the pictures.

    It grows in fragments of 16 frames, each playable without what follows, and at the end becomes
    an ordinary file, with one index, for players that do not read fragments.
    """
    codec, options = "libx264", {"crf": "18", "g": "16"}
    if codec not in av.codecs_available:
        codec, options = "mpeg4", {"qmin": "2", "qmax": "4", "g": "16"}
    growing = {"movflags": "frag_keyframe+delay_moov"}
    with av.open(str(path), "w", "mp4", options=growing) as container:
        stream = None
        try:
            for picture in pictures:
                width, height = picture.size
                if stream is None:
                    stream = container.add_stream(codec, rate=rate, options=options)
                    stream.width, stream.height = width + width % 2, height + height % 2
                    stream.pix_fmt = "yuv420p"
                even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, "rgb24")))
        finally:  # also where it stops: what is done can be watched
            if stream is not None:
                container.mux(stream.encode(None))
    whole, options = path.with_suffix(".whole.mp4"), {"movflags": "+faststart"}
    try:
        with av.open(str(path)) as source, av.open(str(whole), "w", options=options) as target:
            target.metadata["comment"] = comment
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:  # the last one only says that there are no more
                    packet.stream = stream
                    target.mux(packet)
        os.replace(whole, path)
    finally:
        _remove(whole)


def _write_npy(clips: Iterable[torch.Tensor], path: Path) -> None:
    """One array; its header, of a length of its own, is written again when f is known."""
    count = 0
    with open(path, "wb") as file:
        for clip in clips:
            if count == 0:
                np.lib.format.write_array_header_1_0(file, _npy_header(0, clip))
            file.write(clip.numpy().tobytes())
            count += len(clip)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, _npy_header(count, clip))


def _npy_header(count: int, clip: torch.Tensor) -> dict:
    return {"descr": "|u1", "fortran_order": False, "shape": (count, *clip.shape[1:])}


def _write_animation(pictures: list[Image.Image], path: Path, fps: float, comment: str) -> None:
    """GIF, whose clock ticks in hundredths of a second, or animated PNG, in thousandths."""
    gif = path.suffix == ".gif"
    tick = 10 if gif else 1  # milliseconds
    ends = [round(1000 * k / fps / tick) * tick for k in range(len(pictures) + 1)]
    note = {"comment": comment.encode()} if gif else {"pnginfo": _png_text(comment)}
    picture, *others = pictures
    picture.save(path, "GIF" if gif else "PNG", save_all=True, append_images=others, loop=0,
                 duration=np.diff(ends).tolist(), **note)


def _png_text(comment: str) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("comment", comment)
    return text
