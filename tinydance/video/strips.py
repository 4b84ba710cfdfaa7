"""Film strips, as the paper prints its videos, and the strips that a training draws of its model.

A strip has a row for each clip: its caption, its frames from left to right, and beside them the
pictures that were given, the first frame in a blue border and the last frame in an orange one.
"""

import unicodedata
from math import ceil

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from tinydance.model import PixelDance, Sample
from tinydance.sampling import sample_frames
from tinydance.vae import to_frames

BLUE, ORANGE, GREY = "#0072b2", "#c95000", "#666666"  # which everybody can tell apart
GAP, BORDER, MARGIN, LINE = 2, 4, 12, 22  # pixels between frames, of a border, a margin, a caption


def film_strip(clips, captions=None, every=1, scale=None, first=None, last=None) -> Image.Image:
    """Draw clips, each uint8 (f, 3, H, W), as rows of every `every`-th frame.
    first, last: a uint8 (3, H, W) for all rows, or a list that has one or None for each row.
    scale: enlarges; by default frames are some 96 to 160 pixels high."""
    short = min(min(clip.shape[-2:]) for clip in clips)
    scale = scale or (ceil(96 / short) if short < 96 else min(1, 160 / short))
    captions = captions or [""] * len(clips)
    first, last = (x if isinstance(x, (list, tuple)) else [x] * len(clips) for x in (first, last))
    # From left to right: the first frames, if any are given; the clips; the last frames, if any.
    height, width = (ceil(max(clip.shape[side] for clip in clips) * scale) for side in (-2, -1))
    beside = width + 2 * BORDER + MARGIN
    x_clip = MARGIN + beside * any(picture is not None for picture in first)
    x_last = x_clip + max(len(clip[::every]) for clip in clips) * (width + GAP) - GAP + MARGIN
    full = x_last + beside * any(picture is not None for picture in last)
    line = LINE * any(captions)
    row = line + height + 2 * BORDER + MARGIN
    strip = Image.new("RGB", (full, MARGIN + row * len(clips)), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for k, (clip, caption, *given) in enumerate(zip(clips, captions, first, last, strict=True)):
        top = MARGIN + row * k
        words = unicodedata.normalize("NFKD", caption).encode("ascii", "ignore").split()
        text = b" ".join(words)[:500].decode()  # in letters of Pillow's own font: u for u-umlaut
        while len(text) > 3 and font.getlength(text) > full - x_clip - MARGIN:
            text = text.removesuffix("...")[:-1] + "..."
        draw.text((x_clip, top), text, GREY, font)
        for i, picture in enumerate(scaled_pictures(clip[::every], scale)):
            strip.paste(picture, (x_clip + i * (width + GAP), top + line + BORDER))
        for picture, x, colour in zip(given, (MARGIN, x_last), (BLUE, ORANGE)):
            if picture is not None:
                picture = scaled_pictures(picture[None], scale)[0]
                strip.paste(ImageOps.expand(picture, BORDER, colour), (x, top + line))
    return strip


def scaled_pictures(clip: Tensor, scale: float | None = None) -> list[Image.Image]:
    """The frames, enlarged; by default until no side is below 256. Raises ValueError for others."""
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3 or not len(clip):
        raise ValueError(f"{clip.dtype} {[*clip.shape]}: not uint8 (f, 3, H, W); use to_frames")
    scale = scale or ceil(256 / min(256, *clip.shape[-2:]))
    pictures = [Image.fromarray(frame) for frame in clip.permute(0, 2, 3, 1).cpu().numpy()]
    size = [max(1, round(side * scale)) for side in pictures[0].size]
    return [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio of y, a copy of x, in dB: pixels in [-1, 1], so the peak is 2."""
    return float(10 * torch.log10(4 / torch.nn.functional.mse_loss(y.clamp(-1, 1), x)))


def show_images(model: PixelDance, samples: list[Sample], seed: int) -> Image.Image:
    """Sample single frames for the captions of `samples`: a row of eight for each caption."""
    captions = [sample.caption for sample in samples]
    further = {name: x.repeat(8, 1, 1, 1, 1) for name, x in stack(samples, model.device).items()}
    frames = to_frames(sample_frames(model, captions * 8, further=further, frames=1, seed=seed))
    rows = frames.unflatten(0, (8, len(captions))).transpose(0, 1).flatten(1, 2)  # (8 n) 1 -> n 8
    return film_strip(list(rows), captions)


def show_clips(model: PixelDance, samples: list[Sample], seed: int, **changes) -> Image.Image:
    """Sample clips from the captions of `samples` alone, with their first frames as well, and with
    their first and last frames. changes: settings, as for `sample_frames`."""
    captions = [sample.caption for sample in samples]
    # Cached moments are float16, which autocast on a CPU does not stack.
    clips = [s.frames if s.frames.dtype == torch.uint8 else s.frames.float() for s in samples]
    pixels = model.vae.decode_frames(torch.stack(clips).to(model.device))
    first, last = pixels[:, 0], pixels[:, -1]
    given = {"text": (None, None), "text, first": (first, None), "text, first, last": (first, last)}
    changes |= {"seed": seed, "further": stack(samples, model.device)}
    made = [sample_frames(model, captions, *pair, **changes) for pair in given.values()]
    rows = to_frames(torch.stack(made, dim=1).flatten(0, 1))  # 3 times b f -> (b 3) f
    titles = [f"{caption} ({name})" for caption in captions for name in given]
    firsts = [x for frame in to_frames(first) for x in (None, frame, frame)]
    lasts = [x for frame in to_frames(last) for x in (None, None, frame)]
    return film_strip(list(rows), titles, first=firsts, last=lasts)


def stack(samples: list[Sample], device) -> dict[str, Tensor]:
    """The further instructions of samples, (b, f, c, h, w), by name."""
    names = samples[0].instructions
    return {name: torch.stack([s.instructions[name] for s in samples]).to(device) for name in names}
