"""Where a training step's time goes, and what share of the machine's own speed it reaches.

    python train.py --stage benchmark
    python train.py --stage benchmark --preset paper --batch 2 --gradient_checkpointing true

Needs no weights: the networks have their preset's sizes and random values. Each part is timed by
itself, so that the parts need not add up to the whole step, which is timed too. The peak is the
best matrix product of the machine in the same precision, measured and not looked up. MFU is the
UNet's and the VAE's arithmetic of a step over the step's time, as a share of that peak.

Read after `training.py`. Not here: many machines; run it on one rank of yours. [ours]
"""

import os
import resource
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinydance.clip import LENGTH, TextTower
from tinydance.config import NETWORKS, Config
from tinydance.data.open import open_source
from tinydance.model import SD2_TEXT, PixelDance
from tinydance.schedulers import Schedule
from tinydance.toy.losses import build_vocabulary
from tinydance.training import DiffusionLoss, Machine
from tinydance.unet import UNet
from tinydance.vae import VAE, to_pixels

REPEATS = 3


def benchmark(config: Config, machine: Machine) -> str:
    """The table, for as many clips as a rank takes at once."""
    model = random_model(config).to(machine.device)
    model.unet.gradient_checkpointing = config.gradient_checkpointing
    clips = max(1, config.batch // machine.world_size)
    micro = min(config.micro_batch or clips, clips)
    size = config.height, config.width
    source = open_source(config.data, config.frames, config.fps, size, config.seed, config.rich)
    objective = DiffusionLoss(model, config).to(machine.device).train()
    optimizer = machine.optimizer(objective, config.lr, config)

    drawn = [source.clip(n) for n in range(micro)]
    pixels = to_pixels(torch.stack([clip.frames for clip in drawn])).to(machine.device)
    captions, numbers = [clip.caption for clip in drawn], list(range(micro))

    def encode() -> None:
        with machine.autocast():
            model.vae.encode_video(pixels)

    def forward() -> torch.Tensor:
        with machine.autocast():
            return step_loss(pixels, captions, numbers)

    def forward_and_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()

    step_loss = objective
    vae_flops, flops = count_flops(encode), count_flops(forward)
    passes = 4 if config.gradient_checkpointing else 3  # forward, backward twice that; once again
    flops = vae_flops + passes * (flops - vae_flops)

    step_loss = machine.distribute(objective, model.unet)
    data = seconds(lambda: [source.clip(n) for n in range(micro)], machine)
    vae, ahead = seconds(encode, machine), seconds(forward, machine)
    step = seconds(forward_and_backward, machine)
    lacking = 8 * sum(p.numel() for p in model.unet.parameters()) / 2**30 - free_memory(machine)
    adam = seconds(optimizer.step, machine) * micro / clips if lacking < 0 else 0.0

    waited = 0.0 if config.workers else data  # workers read while the network computes
    total, best = waited + step + adam, matmul_peak(machine)
    rows = [
        ("data" if waited else f"data, by one of {config.workers} workers meanwhile", data),
        ("VAE", vae),
        ("forward of the rest", ahead - vae),
        ("backward", step - ahead),
        ("Adam" if lacking < 0 else f"Adam: not measured, lacks {lacking:.1f} GiB", adam),
    ]
    lines = [
        f"preset {config.preset} on {machine.device}, {machine.dtype}: "
        f"{micro} clips of {config.frames} x {config.height} x {config.width} at once",
        "| part | seconds | share of the step |",
        "| --- | --- | --- |",
        *(f"| {name} | {time:.4f} | {time / total:.0%} |" for name, time in rows),
        f"{micro / total:.3g} clips/s, {flops / total / 1e12:.3g} TFLOP/s; the best matrix product "
        f"here has {best / 1e12:.3g}: MFU {flops / total / best:.0%}",
        f"peak memory {peak_memory(machine):.2f} GiB",
    ]
    return "\n".join(lines)


def random_model(config: Config) -> PixelDance:
    """The preset's networks without training: the toy's own, or Stable Diffusion 2.1's sizes."""
    torch.manual_seed(config.seed)
    shapes = NETWORKS.get(config.preset, {})
    text = SD2_TEXT | shapes.get("text", {})
    tokenizer = build_vocabulary([], length=text.get("max_position_embeddings", LENGTH))
    text |= {"vocab_size": len(tokenizer.vocab), "eos_token_id": tokenizer.end_id}
    return PixelDance(
        unet=UNet(**shapes.get("unet", {})),
        vae=VAE(**shapes.get("vae", {})).requires_grad_(False),
        text_tower=TextTower(**text).requires_grad_(False),
        tokenizer=tokenizer,
        schedule=Schedule(),
    )


def seconds(work: Callable[[], object], machine: Machine) -> float:
    """The shortest of some runs, after one to warm up where a run is short."""
    times = []
    for _ in range(1 + REPEATS):
        synchronize(machine)
        begun = time.perf_counter()
        work()
        synchronize(machine)
        times.append(time.perf_counter() - begun)
        if sum(times) > 60:
            break
    return min(times)


def synchronize(machine: Machine) -> None:
    """A GPU works on after a call returns."""
    if machine.device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def count_flops(work: Callable[[], object]) -> int:
    """Of one call: a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matmul_peak(machine: Machine) -> float:
    """FLOP/s of the best of some square matrix products, in the precision of training."""
    best = 0.0
    for n in (1024, 2048, 4096) if machine.device.type == "cpu" else (4096, 8192, 16384):
        a = torch.randn(n, n, device=machine.device, dtype=machine.dtype)
        best = max(best, 2 * n**3 / seconds(lambda: a @ a, machine))
    return best


def free_memory(machine: Machine) -> float:
    """GiB."""
    if machine.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def peak_memory(machine: Machine) -> float:
    """GiB, of the device, or of this process where that is a CPU."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
