"""Answers of homework 08."""

import math
import random

import torch
from compare import compare


def interval(a, b, picks):
    means = (a - b)[picks].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype))
    return float(low), float(high)


def sign_test(a, b):
    better, worse = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def frechet(x, y):
    def root(matrix):
        values, axes = torch.linalg.eigh(matrix)
        return axes * values.clamp(min=0).sqrt() @ axes.T

    x, y = x.double(), y.double()
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    x, y = x - x.mean(0), y - y.mean(0)
    c_x, c_y = x.T @ x / (len(x) - 1), y.T @ y / (len(y) - 1)
    cross = root(root(c_x) @ c_y @ root(c_x))
    return float(apart + c_x.trace() + c_y.trace() - 2 * cross.trace())


def check_interval(yours):
    cases = []
    for n in (16, 40):
        a = torch.randn(n)
        cases.append((a, a + 0.5 * torch.randn(n), torch.randint(n, (200, n))))
    compare(yours, interval, cases)


def check_sign_test(yours):
    cases = [(torch.rand(n) < 0.8, torch.rand(n) < 0.4) for n in (12, 30, 60)]
    same = torch.rand(9) < 0.5
    compare(yours, sign_test, [*cases, cases[0][::-1], (same, same.clone())])


def check_frechet(yours):
    cases = []
    for d in (1, 3, 6):
        mix, shift = torch.randn(2, d, d, dtype=torch.float64), random.uniform(0.5, 2)
        x, y = torch.randn(50, d, dtype=torch.float64), torch.randn(40, d, dtype=torch.float64)
        cases.append((x @ mix[0], y @ mix[1] + shift))
    compare(yours, frechet, cases)
