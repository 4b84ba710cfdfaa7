"""The image instructions: c_image = [f_first, PADs, f_last], the heart of PixelDance [paper Eq. 1].

Two latents go in, one tensor of a clip's shape comes out, to be laid beside z_t on the channel
axis. Training and sampling both build it here and both ask the network here, so that they cannot
drift apart:

    slot          0          1 .. f-2         f-1
    c_image    f_first  |  0  0  ...  0  |  f_last, or 0 where it is dropped

Zero means "nothing is said here", exactly zero, after the noise [ours: the paper drops "by
replacing the corresponding latent with zeros" and has no mask channel, so zero is the only mark].

Two dicts of named tensors carry what the network is told beside z_t, t and the text:
    instructions   what a user gives: latents "first" and "last" (b, 4, h, w)
    conditions     what the network takes: "c_image" (b, f, 4, h, w)
A further instruction (b, f, c, h, w), such as a depth map for each frame, goes from one to the
other by its name, and to the network behind c_image.

Not here: text, whose instruction goes in by cross-attention (`unet.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydance.schedulers import Schedule, add_noise


def make_c_image(
    f_first: Tensor | None,
    f_last: Tensor | None,
    frames: int,
    eps: Tensor,
    alpha_bar_c: float,
    keep_last: Tensor | None = None,
) -> Tensor:
    """[f_first, PADs, f_last], with noise on what is given [paper Eq. 1, §3.2].

    f_first, f_last (b, 4, h, w): latents of the instructions, or None for "not given".
    eps (b, 2, 4, h, w): their noises, independent of the clip's own [paper Fig. 3].
    alpha_bar_c: how much of the instructions is left under their noise; see `noise_level`.
    keep_last (b,) bool: the clips whose last frame is not dropped; None keeps all.

    -> (b, f, 4, h, w). One frame is an image, and an image has no instruction: all zeros [ours].
    """
    b, _, c, h, w = eps.shape
    c_image = eps.new_zeros(b, frames, c, h, w)
    if frames == 1:
        return c_image
    # Why noise: "to mitigate the reliance on the instruction and promote the robustness of model"
    # [paper §1]. The user's pictures will not be frames of a real clip.
    if f_first is not None:
        c_image[:, 0] = add_noise(f_first, eps[:, 0], alpha_bar_c)
    if f_last is not None:
        last = add_noise(f_last, eps[:, 1], alpha_bar_c)
        if keep_last is not None:  # zero after the noise: a dropped instruction leaves no trace
            last = torch.where(keep_last[:, None, None, None], last, torch.zeros_like(last))
        c_image[:, -1] = last
    return c_image


def noise_level(schedule: Schedule, cond_noise_t: int) -> float:
    """alpha_bar_c of "a noise corresponding to 100 time steps" [paper §4.1]; 0 steps: clean."""
    # Index 0 of the table is already a little noise (0.999); clean is 1.
    return float(schedule.alpha_bar[cond_noise_t]) if cond_noise_t else 1.0


def make_conditions(
    instructions: dict[str, Tensor],
    frames: int,
    eps: Tensor,
    alpha_bar_c: float,
    keep_last: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the network is told beside the text: {"c_image": ...}, then the rest by its name.

    instructions: "first" and "last" as in `make_c_image`, each of which may be missing; any other
    is (b, f, c, h, w), of which an image (frames = 1) takes the first frame.
    """
    rest = dict(instructions)
    f_first, f_last = rest.pop("first", None), rest.pop("last", None)
    c_image = make_c_image(f_first, f_last, frames, eps, alpha_bar_c, keep_last)
    return {"c_image": c_image} | {name: given[:, :frames] for name, given in rest.items()}


def ask(unet, z_t: Tensor, t: Tensor, c_text: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The network's answer (b, f, 4, h, w): the only place that asks it, in training and sampling.

    z_t (b, f, 4, h, w), t (b,), c_text (b, l, d); conditions are laid behind z_t in their order.
    """
    z = torch.cat([z_t, *conditions.values()], dim=2)  # b f 4 h w, each -> b f 8 h w
    return unet(z, t, c_text)


def pick_instructions(z_0: Tensor, frames_from_end: Tensor) -> tuple[Tensor, Tensor]:
    """f_first and f_last (b, 4, h, w) of training clips z_0 (b, f, 4, h, w) [paper §3.2].

    "We randomly select an image from the last three ground-truth frames of a clip":
    frames_from_end (b,) in 0..2. Wherever the image was, it goes into the last slot: so the
    network learns not to repeat it exactly.
    """
    f = z_0.shape[1]
    index = (f - 1 - frames_from_end).clamp(min=0)  # a clip may have fewer than three frames
    return z_0[:, 0], z_0[torch.arange(len(z_0), device=z_0.device), index]


def sketch(pixels: Tensor, threshold: float = 0.2) -> Tensor:
    """Pictures (..., 3, H, W) in [-1, 1] as edge drawings of the same shape: black on white.

    An edge is where some channel's gradient, by Sobel's filter, exceeds `threshold` a pixel; from
    black to white are 2. Paper §4.5: sketches by a network of their own, HED. Here: a convolution
    and a comparison, because no other network is needed to see what a sketch can do.
    """
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None].to(pixels)  # 2 1 3 3
    x = pixels.reshape(-1, 1, *pixels.shape[-2:])  # ... 3 H W -> (n 3) 1 H W
    gradient = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), kernels).norm(dim=1)
    steepest = gradient.reshape(pixels.shape).amax(-3, keepdim=True)
    return torch.where(steepest > threshold, -1.0, 1.0).to(pixels).expand(pixels.shape)
