"""Answers of homework 01."""

import math
import random

import torch
from compare import compare


def cosine(T):
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


def shift(alpha_bar, factor):
    return (alpha_bar.double().logit() - 2 * math.log(factor)).sigmoid()


def respace(alpha_bar, kept):
    kept = alpha_bar[torch.tensor(kept)].double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return 1 - kept / before


def draw(T):
    return (1 - torch.linspace(0.03, random.uniform(0.1, 0.3), T) ** 2).cumprod(0)


def check_cosine(yours):
    mistakes = {"the betas are at most 0.999": lambda T: unclipped(T)}
    compare(yours, cosine, [(2,), (3,), (random.randrange(20, 60),), (1000,)], mistakes)


def unclipped(T):
    f = (((torch.arange(T + 1) / T + 0.008) / 1.008) * math.pi / 2).cos() ** 2
    return f[1:] / f[0]


def check_shift(yours):
    compare(yours, shift, [(draw(50), 2.0), (draw(20), random.uniform(0.3, 5))])


def check_respace(yours):
    cases = [(draw(50), sorted(random.sample(range(50), 7))), (draw(20), list(range(20)))]
    compare(yours, respace, cases)
