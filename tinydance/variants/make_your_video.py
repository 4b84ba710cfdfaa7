"""What Make-Your-Video changes: a depth map for every frame, and a causal mask along time.

    conv_in                   [z_t, c_image, depth]: one channel more, whose weights start at zero
    temporal self-attention   frame i attends to frames i - 15 to i

PixelDance says where a clip begins and where it ends. A depth map says where everything is on every
frame, and leaves the looks to the words: so a video can be made again under another caption. Its
spatial layers stay those of the image model; the temporal layers and conv_in are trained.

A network trained on clips of 16 frames has never attended over 64. Under the mask each frame
attends to as many frames as in training, however long the clip is. The price is PixelDance's own
instruction: no early frame attends to the last one.

    python train.py --variant make_your_video --train temporal
    python sample.py "a blue star" --depth depth.mp4 --frames 64 --model runs/toy/video/model

After the released code (github.com/AILab-CVC/Make-Your-Video). Not here: its relative positions,
its depth estimator (MiDaS). It masks all temporal attentions but the first. Here: all, because the
first one would attend over 64 frames. It has no c_image. Here: c_image stays, for comparisons.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tinydance.model import PixelDance
from tinydance.run.cli import Parser, run_main
from tinydance.run.stages import unet_stage
from tinydance.training import Stage
from tinydance.unet import Attention, TemporalTransformer, UNet
from tinydance.weights.files import read_json, write_json

PART = "depth.json"  # the file of a converted model that holds the reach of its mask
PAGES = {"make_your_video": 16, "depth": 0}  # the reach of the mask in frames; 0: no mask


class CausalAttention(Attention):
    """Temporal self-attention: a frame attends to itself and the `reach` - 1 frames before it."""

    def __init__(self, like: Attention, reach: int):
        nn.Module.__init__(self)
        self.heads, self.reach, self.to_out = like.heads, reach, like.to_out
        self.to_q, self.to_k, self.to_v = like.to_q, like.to_k, like.to_v

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        q, k, v = (self.split_heads(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        frame = torch.arange(x.shape[1], device=x.device)
        ago = frame[:, None] - frame  # f f
        near = (ago >= 0) & (ago < self.reach)
        # Written out: the rows are short, and there are b * h * w of them, see `unet.attention`.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # n heads f f
        y = scores.masked_fill(~near, float("-inf")).softmax(-1) @ v
        return self.to_out[0](y.transpose(1, 2).flatten(2))


def mask_time(unet: UNet, reach: int) -> UNet:
    """Mask every temporal transformer; the weights stay. reach 0: no mask."""
    for module in unet.modules():
        if reach and isinstance(module, TemporalTransformer):
            block = module.transformer_blocks[0]
            block.attn1 = CausalAttention(block.attn1, reach)
            block.attn2 = CausalAttention(block.attn2, reach)
    return unet


def convert(unet: UNet, reach: int) -> UNet:
    """A network of the same weights that takes depth behind c_image. Frozen weights stay frozen."""
    channels = 2 * unet.config.out_channels + 1
    new = UNet(replace(unet.config, in_channels=channels))
    new.load(unet.state_dict())
    for (_, p), (_, was) in zip(new.named_parameters(), unet.named_parameters(), strict=True):
        p.requires_grad_(was.requires_grad)
    return mask_time(new, reach)


def open_model(folder) -> PixelDance:
    """Read the folder of a converted model. Raises ValueError for what does not fit."""
    model = PixelDance.from_folder(folder)
    mask_time(model.unet, read_json(Path(folder) / PART)["reach"])
    return model


def depth_stage(name: str, with_depth: Callable, config, machine, source, held_out) -> Stage:
    """The video stage of a converted network. with_depth: adds depth to a source of samples."""
    reach = PAGES[name]
    sources = [x and with_depth(x) for x in (source, held_out)]
    stage = unet_stage("video", config, machine, *sources, convert=partial(convert, reach=reach))
    for deep in filter(None, sources):
        deep.size = stage.objective.model.latent_size(config.height, config.width)

    def publish(ema: UNet) -> None:
        stage.publish(ema)
        write_json(Path(config.out) / "video" / "model" / PART, {"reach": reach})

    return replace(stage, publish=publish)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("variant", choices=PAGES, help="what it becomes")
    parser.add_argument("model", help="model folder")
    parser.add_argument("out", help="model folder to write")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} is there already: name another folder")
    model = PixelDance.from_folder(args.model)
    model.unet = convert(model.unet, PAGES[args.variant])
    model.save(args.out)
    write_json(Path(args.out) / PART, {"reach": PAGES[args.variant]})
    print(args.out)


if __name__ == "__main__":
    run_main(main)
