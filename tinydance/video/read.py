"""Pictures and clips out of files: uint8 tensors (3, H, W) and (f, 3, H, W), cropped to one size.

Frames are picked by time, not by number: every sixth of 25 fps is 4.17, not the paper's 4 [§4.1],
and phones film at varying rates. A file that cannot be read, or claims to be huge, raises
`BadSample` before it takes memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, inf
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from PIL import Image, ImageOps

PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000  # of a picture, checked before decoding: a 10 KB file can claim gigabytes

# A "video" can be a playlist that names other files or hosts. So FFmpeg gets an open file, never a
# name, may open nothing itself (no protocol), and knows only formats that hold their own pictures.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts"
SAFELY = {"protocol_whitelist": "none", "format_whitelist": FORMATS, "max_pixels": str(MAX_PIXELS)}
REASONS = "missing unsafe not_a_video no_video_stream not_a_picture too_large".split()
REASONS += ["too_short", "damaged"]
TINY = 1e-3  # seconds: webm and mkv round times to milliseconds
SLACK = 0.75  # seconds by which pictures may end before the sound, and so before the file
CENTRE = (0.5, 0.5)  # where to crop: (0, 0) keeps the top left, (1, 1) the bottom right
Size = tuple[int, int]  # (H, W) of the frames that come out
Video = str | Path | BinaryIO  # a path, or an open file


class BadSample(ValueError):
    """A file that cannot be trained on: BadSample(reason, message), the reason one of REASONS."""

    reason = property(lambda self: self.args[0])
    message = property(lambda self: self.args[1])

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def open_file(path: str | Path) -> BinaryIO:
    if not Path(path).is_file():  # opening a pipe would wait for ever
        raise BadSample("missing", "no such file")
    return open(path, "rb")


def read_image(path: str | Path, size: Size) -> torch.Tensor:
    """A picture file as uint8 (3, H, W). Raises ValueError that names the file and its fault."""
    try:
        with open_file(path) as file:
            return read_picture(file, size)
    except BadSample as error:
        raise ValueError(f"{path}: {error}") from None


def read_picture(file: BinaryIO, size: Size, at=CENTRE) -> torch.Tensor:
    """Like `read_image`, from an open file, cropped at a place of choice. Raises BadSample."""
    with open_picture(file) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16-bit gray, which `convert` would clip to white
            picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return resize_crop(picture.convert("RGB"), size, at)


@contextmanager
def open_picture(file: BinaryIO):
    """Yield the picture, not decoded yet; errors that Pillow raises inside become BadSamples."""
    try:
        with Image.open(file, formats=PICTURES) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError  # Pillow's own limit is three times as high
            yield picture
    except Image.DecompressionBombError:
        raise BadSample("too_large", f"shrink it below {MAX_PIXELS // 10**6} megapixels") from None
    except Image.UnidentifiedImageError:
        raise BadSample("not_a_picture", f"convert it to {' or '.join(PICTURES)}") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise BadSample("damaged", f"{error}; save it anew") from None


def resize_crop(picture: Image.Image, size: Size, at=CENTRE) -> torch.Tensor:
    """Cut the largest part with the shape of `size` out of an RGB picture; resize it to (3, H, W).
    Pillow's bicubic averages over all that a new pixel covers: no moire. [SD; paper silent]"""
    height, width = size
    scale = min(picture.height / height, picture.width / width)
    top, left = (picture.height - height * scale) * at[0], (picture.width - width * scale) * at[1]
    # Cut (box) before resizing: resizing all of a very long picture would take gigabytes.
    box = (left, top, left + width * scale, top + height * scale)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()  # h w c -> c h w


@contextmanager
def open_video(source: Video):
    """Yield (container, video stream); errors that FFmpeg raises inside become BadSamples."""
    if isinstance(source, (str, Path)):
        with open_file(source) as file, open_video(file) as opened:
            yield opened
        return
    try:
        source.seek(0)
        container = av.open(source, options=SAFELY, metadata_errors="replace")
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


def read_seconds(source: Video) -> float:
    """How long a video says that it is. Raises BadSample."""
    with open_video(source) as (container, stream):
        return read_length(container, stream)


def read_length(container, stream) -> float:
    """In seconds, as the file states it; a damaged file may hold less."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:  # webm and mkv state the length of the whole file only
        return container.duration / av.time_base
    # A recording that was not closed properly states none: look at the time of every packet.
    packets = (packet for packet in container.demux(stream) if packet.pts is not None)
    end = max((packet.pts + (packet.duration or 0) for packet in packets), default=0)
    container.seek(0)
    return float((end - (stream.start_time or 0)) * stream.time_base)


def pictures_in(seconds: float, fps: float) -> int:
    """How many pictures, one every 1 / fps seconds from 0 on, a video of this length shows."""
    return max(1, ceil((seconds - TINY) * fps))


# (seek, skip), from fast to safe: jump to the key frame before the clip; do not decode frames that
# are not shown and that no other frame needs. In videos of varying frame rate a skipped frame may
# be on screen, and in MPEG-TS a seek may land too late; `decode_shown` notices both.
ATTEMPTS = ((True, True), (True, False), (False, False))


def read_clip(
    source: Video, start: float | Callable, frames: int, fps: float, size: Size, end=inf, at=CENTRE
) -> torch.Tensor:
    """What is on screen at start + k / fps seconds of the video: uint8 (frames, 3, H, W). start may
    be a function of the video's length. The last picture is repeated where the video or `end` comes
    too early. Raises BadSample, also where the file breaks off."""
    for attempt in ATTEMPTS:
        with open_video(source) as (container, stream):
            length = read_length(container, stream)
            begin = start(length) if callable(start) else start
            if begin > length:
                raise BadSample("too_short", f"{length:.2f} s hold no clip from {begin:.2f} s on")
            last = pictures_in(min(end, length) - begin, fps) - 1
            times = [begin + min(k, last) / fps for k in range(frames)]
            shown = decode_shown(container, stream, times, length, attempt)
            pictures = [cut_out(frame, size, at) for frame in shown]
        if len(pictures) == frames:
            return torch.stack(pictures)
    raise BadSample("damaged", f"{len(pictures)} of {frames} pictures, then the file breaks off")


def read_pieces(source: Video, fps: float, size: Size, start=0, end=inf, at_once=240) -> Iterator:
    """Yield what `read_clip` shows from start to end, `at_once` frames at a time, till a damage."""
    count = pictures_in(min(end, read_seconds(source)) - start, fps)
    for first in range(0, count, at_once):
        yield read_clip(source, start + first / fps, min(at_once, count - first), fps, size, end)


def decode_shown(container, stream, times, length, attempt) -> Iterator[av.VideoFrame]:
    """Yield the frame on screen at each of `times`: the last not later than that, or the first;
    fewer where the file breaks off, or where `attempt` cannot tell which frame is right."""
    seek, skip = attempt
    origin = float((stream.start_time or 0) * stream.time_base)  # a stream's clock may begin late
    times = [origin + time for time in times]
    end = min(times[-1], origin + length) - SLACK  # a whole file has pictures up to here
    early = float(2 / stream.average_rate) if stream.average_rate else inf  # two frames, in seconds
    if seek and times[0] > origin:
        container.seek(int(times[0] / stream.time_base), stream=stream)
    decoded = decode_needed(container, stream, times, early) if skip else container.decode(stream)
    decoded = (frame for frame in decoded if frame.time is not None)
    shown, coming = None, next(decoded, None)
    for time in times:
        while coming and coming.time <= time + TINY:
            shown, coming = coming, next(decoded, None)
        if coming is None:  # the last frame of the file stays on screen, if the file is whole
            if shown is None or shown.time + (shown.duration or 0) * shown.time_base < end:
                return
        frame = shown or coming
        # The seek landed behind the right frame, or the right one may be between and was skipped.
        if (seek and frame.time > time + TINY) or (skip and frame.time < time - early):
            return
        yield frame


def decode_needed(container, stream, times, early) -> Iterator[av.VideoFrame]:
    """Decode what comes at one of `times` or up to `early` seconds before it, and of other frames
    only those that later ones refer to [H.264]: several times as fast as decoding all."""
    tick, codec = float(stream.time_base), stream.codec_context
    for packet in container.demux(stream):
        now = None if packet.pts is None else packet.pts * tick
        needed = now is None or any(time - early <= now <= time + TINY for time in times)
        if codec.name == "h264":
            codec.skip_frame = "DEFAULT" if needed else "NONREF"
        yield from packet.decode()


def cut_out(frame: av.VideoFrame, size: Size, at) -> torch.Tensor:
    """The frame as players show it, cropped to `size`: uint8 (3, H, W)."""
    turns = round(frame.rotation / 90)  # a phone held upright stores lying pictures and an angle
    height, width = size[::-1] if turns % 2 else size
    scale = max(height / frame.height, width / frame.width)
    if scale < 1:
        # FFmpeg shrinks until the frame just covers `size`: faster than making RGB of all pixels.
        height, width = round(frame.height * scale), round(frame.width * scale)
        frame = frame.reformat(width, height, "rgb24", interpolation="AREA")
    picture = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    if scale <= 1:  # one side fits by now, and the other is cut at whole pixels
        top, left = (round((whole - part) * u) for whole, part, u in zip(picture.shape, size, at))
        picture = picture[top : top + size[0], left : left + size[1]]
    return resize_crop(Image.fromarray(picture), size, at)
