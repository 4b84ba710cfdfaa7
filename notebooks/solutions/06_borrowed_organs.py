"""Solutions of notebook 06, in its order."""

import json
import math


# %% 1
def my_draw(mean, logvar, eps):
    return mean + (0.5 * logvar).exp() * eps


# %% 2
def my_psnr(x, y):
    return 10 * math.log10(2**2 / float(((x - y) ** 2).mean()))


# %% 3
def my_merge(symbols, ranks):
    while True:
        known = [pair for pair in zip(symbols, symbols[1:]) if pair in ranks]
        if not known:
            return symbols
        best, joined = min(known, key=ranks.get), []
        while symbols:
            if tuple(symbols[:2]) == best:
                joined, symbols = [*joined, "".join(best)], symbols[2:]
            else:
                joined, symbols = [*joined, symbols[0]], symbols[1:]
        symbols = joined


# %% 4
def my_shapes(content):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {name: tuple(x["shape"]) for name, x in header.items() if name != "__metadata__"}
