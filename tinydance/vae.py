"""Stable Diffusion's autoencoder: pictures (n, 3, H, W) to latents (n, 4, H/8, W/8) and back.

Borrowed: PixelDance encodes the frames of a clip, and with them both image instructions, by "a
pre-trained VAE encoder" that stays frozen [paper §3.1, §4.1]. The parameters are named as
diffusers' `AutoencoderKL` names them; files with the older attention names or in the original LDM
layout load too (`weights/ldm.py`).

    uint8 frames -- to_pixels --> pixels in [-1, 1] -- encode --> latents -- decode --> pixels

Not here: how a small one is trained (`toy/losses.py`).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.weights import build, load_into, read_part, save_weights
from tinydance.weights.diffusers import write_vae_config
from tinydance.weights.ldm import vae_from_ldm

FRAMES_AT_A_TIME = 4  # of a video: its length then costs time, and no memory


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float in [-1, 1], as the VAE takes it [SD]."""
    return frames.float() / 127.5 - 1


def to_frames(pixels: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8, rounded and clamped; undoes `to_pixels` exactly."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class VAEConfig:
    """The network's shape, in the words of diffusers' `AutoencoderKL`; the defaults are SD's."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    # 1 / (standard deviation of the latents of SD's training images) [LDM §4.3.2 and its code]: a
    # schedule's alpha_bar is a share of signal only if the signal has unit variance.
    scaling_factor: float = 0.18215


class ResBlock(nn.Module):
    """Two convolutions, added to their input. The UNet's has the diffusion time between them."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class PixelAttention(nn.Module):
    """One head over all places of the smallest map."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list, for the name `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # n c h w -> n (h w) c
        q, k, v = (proj(tokens)[:, None] for proj in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + tokens.transpose(1, 2).reshape(x.shape)  # n (h w) c -> n c h w


class Downsample(nn.Module):
    """n c h w -> n c h/2 w/2."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, unlike the UNet's [SD]


class Upsample(nn.Module):
    """n c h w -> n c 2h 2w."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """Some resnets, then the resampler, whose list has the checkpoint's name for its direction."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: str = ""):
        super().__init__()
        inputs = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResBlock(c, c_out, groups) for c in inputs)
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for modules in self.children():  # in order of registration: resnets, then the resampler
            for module in modules:
                x = module(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(dim, dim, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(dim, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pixels n 3 H W -> mean and logvar of the latents, n 2c h w."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        inputs, last = (widths[0], *widths), len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Block(inputs[i], width, config.layers_per_block, groups, "down" if i < last else "")
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # for SD at 256x256: 128x256x256
        for block in self.down_blocks:  # 128x128x128, 256x64x64, 512x32x32, 512x32x32
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents n c h w -> pixels n 3 H W."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        inputs, last = (widths[0], *widths), len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Block(inputs[i], width, config.layers_per_block + 1, groups, "up" if i < last else "")
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config, c = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    @property
    def stride(self) -> int:
        """Pixels to a latent place, on each axis."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (n, 3, H, W) -> mean and logvar (n, 4, h, w) of the posterior, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # exp(logvar) stays finite and above 0 [LDM]

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (n, 4, h, w) -> pixels (n, 3, H, W)."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def encode_video(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """Pixels (b, f, 3, H, W) -> scaled latents (b, f, 4, h, w), a few frames at a time: drawn
        with eps (b, f, 4, h, w) from the posterior, as SD trains, or its mean, as at inference."""
        parts = []
        noise = eps.flatten(0, 1).split(FRAMES_AT_A_TIME) if eps is not None else None
        for i, frames in enumerate(x.flatten(0, 1).split(FRAMES_AT_A_TIME)):
            mean, logvar = self.encode(frames)
            parts.append(mean if noise is None else mean + (0.5 * logvar).exp() * noise[i])
        return torch.cat(parts).float().unflatten(0, x.shape[:2]) * self.config.scaling_factor

    @torch.no_grad()
    def decode_video(self, z: Tensor) -> Tensor:
        """Scaled latents (b, f, 4, h, w) -> pixels (b, f, 3, H, W), a few frames at a time."""
        frames = (z / self.config.scaling_factor).flatten(0, 1).split(FRAMES_AT_A_TIME)
        return torch.cat([self.decode(part) for part in frames]).unflatten(0, z.shape[:2])

    def encode_frames(self, frames: Tensor, draw_eps: Callable[..., Tensor]) -> Tensor:
        """What a data source gives -> z_0 (b, f, 4, h, w), scaled, drawn from the posterior.

        frames: uint8 (b, f, 3, H, W), pixels in [-1, 1], or cached moments (b, f, 8, h, w).
        draw_eps(f, c, h, w) gives the noise of the draw, (b, f, c, h, w).
        """
        b, f, _, height, width = frames.shape
        c, stride = self.config.latent_channels, self.stride
        if holds_moments(frames):
            mean, std = frames.float().chunk(2, dim=2)  # scaled; drawn as `encode_video` does
            return mean + std * draw_eps(f, c, height, width)
        pixels = to_pixels(frames) if frames.dtype == torch.uint8 else frames
        return self.encode_video(pixels, draw_eps(f, c, height // stride, width // stride))

    def decode_frames(self, frames: Tensor) -> Tensor:
        """What a data source gives, as in `encode_frames` -> pixels (b, f, 3, H, W) to look at."""
        if holds_moments(frames):
            mean, _ = frames.float().chunk(2, dim=2)
            return self.decode_video(mean).clamp(-1, 1)
        return to_pixels(frames) if frames.dtype == torch.uint8 else frames

    # ------------------------------------------------------------------------------ on disk
    @classmethod
    def from_folder(cls, path) -> "VAE":
        """Read a `vae/` folder of SD's kind. Raises ValueError for a file that does not fit."""
        file = f"{path}/config.json"
        return read_part(path, lambda config: cls(build(VAEConfig, config, file)))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors of the hub's files or LDM's. Raises ValueError listing what does not fit."""
        load_into(self, vae_from_ldm(tensors))

    def save(self, path, dtype: torch.dtype | None = None) -> None:
        """Write the folder; dtype is that of the weights on disk."""
        save_weights(path, write_vae_config(asdict(self.config)), self.state_dict(), dtype)


def holds_moments(frames: Tensor) -> bool:
    """Are these cached moments, mean and standard deviation (..., 2c, h, w), and no pictures?"""
    return frames.shape[-3] != 3
