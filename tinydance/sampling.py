"""From instructions to a clip: the guided denoiser with its tau switch, and the loop around it.

    caption ---- text tower ----> c_text  --+
    I_first, I_last -- VAE -----> c_image --+-> denoiser(z_t, t, i) --> z_0 -- VAE --> frames
    generator of this clip -----> z_T     --+

The denoiser is a closure around the network. It alone knows of guidance and of tau [paper Eq. 2];
the loop and the schedulers see a function of (z_t, t, i). Text alone works too: the same network
first makes one frame, with its temporal layers off, and that is the clip's first-frame instruction
(the paper takes Stable Diffusion for it, §4.2.1: `first_frame`). Long videos are chains [§4.4].

Read before: `conditioning.py`. Read after: `unet.py`; for stories, `story.py`.
Not here: files and command lines (`sample.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinydance.conditioning import make_c_image
from tinydance.model import PixelDance
from tinydance.noise import draw, generator
from tinydance.run.cli import progress
from tinydance.schedulers import Schedule, ddim_step, ddpm_step

Denoiser = Callable[[Tensor, int, int], Tensor]  # (z_t, diffusion time t, number of the step i)


# ------------------------------------------------------------------------------------ one denoising
def guided_denoiser(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    c_text: Tensor,
    c_empty: Tensor,
    c_image: Tensor,
    c_image_free: Tensor,
    tau: int,
    guidance: float,
) -> Denoiser:
    """The network under its three instructions [paper Eq. 2, and classifier-free guidance].

    c_text, c_empty (b, l, d): of the prompt, and of "" or a negative prompt.
    c_image, c_image_free (b, f, 4, h, w): with the last-frame instruction, and without.
    tau: the last frame is seen on the first tau steps. Eq. 2's t counts steps from pure noise.
    guidance: w in eps_u + w * (eps_c - eps_u), on text only; w = 1 is off and costs one branch.
    """
    b, branches = len(c_text), 1 if guidance == 1 else 2
    context = c_text if guidance == 1 else torch.cat([c_empty, c_text])

    def denoise(z_t: Tensor, t: int, i: int) -> Tensor:
        c = c_image if i < tau else c_image_free
        z = torch.cat([z_t, c], dim=2).repeat(branches, 1, 1, 1, 1)  # both share c and tau
        out = unet(z, torch.full((len(z),), t, device=z.device), context)
        if guidance == 1:
            return out
        out_u, out_c = out[:b], out[b:]
        return out_u + guidance * (out_c - out_u)

    return denoise


def denoise_loop(
    denoise: Denoiser,
    z_T: Tensor,
    schedule: Schedule,
    steps: int,
    sampler: str = "ddim",
    ddim_eta: float = 0.0,
    generators: list[torch.Generator] | None = None,
) -> Iterator[Tensor]:
    """Yield z_t after every step, from z_T (b, f, 4, h, w) to z_0, by "ddim" or "ddpm"."""
    z_t = z_T
    for i, (t, t_prev) in enumerate(schedule.timesteps(steps)):
        out = denoise(z_t, t, i)
        noise = None
        if sampler == "ddpm" or ddim_eta > 0:
            noise = draw(generators, *z_t.shape[1:], device=z_t.device)
        if sampler == "ddpm":
            z_t = ddpm_step(z_t, out, t, t_prev, schedule, noise)
        else:
            z_t = ddim_step(z_t, out, t, t_prev, schedule, ddim_eta, noise)
        yield z_t


# ----------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Sampling:
    """How to sample. What is None the model decides, by its `ClipSettings`."""

    frames: int | None = None
    size: tuple[int, int] | None = None  # (H, W) in pixels
    steps: int | None = None
    guidance: float | None = None  # 1 is off
    tau: int | float | str | None = None  # steps that see f_last: 12; or a share: 0.5, "50%"
    negative: str = ""
    seed: int = 0
    sampler: str = "ddim"  # or "ddpm"
    ddim_eta: float = 0.0
    cond_noise_t: int | None = None  # 0: clean conditions

    def complete(self, model: PixelDance) -> "Sampling":
        """The same without a None, tau as a number of steps.

        Raises ValueError for a value out of its range.
        """
        default, T = model.settings, model.schedule.num_train_timesteps
        frames = default.frames if self.frames is None else self.frames
        size = (default.height, default.width) if self.size is None else self.size
        steps = default.steps if self.steps is None else self.steps
        guidance = default.guidance if self.guidance is None else self.guidance
        noise_t = default.cond_noise_t if self.cond_noise_t is None else self.cond_noise_t
        model.schedule.timesteps(steps)  # raises for a number of steps that cannot be
        model.latent_size(*size)  # and this for a size
        if min(size) < 1:
            raise ValueError(f"size is {size[0]}x{size[1]}; use 1 or more")
        tau = tau_in_steps(default.tau if self.tau is None else self.tau, steps)
        if frames < 1:
            raise ValueError(f"frames is {frames}; use 1 or more")
        if not (np.isfinite(guidance) and guidance >= 0):
            raise ValueError(f"guidance is {guidance}; use a number from 0 (1 is off)")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; use 0 or more")
        if self.sampler not in ("ddim", "ddpm"):
            raise ValueError(f"sampler is {self.sampler!r}; use ddim or ddpm")
        if not 0 <= self.ddim_eta <= 1:
            raise ValueError(f"ddim_eta is {self.ddim_eta}; use 0 to 1")
        if not 0 <= noise_t < T:
            raise ValueError(f"cond_noise_t is {noise_t}; use 0 (clean) to {T - 1}")
        return replace(
            self, frames=frames, size=size, steps=steps, guidance=guidance, tau=tau,
            cond_noise_t=noise_t,
        )  # fmt: skip


def tau_in_steps(tau: int | float | str, steps: int) -> int:
    """tau as a number of steps, from itself (12, "12") or from a share of them (0.5, "0.5", "50%").

    Raises ValueError for what is neither, or out of range.
    """
    count = tau
    try:
        if isinstance(tau, str) and tau.endswith("%"):
            count = float(tau[:-1]) / 100
        elif isinstance(tau, str):
            count = float(tau) if "." in tau else int(tau)
        if isinstance(count, float):
            count = round(count * steps) if 0 <= count <= 1 else -1
    except ValueError:
        count = -1
    if not 0 <= count <= steps:
        raise ValueError(f"tau is {tau}; use 0 to {steps}, the number of steps, or a share of "
                         "them such as 0.5 or 50%")  # fmt: skip
    return count


# ------------------------------------------------------------------------- from instructions to z_0
@torch.no_grad()
def watch(
    model: PixelDance,
    prompts: list[str],
    f_first: Tensor | None = None,
    f_last: Tensor | None = None,
    how: Sampling = Sampling(),
    numbers: list[int] | None = None,
    link: int = 0,
) -> Iterator[Tensor]:
    """Yield z_t (b, f, 4, h, w) after every step of one clip for each prompt; the last one is z_0.

    f_first, f_last (b, 4, h, w): scaled latents of the image instructions. Without f_first the
    model makes its own, in as many steps with f = 1, which are yielded before.
    numbers: of the clips, by default 0, 1, ... Clip k draws from a generator of (seed, k), and as
    link j of a chain of (seed, k, j): the same clip in any batch. Raises ValueError as `Sampling`.
    """
    how = how.complete(model)
    h, w = model.latent_size(*how.size)
    device, c, b = model.device, model.vae.config["latent_channels"], len(prompts)
    for name, f_given in (("f_first", f_first), ("f_last", f_last)):
        if f_given is not None and f_given.shape != (b, c, h, w):
            raise ValueError(f"{name} is {tuple(f_given.shape)}; {b} prompts and size "
                             f"{how.size} want {(b, c, h, w)}")  # fmt: skip
    keys = [(k, link) if link else (k,) for k in numbers or range(b)]
    generators = [generator("sample", how.seed, *key) for key in keys]
    c_text, c_empty = model.encode_text(prompts), model.encode_text([how.negative] * b)
    alpha_bar_c = float(model.schedule.alpha_bar[how.cond_noise_t]) if how.cond_noise_t else 1.0

    def run(f: int, f_first: Tensor | None, f_last: Tensor | None) -> Iterator[Tensor]:
        eps = draw(generators, 2, c, h, w, device=device)  # one noise on c_image for all steps
        c_image = make_c_image(f_first, f_last, f, eps, alpha_bar_c)
        c_image_free = make_c_image(f_first, None, f, eps, alpha_bar_c)
        denoise = guided_denoiser(
            model.unet, c_text, c_empty, c_image, c_image_free, how.tau, how.guidance
        )
        z_T = draw(generators, f, c, h, w, device=device)
        yield from denoise_loop(
            denoise, z_T, model.schedule, how.steps, how.sampler, how.ddim_eta, generators
        )

    if f_first is None:
        for z_t in run(1, None, None):
            yield z_t
        if how.frames == 1:
            return
        f_first = z_t[:, 0]  # of the last one, z_0
    yield from run(how.frames, f_first, f_last)


def sample_latents(
    model: PixelDance,
    prompts: list[str],
    f_first: Tensor | None = None,
    f_last: Tensor | None = None,
    how: Sampling = Sampling(),
    numbers: list[int] | None = None,
    link: int = 0,
    bar: bool = False,
) -> Tensor:
    """z_0 (b, f, 4, h, w), scaled, of one clip for each prompt; see `watch`."""
    how = how.complete(model)
    total = how.steps * (2 if f_first is None and how.frames > 1 else 1)
    steps = watch(model, prompts, f_first, f_last, how, numbers, link)
    for z_t in progress(steps, "steps", "step", total, shown=bar):
        pass
    return z_t


def chain(
    model: PixelDance,
    prompts: list[str],
    clips: int,
    f_first: Tensor | None = None,
    f_last: Tensor | None = None,
    how: Sampling = Sampling(),
    numbers: list[int] | None = None,
    bar: bool = False,
    sample: Callable[..., Tensor] = sample_latents,
) -> Iterator[Tensor]:
    """Yield the clips of a long video: "the last frame from preceding clip is used as the first
    frame instruction for generating the subsequent clip" [paper §4.4].

    The frame is carried over as its latent, which no trip through pixels blurs [ours]. It is shown
    once: the first clip has all its f frames, the others f - 1, N clips of 16 frames 1 + 15 N.
    f_last is what the last clip ends in. Memory is that of one clip.
    sample: what makes a clip, with the arguments of `sample_latents`; `story.py` has one that
    remembers.
    """
    for link in range(clips):
        last = f_last if link == clips - 1 else None
        z_0 = sample(model, prompts, f_first, last, how, numbers, link, bar)
        f_first = z_0[:, -1]
        yield z_0[:, 1:] if link else z_0


def first_frame(
    image_model: PixelDance,
    model: PixelDance,
    prompts: list[str],
    how: Sampling = Sampling(),
    numbers: list[int] | None = None,
    bar: bool = False,
) -> Tensor:
    """f_first (b, 4, h, w) for `model`, from text by an image model, "off-the-shelf T2I Stable
    Diffusion V2.1" [paper §4.2.1] or any other that `PixelDance.from_folder` reads.

    It has a text tower, a schedule and a VAE of its own, and draws as large as it is used to: a
    whole number of times the clip's size, by which its picture is shrunk [ours].
    """
    height, width = how.complete(model).size
    times = max(1, round(image_model.settings.height / min(height, width)))
    size = times * height, times * width
    how = replace(how, frames=1, size=size, tau=None, cond_noise_t=0)
    z_0 = sample_latents(image_model, prompts, how=how, numbers=numbers, bar=bar)
    I_first = image_model.vae.decode_video(z_0)[:, 0].clamp(-1, 1)
    return encode_picture(model, F.avg_pool2d(I_first, times))


@torch.no_grad()
def encode_picture(model: PixelDance, picture: Tensor | None) -> Tensor | None:
    """I_first or I_last, pixels (b, 3, H, W), -> f_first or f_last, scaled latents (b, 4, h, w)."""
    if picture is None:
        return None
    return model.vae.encode_video(picture[:, None].to(model.device))[:, 0]


@torch.no_grad()
def sample_frames(
    model: PixelDance,
    prompts: list[str],
    I_first: Tensor | None = None,
    I_last: Tensor | None = None,
    clips: int = 1,
    bar: bool = False,
    **settings,
) -> Tensor:
    """Frames, pixels (b, f, 3, H, W) in [-1, 1], of one video for every prompt.

    I_first, I_last: pixels (b, 3, H, W) or None. clips: chained, 1 + (f - 1) * clips frames.
    settings: fields of `Sampling`, whose `size` is by default that of the pictures.
    """
    given = I_first if I_first is not None else I_last
    if given is not None:
        settings = {"size": tuple(given.shape[-2:])} | settings
    f_first, f_last = encode_picture(model, I_first), encode_picture(model, I_last)
    parts = chain(model, prompts, clips, f_first, f_last, Sampling(**settings), bar=bar)
    return torch.cat([model.vae.decode_video(z_0).clamp(-1, 1) for z_0 in parts], dim=1)
