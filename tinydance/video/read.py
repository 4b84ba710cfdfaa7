"""Pictures and clips out of files: uint8 tensors (3, H, W) and (f, 3, H, W), cropped to one size.

Frames are picked by time, not by number: every sixth of 25 fps is 4.17, not the paper's 4 [§4.1],
and phones film at varying rates. Files are not trusted: whatever they make a decoder raise is a
`BadSample` (`decoding`), and `Bounded` limits what one may cost while it is decoded.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import ceil, inf
from pathlib import Path
from time import thread_time
from typing import BinaryIO

import av
import numpy as np
import torch
from PIL import Image, ImageOps

from tinydance.weights.untrusted import open_file, reading

PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000  # of a picture or a frame: a 10 KB file can claim gigabytes

# A "video" can be a playlist that names other files or hosts. So FFmpeg gets an open file, never a
# name, may open nothing itself (no protocol), and knows only formats that hold their own pictures.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,flv,mpeg,mpegvideo,asf,ogg,gif,apng"
SAFELY = {"protocol_whitelist": "none", "format_whitelist": FORMATS, "max_pixels": str(MAX_PIXELS)}
REASONS = "missing unsafe not_a_video no_video_stream not_a_picture too_large too_slow".split()
REASONS += ["too_short", "damaged"]
MAX_BYTES = 8 * MAX_PIXELS  # of a picture file: what 16-bit RGBA takes uncompressed
MAX_SCANS = 1000  # of a JPEG, each of which goes over all of its pixels
MAX_FRAMES = 200_000  # of one video in a cache: 14 hours at 4 fps
# A clip must be decoded as fast as it plays, from a key frame LEAD seconds before it on, in seconds
# of CPU time; and be within 4K at 60 fps, a bound that is the same on every machine.
LEAD, PIXELS_A_SECOND = 20, 500_000_000
TINY = 1e-3  # seconds: webm and mkv round times to milliseconds
SLACK = 0.75  # seconds by which pictures may end before the sound, and so before the file
CENTRE = (0.5, 0.5)  # where to crop: (0, 0) keeps the top left, (1, 1) the bottom right
Size = tuple[int, int]  # (H, W) of the frames that come out
Video = str | Path | BinaryIO  # a path, or an open file


class BadSample(ValueError):
    """A file that cannot be trained on: BadSample(reason, message), the reason one of REASONS."""

    reason = property(lambda self: self.args[0])
    message = property(lambda self: printable(self.args[1]))

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def printable(text: str) -> str:
    """Text from outside for a terminal, which obeys control characters, or for a log."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


@contextmanager
def decoding(name: str = "", otherwise: str = "damaged") -> Iterator[None]:
    """The one rule for what comes from outside: whatever it makes a decoder raise is a BadSample,
    with a name for the message, and of the reason `otherwise` where the error does not tell."""
    try:
        yield
    except Exception as error:
        reason, message = otherwise, getattr(error, "strerror", None) or str(error) or repr(error)
        if isinstance(error, BadSample):
            reason, message = error.args
        elif isinstance(error, (Image.DecompressionBombError, MemoryError)):
            reason, message = "too_large", f"shrink it below {MAX_PIXELS // 10**6} megapixels"
        elif isinstance(error, Image.UnidentifiedImageError):
            reason, message = "not_a_picture", f"convert it to {' or '.join(PICTURES)}"
        elif isinstance(error, OSError) and error.filename is not None:
            reason = "missing"
        raise BadSample(reason, f"{name}: {message}" if name else f"{message:.300}") from error


class Bounded:
    """An open file, and what a sample out of it may cost. BadSample `too_slow` when it is more."""

    def __init__(self, file: BinaryIO, seconds: float = 0):
        self.file, self.seek, self.tell, self.seconds = file, file.seek, file.tell, LEAD + seconds
        self.pixels, self.end = self.seconds * PIXELS_A_SECOND, thread_time() + self.seconds
        self.seek(0)

    def read(self, size: int = -1) -> bytes:
        self.spend(0)
        return self.file.read(size)

    def spend(self, pixels: int) -> None:
        self.pixels -= pixels
        if self.pixels < 0 or thread_time() > self.end:
            raise BadSample("too_slow", f"not decoded in {self.seconds:.0f} s; shrink it")


def read_image(path: str | Path, size: Size) -> torch.Tensor:
    """A picture file as uint8 (3, H, W). Raises ValueError that names the file and its fault."""
    with reading(path), bound(path) as file:
        return read_picture(file, size)


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
    """Yield the picture, not decoded yet. Raises BadSample."""
    with decoding():
        data = Bounded(file).read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES or data.count(b"\xff\xda") > MAX_SCANS and data[:2] == b"\xff\xd8":
            raise BadSample("too_large", f"above {MAX_BYTES} bytes, or {MAX_SCANS} scans")
        with Image.open(Bounded(io.BytesIO(data)), formats=PICTURES) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError  # Pillow's own limit is three times as high
            yield picture


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
def bound(source: Video, seconds: float = 0) -> Iterator[Bounded]:
    """Yield what is read, as it is where it has its bounds already. seconds: of the clip."""
    with decoding():
        if isinstance(source, (str, Path)):
            with open_file(source) as file:
                yield Bounded(file, seconds)
        else:
            yield source if isinstance(source, Bounded) else Bounded(source, seconds)


@contextmanager
def open_video(source: Video):
    """Yield (container, video stream). Raises BadSample."""
    with bound(source) as file, ExitStack() as stack:
        with decoding(otherwise="not_a_video"):
            file.seek(0)
            opened = av.open(file, options=SAFELY, metadata_errors="replace")
        container = stack.enter_context(opened)
        if not container.streams.video:
            raise BadSample("no_video_stream", "it holds no pictures")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadSample("damaged", "it names no codec that FFmpeg knows")
        if stream.width * stream.height > MAX_PIXELS:
            raise BadSample("too_large", f"{stream.width}x{stream.height} pixels")
        # By default threads decode whole frames ahead, and stopping early can deadlock (PyAV#1861).
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # of frames, not the header
        yield container, stream


def read_seconds(source: Video) -> float:
    """How long a video says that it is. Raises BadSample."""
    with open_video(source) as (container, stream):
        return read_length(container, stream)


def read_length(container, stream) -> float:
    """In seconds, as the file states it; a damaged file may hold less."""
    is_guess = container.format.name in ("mpeg", "mpegvideo")  # .mpg; FFmpeg's guess is too short
    if stream.duration is not None and not is_guess:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and not is_guess:  # webm and mkv state that of the whole file
        return container.duration / av.time_base
    # Nor does a recording that was not closed properly: look at the time of every packet.
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
    with bound(source, frames / fps) as file:  # all attempts together
        for attempt in ATTEMPTS:
            with open_video(file) as (container, stream):
                length = read_length(container, stream)
                begin = start(length) if callable(start) else start
                if begin > length:
                    raise BadSample("too_short", f"{length:.2f} s, none from {begin:.2f} s on")
                last = pictures_in(min(end, length) - begin, fps) - 1
                times = [begin + min(k, last) / fps for k in range(frames)]
                shown = decode_shown(container, stream, times, length, attempt, file.spend)
                pictures = [cut_out(frame, size, at) for frame in shown]
            if len(pictures) == frames:
                return torch.stack(pictures)
    raise BadSample("damaged", f"{len(pictures)} of {frames} pictures, then the file breaks off")


def read_pieces(source: Video, fps: float, size: Size, start=0, end=inf, at_once=240) -> Iterator:
    """Yield what `read_clip` shows from start to end, `at_once` frames at a time, till a damage."""
    count = pictures_in(min(end, read_seconds(source)) - start, fps)
    if count > MAX_FRAMES:
        raise BadSample("too_large", f"{count} frames; cut it")
    for first in range(0, count, at_once):
        yield read_clip(source, start + first / fps, min(at_once, count - first), fps, size, end)


def decode_shown(container, stream, times, length, attempt, spend=int) -> Iterator[av.VideoFrame]:
    """Yield the frame on screen at each of `times`: the last not later than that, or the first;
    fewer where the file breaks off, or where `attempt` cannot tell which frame is right."""
    seek, skip = attempt
    origin = float((stream.start_time or 0) * stream.time_base)  # a stream's clock may begin late
    times = [origin + time for time in times]
    end = min(times[-1], origin + length) - SLACK  # a whole file has pictures up to here
    early = float(2 / stream.average_rate) if stream.average_rate else inf  # two frames, in seconds
    if seek and times[0] > origin:
        container.seek(int(times[0] / stream.time_base), stream=stream)
    decoded = decode(container, stream, times, early if skip else inf, spend)
    shown, coming = None, next(decoded, None)
    for time in times:
        while coming and coming.time <= time + TINY:
            if seek and coming.is_corrupt:  # it needs what lies before this key frame
                return
            shown, coming = coming, next(decoded, None)
        if coming is None:  # the last frame of the file stays on screen, if the file is whole
            if shown is None or shown.time + (shown.duration or 0) * shown.time_base < end:
                return
        frame = shown or coming
        # The seek landed behind the right frame, or the right one may be between and was skipped.
        if (seek and frame.time > time + TINY) or (skip and frame.time < time - early):
            return
        yield frame


def decode(container, stream, times, early, spend) -> Iterator[av.VideoFrame]:
    """Decode what comes at one of `times` or up to `early` seconds before it, and of other frames
    only those that later ones refer to [H.264]: several times as fast as decoding all."""
    tick, codec = float(stream.time_base), stream.codec_context
    is_avi = container.format.name == "avi"  # it holds no times of frames, only their order
    for packet in container.demux(stream):
        now = None if packet.pts is None or is_avi else packet.pts * tick
        needed = now is None or any(time - early <= now <= time + TINY for time in times)
        if codec.name == "h264":
            codec.skip_frame = "DEFAULT" if needed or early == inf else "NONREF"
        for frame in packet.decode():
            if is_avi and frame.dts is not None:
                frame.pts = frame.dts
            if frame.time is not None:
                yield frame
        spend(codec.width * codec.height)


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
