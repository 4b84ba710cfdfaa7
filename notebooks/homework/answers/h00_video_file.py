"""Answers of homework 00."""

import random

import torch
from compare import compare

TO_YCBCR = torch.tensor(
    [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]
)


def to_ycbcr(frames):
    planes = torch.einsum("yc,fchw->fyhw", TO_YCBCR, frames.float() / 255)
    return planes + torch.tensor([16.0, 128.0, 128.0])[:, None, None]


def write_y4m(planes, fps):
    f, _, h, w = planes.shape
    content = f"YUV4MPEG2 W{w} H{h} F{fps}:1 Ip A1:1 C444\n".encode()
    return content + b"".join(b"FRAME\n" + frame.numpy().tobytes() for frame in planes)


def read_y4m(content):
    line, _, rest = content.partition(b"\n")
    parameters = {word[0]: word[1:] for word in line.decode().split(" ")[1:]}
    w, h = int(parameters["W"]), int(parameters["H"])
    frames = []
    while rest:
        _, _, rest = rest.partition(b"\n")  # FRAME, and maybe parameters of its own
        frames.append(torch.tensor(list(rest[: 3 * h * w]), dtype=torch.uint8).reshape(3, h, w))
        rest = rest[3 * h * w :]
    return torch.stack(frames), int(parameters["F"].split(":")[0])


def draw(f):
    h, w = random.sample(range(2, 9), 2)
    return torch.randint(0, 256, (f, 3, h, w), dtype=torch.uint8)


def check_to_ycbcr(yours):
    compare(yours, to_ycbcr, [(draw(2),), (draw(1),)])


def check_write_y4m(yours):
    compare(yours, write_y4m, [(draw(3), random.randrange(5, 60)), (draw(1), 8)])


def check_read_y4m(yours):
    plain = write_y4m(draw(3), random.randrange(5, 60))
    planes = draw(2)
    h, w = planes.shape[2:]
    other = f"YUV4MPEG2 F{random.randrange(5, 60)}:1 C444 H{h} W{w} XNOTE=made\n".encode()
    other += b"".join(b"FRAME Ip\n" + frame.numpy().tobytes() for frame in planes)
    compare(yours, read_y4m, [(plain,), (other,)])
