"""Where a training step's time goes, and what share of the machine's own speed it reaches.

    python train.py --stage benchmark
    python train.py --stage benchmark --preset paper --batch 2 --gradient_checkpointing true

Needs no weights: the networks have the run's sizes and random values. Each part is timed by itself
and the whole step too, so the parts need not add up to it. The peak is the best matrix product of
the machine in the same precision, measured and not looked up. MFU is the UNet's and the VAE's
arithmetic of a step over the step's time, as a share of that peak. [ours]

Not here: many machines; run it on one rank of yours.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinydance.clip import TextTower
from tinydance.config import NETWORKS, Config
from tinydance.data.batches import batches
from tinydance.data.open import open_source
from tinydance.model import SD2_TEXT, Batch, PixelDance
from tinydance.schedulers import Schedule
from tinydance.toy.losses import build_vocabulary
from tinydance.training import DiffusionLoss, Machine, make_optimizer
from tinydance.unet import UNet, UNetConfig
from tinydance.vae import VAE, VAEConfig

REPEATS = 3
GIB = 2**30


def benchmark(config: Config, machine: Machine) -> None:
    """Print the table, for as many clips as a rank takes at once."""
    model = make_random_model(config).to(machine.device)
    model.unet.set_gradient_checkpointing(config.gradient_checkpointing)
    clips = max(1, config.batch // machine.world_size)
    micro = min(config.micro_batch or clips, clips)
    source, objective = open_source(config), DiffusionLoss(model, config).train()
    optimizer = make_optimizer(objective, config.lr, config, machine)

    def read() -> Batch:
        return next(batches(source, 0, 1, micro))

    def encode() -> None:
        with machine.autocast():
            model.vae.encode_frames(
                batch.frames, partial(torch.zeros, micro, device=machine.device)
            )

    def forward() -> torch.Tensor:
        with machine.autocast():
            return step_loss(batch)["loss"]

    def forward_and_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()

    batch, step_loss = read().part(slice(None), machine.device), objective
    vae_flops, flops = count_flops(encode), count_flops(forward)
    # Backward takes twice the arithmetic of forward; with checkpoints, forward is computed again.
    passes = 4 if config.gradient_checkpointing else 3
    flops = vae_flops + passes * (flops - vae_flops)

    step_loss = machine.distribute(objective, model.unet)
    data, vae, ahead = measure(read, machine), measure(encode, machine), measure(forward, machine)
    step = measure(forward_and_backward, machine)
    # Adam's two moments come into being at its first step: 8 bytes a parameter.
    missing = 8 * sum(p.numel() for p in model.unet.parameters()) / GIB - free_memory(machine)
    adam = measure(optimizer.step, machine) * micro / clips if missing < 0 else 0.0

    waited = 0.0 if config.workers else data  # workers read while the network computes
    total, peak = waited + step + adam, measure_matmul(machine)
    rows = {
        "data" if waited else f"data, by one of {config.workers} workers meanwhile": data,
        "VAE": vae,
        "forward of the rest": ahead - vae,
        "backward": step - ahead,
        "Adam" if missing < 0 else f"Adam: not measured, lacks {missing:.1f} GiB": adam,
    }
    lines = [
        f"preset {config.preset} on {machine.device}, {machine.dtype}: "
        f"{micro} clips of {config.frames} x {config.height} x {config.width} at once",
        "| part | seconds | share of the step |",
        "| --- | --- | --- |",
        *(f"| {name} | {time:.4f} | {time / total:.0%} |" for name, time in rows.items()),
        f"{micro / total:.3g} clips/s, {flops / total / 1e12:.3g} TFLOP/s; the best matrix "
        f"product here has {peak / 1e12:.3g}: MFU {flops / total / peak:.0%}",
        f"peak memory {peak_memory(machine):.2f} GiB",
    ]
    print("\n".join(lines), flush=True)


def make_random_model(config: Config) -> PixelDance:
    """The run's networks without training, in the sizes of `--unet`; "init" has SD 2.1's."""
    torch.manual_seed(config.seed)
    shapes = NETWORKS[config.unet]
    text = shapes.get("text", SD2_TEXT)
    tokenizer = build_vocabulary([], length=text.max_position_embeddings)
    text = replace(text, vocab_size=len(tokenizer.vocab), eos_token_id=tokenizer.end_id)
    unet, vae = UNet(shapes.get("unet", UNetConfig())), VAE(shapes.get("vae", VAEConfig()))
    vae, tower = vae.requires_grad_(False), TextTower(text).requires_grad_(False)
    return PixelDance(unet, vae, tower, tokenizer, Schedule())


def describe_memory(model: PixelDance) -> str:
    """How large the parts are, and the memory that training takes before any activation."""
    count = sum(p.numel() for p in model.unet.parameters())
    trained = sum(p.numel() for p in model.unet.parameters() if p.requires_grad)
    frozen = sum(p.numel() for part in (model.vae, model.text_tower) for p in part.parameters())
    # float32: the weights and their averages, and for what is trained gradients and two moments
    size = (4 * (2 * count + frozen) + 12 * trained) / GIB
    return (
        f"a UNet of {count:,} parameters, {trained:,} of them trained; {frozen:,} frozen in "
        f"VAE and text tower; {size:.1f} GiB for all that, without activations"
    )


def measure(work: Callable[[], object], machine: Machine) -> float:
    """Seconds of the shortest of some runs, after one to warm up where a run is short."""
    # A GPU still computes after a call returns.
    finish = torch.cuda.synchronize if machine.device.type == "cuda" else lambda: None
    times = []
    for _ in range(1 + REPEATS):
        finish()
        begun = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - begun)
        if sum(times) > 60:
            break
    return min(times)


@torch.no_grad()
def count_flops(work: Callable[[], object]) -> int:
    """The arithmetic of one call: a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure_matmul(machine: Machine) -> float:
    """FLOP/s of the best of some square matrix products, in the precision of training."""
    best = 0.0
    for n in (1024, 2048, 4096) if machine.device.type == "cpu" else (4096, 8192, 16384):
        a = torch.randn(n, n, device=machine.device, dtype=machine.dtype)
        best = max(best, 2 * n**3 / measure(lambda: a @ a, machine))
    return best


def free_memory(machine: Machine) -> float:
    """GiB."""
    if machine.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / GIB
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


def peak_memory(machine: Machine) -> float:
    """GiB, of the device, or of this process where that is a CPU."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # it counts in KiB
