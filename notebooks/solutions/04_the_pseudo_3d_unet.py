"""Solutions of notebook 04, in its order."""

import torch


# %% 1
def my_attention(q, k, v):
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


# %% 2
def my_time_rows(x, f):
    x = x.unflatten(0, (-1, f))  # b f c h w
    return x.transpose(1, 2).flatten(3)


# %% 3
def my_time_conv(x, weight):
    zero = torch.zeros_like(x[:, :1])
    before, after = torch.cat([zero, x[:, :-1]], 1), torch.cat([x[:, 1:], zero], 1)
    return before @ weight[0] + x @ weight[1] + after @ weight[2]


# %% 4
def my_count(dim):
    return 4 * (2 * dim + 3 * dim * dim + dim)
