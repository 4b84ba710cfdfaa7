"""Solutions of notebook 00, in its order."""

import torch

from tinydance.toy.referee import judge


# %% 1
def my_to_frames(pixels):
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# %% 2
def my_compression(height, width, stride, channels):
    return 3 * height * width / (channels * (height / stride) * (width / stride))


# %% 3
def my_obeys(frames, caption):
    return all(judge(frames, caption).values())
