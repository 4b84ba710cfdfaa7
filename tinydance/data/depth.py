"""Depth of every frame beside the frames, for `variants/make_your_video.py`.

The toy world renders its own. Of a user's data, the depth of `a.mp4` is a video of the same name in
a folder of its own, made by any estimator: grey, light is near, as long as the video.
Not here: such an estimator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinydance.data.cache import find_caches
from tinydance.data.open import Source
from tinydance.data.rows import Row
from tinydance.model import Sample
from tinydance.toy.source import ToyWorld
from tinydance.toy.world import render_depth, sample_scene
from tinydance.video.read import BadSample, read_clip


@dataclass
class WithDepth:
    """A source whose samples come with the instruction "depth", (f, 1, h, w) from -1 to 1.

    folder: of the depth videos; "" for the toy world. size: of the latents, which the stage sets.
    Raises ValueError for data that cannot have depth.
    """

    source: Source
    folder: str
    size: tuple[int, int] = (1, 1)

    def __post_init__(self):
        leaves = self.source.leaves()
        self.is_toy = all(isinstance(leaf, ToyWorld) for leaf in leaves)
        if find_caches(self.source):
            raise ValueError("depth is read beside pixels, and a cache holds latents")
        if not self.is_toy and not (self.folder and Path(self.folder).is_dir()):
            raise ValueError(f"depth is {self.folder!r}; give the folder of your videos' depth")
        for leaf in leaves if not self.is_toy else ():
            if not isinstance(leaf.rows.kind, partial):  # held-out clips are of the same index
                leaf.rows.kind = partial(make_deep_row, leaf.rows.kind, Path(self.folder))

    def sample(self, n: int, kind: str = "clip") -> Sample:
        sample = self.source.sample(n, kind)
        if self.is_toy:  # whose pictures are first frames, see `ToyWorld.sample`
            scene = sample_scene(np.random.default_rng([self.source.seed, n]))
            depth = torch.from_numpy(render_depth(scene, self.source.world)[: len(sample.frames)])
        else:
            sample, depth = sample._replace(frames=sample.frames[:, :3]), sample.frames[:, 3:4]
            depth = depth / 127.5 - 1
        return sample._replace(instructions={"depth": shrink(depth, self.size)})

    def leaves(self) -> list:
        return self.source.leaves()


class DeepRow(NamedTuple):
    """A row that reads its clip and, behind its channels, the depth: uint8 (f, 6, H, W)."""

    row: Row
    depth: Row  # of the same name, in the folder of depth

    name = property(lambda self: self.row.name)
    caption = property(lambda self: self.row.caption)

    def read(self, choose_start: Callable[[float], float], *given) -> Tensor:
        chosen = []

        def remember(seconds: float) -> float:
            chosen.append(choose_start(seconds))
            return chosen[0]

        pixels = self.row.read(remember, *given)
        return torch.cat([pixels, self.depth.read(lambda _: chosen[0], *given)], dim=1)


def make_deep_row(kind: type[Row], folder: Path, *given, **more) -> DeepRow:
    """What an index makes in place of `kind`; a function, so that workers can be sent it."""
    row = kind(*given, **more)
    return DeepRow(row, kind(row.name, folder, start=row.start, end=row.end))


@lru_cache(1)  # many videos may have one depth
def read_depth(path: str, settings, size: tuple[int, int]) -> Tensor:
    """The depth of a clip that is to be made, (f, 1, h, w), from a video. Raises ValueError."""
    try:
        pixels = settings.height, settings.width
        frames = read_clip(path, 0.0, settings.frames, settings.fps, pixels)
    except BadSample as error:
        raise ValueError(f"{path}: {error}") from None
    return shrink(frames[:, :1] / 127.5 - 1, size)


def shrink(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """(f, 1, H, W) -> (f, 1, h, w), the mean of each latent's pixels."""
    return F.adaptive_avg_pool2d(depth, size)
