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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, inf
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import torch
from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000  # of a picture, before it is decoded: a 10 KB file can claim gigabytes


PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


# A "video" can be a playlist naming other files or hosts. FFmpeg gets bytes and never a name, may
# open nothing by itself, and knows real containers only.
OPEN_SAFELY = {"protocol_whitelist": "none",
               "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts",
               "max_pixels": str(MAX_PIXELS)}


REASONS = ("missing", "unsafe", "not_a_video", "no_video_stream", "not_a_picture", "too_large",
           "too_short", "damaged")


CENTRE = (0.5, 0.5)


TINY = 1e-3  # seconds: webm and mkv round times to milliseconds


SLACK = 0.75  # seconds by which pictures may end before the sound, and so before the file


class BadSample(ValueError):
    """A file that cannot be trained on; `reason` is one of REASONS."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def resize_crop(picture: Image.Image, size: tuple[int, int], at: tuple[float, float] = CENTRE
                ) -> torch.Tensor:
    """The largest part of an RGB picture with the shape of `size`, resized to it.

    size is (H, W); at: where in the picture the part lies, (0, 0) for top left, (1, 1) for bottom
    right; returns uint8 (3, H, W). Cut first, so that a very long picture costs no memory.
    Pillow's bicubic averages over all that a new pixel covers: shrinking makes no moire.
    [SD: short side resized, centre cropped; paper silent]
    """
    height, width = size
    scale = min(picture.height / height, picture.width / width)
    top, left = (picture.height - height * scale) * at[0], (picture.width - width * scale) * at[1]
    box = (left, top, left + width * scale, top + height * scale)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()  # h w c -> c h w


def read_image(path: str | Path, size: tuple[int, int]) -> torch.Tensor:
    """A picture file as uint8 (3, H, W): turned as EXIF says, alpha laid over white, cropped.

    Raises ValueError for what is missing, no picture, damaged or larger than MAX_PIXELS.
    """
    path = Path(path)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {wrong}; give the path of a picture")
    try:
        with open(path, "rb") as file:
            return read_picture(file, size)
    except BadSample as error:
        advice = {"not_a_picture": f"not a picture; convert it to {' or '.join(PICTURES)}",
                  "too_large": f"above {MAX_PIXELS // 10**6} megapixels; shrink it",
                  "damaged": f"damaged picture ({error.message}); save it anew"}
        raise ValueError(f"{path}: {advice[error.reason]}") from None


def read_picture(file: BinaryIO, size: tuple[int, int], at: tuple[float, float] = CENTRE
                 ) -> torch.Tensor:
    """As `read_image`, of an open file, cropped as `resize_crop`. Raises BadSample."""
    with _open_picture(file) as picture:
        return resize_crop(_as_rgb(ImageOps.exif_transpose(picture)), size, at)


def picture_size(file: BinaryIO) -> tuple[int, int, str]:
    """(width, height, format) that a picture's header states. Raises BadSample."""
    with _open_picture(file) as picture:
        return picture.width, picture.height, picture.format


@contextmanager
def _open_picture(file: BinaryIO):
    """Yield the picture, not yet decoded; what Pillow raises inside becomes a BadSample."""
    try:
        with Image.open(file, formats=PICTURES) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadSample("too_large", f"{picture.width}x{picture.height} pixels")
            yield picture
    except BadSample:
        raise
    except Image.UnidentifiedImageError:
        raise BadSample("not_a_picture") from None
    except Image.DecompressionBombError as error:
        raise BadSample("too_large", str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's three ways to say "damaged"
        raise BadSample("damaged", str(error)) from None


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit gray, of which Pillow's convert would make white
        return Image.fromarray((np.asarray(picture) // 256).astype(np.uint8)).convert("RGB")
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


# --------------------------------------------------------------------------------------------------
# Reading clips


@contextmanager
def _open(source: str | Path | BinaryIO):
    """Yield (container, video stream); what FFmpeg raises inside becomes a BadSample."""
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():  # a pipe would be waited for
            raise BadSample("missing", "no such file")
        with open(source, "rb") as file, _open(file) as opened:
            yield opened
        return
    try:
        source.seek(0)
        container = av.open(source, options=OPEN_SAFELY, metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise BadSample("not_a_video", error.strerror) from None
    with container:
        if not container.streams.video:
            raise BadSample("no_video_stream", "it holds no pictures")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadSample("damaged", "it names no codec that FFmpeg knows")
        if stream.width * stream.height > MAX_PIXELS:
            raise BadSample("too_large", f"{stream.width}x{stream.height} pixels")
        # By default threads decode whole frames ahead, and stopping early can deadlock (PyAV#1861).
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        try:
            yield container, stream
        except av.error.FFmpegError as error:
            raise BadSample("damaged", error.strerror) from None


def _duration(container, stream) -> float:
    """In seconds, as the file states it; a damaged one may hold less."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:  # webm and mkv know only the whole file's
        return container.duration / av.time_base
    ends = [packet.pts + (packet.duration or 0)
            for packet in container.demux(stream) if packet.pts is not None]
    container.seek(0)
    return float((max(ends, default=0) - (stream.start_time or 0)) * stream.time_base)


class Header(NamedTuple):
    """What a video's header says."""

    seconds: float
    width: int
    height: int
    fps: float
    codec: str


def read_header(source: str | Path | BinaryIO) -> Header:
    """Read a video's header. Raises BadSample."""
    with _open(source) as (container, stream):
        fps = float(stream.average_rate or 0)
        codec = stream.codec_context.name
        return Header(_duration(container, stream), stream.width, stream.height, fps, codec)


def pictures_in(seconds: float, fps: float) -> int:
    """How many pictures, one every 1 / fps seconds from 0 on, a video of this length shows."""
    return max(1, ceil((seconds - TINY) * fps))


def read_clip(source: str | Path | BinaryIO, start: float | Callable[[float], float], frames: int,
              fps: float, size: tuple[int, int], end: float = inf,
              at: tuple[float, float] = CENTRE, seek: bool = True) -> torch.Tensor:
    """What is on screen at start + k / fps seconds after the video's beginning.

    source: a path, or an open file. start: seconds, or a function of the video's length that
    chooses them, so that the file is opened once. end: nothing from there on is shown.
    Returns uint8 (frames, 3, H, W), cropped as `resize_crop`. Picked by time: a stride of 25 / 4
    frames, rounded, would be 4.17 fps, and phones film at varying rates. Where the video ends
    first, the last of these pictures is repeated.
    Raises BadSample where the file is no video, or breaks off before it should.
    seek=False decodes from the beginning, which is slow and always right.
    """
    for seek, thrifty in ((True, True), (True, False), (False, False))[0 if seek else 2:]:
        with _open(source) as (container, stream):
            length = _duration(container, stream)
            begin = start(length) if callable(start) else start
            if begin > length:
                raise BadSample("too_short", f"{length:.2f} s hold no clip from {begin:.2f} s on")
            count = pictures_in(min(end, length) - begin, fps)
            times = [begin + min(k, count - 1) / fps for k in range(frames)]
            pictures = list(_shown_at(container, stream, times, length, size, at, seek, thrifty))
        if len(pictures) == frames:
            return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    raise BadSample("damaged", f"{len(pictures)} of {frames} pictures, then the file breaks off")


def read_all(source: str | Path | BinaryIO, fps: float, size: tuple[int, int], start: float = 0,
             end: float = inf, at_once: int = 240) -> Iterator[torch.Tensor]:
    """Yield the whole video from start to end, as `read_clip` would show it, in short pieces.

    The pieces are uint8 (at_once or fewer, 3, H, W), so that a long film takes no more memory than
    a short one. Raises BadSample, after what is good.
    """
    with _open(source) as (container, stream):
        length = _duration(container, stream)
        count = pictures_in(min(end, length) - start, fps)
    if start > length:
        raise BadSample("too_short", f"{length:.2f} s hold nothing from {start:.2f} s on")
    for first in range(0, count, at_once):
        yield read_clip(source, start + first / fps, min(at_once, count - first), fps, size, end)


def _shown_at(container, stream, times, length, size, at, seek, thrifty) -> Iterator[np.ndarray]:
    """Yield the picture on screen at each of `times`, seconds from the beginning, as H W 3.

    Fewer where a seek went too far, as it does in MPEG-TS, where the file breaks off, or where one
    that was passed over, being `thrifty`, may be the one on screen.
    """
    origin = float((stream.start_time or 0) * stream.time_base)
    times = [origin + time for time in times]
    end = min(times[-1], origin + length) - SLACK
    if seek and times[0] > origin:
        container.seek(int(times[0] / stream.time_base), stream=stream)  # a key frame before
    early = float(2 / stream.average_rate) if stream.average_rate else inf  # seconds: two frames
    decoded = _decode_thriftily(container, stream, times, early) if thrifty else container.decode(
        stream)
    for time, frame in zip(times, _on_screen(decoded, times, end)):
        if seek and frame.time > time + TINY or thrifty and frame.time < time - early:
            return
        yield _picture(frame, size, at)


def _decode_thriftily(container, stream, times, early):
    """Decode what may be shown: in H.264, pass over frames that no other refers to, unless they
    come at one of `times` or up to `early` seconds before it."""
    tick = float(stream.time_base)
    for packet in container.demux(stream):
        now = None if packet.pts is None else packet.pts * tick
        needed = now is None or any(time - early <= now <= time + TINY for time in times)
        if stream.codec_context.name == "h264":
            stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        yield from packet.decode()


def _on_screen(decoded, times, end):
    """Yield for each of `times` the last frame not later; stop if there is none to show at `end`.

    A last frame stays for the later times too.
    """
    times, shown = list(times), None
    for frame in decoded:
        if frame.time is None:
            continue
        while times and times[0] + TINY < frame.time:
            times.pop(0)
            yield shown or frame
        if not times:
            return
        shown = frame
    if shown and shown.time + (shown.duration or 0) * shown.time_base >= end:
        yield from [shown] * len(times)


def _picture(frame: av.VideoFrame, size: tuple[int, int], at: tuple[float, float]) -> np.ndarray:
    """The frame as players show it (phones store lying pictures and an angle), cropped: H W 3.

    Where it is larger than `size`, FFmpeg shrinks it until it just covers that, a new pixel the
    mean of the area that it covers: for HD, several times as fast as making RGB of all its pixels.
    """
    turns = round(frame.rotation / 90)
    height, width = size[::-1] if turns % 2 else size
    scale = max(height / frame.height, width / frame.width)
    if scale < 1:
        height, width = round(frame.height * scale), round(frame.width * scale)
        frame = frame.reformat(width, height, "rgb24", interpolation="AREA")
    picture = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    if scale > 1:
        return resize_crop(Image.fromarray(picture), size, at).permute(1, 2, 0).numpy()
    top, left = (round((whole - part) * u) for whole, part, u in zip(picture.shape, size, at))
    return picture[top:top + size[0], left:left + size[1]]
