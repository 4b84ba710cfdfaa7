"""What the tests share: golden outputs of the field's reference implementations, and tiny models.

The golden files hold no weights: each parameter is a formula of its name and shape.
"""

import gzip
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tinydance.clip import TextConfig, TextTower
from tinydance.model import PixelDance, Settings
from tinydance.schedulers import Schedule
from tinydance.toy.losses import build_vocabulary
from tinydance.unet import UNet, UNetConfig
from tinydance.vae import VAE, VAEConfig

HERE = Path(__file__).parent
TINY = {
    "unet": UNetConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_levels=(True, True),
        temporal_dropout=0.0,
    ),
    "vae": VAEConfig(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
    ),
    "text": TextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
    ),
}


def formula_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        return n / np.sqrt(np.prod(shape[1:]))
    return 0.1 * n + (1.0 if name.endswith("weight") else 0.0)


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter by the formula; none stays zero."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(torch.from_numpy(np.asarray(formula_weight(name, tuple(tensor.shape)))))
    return module.eval()


def golden(name: str) -> tuple[dict, dict, dict]:
    """(config, names and shapes, tensors) of tests/golden/NAME.npz."""
    file = np.load(HERE / "golden" / f"{name}.npz")
    tensors = {k: torch.from_numpy(file[k]) for k in file.files if k not in ("config", "keys")}
    keys = json.loads(str(file["keys"])) if "keys" in file.files else {}
    return json.loads(str(file["config"])), keys, tensors


def read_shapes(name: str) -> dict[str, list[int]]:
    """{parameter: shape} of a public checkpoint, from tests/keys."""
    with gzip.open(HERE / "keys" / f"{name}_keys.txt.gz", "rt") as file:
        return {k: json.loads(v) for k, v in (line.split(" ", 1) for line in file)}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; shapes must agree."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.detach().double() - b.detach().double()).abs().max())


class Spy(torch.nn.Module):
    """Stands before the UNet and keeps what it was given: (z, t, c_text) of each call."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet, self.seen = unet, []
        self.config, self.conv_in = unet.config, unet.conv_in

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self.seen.append(given)
        return self.unet(*given)


def tiny_unet(**changes) -> UNet:
    torch.manual_seed(0)
    return UNet(replace(TINY["unet"], **changes)).eval()


def tiny_model(filled: bool = True, **schedule) -> PixelDance:
    """A whole model of some 100K parameters for clips of 4 frames of 16 x 16 pixels.

    filled: every parameter by the formula, so that nothing is at its zero start.
    """
    words = ["a", "red", "blue", "circle", "moves", "left"]
    shape = TINY["text"]
    tokenizer = build_vocabulary(words, length=shape.max_position_embeddings)
    shape = replace(shape, vocab_size=len(tokenizer.vocab), eos_token_id=tokenizer.end_id)
    torch.manual_seed(0)
    tower, vae = TextTower(shape), VAE(TINY["vae"])
    parts = tiny_unet(), vae, tower
    if filled:
        for part in parts:
            fill(part)
    unet, vae, tower = (part.eval().requires_grad_(False) for part in parts)
    settings = Settings(frames=4, height=16, width=16, steps=4, guidance=3.0)
    return PixelDance(unet, vae, tower, tokenizer, Schedule(**schedule), settings)


class Means(torch.nn.Module):
    """Stands in for I3D: the mean colours of clips or pictures."""

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> torch.Tensor:
        x = x.float() / 127.5 - 1.0 if rescale else x.float()
        return x.flatten(2).mean(2)
