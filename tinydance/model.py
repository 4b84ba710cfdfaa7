"""PixelDance in one place: the parts of a model, how it samples, what it is trained on, its folder.

A model is a folder in the layout of the hub: `unet/ vae/ text_encoder/ tokenizer/ scheduler/`, each
with its config and weights. `PixelDance.from_folder` reads Stable Diffusion 1.x and 2.x,
ModelScope's text-to-video and our own runs. What has no place there (the clip's shape, how to
sample by default) stands in `pixeldance.json`.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinydance.clip import TextConfig, TextTower, Tokenizer
from tinydance.schedulers import SAMPLERS, Schedule
from tinydance.unet import UNet
from tinydance.vae import VAE
from tinydance.weights import build, diffusers, pick, read_config, reading
from tinydance.weights.files import check_folder, read_json, write_json

# OpenCLIP's ViT-H/14 without its last block [SD 2]; "!" (id 0) pads.
SD2_SIZE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
SD2_TEXT = TextConfig(**SD2_SIZE, num_attention_heads=16, hidden_act="gelu", pad_token_id=0)


@dataclass(frozen=True)
class Settings:
    """How to sample. A model has its own, the defaults of whoever asks it: `model.settings`.

    `dataclasses.replace(model.settings, tau="50%", seed=3)` changes some.
    """

    frames: int = 16  # [paper §4.1]
    fps: int = 4  # [paper §4.1]
    height: int = 256  # pixels [paper §4.1]
    width: int = 256
    cond_noise_t: int = 100  # noise on c_image, as in training [paper §4.1]; 0: clean
    steps: int = 50  # [ours: paper silent; ModelScope]
    guidance: float = 7.5  # w; 1 is off [ours: paper silent; DynamiCrafter]
    tau: int | float | str = 0.5  # first steps that see f_last: 12; or a share: 0.5 [paper Fig. 7]
    sampler: str = "ddim"  # a name in `schedulers.SAMPLERS` [ours: paper silent]
    ddim_eta: float = 0.0  # DDIM's own noise; the paper's eta is another thing
    negative: str = ""  # the prompt of the unconditional branch
    seed: int = 0

    def check(self, model: "PixelDance") -> "Settings":
        """These settings, if the model can sample so. Raises ValueError naming what is wrong."""
        T = model.schedule.num_train_timesteps
        model.schedule.timesteps(self.steps)  # raises for a number of steps that cannot be
        model.latent_size(self.height, self.width)  # and this for a size
        ranges = {"frames": (1, math.inf), "guidance": (0, math.inf), "seed": (0, math.inf)}
        ranges |= {"ddim_eta": (0, 1), "cond_noise_t": (0, T - 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                upper = "or more" if high == math.inf else f"to {high}"
                raise ValueError(f"{name} is {value}; use {low} {upper}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; use {' or '.join(SAMPLERS)}")
        tau_in_steps(self.tau, self.steps)
        return self


def tau_in_steps(tau: int | float | str, steps: int) -> int:
    """tau as a number of steps: 12 or "12" is itself, 0.5, "0.5" or "50%" a share of `steps`.

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
        raise ValueError(f"tau is {tau}; use 0 to {steps} steps, or a share of them: 0.5 or 50%")
    return count


KEPT = [f.name for f in fields(Settings) if f.name not in ("negative", "seed")]  # with a model


@dataclass
class PixelDance:
    """The three networks, their tokenizer and schedule. A dataclass and no nn.Module: what is
    trained is the UNet alone (`training.DiffusionLoss`)."""

    unet: UNet
    vae: VAE
    text_tower: TextTower
    tokenizer: Tokenizer
    schedule: Schedule
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self):
        width, wanted = self.text_tower.config.hidden_size, self.unet.config.cross_attention_dim
        if width != wanted:  # SD 1.x has 768, SD 2.x and ModelScope 1024
            raise ValueError(f"text is {width} wide, the UNet reads {wanted}: take both from one")

    @classmethod
    def from_folder(cls, path, network: type[UNet] = UNet) -> "PixelDance":
        """Read a model folder. Raises ValueError naming what is missing or does not fit."""
        path = check_folder(path)
        with reading(path):
            vae, file = VAE.from_folder(path / "vae").eval(), path / "pixeldance.json"
            # From the hub: SD 2.1 says 96, its latents' side, and so 768 pixels.
            side = read_config(path / "unet").get("sample_size", 32) * vae.stride
            known = read_json(file) if file.is_file() else {"height": side, "width": side}
            return cls(
                unet=network.from_folder(path / "unet").eval(),
                vae=vae,
                text_tower=TextTower.from_folder(path / "text_encoder").eval(),
                tokenizer=Tokenizer.from_folder(path / "tokenizer"),
                schedule=read_schedule(path / "scheduler"),
                settings=build(Settings, pick(known, KEPT), file),
            )

    def save(self, path, dtype: torch.dtype | None = None, spatial: bool = False) -> None:
        """Write the folder; dtype: of the weights on disk; spatial: as an image model."""
        path = Path(path)
        self.unet.save(path / "unet", dtype, spatial)
        self.vae.save(path / "vae", dtype)
        self.text_tower.save(path / "text_encoder", dtype)
        self.tokenizer.save(path / "tokenizer")
        write_schedule(self.schedule, path / "scheduler")
        write_json(path / "pixeldance.json", pick(asdict(self.settings), KEPT))
        write_json(path / "model_index.json", diffusers.write_model_index(spatial))

    def to(self, device, dtype: torch.dtype = torch.float32) -> "PixelDance":
        """dtype: of the weights that autocast would cast to it anyway; float32 to train."""
        for part in (self.unet, self.vae, self.text_tower):
            for name, p in part.named_parameters():
                if p.ndim > 1 and "embedding.weight" not in name:
                    p.data = p.data.to(dtype)
            part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """c_text (n, 77, d) [paper §3.1]."""
        return self.text_tower(self.tokenizer(prompts).to(self.device))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents. Raises ValueError where the networks do not divide the size."""
        unet_stride = 2 ** (len(self.unet.config.block_out_channels) - 1)
        multiple = self.vae.stride * unet_stride
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise ValueError(f"size is {height}x{width}; both must be multiples of {multiple}")
        return height // self.vae.stride, width // self.vae.stride


class Sample(NamedTuple):
    """A clip, or a picture (f = 1), as a data source gives it."""

    frames: Tensor  # uint8 pixels (f, 3, H, W); or cached moments of latents, float16 (f, 8, h, w)
    caption: str
    name: str  # where it comes from, for messages
    counts: Counter = Counter()  # what happened on the way to it, such as {"damaged": 1}
    instructions: dict[str, Tensor] = {}  # further ones (f, c, h, w), by name


class Batch(NamedTuple):
    """This rank's share of one step: the fields of `Sample`, b of each."""

    step: int
    frames: Tensor  # (b, f, ...)
    captions: list[str]
    sample_ids: list[int]  # global numbers, from which all randomness of a sample comes
    names: list[str]
    counts: dict[str, int] = {}  # over the samples
    instructions: dict[str, Tensor] = {}  # (b, f, c, h, w)

    def part(self, rows: slice, device) -> "Batch":
        """Some of the samples, on the device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor[rows].to(device, non_blocking=True)

        instructions = {name: move(given) for name, given in self.instructions.items()}
        lists = self.captions[rows], self.sample_ids[rows], self.names[rows]
        return Batch(self.step, move(self.frames), *lists, self.counts, instructions)


def read_schedule(folder) -> Schedule:
    """Read `scheduler_config.json`, whatever its class; see `read_scheduler_config`."""
    path = Path(folder) / "scheduler_config.json"
    with reading(path):
        return build(Schedule, diffusers.read_scheduler_config(read_json(path)), path)


def write_schedule(schedule: Schedule, folder) -> None:
    """Write it as diffusers' DDIM scheduler, the sampler of our default."""
    config = {"_class_name": "DDIMScheduler", **asdict(schedule), "clip_sample": False}
    write_json(Path(folder) / "scheduler_config.json", config)
