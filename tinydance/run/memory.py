"""Does a training fit? Its memory, calculated before anything runs. [ours]

On the meta device tensors have shapes and no numbers: the largest network passes in seconds. What
autograd keeps for the backward pass is counted as it is kept. CUDA's autocast, which knows no meta
tensors, is imitated: these operations in half precision, those in float32.
Not here: what was measured (`benchmark.py`).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinydance.conditioning import ask
from tinydance.config import Config
from tinydance.model import PixelDance
from tinydance.training import Machine
from tinydance.unet import UNet, UNetConfig

GIB = 2**30
SPARE = 2 * GIB  # CUDA itself, its libraries' workspaces, gradients of activations, gaps
HALVED = {F.linear, F.conv2d, F.conv3d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
FULL = {F.group_norm, F.layer_norm}


class FusedAttention(torch.autograd.Function):
    """What the fused kernel keeps: its inputs, its output and a number a row."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class Autocast(TorchFunctionMode):
    """What autocast does on CUDA; the weights' copies are made once, and counted apart."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.copies = dtype, {}

    def cast(self, x, dtype: torch.dtype):
        if not isinstance(x, Tensor) or x.dtype == dtype or not x.is_floating_point():
            return x
        if isinstance(x, nn.Parameter):
            return self.copies.setdefault(id(x), x.to(dtype))
        return x.to(dtype)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, is_fused = kwargs or {}, func is F.scaled_dot_product_attention
        if is_fused or func in HALVED | FULL:
            dtype = torch.float32 if func in FULL else self.dtype
            args = tuple(self.cast(x, dtype) for x in args)
            kwargs = {name: self.cast(x, dtype) for name, x in kwargs.items()}
        return FusedAttention.apply(*args) if is_fused else func(*args, **kwargs)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps inside the block, each storage once."""

    def __init__(self):
        self.storages = {}
        super().__init__(self.keep, lambda x: x)

    def __enter__(self):
        super().__enter__()
        return self

    def keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()  # held, so that its address is no other's later
        self.storages[storage._cdata] = storage
        return x

    def bytes(self, but=()) -> int:
        left_out = {x.untyped_storage()._cdata for x in but}
        return sum(s.nbytes() for key, s in self.storages.items() if key not in left_out)


def count_activations(config: UNetConfig, shape, text, dtype: torch.dtype, again: bool):
    """-> bytes that one pass keeps for its backward; and bytes of the weights' copies in `dtype`.
    shape: of clips (b, f, h, w); text: of c_text. again: with gradient checkpointing, where the
    largest layer is kept as well, when its turn comes to be computed again."""
    n, f, *size = shape
    with torch.device("meta"):
        unet = UNet(config).train()
        z_t, t = torch.empty(n, f, config.out_channels, *size), torch.zeros(n, dtype=torch.int64)
        c_image = torch.empty(n, f, config.in_channels - config.out_channels, *size)
        c_text = torch.empty(text)
    unet.set_gradient_checkpointing(again)
    layers, weights = [], list(unet.parameters())

    def run_layer(run, *args):
        with Kept() as kept:
            layers.append(kept)
            return run(*args)

    for block in unet.modules():
        if again and hasattr(block, "run_layer"):
            block.run_layer = partial(run_layer, block.run_layer)
    with Kept() as kept, Autocast(dtype) as cast:
        ask(unet, z_t, t, c_text, {"c_image": c_image})
    weights += cast.copies.values()
    largest = max((layer.bytes(weights) for layer in layers), default=0)
    return kept.bytes(weights) + largest, sum(x.nbytes for x in cast.copies.values())


def describe_memory(model: PixelDance, config: Config, machine: Machine) -> str:
    """A line on what the training of `model.unet` takes on this rank. Raises ValueError where a GPU
    has less than that, naming the flags that help."""
    count = sum(p.numel() for p in model.unet.parameters())
    trained = sum(p.numel() for p in model.unet.parameters() if p.requires_grad)
    frozen = sum(p.numel() for part in (model.vae, model.text_tower) for p in part.parameters())
    # float32: weights; of what is trained gradients, and a share of averages and both moments
    later = 4 * trained + 12 * trained // machine.world_size
    total = 4 * (count + frozen) + later
    line = f"a UNet of {count:,} parameters, {trained:,} of them trained; {frozen:,} frozen in "
    line += f"VAE and text tower; {total / GIB:.1f} GiB for all that, without activations"
    if machine.device.type != "cuda":
        return line
    frames, micro = model.settings.frames, config.micro_batch * machine.world_size
    kind, batch = ("clip", config.batch) if frames > 1 else ("image", config.image_batch)
    most = min(batch, batch * micro // config.batch or batch) // machine.world_size or 1
    size, tower = model.latent_size(config.height, config.width), model.text_tower.config
    text, again = (tower.max_position_embeddings, tower.hidden_size), config.gradient_checkpointing

    def kept(n: int) -> tuple[int, int]:
        shape = n, frames, *size
        return count_activations(model.unet.config, shape, (n, *text), machine.dtype, again)

    (one, copies), (two, _) = kept(1), kept(2)
    later, each, free = later + copies + SPARE, two - one, torch.cuda.mem_get_info()[0]
    line += f"; {each / GIB:.2f} for the activations of each {kind} at once, of which there are "
    more = later + most * each
    line += f"{most}: {more / GIB:.0f} GiB more than the weights, {free / GIB:.0f} free"
    if more > free:
        fit = int((free - later) // each * config.batch // batch)  # in clips
        helps = {f"--micro_batch {fit}": fit > 0, "--gradient_checkpointing true": not again}
        cure = " or ".join(flag for flag, does in helps.items() if does)
        needs = f"needs {more / GIB:.0f} GiB more, for {most} {kind}s at once"
        has = f"the GPU has {free / GIB:.0f} free: try {cure or 'a smaller clip or network'}"
        raise ValueError(f"training {needs}, and {has}")
    return line
