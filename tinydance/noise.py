"""Random numbers as a function: the same key gives the same numbers, on any machine, in any batch.

Training keys them by (seed, number of the sample), sampling by (seed, number of the clip). So a
run that stopped goes on exactly, although no generator's state was saved; two processes draw what
one would; and clip 3 of seed 0 is the same clip alone or among eight. [ours; after EDM]

Not here: what is drawn, and in which order (`training.py`, `sampling.py`).
"""

import zlib

import numpy as np
import torch
from torch import Tensor


def generator(purpose: str, *key: int) -> torch.Generator:
    """A torch generator that is a function of its purpose and key, such as ("sample", seed, clip).

    The purpose keeps streams apart: "train" and "dropout" of one key share no number.
    """
    words = (zlib.crc32(purpose.encode()), len(key), *key)
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))  # torch takes 63 bits


def rng(purpose: str, *key: int) -> np.random.Generator:
    """The same for numpy: where data are chosen (which video, from when on, which crop)."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


def draw(generators: list[torch.Generator], *shape: int, device=None) -> Tensor:
    """Standard normal (n, *shape), one generator a row: a clip's noise is the same in any batch.

    Drawn on the CPU and then moved, because a GPU's generators give other numbers.
    """
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
