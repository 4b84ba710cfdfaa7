"""Answers of homework 04."""

import random

import torch
import torch.nn.functional as F
from compare import compare


def time_embedding(t, dim):
    frequencies = 10_000 ** -(torch.arange(dim // 2) / (dim // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def group_norm(x, groups, scale, shift, eps):
    rows = x.reshape(len(x), groups, -1)
    rows = rows - rows.mean(2, keepdim=True)
    rows = rows / (rows.var(2, correction=0, keepdim=True) + eps).sqrt()
    return rows.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]


def res_block(x, temb, weights, groups):
    def norm(x, name):
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return group_norm(x, groups, scale, shift, 1e-5)

    def conv(x, name, padding=1):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    h = conv(F.silu(norm(x, "norm1")), "conv1")
    added = F.silu(temb) @ weights["time_emb_proj.weight"].T + weights["time_emb_proj.bias"]
    h = h + added[:, :, None, None]
    h = conv(F.silu(norm(h, "norm2")), "conv2")
    return h + (conv(x, "conv_shortcut", 0) if "conv_shortcut.weight" in weights else x)


def draw_weights(c_in, c_out, d):
    shapes = {"norm1": (c_in,), "conv1": (c_out, c_in, 3, 3), "time_emb_proj": (c_out, d)}
    shapes |= {"norm2": (c_out,), "conv2": (c_out, c_out, 3, 3)}
    shapes |= {"conv_shortcut": (c_out, c_in, 1, 1)} if c_in != c_out else {}
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}


def check_time_embedding(yours):
    compare(yours, time_embedding, [(torch.randint(0, 1000, (3,)), dim) for dim in (8, 32)])


def check_group_norm(yours):
    cases = []
    for groups in (2, 4, 1):
        x = random.uniform(1, 5) * torch.randn(2, 8, 3, 5) + random.uniform(1, 3)
        cases.append((x, groups, torch.randn(8), torch.randn(8), 1e-2))
    compare(yours, group_norm, cases)


def check_res_block(yours):
    cases = [
        (torch.randn(2, a, 5, 4), torch.randn(2, 6), draw_weights(a, b, 6), 2)
        for a, b in ((4, 8), (4, 4))
    ]
    compare(yours, res_block, cases)
