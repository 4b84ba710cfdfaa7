"""Solutions of notebook 08, in its order."""

import numpy as np

from tinydance.toy.referee import referee
from tinydance.toy.world import OPPOSITES


# %% 1
def my_standard_error(k, n):
    return (k / n * (1 - k / n) / n) ** 0.5


# %% 2
def my_paired(a, b):
    difference = a - b
    return float(difference.mean()), float(difference.std() / len(a) ** 0.5)


# %% 3
def my_end_error(made, truth):
    off = np.linalg.norm(referee(made).end - referee(truth).end) / made.shape[-1]
    return 100.0 if np.isnan(off) else 100 * float(off)


# %% 4
def my_way_back(caption):
    return " ".join(OPPOSITES.get(word, word) for word in caption.split())
