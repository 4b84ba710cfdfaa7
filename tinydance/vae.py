"""Stable Diffusion's autoencoder: pictures (n, 3, H, W) to latents (n, 4, H/8, W/8) and back.

A borrowed organ: PixelDance encodes the frames of a clip, and with them both image instructions,
by "a pre-trained VAE encoder" that stays frozen [paper §3.1, §4.1]. The parameters are named as
diffusers' `AutoencoderKL` names them; files with the older attention names or in the original
LDM layout load too (`weights.py`). The toy preset trains a small one of its own.

Read before: `training.py`. Read after: `clip.py`.
Not here: the adversarial and perceptual losses that Stable Diffusion's was trained with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.weights.files import read_config, write_config
from tinydance.weights.ldm import vae_from_ldm
from tinydance.weights.load import load_into, load_weights
from tinydance.weights.safetensors import save_safetensors


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float in [-1, 1], as the VAE takes it [SD]."""
    return frames.float() / 127.5 - 1


def to_frames(pixels: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] -> uint8, rounded and clamped; undoes `to_pixels` exactly."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


FRAMES_AT_A_TIME = 16  # of a video, so that its length costs time and no memory


class ResBlock(nn.Module):
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
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # n c h w -> n (h w) c
        q, k, v = (proj(tokens)[:, None] for proj in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + tokens.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, unlike the UNet [SD]


class Upsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """Some resnets, then the resampler, whose list has the checkpoint's name for its direction."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: str = ""):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(c_in if j == 0 else c_out, c_out, groups) for j in range(layers)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            for layer in module:
                x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(dim, dim, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(dim, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, c_in: int, c_latent: int, widths: list[int], layers: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        ins, last = [widths[0], *widths], len(widths) - 1
        self.down_blocks = nn.ModuleList(
            Block(ins[i], width, layers, groups, "down" if i < last else "")
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c_latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c_latent: int, c_out: int, widths: list[int], layers: int, groups: int):
        super().__init__()
        widths, last = widths[::-1], len(widths) - 1
        self.conv_in = nn.Conv2d(c_latent, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        ins = [widths[0], *widths]
        self.up_blocks = nn.ModuleList(
            Block(ins[i], width, layers + 1, groups, "up" if i < last else "")
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Arguments are the keys of diffusers' `AutoencoderKL` config; the defaults are SD's."""

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
    ):
        super().__init__()
        widths = list(block_out_channels)
        self.config = {
            "in_channels": in_channels,
            "latent_channels": latent_channels,
            "block_out_channels": widths,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "scaling_factor": scaling_factor,
        }
        rest = widths, layers_per_block, norm_num_groups
        self.encoder = Encoder(in_channels, latent_channels, *rest)
        self.decoder = Decoder(latent_channels, in_channels, *rest)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @property
    def stride(self) -> int:
        """Pixels to a latent place, on each axis."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (n, 3, H, W) -> mean and logvar (n, 4, h, w) of the posterior, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (n, 4, h, w) -> pixels (n, 3, H, W)."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def encode_video(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """Pixels (b, f, 3, H, W) -> scaled latents (b, f, 4, h, w), a few frames at a time.

        eps (b, f, 4, h, w) draws from the posterior, as Stable Diffusion trains; without it the
        mean is taken, as at inference.
        """
        parts = []
        noise = eps.flatten(0, 1).split(FRAMES_AT_A_TIME) if eps is not None else None
        for i, frames in enumerate(x.flatten(0, 1).split(FRAMES_AT_A_TIME)):
            mean, logvar = self.encode(frames)
            parts.append(mean if noise is None else mean + (0.5 * logvar).exp() * noise[i])
        return torch.cat(parts).float().unflatten(0, x.shape[:2]) * self.config["scaling_factor"]

    @torch.no_grad()
    def decode_video(self, z: Tensor) -> Tensor:
        """Scaled latents (b, f, 4, h, w) -> pixels (b, f, 3, H, W), a few frames at a time."""
        frames = (z / self.config["scaling_factor"]).flatten(0, 1).split(FRAMES_AT_A_TIME)
        return torch.cat([self.decode(part) for part in frames]).unflatten(0, z.shape[:2])

    @torch.no_grad()
    def whiten(self, x: Tensor) -> None:
        """Make the latents of pixels x (n, 3, H, W) of zero mean, unit variance, uncorrelated.

        Stable Diffusion scales its latents by one number [LDM]. In those of a small VAE one channel
        can have ten times the variance of another, and noise then drowns the small one first. The
        affine map and its inverse go into the two 1x1 convolutions: the same pictures come out, and
        the file keeps its format. The posterior's variances become their means over x. [ours]
        """
        mean, logvar = (moment.transpose(0, 1).flatten(1).double() for moment in self.encode(x))
        centre = mean.mean(1)
        variances, axes = torch.linalg.eigh(mean.cov())
        forth, back = (axes / variances.sqrt()).T, axes * variances.sqrt()  # whiten, and undo it

        c, quant, post = len(centre), self.quant_conv, self.post_quant_conv
        weight, bias = post.weight.double(), post.bias.double()
        post.weight.copy_(torch.einsum("oi...,ij->oj...", weight, back))
        post.bias.copy_(bias + weight[:, :, 0, 0] @ centre)
        weight, bias = quant.weight[:c].double(), quant.bias[:c].double()
        quant.weight[:c] = torch.einsum("oi,ij...->oj...", forth, weight).to(quant.weight)
        quant.bias[:c] = (forth @ (bias - centre)).to(quant.bias)
        quant.weight[c:] = 0
        quant.bias[c:] = (forth**2 @ logvar.exp().mean(1)).log().to(quant.bias)
        self.config["scaling_factor"] = 1.0

    @classmethod
    def from_folder(cls, path) -> "VAE":
        """Read a `vae/` folder of SD's kind. Raises ValueError for a file that does not fit."""
        config = read_config(path)
        names = ("in_channels", "latent_channels", "block_out_channels", "layers_per_block",
                 "norm_num_groups", "scaling_factor")  # fmt: skip
        vae = cls(**{name: config[name] for name in names if name in config})
        load_into(vae, vae_from_ldm(load_weights(path)))
        return vae

    def save(self, path, dtype: torch.dtype | None = None) -> None:
        levels = len(self.config["block_out_channels"])
        write_config(path, {
            "_class_name": "AutoencoderKL",
            **self.config,
            "out_channels": self.config["in_channels"],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
        })  # fmt: skip
        tensors = {k: v.to(dtype or v.dtype) for k, v in self.state_dict().items()}
        save_safetensors(tensors, f"{path}/diffusion_pytorch_model.safetensors")


def draw_latents(moments: Tensor, eps: Tensor) -> Tensor:
    """Moments (b, f, 8, h, w) and eps (b, f, 4, h, w) -> z_0, as `VAE.encode_video` draws it."""
    mean, std = moments.chunk(2, dim=2)
    return mean + std * eps
