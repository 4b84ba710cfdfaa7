"""What VideoCrafter1 changes: a picture is shown as tokens among the words; and a frame rate.

    attn2 of every spatial transformer   softmax(q k_text) v_text + softmax(q k_image) v_image
    time embedding                       time_embedding(t) + fps_embedding(fps)
    image tokens                         picture -- CLIP's image tower -- Resampler --> 16 of them

PixelDance lays f_first beside z_t, place by place. Here the picture is asked like a word: what it
shows is kept, and not where [VideoCrafter1]. It has keys and values of its own (`to_k_ip`,
`to_v_ip`), which start at zero: a converted network is what it was, until it is trained.

All else of PixelDance stays, so that the two can be compared: the network takes [z_t, c_image] as
ever, and looks at the picture in c_image's first slot. With `in_channels` 4 that is all it gets of
it, as in VideoCrafter1; with 8 it is shown in both ways, as in DynamiCrafter.

    python train.py --variant videocrafter1 --init MODEL --image_encoder CLIP --data clips
    python sample.py "a cat jumps" --first cat.jpg --model runs/toy/video/model

Not here: the image tower (`clip.py`). Left out: the scaled signal that VideoCrafter2 trained with.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tinydance.clip import ImageConfig, ImageTower
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, run_main
from tinydance.run.stages import unet_stage
from tinydance.training import Stage
from tinydance.unet import (
    Attention,
    SpatialTransformer,
    TimeEmbedding,
    UNet,
    UNetConfig,
    attention,
    timestep_embedding,
)
from tinydance.weights import build, load_into, read_config, read_part, save_weights
from tinydance.weights.ldm import unet_from_ldm

TOKENS, HEAD_DIM = 16, 64  # of a picture [IP-Adapter]; the width of the Resampler's heads
PART = "image_encoder"  # the folder of a converted model that holds the image tower


# ------------------------------------------------------------------ from a picture to image tokens
class ResamplerAttention(nn.Module):
    """The queries ask the patches and each other [Flamingo; IP-Adapter's PerceiverAttention]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, inner = heads, heads * HEAD_DIM
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, patches: Tensor, queries: Tensor) -> Tensor:
        queries = self.norm2(queries)
        kv = self.to_kv(torch.cat([self.norm1(patches), queries], dim=1))
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.to_q(queries), *kv.chunk(2, dim=-1))
        )  # n l (heads d) -> n heads l d
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Patch tokens (n, p, d') of a picture -> TOKENS image tokens (n, 16, d) [IP-Adapter plus]."""

    def __init__(self, patch_dim: int, dim: int, depth: int = 4):
        super().__init__()
        heads = max(1, dim * 12 // 1024)  # 12 at VideoCrafter's width
        self.latents = nn.Parameter(torch.randn(1, TOKENS, dim) / math.sqrt(dim))
        self.proj_in, self.proj_out = nn.Linear(patch_dim, dim), nn.Linear(dim, dim)
        self.norm_out, self.layers = nn.LayerNorm(dim), nn.ModuleList()
        for _ in range(depth):
            outer, inner = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
            mlp = nn.Sequential(nn.LayerNorm(dim), outer, nn.GELU(), inner)
            self.layers.append(nn.ModuleList([ResamplerAttention(dim, heads), mlp]))

    def forward(self, patches: Tensor) -> Tensor:
        patches, queries = self.proj_in(patches), self.latents.expand(len(patches), -1, -1)
        for ask, mlp in self.layers:
            queries = queries + ask(patches, queries)
            queries = queries + mlp(queries)
        return self.norm_out(self.proj_out(queries))


# ---------------------------------------------------------------------------- what is put in place
class TextAndImageAttention(Attention):
    """The same queries ask the text and, apart from it, the image tokens behind it."""

    def __init__(self, like: Attention):
        nn.Module.__init__(self)
        self.heads, self.to_out = like.heads, like.to_out
        self.to_q, self.to_k, self.to_v = like.to_q, like.to_k, like.to_v
        inner, context_dim = like.to_k.weight.shape
        self.to_k_ip = nn.Linear(context_dim, inner, bias=False)
        self.to_v_ip = nn.Linear(context_dim, inner, bias=False)
        nn.init.zeros_(self.to_v_ip.weight)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """context (n, l + 16, d'): the text's tokens, then the image's."""
        text, image = context[:, :-TOKENS], context[:, -TOKENS:]
        q = self.split_heads(self.to_q(x))
        y = attention(q, self.split_heads(self.to_k(text)), self.split_heads(self.to_v(text)))
        k, v = self.split_heads(self.to_k_ip(image)), self.split_heads(self.to_v_ip(image))
        y = y + attention(q, k, v)  # nothing, where tokens are zero
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class TimeAndRate(TimeEmbedding):
    """The embedding of t, to which that of `fps`, frames a second, is added."""

    def __init__(self, like: TimeEmbedding):
        nn.Module.__init__(self)
        self.linear_1, self.linear_2, self.fps = like.linear_1, like.linear_2, 4.0
        self.fps_embedding = TimeEmbedding(like.linear_1.in_features)
        nn.init.zeros_(self.fps_embedding.linear_2.weight)
        nn.init.zeros_(self.fps_embedding.linear_2.bias)

    def forward(self, x: Tensor) -> Tensor:
        fps = timestep_embedding(torch.tensor([self.fps], device=x.device), x.shape[1])
        return super().forward(x) + self.fps_embedding(fps.to(x.dtype))


class VideoCrafter1(UNet):
    """The UNet with both. `look`: latents f_first (b, 4, h, w) -> patches (b, p, d'), see `attach`.

    `from_folder` takes a folder of its own, or any that UNet takes, which it converts.
    """

    patch_dim = 1280  # d': that of ViT-H

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__(config)
        self.time_embedding = TimeAndRate(self.time_embedding)
        self.image_proj_model = Resampler(self.patch_dim, config.cross_attention_dim)
        for module in self.modules():
            if isinstance(module, SpatialTransformer):
                block = module.transformer_blocks[0]
                block.attn2 = TextAndImageAttention(block.attn2)
        self.look: Callable[[Tensor], Tensor] | None = None

    def forward(self, z: Tensor, t: Tensor, c_text: Tensor) -> Tensor:
        """As UNet's; z (b, f, 8, h, w) comes with c_image, of which `in_channels` may take none."""
        f_first = z[:, 0, self.config.out_channels : 2 * self.config.out_channels]
        tokens = c_text.new_zeros(len(z), TOKENS, c_text.shape[-1])
        if self.look and (is_shown := f_first.flatten(1).any(dim=1)).any():
            tokens = self.image_proj_model(self.look(f_first)) * is_shown[:, None, None]
        context = torch.cat([c_text, tokens.to(c_text.dtype)], dim=1)
        return super().forward(z[:, :, : self.config.in_channels], t, context)

    @classmethod
    def from_folder(cls, path) -> "VideoCrafter1":
        """As UNet's, but a folder of 4 input channels stays one."""
        return super().from_folder(path, in_channels=read_config(path)["in_channels"])

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take a converted network's tensors, VideoCrafter2's or DynamiCrafter's, or those of a
        plain network, to which what is new is added as it was initialised."""
        tensors = unet_from_ldm(tensors)
        for old, new in (("0", "linear_1"), ("2", "linear_2")):
            for end in ("weight", "bias"):
                if (name := f"fps_embedding.{old}.{end}") in tensors:
                    tensors[f"time_embedding.fps_embedding.{new}.{end}"] = tensors.pop(name)
        new = {name: x for name, x in self.state_dict().items() if is_new(name)}
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, : self.config.in_channels]
        super().load(new | tensors)


def is_new(name: str) -> bool:
    """Whether a parameter is of what VideoCrafter1 adds."""
    return "_ip." in name or "fps_embedding." in name or name.startswith("image_proj_model.")


def for_patches(patch_dim: int) -> type[VideoCrafter1]:
    """The class for patches of this width, which the UNet's config.json does not say."""
    return type("VideoCrafter1", (VideoCrafter1,), {"patch_dim": patch_dim})


def convert(unet: UNet, patch_dim: int, beside: bool = False) -> VideoCrafter1:
    """A VideoCrafter1 of this network. beside: conv_in goes on seeing c_image, as DynamiCrafter's.
    What was frozen is, and what is new is not."""
    channels = unet.config.in_channels if beside else unet.config.out_channels
    new = for_patches(patch_dim)(replace(unet.config, in_channels=channels))
    new.load(unet.state_dict())
    was = {name: p.requires_grad for name, p in unet.named_parameters()}
    for name, p in new.named_parameters():
        p.requires_grad_(was.get(name, True))
    return new


# ------------------------------------------------------------------------------------ whole models
class Eye(ImageTower):
    """CLIP's image tower as a part of a model's folder."""

    @classmethod
    def from_folder(cls, path) -> "Eye":
        """Read a folder of CLIP's, or of its image tower. Raises ValueError for another."""

        def make(config: dict) -> "Eye":
            config = config.get("vision_config", config)
            return cls(build(ImageConfig, config, f"{path}/config.json"))

        return read_part(path, make)

    def load(self, tensors: dict[str, Tensor]) -> None:
        own = {name: x for name, x in tensors.items() if name.startswith("vision_model.")}
        load_into(self, {name: x for name, x in own.items() if not name.endswith("position_ids")})

    def save(self, path) -> None:
        save_weights(path, asdict(self.config), self.state_dict(), name="model")


def attach(model: PixelDance, eye: Eye) -> PixelDance:
    """Let the model's network look with this eye, at its own frame rate."""
    eye.eval().requires_grad_(False)

    @torch.no_grad()
    def look(f_first: Tensor) -> Tensor:
        return eye.to(f_first.device)(model.vae.decode_video(f_first[:, None])[:, 0].float())

    model.unet.look, model.unet.time_embedding.fps = look, float(model.settings.fps)
    return model


def open_model(folder) -> PixelDance:
    """Read the folder of a converted model. Raises ValueError for what does not fit."""
    eye = Eye.from_folder(Path(folder) / PART)
    return attach(PixelDance.from_folder(folder, for_patches(eye.config.hidden_size)), eye)


def image_token_stage(name: str, image_encoder: str, config, *given) -> Stage:
    """The video stage of a converted network, by the name of a page's variant, see PAGES."""
    eye = Eye.from_folder(image_encoder)
    surgery = partial(convert, patch_dim=eye.config.hidden_size, beside=PAGES[name])
    stage = unet_stage("video", config, *given, convert=surgery)
    attach(stage.objective.model, eye)

    def publish(ema: UNet) -> None:
        stage.publish(ema)
        eye.save(Path(config.out) / "video" / "model" / PART)

    return replace(stage, publish=publish)


PAGES = {"videocrafter1": False, "dynamicrafter": True}  # is c_image shown beside z_t as well?


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("variant", choices=PAGES, help="what it becomes")
    parser.add_argument("model", help="model folder")
    parser.add_argument("image_encoder", help="folder of CLIP, or of its image tower")
    parser.add_argument("out", help="model folder to write")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} is there already: name another folder")
    model, eye = PixelDance.from_folder(args.model), Eye.from_folder(args.image_encoder)
    model.unet = convert(model.unet, eye.config.hidden_size, PAGES[args.variant])
    model.save(args.out)
    eye.save(Path(args.out) / PART)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
