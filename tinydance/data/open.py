"""Which clips are trained on, and in which order: the toy world, users' files, mixtures of them.

"For video data, we randomly sample 16 consecutive frames with 4 fps per video" [paper §4.1], from
WebVid-10M and 500 thousand clips without watermark; images from LAION. Here the order is a
function: what is seen at global sample number n (which source, which video, from when on) follows
from (seed, n) and is stored nowhere. So the data are the same on any number of machines, and
resuming needs no state but the step.

A source has `clip(n)`, `frame(n)`, `any_frame(n)`, `frames`, `size`, `words()`, `about()` and
`reseeded(seed)`; `batches` makes a stream of it. What was bad on the way to a clip travels with it.
Read `weights.py` before, `sources.py` and `toyworld.py` after; cached latents are in `latents.py`.
"""

from __future__ import annotations

import glob
from pathlib import Path

from tinydance.data.cache import Latents, is_cache
from tinydance.data.index import PICTURE_FILES, VIDEO_FILES, Folder, Shards, Table
from tinydance.data.order import Files, Mixture, WithPictures
from tinydance.toy.source import ToyWorld
from tinydance.toy.world import World

Source = ToyWorld | Files | Mixture | WithPictures


def open_source(data: str, frames: int, fps: float, size: tuple[int, int], seed: int = 0,
                rich: bool = False, images: str = "", short: str = "pad", crop: str = "centre",
                starts: str = "any") -> Source:
    """What `--data` and `--images` name, several joined by "|", as one source.

    Each is 'toyworld', a folder of videos, of tar shards or of cached latents, a .csv, or .tar
    files; after a colon its weight, as in "webvid.csv:0.95|clips:0.05". Without weights, every
    sample counts the same. ValueError for anything else.
    """
    

    def open_one(name: str | list[Path], pictures: bool):
        suffixes = PICTURE_FILES if pictures else VIDEO_FILES
        if name == "toyworld":
            if size[0] != size[1]:
                raise ValueError(f"the toy world is square, and {size[0]}x{size[1]} is not")
            return ToyWorld(seed, World(size[0], frames, rich))
        if isinstance(name, list):
            rows = Shards(name, suffixes)
        elif is_cache(name):
            return Latents(name, size, frames, fps, seed, short)
        elif Path(name).suffix.lower() == ".csv":
            rows = Table(name)
        else:
            rows = Folder(name, suffixes)
        return Files(rows, size, frames, fps, seed, short, crop, starts, pictures)

    def open_all(text: str, pictures: bool):
        named = parse_data(text)
        sources = [open_one(name, pictures) for name, _ in named]
        if len(sources) == 1:
            return sources[0]
        weights = [weight for _, weight in named]
        if None in weights and any(weights) or None in weights and "toyworld" in text.split("|"):
            raise ValueError(f"{text}: give every source a weight, as in a.csv:0.95, or none")
        if 0 < sum(isinstance(source, Latents) for source in sources) < len(sources):
            raise ValueError(f"{text}: a batch is of latents or of pixels; mix caches with caches")
        return Mixture(sources, [w or len(s) for w, s in zip(weights, sources)], seed)

    clips = open_all(data, False)
    return WithPictures(clips, open_all(images, True)) if images else clips


def parse_data(text: str) -> list[tuple[str | list[Path], float | None]]:
    """"a.csv:0.95|b" -> [("a.csv", 0.95), ("b", None)]; tar files, or a folder of them, as a list.

    Patterns such as laion/*.tar may stand unexpanded; tar files without a weight are one source.
    """
    named, loose = [], []
    for item in text.split("|"):
        name, colon, tail = item.rpartition(":")
        weight = None
        if colon and not Path(item).exists():
            try:
                weight = float(tail)
            except ValueError:  # the colon of C:\clips
                name = item
            if weight is not None and not 0 < weight < float("inf"):
                raise ValueError(f"{item}: the weight must be above 0")
        else:
            name = item
        tars = sorted(map(Path, glob.glob(name))) if glob.has_magic(name) else [Path(name)]
        if len(tars) == 1 and tars[0].is_dir():
            tars = sorted(tars[0].glob("*.tar"))
        if not tars or any(path.suffix != ".tar" for path in tars):
            named.append((name, weight))
        elif weight is None:
            loose += tars
        else:
            named.append((tars, weight))
    return named + [(loose, None)] * bool(loose)
