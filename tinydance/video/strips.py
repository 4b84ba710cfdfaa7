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

import unicodedata
from math import ceil

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from tinydance.model import PixelDance
from tinydance.sampling import sample_frames
from tinydance.vae import to_frames, to_pixels


def _pictures(frames: torch.Tensor, scale: float) -> list[Image.Image]:
    """uint8 (f, 3, H, W) -> f pictures, `scale` times as large."""
    pictures = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).numpy()]
    size = [max(1, round(side * scale)) for side in pictures[0].size]
    return [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]


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


# ------------------------------------------------------------------------------------- the pictures
def show_images(model: PixelDance, held_out, seed: int):
    """A sheet of single frames: a row of eight seeds for each of six held-out captions."""
    captions = [held_out.frame(n).caption for n in range(6)]
    frames = to_frames(sample_frames(model, captions * 8, frames=1, seed=seed))
    rows = frames.unflatten(0, (8, 6)).transpose(0, 1).flatten(1, 2)  # (8 6) 1 -> 6 8
    return film_strip(list(rows), captions)


def show_clips(model: PixelDance, held_out, seed: int, count: int = 3, **settings):
    """Held-out captions, each from text alone, with the first frame, with the last one as well."""
    clips = [held_out.clip(n) for n in range(count)]
    captions = [clip.caption for clip in clips]
    pixels = pixels_of(model, [clip.frames for clip in clips])
    frames = to_frames(pixels).cpu()
    first, last = pixels[:, 0], pixels[:, -1]
    given = {"text": (None, None), "text, first": (first, None), "text, first, last": (first, last)}
    rows, titles, firsts, lasts = [], [], [], []
    made = {
        name: to_frames(sample_frames(model, captions, *asked, seed=seed, **settings))
        for name, asked in given.items()
    }
    for n, caption in enumerate(captions):
        for name, (I_first, I_last) in given.items():
            rows.append(made[name][n])
            titles.append(f"{caption} ({name})")
            firsts.append(None if I_first is None else frames[n, 0])
            lasts.append(None if I_last is None else frames[n, -1])
    return film_strip(rows, titles, first=firsts, last=lasts)


def pixels_of(model: PixelDance, clips: list[Tensor]) -> Tensor:
    """What a source gave, uint8 (f, 3, H, W) or moments (f, 8, h, w), as pixels (b, f, 3, H, W)."""
    if clips[0].dtype == torch.uint8:
        return to_pixels(torch.stack(clips)).to(model.device)
    moments = torch.stack([clip.float() for clip in clips]).to(model.device)
    return model.vae.decode_video(moments.chunk(2, dim=2)[0]).clamp(-1, 1)


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / F.mse_loss(y.clamp(-1, 1), x)))
