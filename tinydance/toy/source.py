"""The toy world as a source of training samples, with the same methods as one of files: sample n is
a function of (seed, n), and there is no last one. [ours]"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from tinydance.model import Sample
from tinydance.noise import rng
from tinydance.toy.world import World, make_clip, vocabulary

HELD_OUT = 1_000_003  # added to the seed of the clips that are never trained on


@dataclass(frozen=True)
class ToyWorld:
    """The endless source whose clip n is `make_clip(seed, n, world)`."""

    seed: int = 0
    world: World = World()

    frames = property(lambda self: self.world.frames)
    size = property(lambda self: (self.world.size, self.world.size))

    def sample(self, n: int, kind: Literal["clip", "first", "any"] = "clip") -> Sample:
        """Return clip n; or one frame of it as a clip with f = 1: the "first", or of "any" time.
        The UNet's images are first frames: were they of any time, a clip from text alone could
        begin where its motion ends."""
        pick = slice(None)
        if kind != "clip":
            k = rng("frame", self.seed, n).integers(self.frames) if kind == "any" else 0
            pick = slice(k, k + 1)
        frames, caption = make_clip(self.seed, n, self.world, pick)
        return Sample(torch.from_numpy(frames), caption, f"toy/{self.seed}/{n}")

    def hold_out(self) -> "ToyWorld":
        return replace(self, seed=self.seed + HELD_OUT)

    def leaves(self) -> list["ToyWorld"]:
        return [self]

    def words(self) -> list[str]:
        return vocabulary()

    def describe(self) -> list[str]:
        return ["the toy world, endless"]
