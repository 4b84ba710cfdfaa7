"""What grades the exercises: your function against the library's, on fresh random inputs.

A check prints one line: "right", or "not yet" and what is probably wrong. It finds that out by
making the usual mistakes itself (a missing square root, a sign, an axis, a count off by one): where
your answers are those of a mistake, it names it. One function an exercise, in the notebooks' order.
Not here: how answers are compared (`compare.py`); the solutions. Try first; they are in
`solutions/`.
"""

import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from compare import compare
from torch import Tensor

from tinydance import clip, conditioning, sampling, schedulers, training, unet, vae
from tinydance.config import make_config
from tinydance.data.batches import batches
from tinydance.model import Settings, tau_in_steps
from tinydance.schedulers import Schedule
from tinydance.toy import evaluate
from tinydance.toy.paint import BACKGROUNDS, COLOURS, SHAPES
from tinydance.toy.referee import judge, referee
from tinydance.toy.source import ToyWorld
from tinydance.toy.world import MOTIONS, World, make_clip, parse, reverse_motion
from tinydance.training import Batch
from tinydance.video import strips
from tinydance.weights.safetensors import load_safetensors, save_safetensors


def uniform(low: float, high: float) -> float:
    return random.uniform(low, high)


# ------------------------------------------------------------------------ 00 the whole path
def to_frames(yours: Callable) -> None:
    cases = [(2.4 * torch.rand(2, 3, 5, 4) - 1.2,) for _ in range(3)]

    def unclamped(pixels):
        return ((pixels + 1) * 127.5).round().to(torch.int64).remainder(256).to(torch.uint8)

    mistakes = {
        "beyond -1 and 1 the numbers must stay at 0 and 255: clamp before the uint8": unclamped,
        "it cuts the fraction off; round first": (
            lambda pixels: ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        ),
        "the factor: from -1 to 1 it is 2 wide, so 255 / 2": (
            lambda pixels: ((pixels + 1) * 128).round().clamp(0, 255).to(torch.uint8)
        ),
        "-1 is black, not 0: add 1 first": (
            lambda pixels: (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        ),
    }
    compare(yours, vae.to_frames, cases, mistakes)


def compression(yours: Callable) -> None:
    cases = [(64, 64, 8, 8), (256, 256, 8, 5), (320, 512, 8, 16)]

    def right(height, width, stride, channels):
        return 3 * height * width / (channels * height * width / stride**2)

    mistakes = {
        "the stride counts on both axes": lambda h, w, stride, channels: 3 * stride / channels,
        "a pixel is three numbers": lambda h, w, stride, channels: stride**2 / channels,
        "upside down": lambda h, w, stride, channels: channels / (3 * stride**2),
        "a latent place has several channels": lambda h, w, stride, channels: 3.0 * stride**2,
        "it need not be a whole number: / and not //": (
            lambda h, w, stride, channels: 3 * stride**2 // channels
        ),
    }
    compare(yours, right, cases, mistakes)


def obeys(yours: Callable) -> None:
    words = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}

    def right(frames, caption):
        return all(judge(frames, caption).values())

    while True:  # until a clip whose caption mentions all of these
        frames, caption = make_clip(seed=random.randrange(10**6), index=0)
        said = parse(caption)
        if said.keys() >= words.keys() and right(frames, caption):
            break
    cases = [(torch.from_numpy(frames), caption)]
    for name, known in words.items():  # one wrong word, each in its turn
        wrong = random.choice([word for word in known if word != said[name]])
        cases.append((cases[0][0], caption.replace(said[name], wrong, 1)))
    change = f" {said.get('change', 'until a cut')}"  # one too many, or too few
    cases.append(
        (cases[0][0], caption.removesuffix(change) if "change" in said else caption + change)
    )

    def only(*names):
        return lambda frames, caption: all(judge(frames, caption)[name] for name in names)

    mistakes = {
        "one wrong word is enough to disobey: `all` of them must be right": (
            lambda frames, caption: any(judge(frames, caption).values())
        ),
        "`judge` answers with a verdict on each thing; join them": judge,
    }
    for name in words:
        mistakes[f"the {name} counts too"] = only(*said.keys() - {name})
        mistakes[f"not the {name} alone: all that the caption mentions"] = only(name)
    compare(yours, right, cases, mistakes)


# --------------------------------------------------------------- 01 noise and schedules
def add_noise(yours: Callable) -> None:
    cases = [(torch.randn(2, 3, 4), torch.randn(2, 3, 4), uniform(0.2, 0.8)) for _ in range(3)]
    mistakes = {
        "both square roots are missing: alpha_bar is a share of the variance": (
            lambda z_0, eps, a: a * z_0 + (1 - a) * eps
        ),
        "the square root of the signal's share is missing": (
            lambda z_0, eps, a: a * z_0 + (1 - a) ** 0.5 * eps
        ),
        "the square root of the noise's share is missing": (
            lambda z_0, eps, a: a**0.5 * z_0 + (1 - a) * eps
        ),
        "signal and noise have changed places": (
            lambda z_0, eps, a: (1 - a) ** 0.5 * z_0 + a**0.5 * eps
        ),
        "1 - sqrt(alpha_bar) is not sqrt(1 - alpha_bar)": (
            lambda z_0, eps, a: a**0.5 * z_0 + (1 - a**0.5) * eps
        ),
        "the noise is added, not taken away": (
            lambda z_0, eps, a: a**0.5 * z_0 - (1 - a) ** 0.5 * eps
        ),
    }
    compare(yours, schedulers.add_noise, cases, mistakes)


def alpha_bar(yours: Callable) -> None:
    def right(start, end, T):
        return Schedule(beta_start=start, beta_end=end, num_train_timesteps=T).alpha_bar

    def betas(start, end, T):
        return torch.linspace(start**0.5, end**0.5, T) ** 2

    cases = [(uniform(1e-4, 1e-3), uniform(0.01, 0.03), T) for T in (1000, 50)]
    mistakes = {
        "the betas themselves are equally spaced there; it should be their square roots": (
            lambda start, end, T: (1 - torch.linspace(start, end, T)).cumprod(0)
        ),
        "these are the square roots of the betas: square them": (
            lambda start, end, T: (1 - torch.linspace(start**0.5, end**0.5, T)).cumprod(0)
        ),
        "this is 1 - beta of each step; the product of all up to t is wanted": (
            lambda *given: 1 - betas(*given)
        ),
        "the shares multiply; they do not add up": lambda *given: 1 - betas(*given).cumsum(0),
        "this is the product of the betas; what is left at a step is 1 - beta": (
            lambda *given: betas(*given).cumprod(0)
        ),
        "this is its square root": lambda *given: (1 - betas(*given)).cumprod(0).sqrt(),
    }
    compare(yours, right, cases, mistakes)


def z_0_hat(yours: Callable) -> None:
    def right(z_t, eps_hat, a):
        return schedulers.split_prediction(z_t, eps_hat, a, "epsilon")[0]

    cases = [(torch.randn(2, 3, 4), torch.randn(2, 3, 4), uniform(0.2, 0.8)) for _ in range(3)]
    mistakes = {
        "both square roots are missing": lambda z_t, e, a: (z_t - (1 - a) * e) / a,
        "the square root below the line is missing": (
            lambda z_t, e, a: (z_t - (1 - a) ** 0.5 * e) / a
        ),
        "the square root on the noise's share is missing": (
            lambda z_t, e, a: (z_t - (1 - a) * e) / a**0.5
        ),
        "the noise has to be taken away: a sign": (
            lambda z_t, e, a: (z_t + (1 - a) ** 0.5 * e) / a**0.5
        ),
        "divide all of it: parentheses": lambda z_t, e, a: z_t - (1 - a) ** 0.5 * e / a**0.5,
        "the division by sqrt(alpha_bar) is missing": lambda z_t, e, a: z_t - (1 - a) ** 0.5 * e,
    }
    compare(yours, right, cases, mistakes)


def ddim_step(yours: Callable) -> None:
    def right(z_t, eps_hat, a, a_prev):
        z_0_hat, _ = schedulers.split_prediction(z_t, eps_hat, a, "epsilon")
        return schedulers.add_noise(z_0_hat, eps_hat, a_prev)

    def clip_hat(z_t, e, a):
        return (z_t - (1 - a) ** 0.5 * e) / a**0.5

    cases = []
    for _ in range(3):
        a = uniform(0.1, 0.5)
        cases.append((torch.randn(2, 3), torch.randn(2, 3), a, uniform(a + 0.1, 0.9)))
    mistakes = {
        "this is z_0_hat, the end of the walk; mix the noise in again, as much as a_prev says": (
            lambda z_t, e, a, a_prev: clip_hat(z_t, e, a)
        ),
        "it stays where it is: mix with a_prev, not with a": lambda z_t, e, a, a_prev: z_t,
        "a and a_prev have changed places": (
            lambda z_t, e, a, a_prev: schedulers.add_noise(clip_hat(z_t, e, a_prev), e, a)
        ),
        "square roots are missing where a_prev mixes": (
            lambda z_t, e, a, a_prev: a_prev * clip_hat(z_t, e, a) + (1 - a_prev) * e
        ),
        "the noise of the earlier time is missing": (
            lambda z_t, e, a, a_prev: a_prev**0.5 * clip_hat(z_t, e, a)
        ),
    }
    compare(yours, right, cases, mistakes)


# ------------------------------------------------------------------------ 02 the condition
def c_image(yours: Callable) -> None:
    def right(f_first, f_last, frames):
        eps = torch.zeros(len(f_first), 2, *f_first.shape[1:])
        return conditioning.make_c_image(f_first, f_last, frames, eps, 1.0)

    def placed(f_first, f_last, frames, at, last_at):
        c_image = torch.zeros(len(f_first), frames, *f_first.shape[1:])
        c_image[:, at], c_image[:, last_at] = f_first, f_last
        return c_image

    cases = [(torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), f) for f in (16, 5)]
    mistakes = {
        "first and last have changed places": lambda a, b, f: placed(b, a, f, 0, -1),
        "f_last stands one slot too early: slot f - 1 is the last": (
            lambda a, b, f: placed(a, b, f, 0, -2)
        ),
        "f_first belongs into slot 0": lambda a, b, f: placed(a, b, f, 1, -1),
        "PADs are zeros, not copies of the first frame": (
            lambda a, b, f: torch.stack([a] * (f - 1) + [b], 1)
        ),
        "the frames are axis 1, behind the batch": lambda a, b, f: right(a, b, f).transpose(0, 1),
        "the channels stand before the frames": lambda a, b, f: right(a, b, f).transpose(1, 2),
    }
    compare(yours, right, cases, mistakes)


def f_last(yours: Callable) -> None:
    def right(z_0, frames_from_end):
        return conditioning.pick_instructions(z_0, frames_from_end)[1]

    cases = [(torch.randn(3, f, 4, 2, 2), torch.randperm(3)) for f in (16, 5)]
    mistakes = {
        "one too far back: frames_from_end = 0 is frame f - 1": (
            lambda z_0, back: right(z_0, back + 1)
        ),
        "one too late: the last frame is -1, and -0 is the first": (
            lambda z_0, back: z_0[torch.arange(len(z_0)), -back]
        ),
        "it counts from the beginning": lambda z_0, back: z_0[torch.arange(len(z_0)), back],
        "each clip has its own number in `frames_from_end`: index clips and frames together": (
            lambda z_0, back: z_0[:, z_0.shape[1] - 1 - back]
        ),
        "every clip gives its last frame: use `frames_from_end`": lambda z_0, back: z_0[:, -1],
    }
    compare(yours, right, cases, mistakes)


def noised_last(yours: Callable) -> None:
    def right(f_last, eps, a, keep):
        eps = torch.stack([torch.zeros_like(eps), eps], 1)
        return conditioning.make_c_image(None, f_last, 3, eps, a, keep)[:, -1]

    def mask(keep):
        return keep[:, None, None, None]

    cases = [
        (torch.randn(4, 4, 2, 3), torch.randn(4, 4, 2, 3), uniform(0.7, 0.9), torch.randperm(4) < 2)
        for _ in range(2)
    ]
    mistakes = {
        "dropped before the noise: then noise is left where zero should say 'nothing'": (
            lambda f, eps, a, keep: schedulers.add_noise(f * mask(keep), eps, a)
        ),
        "`keep` is True where the frame stays": lambda f, eps, a, keep: right(f, eps, a, ~keep),
        "none is dropped: use `keep`": lambda f, eps, a, keep: schedulers.add_noise(f, eps, a),
        "the noise is missing": lambda f, eps, a, keep: f * mask(keep),
        "square roots are missing": lambda f, eps, a, keep: (a * f + (1 - a) * eps) * mask(keep),
    }
    compare(yours, right, cases, mistakes)


def unet_input(yours: Callable) -> None:
    def right(z_t, c_image):
        unet = lambda z, t, c_text: z  # noqa: E731  what the library asks the network with
        return conditioning.ask(unet, z_t, None, None, {"c_image": c_image})

    cases = [(torch.randn(2, 5, 4, 3, 3), torch.randn(2, 5, 4, 3, 3))]
    mistakes = {
        "joined along the frames (axis 1); the channels are axis 2": (
            lambda z_t, c: torch.cat([z_t, c], 1)
        ),
        "joined along the batch (axis 0); the channels are axis 2": (
            lambda z_t, c: torch.cat([z_t, c], 0)
        ),
        "z_t comes first: its channels are the image model's": (
            lambda z_t, c: torch.cat([c, z_t], 2)
        ),
        "beside each other, not added": lambda z_t, c: z_t + c,
    }
    compare(yours, right, cases, mistakes)


# ------------------------------------------------------------------------------- 03 sampling
def denoiser(
    unet: Callable, c_image: Tensor, c_image_free: Tensor, tau: int = 0, guidance: float = 1.0
) -> schedulers.Denoiser:
    """The library's closure around a make-believe network, which hears no words."""
    empty = torch.zeros(1, 1, 1)
    conditions, conditions_free = {"c_image": c_image}, {"c_image": c_image_free}
    return sampling.guided_denoiser(unet, empty, empty, conditions, conditions_free, tau, guidance)


def guidance(yours: Callable) -> None:
    def right(eps_u, eps_c, w):
        none = torch.zeros_like(eps_u)
        unet = lambda z, t, context: torch.cat([eps_u, eps_c])  # noqa: E731
        return denoiser(unet, none, none, guidance=w)(none, 0, 0)

    cases = [(torch.randn(1, 3, 4, 2, 2), torch.randn(1, 3, 4, 2, 2), w) for w in (2.0, 7.5, 0.0)]
    mistakes = {
        "this starts from the answer with words, so w = 0 is guided and w = 1 is not off": (
            lambda u, c, w: c + w * (c - u)
        ),
        "the direction: from the answer without words to the one with them": (
            lambda u, c, w: u + w * (u - c)
        ),
        "the two have changed places": lambda u, c, w: c + w * (u - c),
        "a difference is wanted: eps_c - eps_u": lambda u, c, w: u + w * c,
    }
    compare(yours, right, cases, mistakes)


def switch(yours: Callable) -> None:
    def right(i, tau, c_image, c_image_free):
        unet = lambda z, t, context: z[:, :, c_image.shape[2] :]  # noqa: E731
        return denoiser(unet, c_image, c_image_free, tau)(torch.zeros_like(c_image), 0, i)

    pair = torch.randn(1, 3, 4, 2, 2), torch.randn(1, 3, 4, 2, 2)
    cases = [(i, tau, *pair) for tau in (5, 0, 16) for i in (0, 3, 4, 5, 15)]
    mistakes = {
        "one step too long: tau steps are i = 0 .. tau - 1": (
            lambda i, tau, c, free: c if i <= tau else free
        ),
        "one step too short: tau steps are i = 0 .. tau - 1": (
            lambda i, tau, c, free: c if i < tau - 1 else free
        ),
        "the other way round: the *first* tau steps see the last frame": (
            lambda i, tau, c, free: free if i < tau else c
        ),
        "every step sees the last frame here: compare i with tau": lambda i, tau, c, free: c,
        "no step sees the last frame here: compare i with tau": lambda i, tau, c, free: free,
    }
    compare(yours, right, cases, mistakes)


def last_time(yours: Callable) -> None:
    def at(schedule, steps, index):
        times = [t for t, _ in schedule.timesteps(steps)]
        return times[index] if 0 <= index < steps else None

    def right(schedule, steps, tau):
        return at(schedule, steps, tau - 1)

    trailing = Schedule(timestep_spacing="trailing")
    cases = [(Schedule(), 50, 20), (trailing, 16, 8), (Schedule(), 50, 0), (trailing, 16, 1)]
    mistakes = {
        "this is the first step that no longer sees it: tau steps are i = 0 .. tau - 1": (
            lambda schedule, steps, tau: at(schedule, steps, tau)
        ),
        "with tau = 0 no step sees it, and index -1 is the last one: answer None": (
            lambda schedule, steps, tau: schedule.timesteps(steps)[tau - 1][0]
        ),
        "the number of the step, and not its t": lambda schedule, steps, tau: tau - 1,
        "the pairs begin with the noisiest step already": (
            lambda schedule, steps, tau: at(schedule, steps, steps - tau)
        ),
    }
    compare(yours, right, cases, mistakes)


def denoise(z_t: Tensor, t: int, i: int) -> Tensor:
    """A make-believe network, which hears all that it is told."""
    return (0.1 * z_t + 0.001 * t + 0.1 * i).sin()


def loop(yours: Callable) -> None:
    def right(denoise, step, z_T, schedule, steps):
        return list(schedulers.ddim(denoise, z_T, schedule, Settings(steps=steps), noise=None))[-1]

    def wrong(go):
        def run(denoise, step, z_t, schedule, steps):
            for i, (t, t_prev) in enumerate(schedule.timesteps(steps)):
                z_t = go(step, z_t, i, t, t_prev, schedule)
            return z_t

        return run

    def part(which, first=0):
        def run(denoise, step, z_t, schedule, steps):
            for i, (t, t_prev) in enumerate(schedule.timesteps(steps)[which], first):
                z_t = step(z_t, denoise(z_t, t, i), t, t_prev, schedule)
            return z_t

        return run

    def one_step(denoise, step, z_T, schedule, steps, index):
        t, t_prev = schedule.timesteps(steps)[index]
        return step(z_T, denoise(z_T, t, index % steps), t, t_prev, schedule)

    cases = [
        (denoise, schedulers.ddim_step, torch.randn(1, 3, 4, 2, 2), Schedule(), steps)
        for steps in (5, 50)
    ]
    mistakes = {
        "the denoiser is asked about t, where z_t is, and not about t_prev": wrong(
            lambda step, z, i, t, prev, s: step(z, denoise(z, prev, i), t, prev, s)
        ),
        "i is the number of the step, from 0; t is another clock": wrong(
            lambda step, z, i, t, prev, s: step(z, denoise(z, t, t), t, prev, s)
        ),
        "i begins with 0": wrong(
            lambda step, z, i, t, prev, s: step(z, denoise(z, t, i + 1), t, prev, s)
        ),
        "`step` takes z_t first and the network's answer second": wrong(
            lambda step, z, i, t, prev, s: step(denoise(z, t, i), z, t, prev, s)
        ),
        "this returns what the network answers: go the steps": wrong(
            lambda step, z, i, t, prev, s: denoise(z, t, i)
        ),
        "the pairs begin with the noisiest step already: no reversing": part(slice(None, None, -1)),
        "the last step is missing": part(slice(-1)),
        "the first step is missing": part(slice(1, None), first=1),
        "this is z_T: go the steps": lambda denoise, step, z_T, schedule, steps: z_T,
        "each step goes on from the one before; this always starts from z_T": (
            lambda *given: one_step(*given, -1)
        ),
        "this is one step: go through all of schedule.timesteps(steps)": (
            lambda *given: one_step(*given, 0)
        ),
    }
    compare(yours, right, cases, mistakes)


# ----------------------------------------------------------------- 04 the pseudo-3D UNet
def attention(yours: Callable) -> None:
    def scores(q, k):
        return q @ k.transpose(-2, -1)

    cases = []
    for queries, keys in ((6, 6), (4, 5)):
        cases.append(tuple(torch.randn(2, 3, length, 16) for length in (queries, keys, keys)))
    mistakes = {
        "the scores are not divided by sqrt(d)": lambda q, k, v: scores(q, k).softmax(-1) @ v,
        "divided by d; it should be its square root": (
            lambda q, k, v: (scores(q, k) / q.shape[-1]).softmax(-1) @ v
        ),
        "divided by the root of the number of tokens; d is the last axis": (
            lambda q, k, v: (scores(q, k) / q.shape[-2] ** 0.5).softmax(-1) @ v
        ),
        "the softmax runs over the queries; each query's weights on the keys add up to 1": (
            lambda q, k, v: (scores(q, k) / q.shape[-1] ** 0.5).softmax(-2) @ v
        ),
        "the softmax is missing": lambda q, k, v: scores(q, k) / q.shape[-1] ** 0.5 @ v,
        "queries and keys have changed places": lambda q, k, v: unet.attention(k, q, v),
    }
    compare(yours, unet.attention, cases, mistakes)


def time_rows(yours: Callable) -> None:
    cases = [(torch.randn(b * f, 3, 2, 5), f) for b, f in ((2, 4), (1, 6))]
    mistakes = {
        "the frames of a clip are neighbours on the batch axis: (b f), and not (f b)": (
            lambda x, f: x.unflatten(0, (f, -1)).permute(1, 2, 0, 3, 4).flatten(3)
        ),
        "a reshape alone does not move axes: frames and channels are mixed up": (
            lambda x, f: x.reshape(-1, x.shape[1], f, x.shape[2] * x.shape[3])
        ),
        "frames and channels have changed places": lambda x, f: x.unflatten(0, (-1, f)).flatten(3),
        "h and w have changed places": (
            lambda x, f: x.unflatten(0, (-1, f)).transpose(1, 2).transpose(3, 4).flatten(3)
        ),
        "h and w become one axis": lambda x, f: x.unflatten(0, (-1, f)).transpose(1, 2),
    }
    compare(yours, unet.to_time_rows, cases, mistakes)


def time_conv(yours: Callable) -> None:
    def right(x, weight):
        conv = unet.TimeConv(x.shape[-1])
        conv.weight.data = weight.permute(2, 1, 0)[..., None, None]  # out in 3 1 1
        conv.bias.data.zero_()
        rows = x.transpose(1, 2)[..., None]  # b c f 1
        return conv(rows)[..., 0].transpose(1, 2).detach()

    def by_turns(x, weight, shift):
        return sum(shift(x, 1 - n) @ weight[n] for n in range(3))

    def repeated(x, n):
        f = x.shape[1]
        return x[:, (torch.arange(f) - n).clamp(0, f - 1)]

    cases = [(torch.randn(2, f, 3), torch.randn(3, 3, 3)) for f in (5, 4)]
    mistakes = {
        "before and after have changed places": lambda x, weight: right(x, weight.flip(0)),
        "beyond the ends there are zeros; this goes round in a circle": (
            lambda x, weight: by_turns(x, weight, lambda x, n: x.roll(n, 1))
        ),
        "beyond the ends there are zeros; this repeats the end frames": (
            lambda x, weight: by_turns(x, weight, repeated)
        ),
        "the clip has become shorter: put a frame of zeros at both ends first": (
            lambda x, weight: right(x, weight)[:, 1:-1]
        ),
        "weight[n] is transposed": lambda x, weight: right(x, weight.transpose(1, 2)),
    }
    compare(yours, right, cases, mistakes)


def temporal_conv_count(yours: Callable) -> None:
    def right(dim):
        return sum(p.numel() for p in unet.TemporalConv(dim, 1, 0.0).parameters())

    mistakes = {
        "a scale, a shift and a bias: three numbers a channel, beside the kernel": (
            lambda dim: 4 * (2 * dim + 3 * dim * dim)
        ),
        "the GroupNorm is missing": lambda dim: 4 * (3 * dim * dim + dim),
        "there are four of them": lambda dim: 2 * dim + 3 * dim * dim + dim,
        "the kernel reaches over time only: 3, and not 3 x 3": (
            lambda dim: 4 * (3 * dim + 9 * dim * dim)
        ),
    }
    cases = [(8,), (20,)]
    compare(yours, right, cases, mistakes)


# ------------------------------------------------------------------------------- 05 training
def target(yours: Callable) -> None:
    def v(sign, swap=False, root=0.5):
        def mistake(z_0, eps, a, kind):
            if kind == "epsilon":
                return eps
            z_0, eps = (eps, z_0) if swap else (z_0, eps)
            return a**root * eps + sign * (1 - a) ** root * z_0

        return mistake

    cases = [
        (torch.randn(2, 3), torch.randn(2, 3), uniform(0.2, 0.8), kind)
        for kind in ("epsilon", "v_prediction")
    ]
    mistakes = {
        "the sign in v: minus z_0's part": v(+1),
        "square roots are missing in v": v(-1, root=1),
        "z_0 and eps have changed places": v(-1, swap=True),
        "asked for epsilon, the target is the noise": lambda z_0, eps, a, kind: z_0,
        "asked for v, it is another mixture": lambda z_0, eps, a, kind: eps,
    }
    compare(yours, schedulers.target, cases, mistakes)


def ema(yours: Callable) -> None:
    def right(average, weight, decay):
        average = average.clone()
        training.update_ema([average], [weight], step=10**6, decay=decay)
        return average

    cases = [(torch.randn(3, 2), torch.randn(3, 2), decay) for decay in (0.999, 0.9)]
    mistakes = {
        "the decay is the share of the *old* average": lambda a, w, d: (1 - d) * a + d * w,
        "the shares must add up to 1": lambda a, w, d: d * a + w,
        "this is their mean: use `decay`": lambda a, w, d: (a + w) / 2,
    }
    compare(yours, right, cases, mistakes)


def learning_rate(yours: Callable) -> None:
    def right(step, steps, peak, warmup):
        config = make_config("toy", warmup=warmup, decay=True)
        return training.learning_rate(step, steps, peak, config)

    def other(rise, fall=lambda step, steps: 0.5 * (1 + math.cos(math.pi * step / steps))):
        return lambda step, steps, peak, warmup: (
            peak * min(1.0, rise(step, warmup)) * fall(step, steps)
        )

    cases = [(step, 1000, uniform(1e-4, 1e-3), 100) for step in (7, 0, 100, 600)]
    mistakes = {
        "one step late: at step 0 the rate is not 0": other(lambda step, warmup: step / warmup),
        "step `warmup` is the first with the whole rate: (step + 1) / (warmup + 1)": other(
            lambda step, warmup: (step + 1) / warmup
        ),
        "the half cosine is missing": other(
            lambda step, warmup: (step + 1) / (warmup + 1), lambda step, steps: 1.0
        ),
        "the warm-up is missing": other(lambda step, warmup: 1.0),
        "a half cosine falls from 1 to 0: (1 + cos) / 2": other(
            lambda step, warmup: (step + 1) / (warmup + 1),
            lambda step, steps: math.cos(math.pi * step / steps),
        ),
        "the half cosine begins with step 0, beside the warm-up, and not after it": (
            lambda step, steps, peak, warmup: (
                peak
                * min(1.0, (step + 1) / (warmup + 1))
                * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
                / 2
            )
        ),
        "after the warm-up the rate does not rise on: min(1, ...)": (
            lambda step, steps, peak, warmup: (
                peak * (step + 1) / (warmup + 1) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
        ),
    }
    compare(yours, right, cases, mistakes)


def shares(yours: Callable) -> None:
    def right(count, micro):
        """What `backward` multiplies with: the gradients it leaves in losses that are weights."""

        class Loss(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.passes, self.weights = 0, torch.nn.Parameter(torch.zeros(-(-count // micro)))

            def forward(self, batch):
                self.passes += 1
                return {"loss": self.weights[self.passes - 1]}

        loss, frames = Loss(), torch.zeros(count, 1, 3, 1, 1, dtype=torch.uint8)
        batch = Batch(0, frames, [""] * count, list(range(count)), [""] * count)
        machine = training.Machine(make_config("toy", device="cpu", compile="off"))
        training.backward(loss, batch, micro, machine)
        return loss.weights.grad.tolist()

    def passes(count, micro):
        return -(-count // micro)

    mistakes = {
        "the last pass is smaller: each counts by its clips": (
            lambda c, m: [1 / passes(c, m)] * passes(c, m)
        ),
        "gradients add up, so the shares must add up to 1": lambda c, m: [1.0] * passes(c, m),
        "the last pass has fewer clips than micro": lambda c, m: [m / c] * passes(c, m),
        "the last pass is missing: count need not be a multiple of micro": (
            lambda c, m: [m / c] * (c // m)
        ),
        "these are numbers of clips, not shares": (
            lambda c, m: [min(m, c - i) for i in range(0, c, m)]
        ),
    }
    cases = [(8, 3), (6, 2), (5, 8)]
    compare(yours, right, cases, mistakes)


# ------------------------------------------------------------------------ 06 borrowed organs
def posterior(yours: Callable) -> None:
    def right(mean, logvar, eps):
        class Known(vae.VAE):
            def encode(self, x):
                return mean, logvar

        config = vae.VAEConfig(block_out_channels=(1,), norm_num_groups=1, scaling_factor=1.0)
        return Known(config).encode_video(torch.zeros(len(mean), 1, 3, 1, 1), eps[:, None])[:, 0]

    cases = [tuple(torch.randn(2, 4, 3, 3) for _ in range(3)) for _ in range(2)]
    mistakes = {
        "this multiplies with the variance; the standard deviation is its root, exp(logvar / 2)": (
            lambda mean, logvar, eps: mean + logvar.exp() * eps
        ),
        "logvar is a logarithm: exp": lambda mean, logvar, eps: mean + logvar * eps,
        "half the logarithm still is one: exp": lambda mean, logvar, eps: mean + 0.5 * logvar * eps,
        "half of the logarithm, and then exp; not half of exp": (
            lambda mean, logvar, eps: mean + 0.5 * logvar.exp() * eps
        ),
        "this is the mean: add the noise": lambda mean, logvar, eps: mean,
    }
    compare(yours, right, cases, mistakes)


def psnr(yours: Callable) -> None:
    def decibels(peak, error, log=math.log10, factor=10):
        return lambda x, y: factor * log(peak / float(error(x - y)))

    def square(d):
        return (d**2).mean()

    cases = [(2 * torch.rand(2, 3, 4, 4) - 1, 2 * torch.rand(2, 3, 4, 4) - 1) for _ in range(2)]
    mistakes = {
        "from -1 to 1 the peak to peak is 2, so its square is 4": decibels(1, square),
        "the peak to peak is 2: squared, 4": decibels(2, square),
        "pixels here are not 0 to 255": decibels(255**2, square),
        "the logarithm is that of base 10": decibels(4, square, math.log),
        "a sign: the peak stands above the error": lambda x, y: -decibels(4, square)(x, y),
        "20 goes with the root of the error, 10 with its square": decibels(4, square, factor=20),
        "the square of the error, not its size": decibels(4, lambda d: d.abs().mean()),
    }
    compare(yours, strips.psnr, cases, mistakes)


def merge(yours: Callable) -> None:
    def join(symbols, pair):
        joined, i = [], 0
        while i < len(symbols):
            here = tuple(symbols[i : i + 2]) == pair
            joined.append("".join(pair) if here else symbols[i])
            i += 2 if here else 1
        return joined

    def by(choose, rounds=99, listed=lambda pair, ranks: pair in ranks):
        def run(symbols, ranks):
            symbols = list(symbols)
            for _ in range(rounds):
                known = [pair for pair in zip(symbols, symbols[1:]) if listed(pair, ranks)]
                if not known:
                    break
                symbols = join(symbols, choose(known, ranks))
            return symbols

        return run

    def lowest(known, ranks):
        return min(known, key=ranks.get)

    def right(symbols, ranks):
        return clip.merge_symbols("".join(symbols).removesuffix("</w>"), ranks)

    mistakes = {
        "the pair of lowest rank goes first, wherever it stands": by(lambda known, ranks: known[0]),
        "lowest rank first, not highest": by(lambda known, ranks: max(known, key=ranks.get)),
        "go on until no pair is listed": by(lowest, rounds=1),
        "rank 0 is a rank: ask `pair in ranks`, not whether its rank is true": by(
            lowest, listed=lambda pair, ranks: ranks.get(pair)
        ),
    }
    cases = []
    while len(cases) < 4:
        letters = [random.choice("ab") for _ in range(8)]
        symbols = [*letters[:-1], letters[-1] + "</w>"]
        pairs = [tuple(p.split()) for p in ("a b", "b a", "a a", "ab a", "ba b", "ab ab", "b b")]
        ranks = {pair: rank for rank, pair in enumerate(random.sample(pairs, len(pairs)))}
        answers = [answer(symbols, ranks) for answer in (right, *mistakes.values())]
        if all(answers.count(answer) == 1 for answer in answers):  # a word that shows them all
            cases.append((symbols, ranks))
    compare(yours, right, cases, mistakes)


def header(yours: Callable) -> None:
    def right(content):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.safetensors")
            path.write_bytes(content)
            return {name: tuple(x.shape) for name, x in load_safetensors(path).items()}

    cases = []
    for long in (1, 70_000):  # the second header has more bytes than two can count
        end = " "
        while end != "}":  # until the header needs no padding
            long, sizes = long + 1, random.sample(range(1, 9), 2)
            tensors = {  # the data are braces too
                name: torch.full((n, size), ord("}"))
                for n, (name, size) in enumerate(zip(("bias", long * "w"), sizes))
            }
            with tempfile.TemporaryDirectory() as folder:
                save_safetensors(tensors, Path(folder, "x.safetensors"))
                content = Path(folder, "x.safetensors").read_bytes()
            end = chr(content[7 + int.from_bytes(content[:8], "little")])
        cases.append((content,))

    def everything(content):
        length = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + length])

    def listed(content):
        return {name: x["shape"] for name, x in everything(content).items() if "shape" in x}

    mistakes = {
        "this is the header itself: only names and shapes are wanted": everything,
        "the shapes are to be tuples": listed,
        "`__metadata__` is no tensor": (
            lambda content: {k: tuple(v.get("shape", ())) for k, v in everything(content).items()}
        ),
    }
    compare(yours, right, cases, mistakes)


# ------------------------------------------------------------------------------ 07 directing
def chained(make: Callable, f_first: Tensor, clips: int) -> list[Tensor]:
    """The library's chain of a make-believe model: what it yields, each shared frame once."""

    def make_clip(model, prompts, instructions, settings, keys):
        return make(instructions["first"])

    return list(sampling.chain(None, [""], clips, {"first": f_first}, make=make_clip))


class Grow:
    """Makes clips of four frames that begin with f_first, no two the same."""

    def __init__(self):
        self.made = 0

    def __call__(self, f_first: Tensor) -> Tensor:
        self.made += 1
        return torch.stack([f_first + 0.1 * k * (f_first + self.made) for k in range(4)], dim=1)


def clips(yours: Callable) -> None:
    def right(frames, f):
        count = 1
        first = torch.zeros(1, 1, 1, 1)
        while (
            sum(
                z.shape[1]
                for z in chained(lambda z: z[:, None].expand(-1, f, -1, -1, -1), first, count)
            )
            < frames
        ):
            count += 1
        return count

    mistakes = {
        "shared frames are shown once: a clip brings f - 1 new ones": lambda n, f: -(-n // f),
        "at least so many frames: round up": lambda n, f: max(1, (n - 1) // (f - 1)),
        "the very first frame is shared with no clip": lambda n, f: -(-n // (f - 1)),
    }
    cases = [(1024, 16), (46, 16), (47, 16), (16, 16), (9, 4)]
    compare(yours, right, cases, mistakes)


def chain(yours: Callable) -> None:
    def right(make, f_first, clips):
        made = chained(make, f_first, clips)
        ends = [f_first, *(z[:, -1] for z in made)]
        return [
            torch.cat([end[:, None], z], 1) if k else z
            for k, (end, z) in enumerate(zip(ends, made))
        ]

    def from_frame(index):
        def run(make, f_first, clips):
            made = []
            for _ in range(clips):
                made.append(make(f_first))
                f_first = made[-1][:, index]
            return made

        return run

    def twice(make, f_first, clips):
        made = []
        for _ in range(clips):
            made.append(make(f_first))
            f_first = make(f_first)[:, -1]
        return made

    mistakes = {
        "every clip begins like the first: carry over the last frame of the one before": from_frame(
            0
        ),
        "this carries over the last frame but one": from_frame(-2),
        "every clip is made twice: make it once, keep it, take its last frame": twice,
        "one clip too many": lambda make, f_first, clips: right(make, f_first, clips + 1),
        "one clip too few": lambda make, f_first, clips: right(make, f_first, clips)[:-1],
        "this time, all clips whole: the shared frame stays in both": chained,
    }
    cases = [(Grow(), torch.randn(2, 4, 3, 3), n) for n in (3, 1)]
    compare(yours, right, cases, mistakes)


def join(yours: Callable) -> None:
    def right(clips):
        return torch.cat([clips[0], *(z[:, 1:] for z in clips[1:])], 1)

    cases = []
    for n in (3, 1):
        f_first, made, make = torch.randn(2, 4, 3, 3), [], Grow()
        for _ in range(n):
            made.append(make(f_first))
            f_first = made[-1][:, -1]
        cases.append((made,))
    mistakes = {
        "shared frames are shown twice": lambda clips: torch.cat(clips, 1),
        "only one of the two shared frames goes": (
            lambda clips: torch.cat([clips[0][:, :-1], *(z[:, 1:] for z in clips[1:])], 1)
        ),
        "the first clip keeps its first frame": (
            lambda clips: torch.cat([z[:, 1:] for z in clips], 1)
        ),
        "the last clip keeps its last frame": (
            lambda clips: torch.cat([z[:, :-1] for z in clips], 1)
        ),
        "the frames are axis 1": lambda clips: torch.cat(clips, 0),
    }
    compare(yours, right, cases, mistakes)


def tau(yours: Callable) -> None:
    mistakes = {
        "a percent is a hundredth": (
            lambda value, steps: float(value[:-1]) * steps if isinstance(value, str) else value
        ),
        "a whole number of steps: round": (
            lambda value, steps: (
                float(value[:-1]) / 100 * steps if isinstance(value, str) else value
            )
        ),
        "round to the nearest, not down": (
            lambda value, steps: (
                int(float(value[:-1]) / 100 * steps) if isinstance(value, str) else value
            )
        ),
        "round to the nearest, not up": (
            lambda value, steps: (
                math.ceil(float(value[:-1]) / 100 * steps) if isinstance(value, str) else value
            )
        ),
    }
    cases = [("50%", 16), (12, 50), ("30%", 16), ("40%", 16), ("75%", 400), (0, 16)]
    compare(yours, tau_in_steps, cases, mistakes)


# ------------------------------------------------------- 08 which instruction does what
def standard_error(yours: Callable) -> None:
    def right(k, n):  # of n zeros and ones
        values = torch.tensor([1.0] * k + [0.0] * (n - k), dtype=torch.float64)
        return float(values.std(correction=0) / n**0.5)

    cases = [(random.randrange(2, 15), 16), (random.randrange(20, 180), 200)]
    mistakes = {
        "this is the variance: a square root is missing": lambda k, n: k / n * (1 - k / n) / n,
        "this is the spread of one clip; the mean of n is calmer: / n under the root": (
            lambda k, n: (k / n * (1 - k / n)) ** 0.5
        ),
        "n stands under the root": lambda k, n: (k / n * (1 - k / n)) ** 0.5 / n,
        "p and 1 - p both count": lambda k, n: (k / n / n) ** 0.5,
    }
    compare(yours, right, cases, mistakes)


def paired(yours: Callable) -> None:
    def right(a, b):
        return float((a - b).mean()), float((a - b).std() / len(a) ** 0.5)

    cases = []
    for n in (16, 5):
        a = torch.randn(n)
        cases.append((a, a + 0.3 * torch.randn(n)))
    mistakes = {
        "a - b, and not b - a": lambda a, b: right(b, a),
        "these are the errors of two different samples; take the differences clip by clip first": (
            lambda a, b: (
                right(a, b)[0],
                float(((a.var() + b.var()) / len(a)) ** 0.5),
            )
        ),
        "this is the spread of one difference; that of their mean is 1 / sqrt(n) of it": (
            lambda a, b: (
                right(a, b)[0],
                float((a - b).std()),
            )
        ),
        "the standard deviation divides by n - 1": (
            lambda a, b: (
                right(a, b)[0],
                float((a - b).std(correction=0) / len(a) ** 0.5),
            )
        ),
        "the *root* of n": lambda a, b: (right(a, b)[0], float((a - b).std() / len(a))),
    }
    compare(yours, right, cases, mistakes)


def end_error(yours: Callable) -> None:
    def right(made, truth):
        made, truth = np.asarray(made), np.asarray(truth)
        return evaluate.judge("", made, "a red circle moves up", truth)["end"]

    def percent(made, truth, frame=-1, gone=1.0, distance=math.dist):
        a, b = (referee(clip).track[frame] for clip in (made, truth))
        off = distance(a, b) / made.shape[-1]
        return 100 * (gone if math.isnan(off) else off)

    seed, clips = random.randrange(10**6), []
    while len(clips) < 2:
        clip = make_clip(seed, len(clips))[0]
        seed, is_seen = seed + 1, not np.isnan(referee(clip).track).any()
        clips += [torch.from_numpy(clip)] * is_seen
    cases = [(clips[0], clips[1]), (torch.full_like(clips[0], 128), clips[1])]
    mistakes = {
        "this is where it begins": lambda a, b: percent(a, b, frame=0),
        "these are pixels: divide by the width": lambda a, b: right(a, b) * a.shape[-1] / 100,
        "this is a share; in percent it is 100 times as much": lambda a, b: right(a, b) / 100,
        "a square root is missing": (
            lambda a, b: percent(a, b, distance=lambda p, q: math.dist(p, q) ** 2)
        ),
        "the distance of two places, not the sum over x and y": (
            lambda a, b: percent(a, b, distance=lambda p, q: float(np.abs(p - q).sum()))
        ),
        "a clip without an object is a whole width off, and not right": (
            lambda a, b: percent(a, b, gone=0.0)
        ),
    }
    compare(yours, right, cases, mistakes)


def way_back(yours: Callable) -> None:
    seed, by_motion = random.randrange(10**6), {}
    while len(by_motion) < len(MOTIONS):
        caption = make_clip(seed, len(by_motion), pick=slice(1))[1]
        seed += parse(caption)["motion"] in by_motion
        by_motion.setdefault(parse(caption)["motion"], caption)
    cases = [(caption,) for caption in by_motion.values()]  # every motion once
    cases.append(("a red circle moves up at night until a cut",))
    mistakes = {
        "the motion is the same as before": lambda caption: caption,
        "only the motion changes: keep what stands behind it": (
            lambda caption: reverse_motion(
                " ".join(caption.split()[:3]) + " " + parse(caption)["motion"]
            )
        ),
    }
    compare(yours, reverse_motion, cases, mistakes)


# ---------------------------------------------------------------- 09 from laptop to 32 GPUs
def state(yours: Callable) -> None:
    def right(trained, ranks, kept=8, shared=12, unit=2**30):
        return trained * (kept + shared / ranks) / unit

    cases = [(random.randrange(10**8, 10**10), ranks) for ranks in (32, 8, 1)]
    mistakes = {
        "a GiB is 2**30 bytes": lambda *given: right(*given, unit=10**9),
        "Adam has two moments of each parameter": lambda *given: right(*given, shared=8),
        "the average is spread over the ranks too": lambda *given: right(*given, 12, 8),
        "four bytes are missing: the gradient counts too": lambda *given: right(*given, kept=4),
        "a float32 has four bytes; these are numbers": lambda *given: right(*given) / 4,
        "every rank has all weights and gradients": lambda n, ranks: 20 * n / 2**30 / ranks,
        "each rank keeps its share of average and moments": lambda n, ranks: right(n, 1),
    }
    compare(yours, right, cases, mistakes)


def hours(yours: Callable) -> None:
    def right(flops, batch, steps, gpus, peak, share, passes=3, unit=3600):
        return passes * flops * batch * steps / (gpus * peak * share) / unit

    cases = [
        (uniform(1e12, 5e12), 192, 200_000, 32, 312e12, uniform(0.2, 0.5)),
        (uniform(1e11, 5e11), 16, 100_000, 1, 165e12, uniform(0.2, 0.5)),
    ]
    mistakes = {
        "the backward pass is missing: three times the forward": (
            lambda *given: right(*given, passes=1)
        ),
        "forward and backward are three times the forward, not two": (
            lambda *given: right(*given, passes=2)
        ),
        "these are seconds": lambda *given: right(*given, unit=1),
        "these are minutes": lambda *given: right(*given, unit=60),
        "a share below 1 makes it longer": lambda *given: right(*given) * given[-1] ** 2,
        "the GPUs work at the same time": lambda *given: right(*given) * given[3],
    }
    compare(yours, right, cases, mistakes)


def sample_ids(yours: Callable) -> None:
    def right(step, rank, ranks, batch):
        source = ToyWorld(0, World(size=8, frames=2))
        [only] = batches(source, step, step + 1, batch, rank, ranks)
        return only.sample_ids

    cases = [(random.randrange(1, 9), 1, 2, 6), (random.randrange(1, 9), 3, 4, 20)]
    mistakes = {
        "dealt out in turn; here each rank's share is one piece": (
            lambda step, rank, ranks, batch: [step * batch + n for n in range(rank, batch, ranks)]
        ),
        "every rank takes the whole batch": (
            lambda step, rank, ranks, batch: list(range(step * batch, (step + 1) * batch))
        ),
        "the step's own samples come after those of all steps before: step * batch": (
            lambda step, rank, ranks, batch: right(0, rank, ranks, batch)
        ),
        "the samples of the steps before count for all ranks: step * batch, not step * share": (
            lambda step, rank, ranks, batch: [
                n - step * (batch - batch // ranks) for n in right(step, rank, ranks, batch)
            ]
        ),
    }
    compare(yours, right, cases, mistakes)
