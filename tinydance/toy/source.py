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

import torch

from tinydance.noise import random
from tinydance.toy.world import World, make_clip, vocabulary
from tinydance.training import Clip


class ToyWorld:
    """The procedural world as an endless source: clip n is `make_clip(seed, n)`."""

    def __init__(self, seed: int = 0, world: World = World()):
        self.seed, self.world = seed, world
        self.frames, self.size = world.frames, (world.size, world.size)

    def clip(self, n: int) -> Clip:
        frames, caption = make_clip(self.seed, n, self.world)
        return Clip(torch.from_numpy(frames), caption, f"toy/{self.seed}/{n}")

    def frame(self, n: int) -> Clip:
        """The picture that clip n begins with, as a clip with f = 1.

        Text alone makes its first frame as an image model does: were the images frames of any time,
        a clip could begin where its motion ends.
        """
        clip = self.clip(n)
        return clip._replace(frames=clip.frames[:1])

    def any_frame(self, n: int) -> Clip:
        """A frame of any time of clip n, as a clip with f = 1."""
        clip = self.clip(n)
        k = random("frame", self.seed, n).integers(self.frames)
        return clip._replace(frames=clip.frames[k:k + 1])

    def words(self) -> list[str]:
        """Every word that a caption can hold; a tokenizer is built from them."""
        return vocabulary(self.world)

    def reseeded(self, seed: int) -> ToyWorld:
        return ToyWorld(seed, self.world)

    def about(self) -> list[str]:
        return ["the toy world, endless"]
