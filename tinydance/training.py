"""Training: the diffusion loss under PixelDance's three instructions, and the loop that lowers it.

`DiffusionLoss.forward` is section 3.2 of the paper in one straight line. `fit` is the loop, on a
laptop and under torchrun on many machines the same; what it trains is a `Stage`, and `stages.py`
has those of the real pipeline.

Read before: `unet.py`. Read after: `checkpoints.py`, `stages.py`, `train.py`.
Not here: weights sharded over devices (the optimizer's state can be).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinydance.conditioning import LAST_FRAMES, instructions_of, make_c_image, sketch
from tinydance.config import Config, autocast, choose_device, choose_dtype
from tinydance.model import PixelDance
from tinydance.noise import draw, generator
from tinydance.schedulers import add_noise, target
from tinydance.vae import draw_latents, to_pixels


class Clip(NamedTuple):
    frames: torch.Tensor  # uint8 (f, 3, H, W); from a cache, latents float16 (f, 8, h, w)
    caption: str
    name: str             # where it comes from
    counts: Counter = Counter()  # of COUNTED: what happened on the way to it


# --------------------------------------------------------------------------------------------------
# Batches

class Batch(NamedTuple):
    step: int
    frames: torch.Tensor  # uint8 (b, f, 3, H, W); from a cache, latents float16 (b, f, 8, h, w)
    captions: list[str]
    numbers: list[int]    # the samples' numbers
    names: list[str]      # where they come from
    counts: Counter = Counter()  # of COUNTED, over the samples


# ------------------------------------------------------------------------------------- the loss
class DiffusionLoss(nn.Module):
    """The mean square error of the UNet's answer for one batch of clips, or of images (f = 1)."""

    def __init__(self, model: PixelDance, config: Config):
        super().__init__()
        self.unet = model.unet
        self.model, self.config = model, config  # a dataclass: the frozen parts stay unregistered
        self.alpha_bar = model.schedule.alpha_bar

    def forward(self, pixels: Tensor, captions: list[str], numbers: list[int]) -> Tensor:
        """pixels (b, f, 3, H, W), or moments (b, f, 8, h, w) from a cache of latents; numbers: the
        samples', from which all their randomness comes."""
        f, device, config = pixels.shape[1], pixels.device, self.config
        c = self.model.vae.config["latent_channels"]
        cached = pixels.shape[2] == 2 * c
        h, w = pixels.shape[-2:] if cached else self.model.latent_size(*pixels.shape[-2:])
        generators = [generator("train", config.seed, n) for n in numbers]
        u = torch.stack([torch.rand(4, generator=g) for g in generators])  # b 4, uniform
        t = (u[:, 0] * config.num_train_timesteps).long()
        keep_last = u[:, 1] >= config.eta
        keep_text = u[:, 2] >= config.text_drop
        back = (u[:, 3] * LAST_FRAMES).long()

        # The borrowed organs are frozen: "the weights of pre-trained text encoder and VAE model
        # are frozen during training" [paper §4.1].
        encode = draw_latents if cached else self.model.vae.encode_video
        z_0 = encode(pixels, draw(generators, f, c, h, w, device=device))
        texts = [caption if keep else "" for caption, keep in zip(captions, keep_text.tolist())]
        c_text = self.model.encode_text(texts)

        f_first, f_last = instructions_of(z_0, back.to(device))
        if config.sketch and f > 1:  # "finetune PixelDance with image sketch" [§4.5]
            _, I_last = instructions_of(pixels, back.to(device))
            f_last = self.model.vae.encode_video(sketch(I_last)[:, None])[:, 0]
        eps_c = draw(generators, 2, c, h, w, device=device)  # "different noises" [paper Fig. 3]
        alpha_bar_c = float(self.alpha_bar[config.cond_noise_t]) if config.cond_noise_t else 1.0
        c_image = make_c_image(f_first, f_last, f, eps_c, alpha_bar_c, keep_last.to(device))

        eps = draw(generators, f, c, h, w, device=device)
        alpha_bar_t = self.alpha_bar[t].to(device)
        z_t = add_noise(z_0, eps, alpha_bar_t)
        out = self.unet(torch.cat([z_t, c_image], dim=2), t.to(device), c_text)
        return F.mse_loss(out.float(), target(z_0, eps, alpha_bar_t, config.prediction_type))


# ------------------------------------------------------------------------------------ the machine
class Machine:
    """Which device this process computes on, how exactly, and as which of how many processes."""

    def __init__(self, config: Config):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        kind = choose_device(config.device)
        if kind == "cuda":
            torch.cuda.set_device(local_rank)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        self.dtype = choose_dtype(config.dtype, kind)
        self.compile = config.compile == "on" or (config.compile == "auto" and kind == "cuda")
        self.compile = self.compile and compiler_works(self.device)
        if self.world_size > 1 and not dist.is_initialized():
            longest = timedelta(minutes=config.timeout)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=longest)

    def autocast(self):
        return autocast(self.device.type, self.dtype)

    # --- scale: the same step, compiled, on many devices
    def optimizer(self, objective: nn.Module, lr: float, config: Config) -> torch.optim.Optimizer:
        """AdamW; with --zero, its two moments of a weight live on one rank only [ZeRO, stage 1]."""
        trained = [p for p in objective.parameters() if p.requires_grad]
        settings = {"lr": lr, "weight_decay": config.weight_decay, "fused": True}
        if config.zero and self.world_size > 1:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

            return ZeroRedundancyOptimizer(trained, torch.optim.AdamW, **settings)
        return torch.optim.AdamW(trained, **settings)

    def gather(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring sharded moments to rank 0, which saves."""
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict(to=0)

    def distribute(self, objective: nn.Module, trained: nn.Module) -> nn.Module:
        """Compile the trained part, and average gradients over the ranks after each backward."""
        if self.compile:
            # In place: names keep no prefix, and the averaged copy stays uncompiled. Not dynamic:
            # one graph for clips, one for images.
            trained.compile(dynamic=False)
        if self.world_size == 1:
            return objective
        # An image step does not reach the temporal layers: without the search for unused
        # parameters the ranks would part in silence; with it those gradients stay None. On the
        # first clip step torch warns once that it found none: harmless.
        return DistributedDataParallel(
            objective, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def mean(self, *values: float) -> list[float]:
        """The mean over all ranks of each value."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.world_size).tolist()

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def compiler_works(device: torch.device) -> bool:
    """Try torch.compile on a sum; where it cannot, one line says so."""
    try:
        torch.compile(lambda x: x + x)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines()[0]
        print(f"note: torch.compile does not work here ({reason}): going on without", flush=True)
        return False
    return True


# ----------------------------------------------------------------------------------------- the loop
def learning_rate(step: int, steps: int, peak: float, config: Config) -> float:
    """A function of the step: nothing to save."""
    rate = peak * min(1.0, (step + 1) / (config.warmup + 1))
    if config.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weights, in float32; the first steps weigh more."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)


@dataclass
class Stage:
    """What one stage trains, on what, and what it leaves."""

    name: str
    objective: nn.Module  # (pixels, captions, numbers) -> loss
    trained: nn.Module  # the part of it that is kept
    steps: int
    lr: float
    stream: Callable[[int, int], Iterable[Batch]]  # (first, last) -> this rank's batches of these
    publish: Callable[[nn.Module], None]  # write the model folder from the averaged weights
    show: Callable[[nn.Module], object] = lambda ema: None  # a picture of what they can do
    divisible: bool = True  # is the loss of a batch the mean of its samples' losses?


def backward(step_loss: nn.Module, batch: Batch, micro: int, machine: Machine) -> float:
    """Leave the gradients of this rank's mean loss, `micro` samples at a time; -> that loss.

    Gradients add up, so that many small passes equal a large one; only the last speaks to the
    other ranks.
    """
    count, total = len(batch.captions), 0.0
    for i in range(0, count, micro):
        part, more = slice(i, i + micro), i + micro < count
        pixels = batch.frames[part].to(machine.device, non_blocking=True)
        pixels = to_pixels(pixels) if pixels.dtype == torch.uint8 else pixels.float()  # or moments
        alone = step_loss.no_sync() if more and machine.world_size > 1 else contextlib.nullcontext()
        with alone:
            with machine.autocast():
                loss = step_loss(pixels, batch.captions[part], batch.numbers[part])
            share = loss * (len(pixels) / count)
            share.backward()
        total += share.item()
    return total


def micro_batch(stage: Stage, batch: Batch, config: Config, machine: Machine) -> int:
    """How many of this rank's samples go through the network at once; of images, more."""
    count = len(batch.captions)
    if config.micro_batch == 0 or not stage.divisible:
        return count
    return max(1, count * config.micro_batch * machine.world_size // config.batch)
