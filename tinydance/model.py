"""PixelDance in one place: the parts of a model and the folder that they live in.

A model is a folder in the layout of the hub: `unet/ vae/ text_encoder/ tokenizer/ scheduler/`, each
with its config and weights. SD 2.1, ModelScope's text-to-video and our own runs are all read by
`PixelDance.from_folder`. What has no place there (the clip's shape, how to sample by default)
stands in `pixeldance.json`.

Read before: `clip.py`. Read after: `weights.py`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tinydance.clip import TextTower, Tokenizer
from tinydance.schedulers import Schedule
from tinydance.unet import UNet
from tinydance.vae import VAE
from tinydance.weights.files import read_config, read_json, write_json
from tinydance.weights.ldm import vae_from_ldm
from tinydance.weights.load import load_into

# OpenCLIP's ViT-H/14 without its last block [SD]; "!" (id 0) pads.
SD2_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class ClipSettings:
    """What a model makes when nothing else is asked for; the defaults are the paper's."""

    frames: int = 16  # [paper §4.1]
    fps: int = 4  # [paper §4.1]
    height: int = 256  # [paper §4.1]
    width: int = 256
    cond_noise_t: int = 100  # noise on c_image, as in training [paper §4.1]
    steps: int = 50  # [ours: paper silent; ModelScope]
    guidance: float = 7.5  # [ours: paper silent; DynamiCrafter]
    tau: float = 0.5  # share of the steps that sees the last frame [paper Fig. 7]


@dataclass
class PixelDance:
    unet: UNet
    vae: VAE
    text_tower: TextTower
    tokenizer: Tokenizer
    schedule: Schedule
    settings: ClipSettings = field(default_factory=ClipSettings)

    @classmethod
    def from_folder(cls, path) -> "PixelDance":
        """Read a model folder. Raises ValueError naming what is missing or does not fit."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; give a model folder, with unet/ and vae/ in it")
        vae, settings = VAE.from_folder(path / "vae").eval(), path / "pixeldance.json"
        if settings.is_file():
            known = read_json(settings)
        else:  # from the hub: SD 2.1 says 96, its latents' side, and so 768 pixels
            side = read_config(path / "unet").get("sample_size", 32) * vae.stride
            known = {"height": side, "width": side}
        return cls(
            unet=UNet.from_folder(path / "unet").eval(),
            vae=vae,
            text_tower=TextTower.from_folder(path / "text_encoder").eval(),
            tokenizer=Tokenizer.from_folder(path / "tokenizer"),
            schedule=Schedule.from_folder(path / "scheduler"),
            settings=ClipSettings(**{k: known[k] for k in vars(ClipSettings()) if k in known}),
        )

    @classmethod
    def from_ldm(cls, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> "PixelDance":
        """The parts of one of Stable Diffusion 2's single-file checkpoints, from `load_weights`.

        Such a file has no tokenizer; any CLIP folder with vocab.json and merges.txt brings it.
        """
        unet, vae, tower = UNet(), VAE(), TextTower(**SD2_TEXT)
        unet.load(tensors)
        load_into(vae, vae_from_ldm(tensors))
        tower.load(tensors)
        return cls(unet.eval(), vae.eval(), tower.eval(), tokenizer, Schedule())

    def save(self, path, dtype: torch.dtype | None = None, spatial: bool = False) -> None:
        """Write the folder; dtype (say torch.float16) is that of the weights on disk. spatial: as
        an image model, see `UNet.save`."""
        path = Path(path)
        self.unet.save(path / "unet", dtype, spatial)
        self.vae.save(path / "vae", dtype)
        self.text_tower.save(path / "text_encoder", dtype)
        self.tokenizer.save(path / "tokenizer")
        self.schedule.save(path / "scheduler")
        write_json(path / "pixeldance.json", asdict(self.settings))

    def to(self, device) -> "PixelDance":
        for part in (self.unet, self.vae, self.text_tower):
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
        unet_stride = 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        multiple = self.vae.stride * unet_stride
        if height % multiple or width % multiple:
            raise ValueError(f"size is {height}x{width}; both must be multiples of {multiple}")
        return height // self.vae.stride, width // self.vae.stride
