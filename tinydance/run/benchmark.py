"""Where a training step's time goes, and what share of the machine's own speed it reaches.

The networks have the run's sizes and random weights. MFU is the UNet's and the VAE's arithmetic
over the step's time, as a share of the machine's best matrix product in the same precision. [ours]
Not here: many machines (run it on one rank of yours); Adam and the averages, which take little.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from tinydance.clip import TextTower
from tinydance.config import NETWORKS, Config
from tinydance.data import batches
from tinydance.data.open import Source
from tinydance.model import SD2_TEXT, PixelDance
from tinydance.schedulers import Schedule
from tinydance.toy.losses import build_vocabulary
from tinydance.training import DiffusionLoss, Machine
from tinydance.unet import UNet, UNetConfig
from tinydance.vae import VAE, VAEConfig

GIB = 2**30


def benchmark(config: Config, machine: Machine, source: Source) -> None:
    """Print the table, for as many clips as a rank takes at once."""
    model = make_random_model(config).to(machine.device)
    model.unet.set_gradient_checkpointing(config.gradient_checkpointing)
    clips = max(1, config.batch // machine.world_size)
    micro = min(config.micro_batch or clips, clips)
    objective = DiffusionLoss(model, config).train()
    stream = batches(source, 0, 9, micro)
    batch = next(stream).part(slice(None), machine.device)
    zeros = partial(torch.zeros, micro, device=machine.device)

    def encode() -> None:
        with machine.autocast():
            model.vae.encode_frames(batch.frames, zeros)

    def forward() -> torch.Tensor:
        objective.zero_grad()
        with machine.autocast():
            return objective(batch)["loss"]

    vae_flops, flops = count_flops(encode), count_flops(forward)
    # Backward takes twice the arithmetic of forward; with checkpoints, forward is computed again.
    flops = vae_flops + (4 if config.gradient_checkpointing else 3) * (flops - vae_flops)
    objective = machine.distribute(objective, model.unet)
    data, vae = measure(partial(next, stream)), measure(encode)
    ahead, step = measure(forward), measure(lambda: forward().backward())
    total = step if config.workers else data + step
    speed, peak = flops / total / 1e12, measure_matmul(machine) / 1e12

    size = f"{micro} clips of {config.frames} x {config.height} x {config.width}"
    print(f"preset {config.preset} on {machine.device}, {machine.dtype}: {size} at once")
    print("| part | seconds | share of the step |\n| --- | --- | --- |")
    parts = {"data": data, "VAE": vae, "forward of the rest": ahead - vae, "backward": step - ahead}
    for name, seconds in parts.items():
        print(f"| {name} | {seconds:.4f} | {seconds / total:.0%} |")
    if config.workers:
        print(f"data is the time of one of {config.workers} workers, who read meanwhile")
    print(f"{micro / total:.3g} clips/s, {speed:.3g} TFLOP/s; the best matrix product here has")
    if machine.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / GIB
    else:
        import resource  # Windows has none

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB
    print(f"{peak:.3g}: MFU {speed / peak:.0%}; peak memory {memory:.2f} GiB")


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


def measure(work: Callable[[], object]) -> float:
    """Seconds of the shortest of three runs, after one to warm up; of fewer where they are long."""
    times = []
    while len(times) < 4 and sum(times) <= 60:
        begun = timer()  # it waits for the GPU, which still computes after a call returns
        work()
        times.append(timer() - begun)
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
        best = max(best, 2 * n**3 / measure(lambda: a @ a))
    return best
