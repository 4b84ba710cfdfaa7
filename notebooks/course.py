"""What the notebooks show things with: a clip that moves, a film strip, a piece of the library.

An animated PNG is an ordinary `image/png`, so a clip moves wherever a notebook is shown. Code is
never copied into a notebook: `code` prints it from the library, and fails where it is gone.
Not here: anything that computes. `checks.py` grades the exercises, `run.py` runs the notebooks.
"""

import inspect
import io
import os
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Markdown
from PIL import Image as Picture
from torch import Tensor

import tinydance
from tinydance.video.strips import film_strip

FAST = os.environ.get("TINYDANCE_FAST") == "1"  # the tests' switch: smaller numbers, same cells
PACKAGE = Path(tinydance.__file__).parent

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


def play(*clips, fps: float = 4, scale: int = 2) -> Image:
    """Clips, uint8 (f, 3, H, W), side by side and moving, each pixel `scale` pixels wide."""
    clips = [torch.as_tensor(clip) for clip in clips]
    gap = torch.full((*clips[0].shape[:3], 2), 255, dtype=torch.uint8)
    row = torch.cat([part for clip in clips for part in (clip, gap)][:-1], dim=-1)  # f 3 H W
    f, _, h, w = row.shape
    # One palette for all frames, which stand below each other: half of the bytes.
    tower = Picture.fromarray(row.permute(0, 2, 3, 1).flatten(0, 1).numpy())
    tower = tower.quantize(256, dither=Picture.Dither.NONE)
    frames = (tower.crop((0, top, w, top + h)) for top in range(0, f * h, h))
    size, nearest = (w * scale, h * scale), Picture.Resampling.NEAREST
    first, *rest = (frame.resize(size, nearest) for frame in frames)
    file = io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    return Image(file.getvalue())


def strip(clips: list, captions: list[str] | None = None, every: int = 2, **given) -> Picture.Image:
    """Rows of every `every`-th frame: `video.strips.film_strip`, at a notebook's size.

    256 colours: a third of the bytes, and noise is most of what a notebook on diffusion saves.
    """
    clips = [torch.as_tensor(clip) for clip in clips]
    return film_strip(clips, captions, every, **({"scale": 1} | given)).quantize(256)


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


def tiles(x: Tensor, title: str, axes=None) -> None:
    """Latents (f, h, w) as a row of f grey tiles."""
    axes = axes or plt.subplots(figsize=(9, 0.9))[1]
    f, h, w = x.shape
    padded = torch.nn.functional.pad(x, (1, 1), value=float("nan"))  # a white line between tiles
    axes.imshow(padded.permute(1, 0, 2).reshape(h, f * (w + 2)), cmap="gray", vmin=-3, vmax=3)
    axes.set_title(title, loc="left", fontsize=9)
    axes.axis("off")
