"""What the notebooks show things with: a clip that moves, a film strip, a piece of the library.

A clip is an animated PNG, so it moves wherever a notebook is shown; where scripts may run,
`player.js` gives it a pause button and a slider. Code is never copied into a notebook: `code`
prints it from the library, and fails where it is gone.
Not here: anything that computes. `checks.py` grades the exercises, `run.py` runs the notebooks.
"""

import base64
import inspect
import io
import os
import textwrap
import zlib
from html import escape
from pathlib import Path
from struct import pack

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, Markdown, display
from PIL import Image as Picture
from torch import Tensor

import tinydance
from tinydance.video.strips import film_strip

FAST = os.environ.get("TINYDANCE_FAST") == "1"  # the tests' switch: smaller numbers, same cells
PACKAGE = Path(tinydance.__file__).parent
PLAYER = (Path(__file__).parent / "player.js").read_text(encoding="utf-8")

plt.rcParams.update(
    {
        "figure.figsize": (7, 2.8),
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "image.cmap": "viridis",
    }
)


def play(*clips, fps: float = 4, scale: int = 2, alt: str = "") -> "Player":
    """Clips, uint8 (f, 3, H, W), side by side and moving, each pixel `scale` pixels wide.

    alt: what they show, in words, for who cannot see them.
    """
    clips = [torch.as_tensor(clip) for clip in clips]
    gap = torch.full((*clips[0].shape[:3], 2), 255, dtype=torch.uint8)
    row = torch.cat([part for clip in clips for part in (clip, gap)][:-1], dim=-1)
    number = f"{len(clips)} clips, each" if len(clips) > 1 else "a clip"
    alt = alt or f"{number} of {len(row)} frames at {fps:g} frames per second"
    return Player(animate(row, fps), alt, fps, row.shape[-1] * scale)


class Player:
    """Shows an animated PNG: where scripts may run with a slider, and else as it is."""

    def __init__(self, png: bytes, alt: str, fps: float, width: int):
        self.png, self.alt, self.width = png, alt, width
        self.base64, script = base64.b64encode(png).decode(), f"({PLAYER})(this, {fps})"
        self.html = (
            f'<img src="data:image/png;base64,{self.base64}" alt="{escape(alt)}" width="{width}" '
            f'style="image-rendering: pixelated" onload="{escape(script)}">'
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        shown = {"text/html": self.html, "image/png": self.base64, "text/plain": self.alt}
        return shown, {"image/png": {"width": self.width, "alt": self.alt}}


def animate(clip: Tensor, fps: float) -> bytes:
    """A clip, uint8 (f, 3, H, W), as an animated PNG of 256 colours, every frame in full."""
    f, _, height, width = clip.shape
    tall = Picture.fromarray(clip.permute(0, 2, 3, 1).flatten(0, 1).numpy())  # (f H) W 3
    tall = limit_colours(tall)
    rows = np.asarray(tall).reshape(f, height, width)
    rows = np.pad(rows, ((0, 0), (0, 0), (1, 0)))  # before each row its filter: 0, none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    parts = [
        chunk(b"IHDR", pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),  # 8 bits, of a palette
        chunk(b"acTL", pack(">II", f, 0)),
        chunk(b"PLTE", bytes(tall.getpalette())),
    ]
    for k, frame in enumerate(rows):
        # Both chunks of a frame are numbered, but the first frame's data, an ordinary IDAT.
        place = max(0, 2 * k - 1), width, height, 0, 0, round(1000 / fps), 1000, 0, 0
        data = zlib.compress(frame.tobytes(), 9)
        parts.append(chunk(b"fcTL", pack(">IIIIIHHBB", *place)))
        parts.append(chunk(b"fdAT", pack(">I", 2 * k) + data) if k else chunk(b"IDAT", data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def strip(
    clips: list, captions: list[str] | None = None, every: int = 2, alt: str = "", **given
) -> Image:
    """Rows of every `every`-th frame: `video.strips.film_strip`, at a notebook's size.

    256 colours: a third of the bytes, and noise is most of what a notebook on diffusion saves.
    alt: what it shows, in words; by default its captions.
    """
    clips, file = [torch.as_tensor(clip) for clip in clips], io.BytesIO()
    picture = film_strip(clips, captions, every, **({"scale": 1} | given))
    limit_colours(picture).save(file, "PNG")
    alt = alt or "a film strip" + (f": {'; '.join(captions)}" if captions else "")
    return Image(file.getvalue(), alt=alt)


def limit_colours(picture: Picture.Image) -> Picture.Image:
    """With 256 colours. Pillow's default gives them all to the sky, and a small yellow object turns
    red; an octree keeps it, and the sky gets stripes."""
    coverage, no_dither = Picture.Quantize.MAXCOVERAGE, Picture.Dither.NONE
    return picture.quantize(256, coverage, kmeans=1, dither=no_dither)


def code(thing, first: str = "", last: str = "") -> Markdown:
    """The library's own lines, or those from one that holds `first` to one that holds `last`.

    tests/test_notebooks.py compares what notebooks have saved of this with the library as it is.
    Raises ValueError where there is no such line.
    """
    lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
    begin = find_line(lines, first, 0) if first else 0
    end = find_line(lines, last, begin) if last else len(lines) - 1
    part = textwrap.dedent("\n".join(lines[begin : end + 1]))
    file = Path(inspect.getsourcefile(inspect.unwrap(thing))).relative_to(PACKAGE).as_posix()
    return Markdown(f"`{file}`, `{thing.__qualname__}`\n\n```python\n{part}\n```")


def find_line(lines: list[str], words: str, begin: int) -> int:
    for number in range(begin, len(lines)):
        if words in lines[number]:
            return number
    raise ValueError(f"no line has {words!r} any more")


def show(alt: str) -> None:
    """Show the figure that was just drawn. alt: what it shows, in words, as for a clip."""
    file = io.BytesIO()
    plt.savefig(file, format="png", bbox_inches="tight")
    plt.close()
    display(Image(file.getvalue(), alt=alt))


def tiles(x: Tensor, title: str, axes=None) -> None:
    """Latents (f, h, w) as a row of f grey tiles."""
    axes = axes or plt.subplots(figsize=(9, 0.9))[1]
    f, h, w = x.shape
    padded = torch.nn.functional.pad(x, (1, 1), value=float("nan"))  # a white line between tiles
    axes.imshow(padded.permute(1, 0, 2).reshape(h, f * (w + 2)), cmap="gray", vmin=-3, vmax=3)
    axes.set_title(title, loc="left", fontsize=9)
    axes.axis("off")
