"""What `--data` and `--images` name, as a source.

Not here: what the parts are (`index.py`, `cache.py`, `toy/source.py`), or their order (`order.py`).
"""

import glob
import re
from pathlib import Path

from tinydance.config import Config
from tinydance.data.cache import Latents, find_caches, is_cache
from tinydance.data.index import Folder, Shards, Table, untracked
from tinydance.data.order import Files, Mixture, WithPictures
from tinydance.data.rows import Picture, Video
from tinydance.toy.source import ToyWorld
from tinydance.toy.world import World

Source = ToyWorld | Files | Mixture | WithPictures


def open_source(config: Config, track=untracked) -> Source:
    """The clips of config.data, and where config.images is given the pictures of image steps: each
    as README.md says, joined by "|", after a colon its weight, as in "webvid.csv:0.95|clips:0.05".
    Raises ValueError for what is no data. track: see `index.py`."""
    sources = [open_all(config.data, Video, config, track)]
    if config.images:
        sources.append(open_all(config.images, Picture, config, track))
    return WithPictures(sources, [1, 1], config.seed) if config.images else sources[0]


def open_all(text: str, kind: type, config: Config, track) -> Source:
    names, weights = zip(*parse_data(text))
    sources = [open_one(name, kind, config, track) for name in names]
    if len(sources) == 1:
        return sources[0]
    if None in weights and (any(weights) or "toyworld" in names):
        raise ValueError(f"{text}: give every source a weight, as in a.csv:0.95, or none")
    if 0 < sum(len(find_caches(source)) for source in sources) < len(sources):
        raise ValueError(f"{text}: a batch is of latents or of pixels; mix caches with caches")
    weights = [w or len(source) for source, w in zip(sources, weights, strict=True)]
    return Mixture(sources, weights, config.seed)


def open_one(name: str | list[Path], kind: type, config: Config, track) -> ToyWorld | Files:
    size, starts = (config.height, config.width), config.starts
    if name == "toyworld":
        if config.height != config.width:
            raise ValueError(f"the toy world is square, and {size[0]}x{size[1]} is not")
        return ToyWorld(config.seed, World(config.width, config.frames))
    if isinstance(name, list):
        rows = Shards(name, kind, track, config.out)
    elif is_cache(name):
        rows, starts = Latents(name, size, config.fps), "grid"
    else:
        is_table = name.lower().endswith((".csv", ".jsonl"))
        if config.root and not Path(config.root).is_dir():
            raise ValueError(f"root is {config.root}: no such folder")
        rows = (Table if is_table else Folder)(name, kind, track, config.root)
    given = size, config.frames, config.fps, config.seed, config.short, config.crop
    return Files(rows, *given, starts, config.held_out)


def parse_data(text: str) -> list[tuple[str | list[Path], float | None]]:
    """From "a.csv:0.95|b" to [("a.csv", 0.95), ("b", None)]. A folder of tar files, or a pattern
    such as laion/*.tar or {000..122}.tar, is the list of what it holds; those without a weight are
    one source."""
    named, loose = [], []
    for name in text.split("|"):
        weight = None
        found = re.fullmatch(r"(.+):(-?[\d.][\d.e-]*)", name)
        if found and not Path(name).exists():  # the colon of C: or in a file's name is left alone
            name, weight = found[1], float(found[2])
            if not weight > 0:
                raise ValueError(f"{found[0]}: the weight must be above 0")
        if name.lower().endswith((".tar.gz", ".tgz")):
            raise ValueError(f"{name}: packed tars cannot be read here and there; unpack: gunzip")
        parts = expand(name)
        tars = sorted(Path(path) for part in parts for path in glob.glob(part) or [part])
        if len(tars) == 1 and tars[0].is_dir():
            tars = sorted(tars[0].glob("*.tar"))
        if not tars or any(path.suffix != ".tar" for path in tars):
            named.append((name, weight))
        elif weight is None:
            loose += tars
        else:
            named.append((tars, weight))
    return named + ([(loose, None)] if loose else [])


def expand(name: str) -> list[str]:
    """ "{000..122}.tar" as the names that webdataset means by it."""
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", name)
    if found is None:
        return [name]
    before, first, last, after = found.groups()
    return [f"{before}{n:0{len(first)}}{after}" for n in range(int(first), int(last) + 1)]
