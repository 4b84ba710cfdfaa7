"""Answers of homework 02."""

import random

import torch
from compare import compare


def condition(pictures, eps, alpha_bar_c):
    b, frames, c, h, w = eps.shape
    out = torch.zeros(b, frames, c + 1, h, w)
    for place, picture in pictures.items():
        out[:, place, :c] = alpha_bar_c**0.5 * picture + (1 - alpha_bar_c) ** 0.5 * eps[:, place]
        out[:, place, c] = 1
    return out


def drop(c_image, keep):
    return c_image * keep[:, :, None, None, None]


def widen(weight, at, count):
    zeros = torch.zeros(len(weight), count, *weight.shape[2:])
    return torch.cat([weight[:, :at], zeros, weight[:, at:]], 1)


def check_condition(yours):
    cases = []
    for places in ([0, -1], [], random.sample(range(6), 3)):
        pictures = {place: torch.randn(2, 4, 3, 5) for place in places}
        cases.append((pictures, torch.randn(2, 6, 4, 3, 5), random.uniform(0.6, 0.9)))
    compare(yours, condition, cases)


def check_drop(yours):
    cases = [(torch.randn(3, 5, 5, 2, 4), torch.rand(3, 5) < share) for share in (0.5, 0.0, 1.0)]
    compare(yours, drop, cases)


def check_widen(yours):
    weights = [torch.randn(6, 8, 3, 3) for _ in range(3)]
    compare(
        yours,
        widen,
        [(weights[0], 8, 1), (weights[1], random.randrange(1, 7), 3), (weights[2], 0, 2)],
    )
