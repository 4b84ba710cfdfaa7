"""What the tests share: golden outputs of the field's reference implementations, and tiny models.

The golden files hold no weights: each parameter is a formula of its name and shape.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from tiny_training import NETWORKS

from tinydance.clip import TextTower
from tinydance.toy.losses import build_vocabulary
from tinydance.model import ClipSettings, PixelDance
from tinydance.schedulers import Schedule
from tinydance.unet import UNet
from tinydance.vae import VAE

HERE = Path(__file__).parent


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


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; shapes must agree."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.detach().double() - b.detach().double()).abs().max())


def tiny_unet(**changes) -> UNet:
    arguments = NETWORKS["unet"] | {"attention_levels": (True, True), "temporal_dropout": 0.0}
    torch.manual_seed(0)
    return UNet(**(arguments | changes)).eval()


def tiny_model(filled: bool = True, **schedule) -> PixelDance:
    """A whole model of some 100K parameters for clips of 4 frames of 16 x 16 pixels.

    filled: every parameter by the formula, so that nothing is at its zero start.
    """
    words = ["a", "red", "blue", "circle", "moves", "left"]
    tokenizer = build_vocabulary(words, length=NETWORKS["text"]["max_position_embeddings"])
    torch.manual_seed(0)
    tower = TextTower(
        vocab_size=len(tokenizer.vocab), eos_token_id=tokenizer.end_id, **NETWORKS["text"]
    )
    vae = VAE(**NETWORKS["vae"], scaling_factor=0.5)
    parts = tiny_unet(), vae, tower
    if filled:
        for part in parts:
            fill(part)
    unet, vae, tower = (part.eval().requires_grad_(False) for part in parts)
    settings = ClipSettings(frames=4, height=16, width=16, steps=4, guidance=3.0)
    return PixelDance(unet, vae, tower, tokenizer, Schedule(**schedule), settings)
