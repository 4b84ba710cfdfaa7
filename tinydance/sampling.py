"""From instructions to a clip: the guided denoiser with its tau switch, and clips in a chain.

    caption ---- text tower ----> c_text  --+
    I_first, I_last -- VAE -----> c_image --+-> denoise(z_t, t, i) --> z_0 -- VAE --> frames
    generator of this clip -----> z_T     --+

The denoiser is a closure around the network. It alone knows of guidance and of tau [paper Eq. 2];
samplers see a function of (z_t, t, i). `sample` is a generator that yields every z_t, as
`training.training_steps` yields every step.

Text alone works too: the same network first makes one frame, with its temporal layers off, and that
is the clip's first-frame instruction. Long videos are chains of clips [paper §4.4].

Not here: files and command lines (`sample.py`), films of several shots (`video/story.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydance.conditioning import ask, make_conditions, noise_level
from tinydance.model import PixelDance, Settings, tau_in_steps
from tinydance.noise import draw, generator
from tinydance.schedulers import SAMPLERS, Denoiser


# ------------------------------------------------------------------------------------ one denoising
def guided_denoiser(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    c_text: Tensor,
    c_empty: Tensor,
    conditions: dict[str, Tensor],
    conditions_free: dict[str, Tensor],
    tau: int,
    guidance: float,
) -> Denoiser:
    """The network under its instructions [paper Eq. 2], with classifier-free guidance.

    c_text, c_empty (b, l, d): of the prompt, and of "" or a negative prompt.
    conditions, conditions_free: as `make_conditions` gives them, with the last-frame instruction
    and without. tau: the last frame is seen on the first tau steps.
    guidance: w in eps_u + w * (eps_c - eps_u), on text only; w = 1 is off and costs one branch.
    """
    double = {name: c.repeat(2, 1, 1, 1, 1) for name, c in conditions.items()}
    double_free = {name: c.repeat(2, 1, 1, 1, 1) for name, c in conditions_free.items()}

    def denoise(z_t: Tensor, t: int, i: int) -> Tensor:
        # The tau switch. Early steps decide where things are, and need the goal. Seen to the end,
        # the last frame is copied, and the clip stops abruptly [paper Fig. 7]. Eq. 2's t counts
        # steps from pure noise; here that is i, and t is the diffusion time.
        sees_last = i < tau
        times = torch.full((len(z_t),), t, device=z_t.device)
        if guidance == 1:
            return ask(unet, z_t, times, c_text, conditions if sees_last else conditions_free)
        # Guidance is on the text only: both branches see the same image instructions, so what they
        # differ in is what the words say. One batch of 2 b, the unconditional half first.
        told, text = double if sees_last else double_free, torch.cat([c_empty, c_text])
        out = ask(unet, z_t.repeat(2, 1, 1, 1, 1), times.repeat(2), text, told)
        out_u, out_c = out.chunk(2)
        return out_u + guidance * (out_c - out_u)

    return denoise


# ----------------------------------------------------------------------------------------- one clip
@torch.no_grad()
def sample(
    model: PixelDance,
    prompts: list[str],
    instructions: dict[str, Tensor] = {},
    settings: Settings | None = None,
    keys: list[tuple[int, ...]] | None = None,
) -> Iterator[Tensor]:
    """Yield z_t (b, f, 4, h, w) after every step of one clip for each prompt; the last one is z_0.

    instructions: scaled latents "first" and "last" (b, 4, h, w), each of which may be missing.
    Without "first" the model makes its own in as many steps with f = 1, which are yielded before.
    settings: by default the model's. keys: of the clips, by default (0,), (1,), ...: a clip's noise
    is a function of (seed, key), so that it is the same clip alone or in any batch.
    Raises ValueError for settings out of range, or latents that do not fit them.
    """
    settings = (settings or model.settings).check(model)
    h, w = model.latent_size(settings.height, settings.width)
    b, c, device = len(prompts), model.vae.config.latent_channels, model.device
    for name in ("first", "last"):
        if name in instructions and (shape := tuple(instructions[name].shape)) != (b, c, h, w):
            wanted = f"size {settings.height}x{settings.width} want {(b, c, h, w)}"
            raise ValueError(f"f_{name} is {shape}; {b} prompts and {wanted}")
    keys = keys or [(k,) for k in range(b)]
    generators = [generator("sample", settings.seed, *key) for key in keys]
    c_text, c_empty = model.encode_text(prompts), model.encode_text([settings.negative] * b)
    tau = tau_in_steps(settings.tau, settings.steps)
    alpha_bar_c = noise_level(model.schedule, settings.cond_noise_t)

    def one_clip(frames: int, instructions: dict[str, Tensor]) -> Iterator[Tensor]:
        # One noise on c_image for all steps, the same with and without the last frame: what the
        # network sees of the first frame does not change while it denoises [ours: paper silent].
        eps = draw(generators, 2, c, h, w, device=device)
        without_last = {name: given for name, given in instructions.items() if name != "last"}
        conditions = make_conditions(instructions, frames, eps, alpha_bar_c)
        conditions_free = make_conditions(without_last, frames, eps, alpha_bar_c)
        parts = c_text, c_empty, conditions, conditions_free
        denoise = guided_denoiser(model.unet, *parts, tau, settings.guidance)

        def noise() -> Tensor:
            return draw(generators, frames, c, h, w, device=device)

        sampler = SAMPLERS[settings.sampler]
        yield from sampler(denoise, noise(), model.schedule, settings, noise)  # from z_T = noise()

    # Text alone: at f = 1 the temporal layers are off, and the network is a text-to-image model.
    # Its picture becomes the first-frame instruction. [Paper §4.2.1: Stable Diffusion makes it,
    # here `first_frame`. Ours: image steps train this network as text-to-image, so it can.]
    if "first" not in instructions:
        for z_t in one_clip(1, instructions):
            yield z_t
        if settings.frames == 1:
            return
        instructions = instructions | {"first": z_t[:, 0]}  # of the last z_t, z_0
    yield from one_clip(settings.frames, instructions)


def sample_latents(
    model: PixelDance,
    prompts: list[str],
    instructions: dict[str, Tensor] = {},
    settings: Settings | None = None,
    keys: list[tuple[int, ...]] | None = None,
) -> Tensor:
    """z_0 (b, f, 4, h, w), scaled: the last z_t of `sample`, with the same arguments."""
    for z_t in sample(model, prompts, instructions, settings, keys):
        pass
    return z_t


# ------------------------------------------------------------------------- several clips in a chain
def chain(
    model: PixelDance,
    prompts: list[str],
    clips: int,
    instructions: dict[str, Tensor] = {},
    settings: Settings | None = None,
    keys: list[tuple[int, ...]] | None = None,
    make: Callable[..., Tensor] = sample_latents,
) -> Iterator[Tensor]:
    """Yield the clips of a long video: "the last frame from preceding clip is used as the first
    frame instruction for generating the subsequent clip" [paper §4.4].

    The frame is carried over as its latent, which no trip through pixels blurs [ours]. It is shown
    once: the first clip has all its f frames, the others f - 1, N clips of 16 frames 1 + 15 N.
    "last" ends the last clip; further instructions are given to each clip as they are. make: what
    makes one clip, with the arguments of `sample_latents`.
    """
    keys = keys or [(k,) for k in range(len(prompts))]
    without_last = {name: given for name, given in instructions.items() if name != "last"}
    carried = {}
    for link in range(clips):
        given = (instructions if link == clips - 1 else without_last) | carried
        # Its own noise for each link: the same z_T would make the same motion again.
        own_keys = [(*key, link) if link else key for key in keys]
        z_0 = make(model, prompts, given, settings, own_keys)
        carried = {"first": z_0[:, -1]}
        yield z_0[:, 1:] if link else z_0


# ------------------------------------------------------------------------------------------- pixels
@torch.no_grad()
def encode_picture(model: PixelDance, picture: Tensor) -> Tensor:
    """I_first or I_last, pixels (b, 3, H, W), -> f_first or f_last, scaled latents (b, 4, h, w)."""
    return model.vae.encode_video(picture[:, None].to(model.device))[:, 0]


@torch.no_grad()
def sample_frames(
    model: PixelDance,
    prompts: list[str],
    I_first: Tensor | None = None,
    I_last: Tensor | None = None,
    clips: int = 1,
    further: dict[str, Tensor] = {},
    **changes,
) -> Tensor:
    """Frames, pixels (b, f, 3, H, W) in [-1, 1], of one video for every prompt.

    I_first, I_last: pixels (b, 3, H, W) or None. clips: chained, 1 + (f - 1) * clips frames.
    further: instructions of other names, see `conditioning.py`. changes: fields of `Settings`, such
    as tau="50%", seed=3; the size is that of the pictures.
    """
    pictures = {"first": I_first, "last": I_last}
    pictures = {name: picture for name, picture in pictures.items() if picture is not None}
    for picture in pictures.values():
        changes = {"height": picture.shape[-2], "width": picture.shape[-1]} | changes
    settings = replace(model.settings, **changes)
    instructions = {name: encode_picture(model, picture) for name, picture in pictures.items()}
    parts = chain(model, prompts, clips, instructions | further, settings)
    return torch.cat([model.vae.decode_video(z_0).clamp(-1, 1) for z_0 in parts], dim=1)


def first_frame(
    image_model: PixelDance,
    model: PixelDance,
    prompts: list[str],
    settings: Settings,
    keys: list[tuple[int, ...]] | None = None,
) -> Tensor:
    """f_first (b, 4, h, w) for `model`, from text by an image model: "off-the-shelf T2I Stable
    Diffusion V2.1" [paper §4.2.1], or any other that `PixelDance.from_folder` reads.

    The two have different VAEs, so a picture goes from one to the other, and not a latent. The
    image model has its own steps and guidance, and samples at the size it was trained on, a whole
    multiple of the clip's; its picture is shrunk by that factor [ours].
    """
    times = max(1, round(image_model.settings.height / min(settings.height, settings.width)))
    size = {"height": times * settings.height, "width": times * settings.width}
    same = {"negative": settings.negative, "seed": settings.seed}
    own = replace(image_model.settings, frames=1, **size, **same)
    z_0 = sample_latents(image_model, prompts, settings=own, keys=keys)
    I_first = image_model.vae.decode_video(z_0)[:, 0].clamp(-1, 1)
    return encode_picture(model, F.avg_pool2d(I_first, times))
