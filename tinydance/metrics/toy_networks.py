"""The toy world's own networks for FID, FVD and the Inception Score: small classifiers.

    python -m tinydance.metrics.toy_networks --steps 2000         # trains and writes both

What I3D learned of Kinetics and Inception of ImageNet, these learn of the toy world: to name what a
clip or a frame shows. Their last layer but one is the feature. The files are TorchScript, called as
the field's are (`detectors.py`), so the same code measures toy clips and real ones. [ours]
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.run.cli import Parser, progress, run_main
from tinydance.toy.world import (
    BACKGROUNDS,
    CHANGES,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    render,
    sample_scene,
)

CLIPS, FRAMES = (Path(__file__).parent / f"toy_{name}.pt" for name in ("clips", "frames"))
# What is named: of a frame the first three; of a clip all.
NAMED = {"colour": [*COLOURS], "shape": [*SHAPES], "background": [*BACKGROUNDS]}
NAMED |= {"motion": [*MOTIONS], "change": ["", *CHANGES], "ends": [*BACKGROUNDS]}
FEATURES, SEED = 64, 2_000_003_000  # numbers of a feature; seed of the clips, used by nothing else


class ToyNetwork(nn.Module):
    """Features of clips (n, 3, f, H, W) or pictures (n, 3, H, W) in 0 ... 255."""

    def __init__(self, over_time: bool):
        super().__init__()
        self.over_time = over_time
        self.frame = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(),
            nn.Conv2d(32, 48, 3, 2, 1), nn.GELU(), nn.Conv2d(48, 48, 3, 2, 1), nn.GELU(),
            nn.Flatten(1), nn.Linear(48 * 16, FEATURES),
        )
        self.time = nn.Sequential(
            nn.Conv1d(FEATURES, FEATURES, 3, 1, 1), nn.GELU(),
            nn.Conv1d(FEATURES, FEATURES, 3, 2, 1), nn.GELU(),
            nn.Conv1d(FEATURES, FEATURES, 3, 2, 1), nn.GELU(),
            nn.Flatten(1), nn.Linear(4 * FEATURES, FEATURES),
        ) if over_time else nn.Identity()
        sizes = [len(words) for words in NAMED.values()]
        self.sizes: list[int] = sizes if over_time else sizes[:3]
        self.heads = nn.Linear(FEATURES, sum(self.sizes))

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        """-> features (n, d); or else the probabilities of pairs of colour and last named thing."""
        x = x.float() / 127.5 - 1.0
        if self.over_time:
            n, f = x.shape[0], x.shape[2]
            frames = F.interpolate(x.transpose(1, 2).flatten(0, 1), size=[64, 64], mode="area")
            y = self.frame(frames).unflatten(0, [n, f]).transpose(1, 2)
            y = self.time(F.interpolate(y, size=16))
        else:
            y = self.frame(F.interpolate(x, size=[64, 64], mode="area"))
        if return_features:
            return y
        parts = self.heads(F.gelu(y)).split(self.sizes, dim=1)
        which = parts[3] if self.over_time else parts[1]
        pairs = parts[0].softmax(1).unsqueeze(2) * which.softmax(1).unsqueeze(1)
        return pairs.flatten(1)
