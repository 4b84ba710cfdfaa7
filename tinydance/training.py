"""Training: the diffusion loss under PixelDance's three instructions, and the steps that lower it.

`DiffusionLoss.forward` is section 3.2 of the paper in one straight line. `training_steps` is the
loop, on a laptop and under torchrun on many machines the same: a generator that yields after every
step, as a sampler yields every z_t. Who iterates it decides what to log, save and draw, and when
to stop (`run/fit.py`), so that none of that stands between you and the step.

Not here: which stages there are (`run/stages.py`); weights sharded over devices.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinydance.conditioning import ask, make_conditions, noise_level, pick_instructions, sketch
from tinydance.config import Config, autocast, choose_device, choose_dtype
from tinydance.model import Batch, PixelDance
from tinydance.noise import draw, generator
from tinydance.schedulers import add_noise, target


# ------------------------------------------------------------------------------------- the loss
class DiffusionLoss(nn.Module):
    """|| eps - eps_hat(z_t, t, c_text, c_image) ||^2 of one batch of clips, or of images (f = 1).

    Every choice for a sample is a function of its number: the same in any batch, on any rank.
    fixed_t: a t for all samples, which measures and does not train; None: any, as in training.
    """

    def __init__(self, model: PixelDance, config: Config, fixed_t: int | None = None):
        super().__init__()
        self.unet = model.unet
        # `model` is a dataclass, no nn.Module: VAE and text tower stay unregistered, and neither
        # the optimizer nor DDP sees them. "The weights of pre-trained text encoder and VAE model
        # are frozen during training" [paper §4.1].
        self.model, self.config, self.fixed_t = model, config, fixed_t

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """A batch on the device -> named numbers, of which "loss" is lowered; all are logged."""
        model, config = self.model, self.config
        vae, schedule = model.vae, model.schedule
        device, f = batch.frames.device, batch.frames.shape[1]
        generators = [generator("train", config.seed, n) for n in batch.sample_ids]
        # Four uniform numbers for each sample, by name: what a sample's choices are made from.
        u = torch.stack([torch.rand(4, generator=g) for g in generators])  # b 4, in [0, 1)
        u_time, u_last, u_text, u_from_end = u.unbind(dim=1)

        # z_0 is drawn from the VAE's posterior, and not its mean, as in Stable Diffusion [SD].
        z_0 = vae.encode_frames(batch.frames, partial(draw, generators, device=device))
        c, h, w = z_0.shape[2:]

        # c_text: some captions are dropped, so that guidance has an unconditional branch.
        keep_text = (u_text >= config.text_drop).tolist()
        captions = [text if keep else "" for text, keep in zip(batch.captions, keep_text)]
        c_text = model.encode_text(captions)

        # c_image. Three techniques keep the network from copying the last frame [paper §3.2]:
        # 1. it is one of the clip's last three frames, wherever it is put;
        frames_from_end = (u_from_end * config.last_frames).long().to(device)
        f_first, f_last = pick_instructions(z_0, frames_from_end)
        if config.sketch and f > 1:  # "finetune PixelDance with image sketch" [§4.5]
            _, I_last = pick_instructions(vae.decode_frames(batch.frames), frames_from_end)
            f_last = vae.encode_video(sketch(I_last)[:, None])[:, 0]
        # 2. it is noised, by a noise of its own: "different noises" [Fig. 3];
        eps_c = draw(generators, 2, c, h, w, device=device)
        alpha_bar_c = noise_level(schedule, config.cond_noise_t)
        # 3. with probability eta it is dropped.
        keep_last = (u_last >= config.eta).to(device)
        instructions = {"first": f_first, "last": f_last} | batch.instructions
        conditions = make_conditions(instructions, f, eps_c, alpha_bar_c, keep_last)

        # The objective [DDPM algorithm 1]: any t, reached in one jump.
        t = (u_time * schedule.num_train_timesteps).long()
        t = t if self.fixed_t is None else torch.full_like(t, self.fixed_t)
        alpha_bar_t = schedule.alpha_bar[t].to(device)
        eps = draw(generators, f, c, h, w, device=device)
        z_t = add_noise(z_0, eps, alpha_bar_t)
        out = ask(self.unet, z_t, t.to(device), c_text, conditions)
        wanted = target(z_0, eps, alpha_bar_t, schedule.prediction_type)
        return {"loss": F.mse_loss(out.float(), wanted)}


# ------------------------------------------------------------------------------------ the machine
class Machine:
    """Which device this process computes on, how exactly, and as which of how many processes."""

    def __init__(self, config: Config):
        self.rank = int(os.environ.get("RANK", 0))  # torchrun sets these three
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        kind = choose_device(config.device)
        self.device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        self.dtype = choose_dtype(config.dtype, kind)
        self.compile = config.compile == "on" or (config.compile == "auto" and kind == "cuda")
        if kind == "cuda":
            torch.cuda.set_device(local_rank)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if self.world_size > 1 and not dist.is_initialized():
            longest = timedelta(minutes=config.timeout)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=longest)

    def autocast(self):
        return autocast(self.device.type, self.dtype)

    def distribute(self, objective: nn.Module, trained: nn.Module) -> nn.Module:
        """Compile the trained part; average gradients over the ranks after each backward pass."""
        if self.compile:
            # In place: names keep no prefix, and the averaged copy stays uncompiled. Not dynamic:
            # one graph for clips, one for images, which DDP would cut every 25 MB of gradients.
            torch._dynamo.config.optimize_ddp = False
            trained.compile(dynamic=False)
        if self.world_size == 1:
            return objective
        # An image step does not reach the temporal layers. Without the search for unused
        # parameters the ranks would silently drift apart; with it those gradients stay None. On
        # the first clip step torch warns once that it found none unused: harmless.
        return DistributedDataParallel(
            objective, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def mean(self, *values: float) -> list[float]:
        """The mean of each value over all ranks."""
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


# ----------------------------------------------------------------------------------------- the loop
@dataclass
class Stage:
    """What one stage trains, on what, and what it leaves."""

    name: str
    objective: nn.Module  # Batch -> {"loss": ..., and other numbers to log}
    trained: nn.Module  # the part of the objective that is kept
    steps: int
    lr: float
    stream: Callable[[int, int], Iterable[Batch]]  # (first, last) -> this rank's batches of these
    publish: Callable[[nn.Module], None]  # write the model folder from a host's copy of averages
    show: Callable[[nn.Module], object] = lambda ema: None  # a picture of what they can do
    validate: Callable[[nn.Module], dict[str, float]] = lambda ema: {}  # on held-out clips
    divisible: bool = True  # is the loss of a batch the mean of its samples' losses?


class Step(NamedTuple):
    """What one step did."""

    done: int  # steps taken, this one included
    numbers: dict[str, float]  # what the objective told, of this rank's share
    grad_norm: float  # the same on all ranks; where not finite, the weights stayed as they were
    lr: float
    batch: Batch
    waited: float  # seconds until the batch was there


class Trainee:
    """What training changes, and a checkpoint holds: weights, their averages, Adam's moments.

    Every rank has all weights. The average and the moments of a weight live on one rank, its owner,
    which steps it, sends it to the others and writes it into checkpoints [ZeRO, stage 1].
    """

    def __init__(self, stage: Stage, config: Config, machine: Machine):
        self.machine, self.trained = machine, stage.trained
        self.objective = stage.objective.to(machine.device).train()
        self.weights = {k: p for k, p in self.objective.named_parameters() if p.requires_grad}
        # In the order of their sizes, in turns: so every rank owns nearly as much.
        ordered = sorted(self.weights, key=lambda name: self.weights[name].numel())
        self.owners = {name: k % machine.world_size for k, name in enumerate(ordered)}
        self.own = {k: p for k, p in self.weights.items() if self.owners[k] == machine.rank}
        self.ema = {name: p.detach().clone() for name, p in self.own.items()}
        settings = {"lr": stage.lr, "weight_decay": config.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW([*self.own.values()], **settings)

    @torch.no_grad()
    def step(self, step: int, decay: float) -> None:
        """One step of AdamW by the gradients, which are the same on all ranks."""
        self.optimizer.step()
        for rank in range(self.machine.world_size) if self.machine.world_size > 1 else ():
            part = [p for name, p in self.weights.items() if self.owners[name] == rank]
            flat = torch.cat([p.flatten() for p in part])
            dist.broadcast(flat, rank)
            for p, x in zip(part, flat.split([p.numel() for p in part])):
                p.copy_(x.view_as(p))
        update_ema([*self.ema.values()], [*self.own.values()], step, decay)


def training_steps(
    stage: Stage, config: Config, machine: Machine, trainee: Trainee, start: int = 0
) -> Iterator[Step]:
    """Take the steps from `start` to the stage's end; yield after each.

    A run that stopped and goes on equals a straight one: every random number is a function of
    (seed, step, sample), so a step needs no more than what `trainee` holds.
    """
    objective = trainee.objective
    step_loss = machine.distribute(objective, stage.trained)
    begun = time.perf_counter()
    for batch in stage.stream(start, stage.steps):
        waited = time.perf_counter() - begun
        # Dropout alone draws from torch's own generator: seeded at each step, it needs no saving.
        dropout = generator("dropout", config.seed, batch.step, machine.rank)
        torch.manual_seed(dropout.initial_seed())
        lr = learning_rate(batch.step, stage.steps, stage.lr, config)
        for group in trainee.optimizer.param_groups:
            group["lr"] = lr
        # -------------------------------------------------------------------- the step
        objective.zero_grad(set_to_none=True)  # None, not 0: AdamW leaves what has no gradient
        size = micro_batch(stage, batch, config, machine)
        totals = backward(step_loss, batch, size, machine)
        totals["norm"] = nn.utils.clip_grad_norm_(objective.parameters(), config.clip_grad)
        *told, norm = torch.stack([*totals.values()]).tolist()  # the one time we wait for a GPU
        if math.isfinite(norm):  # the same on all ranks, because their gradients are
            trainee.step(batch.step, config.ema)
        # ------------------------------------------------------------------------------
        yield Step(batch.step + 1, dict(zip(totals, told)), norm, lr, batch, waited)
        begun = time.perf_counter()


def backward(step_loss: nn.Module, batch: Batch, size: int, machine: Machine) -> dict[str, Tensor]:
    """Leave the gradients of this rank's mean loss, `size` samples at a time; -> its numbers.

    A part counts by its share of the batch, so that gradients add up to those of one pass.
    """
    count, totals = len(batch.captions), {}
    for i in range(0, count, size):
        part = batch.part(slice(i, i + size), machine.device)
        share, is_last = len(part.captions) / count, i + size >= count
        # Gradients are exchanged once per step, in the backward pass of the last part.
        alone = machine.world_size > 1 and not is_last
        with step_loss.no_sync() if alone else contextlib.nullcontext():
            with machine.autocast():
                numbers = step_loss(part)
            (numbers["loss"] * share).backward()
        for name, number in numbers.items():
            totals[name] = totals.get(name, 0) + number.detach().float() * share
    return totals


def micro_batch(stage: Stage, batch: Batch, config: Config, machine: Machine) -> int:
    """How many of this rank's samples go through the network at once; of images, more."""
    count = len(batch.captions)
    if config.micro_batch == 0 or not stage.divisible:
        return count
    return max(1, count * config.micro_batch * machine.world_size // config.batch)


def learning_rate(step: int, steps: int, peak: float, config: Config) -> float:
    """Linear warmup, then constant or half a cosine. A function of the step: nothing to save."""
    rate = peak * min(1.0, (step + 1) / (config.warmup + 1))
    if config.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate


def update_ema(ema: list[Tensor], weights: list[Tensor], step: int, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weights, in float32.

    A decay of 0.9999 remembers some 10,000 steps, longer than a toy run. So the decay grows from
    0.1 on, and the random first weights are forgotten. [TensorFlow's ExponentialMovingAverage]
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(ema, weights, 1 - decay)
