"""From instructions to a clip: the guided denoiser with its tau switch, and the loop around it.

    caption ---- text tower ----> c_text  --+
    I_first, I_last -- VAE -----> c_image --+-> denoiser(z_t, t, i) --> z_0 -- VAE --> frames
    generator of this clip -----> z_T     --+

The denoiser is a closure around the network. It alone knows of guidance and of tau [paper Eq. 2];
the loop and the schedulers see a function of (z_t, t, i). Text alone works too: the same network
first makes one frame, with its temporal layers off, and that is the clip's first-frame instruction
(the paper takes Stable Diffusion for it, §4.2.1).

Read before: `conditioning.py`. Read after: `unet.py`.
Not here: files and command lines (`sample.py`).
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinydance.conditioning import make_c_image
from tinydance.model import PixelDance
from tinydance.noise import draw, generator
from tinydance.schedulers import Schedule, ddim_step, ddpm_step

Denoiser = Callable[[Tensor, int, int], Tensor]  # (z_t, diffusion time t, number of the step i)


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


@torch.no_grad()
def sample_latents(
    model: PixelDance,
    prompts: list[str],
    f_first: Tensor | None = None,
    f_last: Tensor | None = None,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    tau: int | None = None,
    negative: str = "",
    seed: int = 0,
    sampler: str = "ddim",
    ddim_eta: float = 0.0,
    cond_noise_t: int | None = None,
    bar: bool = False,
) -> Tensor:
    """Scaled latents (b, f, 4, h, w) of one clip for every prompt; what is None the model decides.

    f_first, f_last (b, 4, h, w): scaled latents of the image instructions; without f_first the
    model makes its own. tau defaults to half the steps [paper Fig. 7].
    Clip k draws from a generator of (seed, k). Raises ValueError for a value out of its range.
    """
    default = model.settings
    frames = default.frames if frames is None else frames
    steps = default.steps if steps is None else steps
    guidance = default.guidance if guidance is None else guidance
    cond_noise_t = default.cond_noise_t if cond_noise_t is None else cond_noise_t
    tau = steps // 2 if tau is None else tau
    model.schedule.timesteps(steps)  # raises for a number of steps that cannot be
    if not 0 <= tau <= steps:
        raise ValueError(f"tau is {tau}; use 0 to {steps}, the number of steps")
    if frames < 1:
        raise ValueError(f"frames is {frames}; use 1 or more")
    if not (np.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"guidance is {guidance}; use a number from 0 (1 is off)")
    if not 0 <= ddim_eta <= 1:
        raise ValueError(f"ddim_eta is {ddim_eta}; use 0 to 1")
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"sampler is {sampler!r}; use ddim or ddpm")
    T = model.schedule.num_train_timesteps
    if not 0 <= cond_noise_t < T:
        raise ValueError(f"cond_noise_t is {cond_noise_t}; use 0 (clean) to {T - 1}")

    height, width = size or (default.height, default.width)
    h, w = model.latent_size(height, width)
    device, c = model.device, model.vae.config["latent_channels"]
    generators = [generator("sample", seed, k) for k in range(len(prompts))]
    c_text, c_empty = model.encode_text(prompts), model.encode_text([negative] * len(prompts))
    alpha_bar_c = float(model.schedule.alpha_bar[cond_noise_t]) if cond_noise_t else 1.0

    def run(f: int, f_first: Tensor | None, f_last: Tensor | None, label: str) -> Tensor:
        eps = draw(generators, 2, c, h, w, device=device)  # one noise on c_image for all steps
        denoise = guided_denoiser(
            model.unet,
            c_text,
            c_empty,
            make_c_image(f_first, f_last, f, eps, alpha_bar_c),
            make_c_image(f_first, None, f, eps, alpha_bar_c),
            tau,
            guidance,
        )
        z_T = draw(generators, f, c, h, w, device=device)
        loop = denoise_loop(denoise, z_T, model.schedule, steps, sampler, ddim_eta, generators)
        no_bar = None if bar else True  # None: tqdm looks whether there is a terminal
        for z_t in tqdm(loop, label, total=steps, disable=no_bar, leave=False):
            pass
        return z_t

    if f_first is None:
        f_first = run(1, None, None, "first frame")[:, 0]
        if frames == 1:
            return f_first[:, None]
    return run(frames, f_first, f_last, "clip")


@torch.no_grad()
def sample_frames(
    model: PixelDance,
    prompts: list[str],
    I_first: Tensor | None = None,
    I_last: Tensor | None = None,
    **settings,
) -> Tensor:
    """Frames, pixels (b, f, 3, H, W) in [-1, 1], of one clip for every prompt.

    I_first, I_last: pixels (b, 3, H, W) or None. Settings are those of `sample_latents`.
    """

    def encode(picture: Tensor | None) -> Tensor | None:
        if picture is None:
            return None
        return model.vae.encode_video(picture[:, None].to(model.device))[:, 0]

    z_0 = sample_latents(model, prompts, encode(I_first), encode(I_last), **settings)
    return model.vae.decode_video(z_0).clamp(-1, 1)
