"""LoRA: a finished network learns something new in thin matrices beside its own [Hu et al. 2021].

    W x  ->  W x + B A x        A (r, d) and B (d', r) are trained, W (d', d) is not; B begins at 0

They stand beside the queries, keys, values and outputs of every attention, in space and in time. At
the start the network is what it was, bit for bit. Gradients, averages and Adam's moments are of the
thin matrices alone, so that one card is enough for the paper's network.

    python train.py --preset paper --init MODEL --data clips --lora 8 --out runs/mine
    python -m tinydance.variants.lora MODEL runs/mine/video/model/lora.safetensors OUT

The first leaves a model folder in which B A is added to W, so that everything reads it, and beside
it `lora.safetensors`, named as peft and diffusers name it. The second adds such a file to a model.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tinydance.model import PixelDance
from tinydance.run.cli import Parser, run_main
from tinydance.run.stages import unet_stage
from tinydance.training import Stage
from tinydance.unet import Attention, UNet
from tinydance.weights import load_weights
from tinydance.weights.safetensors import save_safetensors

FILE = "lora.safetensors"


class LoRA(nn.Module):
    """A linear layer with thin matrices beside it [Hu et al. 2021, §4.1]; alpha is r [ours]."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False).to(base.weight)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False).to(base.weight)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def attention_layers(unet: UNet) -> list[tuple[str, nn.Module, str]]:
    """(full name, module that has it, name there) of every projection of every attention."""
    found = []
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            found += [(f"{name}.{key}", module, key) for key in ("to_q", "to_k", "to_v")]
            found.append((f"{name}.to_out.0", module.to_out, "0"))
    return found


def add_lora(unet: UNet, rank: int) -> UNet:
    """Freeze the network, in place, and put trainable matrices of this rank beside its attentions.
    Raises ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError(f"the rank of LoRA is {rank}; use 1 or more, such as 8")
    unet.requires_grad_(False)
    for _, parent, key in attention_layers(unet):
        setattr(parent, key, LoRA(getattr(parent, key), rank))
    return unet


def lora_weights(unet: UNet) -> dict[str, Tensor]:
    """The thin matrices alone, as peft and diffusers name them."""
    layers = [(name, getattr(parent, key)) for name, parent, key in attention_layers(unet)]
    weights = {f"unet.{name}.lora_A.weight": lora.lora_A.weight for name, lora in layers}
    return weights | {f"unet.{name}.lora_B.weight": lora.lora_B.weight for name, lora in layers}


@torch.no_grad()
def merge_lora(unet: UNet) -> UNet:
    """Add B A to W, in place: the network is a plain one again, and computes the same."""
    for _, parent, key in attention_layers(unet):
        lora = getattr(parent, key)
        lora.base.weight += lora.lora_B.weight @ lora.lora_A.weight
        setattr(parent, key, lora.base)
    return unet


@torch.no_grad()
def apply_lora(unet: UNet, tensors: dict[str, Tensor]) -> UNet:
    """Add the matrices of a file to the network's own, in place. Raises ValueError listing what
    does not fit; the network is then as it was."""
    tensors, weights, changes = dict(tensors), unet.state_dict(), {}
    for name in {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}:
        A, B = (tensors.pop(f"{name}.lora_{x}.weight", None) for x in "AB")
        alpha, own = tensors.pop(f"{name}.alpha", None), f"{name.removeprefix('unet.')}.weight"
        fits = A is not None and B is not None and own in weights
        if not fits or (B.shape[0], A.shape[1]) != weights[own].shape or len(A) != B.shape[1]:
            raise ValueError(f"LoRA's {name} does not fit this network")
        scale = float(alpha) / len(A) if alpha is not None else 1.0  # of files from elsewhere
        changes[own] = scale * B.float() @ A.float()
    if tensors or not changes:
        raise ValueError(f"no file of a LoRA: it has {', '.join([*tensors][:3]) or 'nothing'}")
    for name, change in changes.items():
        weights[name] += change.to(weights[name])
    return unet


def lora_stage(rank: int, config, *given) -> Stage:
    """The video stage with LoRA: `stages.STAGES["video"] = partial(lora_stage, 8)`."""
    stage = unet_stage("video", config, *given, convert=partial(add_lora, rank=rank))
    folder = Path(config.out) / "video" / "model"

    def publish(ema: UNet) -> None:
        save_safetensors(lora_weights(ema), folder / FILE)
        stage.publish(merge_lora(ema))  # a copy, of which nobody has use afterwards

    return replace(stage, publish=publish)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="model folder")
    parser.add_argument("lora", help="file of thin matrices: ours, or of diffusers or peft")
    parser.add_argument("out", help="model folder to write")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} is there already: name another folder")
    model = PixelDance.from_folder(args.model)
    apply_lora(model.unet, load_weights(args.lora))
    model.save(args.out)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
