"""Random numbers as a function: the same key gives the same noise, on any machine, in any batch.

Training keys them by (seed, number of the sample), sampling by (seed, number of the clip). So a
run that stopped goes on exactly, with no generator's state saved, two processes draw what one
would, and clip 3 of seed 0 is the same clip alone or among eight. [ours; after EDM]

Read with `sampling.py` and `training.py`.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def generator(purpose: str, *key: int) -> torch.Generator:
    """A generator that is a function of its purpose and key, such as ("sample", seed, clip)."""
    words = (zlib.crc32(purpose.encode()), len(key), *key)
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def draw(generators: list[torch.Generator], *shape: int, device=None) -> Tensor:
    """Standard normal (n, *shape), one generator a row: a clip's noise is the same in any batch."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def random(purpose: str, *key: int) -> np.random.Generator:
    """The purpose keeps streams apart: were `frame` to draw from the scene's numbers, the frame
    shown would depend on the shape."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))
