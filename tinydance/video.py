"""Pictures and clips, in and out: everything that touches a file with pixels in it.

In come pictures for the first and last frame (`read_image`), and clips to train on (`read_clip`):
"16 consecutive frames with 4 fps" [paper §4.1], picked by time, not by frame number. Out go mp4,
GIF, animated PNG, the film strip in which the paper prints its videos, a folder of pictures or
an array, each with how it was made (`save_video`).

Frames are uint8 (f, 3, H, W); `to_pixels` and `to_frames` lead to the network's floats and back.
Not included: sound, mirrored or non-square pixels, colour management.
Read `data.py` and `toyworld.py` before, `config.py` and `sample.py` after.
"""

from __future__ import annotations

import itertools
import json
import os
import unicodedata
from collections.abc import Iterable
from contextlib import contextmanager
from fractions import Fraction
from math import ceil
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from .weights import read_json, write_json

MAX_PIXELS = 50_000_000  # of a picture, before it is decoded: a 10 KB file can claim gigabytes
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".mp4", ".gif", ".apng", ".png", ".npy")
# A "video" can be a playlist naming other files or hosts: only plain files, only real containers.
OPEN_SAFELY = {"protocol_whitelist": "file",
               "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts"}
TINY = 1e-3  # seconds: webm and mkv round times to milliseconds
SLACK = 0.5  # seconds by which the pictures may end before the sound, and so before the file


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float in [-1, 1], as the VAE takes it [SD]."""
    return frames.float() / 127.5 - 1


def to_frames(pixels: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] -> uint8, rounded and clamped; undoes `to_pixels` exactly."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize_crop(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """The largest centred part of an RGB picture with the shape of `size`, resized to it.

    size is (H, W); returns uint8 (3, H, W). Cut first, so that a very long picture costs no memory.
    Pillow's bicubic averages over all that a new pixel covers: shrinking makes no moire.
    [SD: short side resized, centre cropped; paper silent]
    """
    height, width = size
    scale = min(picture.height / height, picture.width / width)
    left, top = (picture.width - width * scale) / 2, (picture.height - height * scale) / 2
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
        with Image.open(path, formats=PICTURES) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return resize_crop(_as_rgb(ImageOps.exif_transpose(picture)), size)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture; convert it to {' or '.join(PICTURES)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: above {MAX_PIXELS // 10**6} megapixels; shrink it") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's three ways to say "damaged"
        raise ValueError(f"{path}: damaged picture ({error}); save it anew") from None


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit gray, of which Pillow's convert would make white
        return Image.fromarray((np.asarray(picture) // 256).astype(np.uint8)).convert("RGB")
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


# --------------------------------------------------------------------------------------------------
# Reading clips


class BadVideo(ValueError):
    """`reason` is one of missing, not_a_video, no_video_stream, too_short, damaged."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(f"{reason}: {message}")
        self.reason = reason


@contextmanager
def _open(path):
    """Yield (container, video stream); what FFmpeg raises inside becomes a BadVideo."""
    if not Path(path).is_file():
        raise BadVideo("missing", f"{path} is no file")
    try:
        container = av.open(str(path), options=OPEN_SAFELY, metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise BadVideo("not_a_video", f"{path} ({error})") from None
    with container:
        if not container.streams.video:
            raise BadVideo("no_video_stream", f"{path} holds no pictures")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadVideo("damaged", f"{path} names no codec that FFmpeg knows")
        # By default threads decode whole frames ahead, and stopping early can deadlock (PyAV#1861).
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        try:
            yield container, stream
        except av.error.FFmpegError as error:
            raise BadVideo("damaged", f"{path} ({error})") from None


def _stated_duration(container, stream) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    # webm and mkv know only the whole file's
    return None if container.duration is None else container.duration / av.time_base


def duration(path: str | Path) -> float:
    """Length in seconds as the file states it; a damaged one may hold less. Raises BadVideo."""
    with _open(path) as (container, stream):
        stated = _stated_duration(container, stream)
        if stated is not None:
            return stated
        ends = [packet.pts + (packet.duration or 0)
                for packet in container.demux(stream) if packet.pts is not None]
        return float((max(ends, default=0) - (stream.start_time or 0)) * stream.time_base)


def read_clip(path: str | Path, start: float, frames: int, fps: float, size: tuple[int, int],
              pad: bool = True, seek: bool = True) -> torch.Tensor:
    """What is on screen at start + k / fps seconds after the video's beginning.

    Returns uint8 (frames, 3, H, W). Picked by time: a stride of 25 / 4 frames, rounded, would be
    4.17 fps, and phones film at varying rates. Where the clip runs past the video's end, the last
    picture is repeated, or, with pad=False, BadVideo too_short raised.
    Raises BadVideo also where the file is no video, or breaks off before it should.
    seek=False decodes from the beginning, which is slow and always right.
    """
    with _open(path) as (container, stream):
        origin = float((stream.start_time or 0) * stream.time_base)
        length = _stated_duration(container, stream)
        times = [origin + start + k / fps for k in range(frames)]
        end = times[-1] if length is None else min(times[-1], origin + length)
        if length is not None and start > length or not pad and end < times[-1] - TINY:
            raise BadVideo("too_short", f"{path}: {length:.2f} s hold no clip from {start:.2f} s")
        if seek and start > 0:
            container.seek(int(times[0] / stream.time_base), stream=stream)  # a key frame before
        pictures = []
        for frame in _on_screen(container.decode(stream), times, end - 1 / fps - SLACK):
            if seek and not pictures and frame.time > times[0] + TINY:
                break  # in MPEG-TS a seek goes too far
            pictures.append(resize_crop(_upright(frame, size), size))
    if len(pictures) == frames:
        return torch.stack(pictures)
    if seek:
        return read_clip(path, start, frames, fps, size, pad, seek=False)
    raise BadVideo("damaged", f"{path} ends after {len(pictures)} of {frames} pictures")


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


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> Image.Image:
    """The frame as players show it (phones store lying pictures and an angle), still to be cropped.

    Where it is larger than `size`, FFmpeg shrinks it until it just covers that: for HD, several
    times as fast as making RGB of all its pixels.
    """
    angle = frame.rotation
    height, width = size[::-1] if angle % 180 else size
    scale = max(height / frame.height, width / frame.width)
    if scale < 1:  # by an even number more than `size`, lest the crop falls between pixels
        height += 2 * round((frame.height * scale - height) / 2)
        width += 2 * round((frame.width * scale - width) / 2)
        frame = frame.reformat(width, height, "rgb24", interpolation="AREA")
    return frame.to_image().rotate(angle, expand=True)


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


def _pictures(frames: torch.Tensor, scale: float) -> list[Image.Image]:
    """uint8 (f, 3, H, W) -> f pictures, `scale` times as large."""
    pictures = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).numpy()]
    size = [max(1, round(side * scale)) for side in pictures[0].size]
    return [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]


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


def film_strip(clips: list[torch.Tensor], captions: list[str] | None = None, every: int = 1,
               scale: float | None = None, first=None, last=None) -> Image.Image:
    """Clips, uint8 (f, 3, H, W), as rows of every `every`-th frame, a caption over each.

    first, last: the image instructions, one uint8 (3, H, W) for all rows or a list, one or None for
    each. They stand beside the row, framed in red and green as in the paper's figures, so that
    what was asked for meets what came out. By default tiles are some 96 to 160 pixels high.
    """
    if scale is None:
        short = min(min(clip.shape[-2:]) for clip in clips)
        scale = ceil(96 / short) if short < 96 else min(1, 160 / short)
    captions = captions or [""] * len(clips)
    first, last = (given if isinstance(given, (list, tuple)) else [given] * len(clips)
                   for given in (first, last))
    gap, border, margin, line = 2, 4, 12, 22 if any(captions) else 0
    height, width = (ceil(max(clip.shape[side] for clip in clips) * scale) for side in (-2, -1))
    beside = width + 2 * border + margin  # the room of an instruction
    x_frames = margin + beside * any(picture is not None for picture in first)
    x_last = x_frames + max(len(clip[::every]) for clip in clips) * (width + gap) - gap + margin
    full = x_last + beside * any(picture is not None for picture in last)
    row = line + height + 2 * border + margin

    strip = Image.new("RGB", (full, margin + row * len(clips)), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for k, (clip, caption, *asked) in enumerate(zip(clips, captions, first, last, strict=True)):
        top = margin + row * k
        # Pillow's own font has ASCII only: letters lose their accents.
        plain = unicodedata.normalize("NFKD", caption).encode("ascii", "ignore").decode()
        caption = " ".join(plain.split())[:500]
        while len(caption) > 3 and draw.textlength(caption, font) > full - x_frames - margin:
            caption = caption.removesuffix("...")[:-1] + "..."
        draw.text((x_frames, top), caption, "#666666", font)
        top += line + border
        for column, picture in enumerate(_pictures(clip[::every], scale)):
            strip.paste(picture, (x_frames + column * (width + gap), top))
        for picture, x, colour in zip(asked, (margin, x_last), ("#d63031", "#27a04f")):
            if picture is not None:
                framed = ImageOps.expand(_pictures(picture[None], scale)[0], border, colour)
                strip.paste(framed, (x, top - border))
    return strip
