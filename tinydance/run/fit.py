"""Training: the diffusion loss under PixelDance's three instructions, and the loop that lowers it.

`DiffusionLoss.forward` is section 3.2 of the paper in one straight line. `fit` is the loop, on a
laptop and under torchrun on many machines the same; what it trains is a `Stage`, and `stages.py`
has those of the real pipeline.

Read before: `unet.py`. Read after: `checkpoints.py`, `stages.py`, `train.py`.
Not here: weights sharded over devices (the optimizer's state can be).
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from tinydance.config import Config
from tinydance.data.batches import Quota
from tinydance.data.order import COUNTED
from tinydance.noise import generator
from tinydance.run.checkpoints import resume, save_checkpoint
from tinydance.run.log import Interrupted, Log, StopSignal, save_picture
from tinydance.training import Machine, Stage, backward, learning_rate, micro_batch, update_ema


def fit(stage: Stage, config: Config, machine: Machine) -> nn.Module:
    """Train a stage to its end, from the newest checkpoint if there is one; -> the EMA weights.

    A run that stopped and goes on equals a straight one: every random number is a function of
    (seed, step, sample), so a step needs no more than the weights, their averages and Adam's state.
    Raises Interrupted after SIGTERM, SIGUSR1 or Ctrl-C, saved at the current step; ValueError
    after `max_skips` steps in a row whose gradients are not finite, or where too many samples are
    bad (see `data.Quota`); OSError where the disk is full.
    """
    objective, trained, steps = stage.objective, stage.trained, stage.steps
    folder = Path(config.out) / stage.name
    objective.to(machine.device).train()
    ema = copy.deepcopy(trained).eval().requires_grad_(False)
    optimizer = machine.optimizer(objective, stage.lr, config)
    start = resume(folder / "checkpoints", config, objective, ema, optimizer)
    if start >= steps:
        return ema
    step_loss = machine.distribute(objective, trained)

    stop, skipped, quota = StopSignal(), 0, Quota(config.max_bad)
    log = Log(stage.name, folder, start, steps) if machine.rank == 0 else None
    for waited, batch in timed(stage.stream(start, steps)):
        step, dropout = batch.step, generator("dropout", config.seed, batch.step, machine.rank)
        torch.manual_seed(dropout.initial_seed())
        rate = learning_rate(step, steps, stage.lr, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # ------------------------------------------------------------------ the step
        optimizer.zero_grad(set_to_none=True)  # None, not 0: AdamW leaves what has no gradient
        loss = backward(step_loss, batch, micro_batch(stage, batch, config, machine), machine)
        norm = nn.utils.clip_grad_norm_(objective.parameters(), config.clip_grad)
        if torch.isfinite(norm):  # the same on all ranks: the gradients are
            optimizer.step()
        update_ema(ema, trained, step, config.ema)
        # ---------------------------------------------------------------------------
        skipped = 0 if math.isfinite(norm) else skipped + 1
        counts = [batch.counts[name] for name in COUNTED]
        loss, waited, stopping, *counts = machine.mean(loss, waited, float(stop.asked), *counts)
        counts = {name: round(n * machine.world_size) for name, n in zip(COUNTED, counts) if n}
        done = step + 1
        last = done == steps or stopping > 0
        if log:
            log.step(done, loss, float(norm), rate, waited, batch.frames.shape[1] == 1, counts)
        quota.add(len(batch.numbers) * machine.world_size, counts)
        if skipped == config.max_skips:
            raise ValueError(f"{skipped} steps in a row without finite gradients; "
                             f"the last, {done}, had {', '.join(batch.names)}")  # fmt: skip
        if done % config.save_every == 0 or last:
            machine.gather(optimizer)
            if machine.rank == 0:
                stage.publish(ema)  # first: a run killed meanwhile comes back to this step
                state = {
                    "step": done, "config": asdict(config), "objective": objective.state_dict(),
                    "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                }  # fmt: skip
                save_checkpoint(folder / "checkpoints", done, state)
            machine.wait()
        if done % config.sample_every == 0 or last:
            if machine.rank == 0:
                save_picture(stage.show(ema), folder / "samples" / f"step_{done:08d}.png")
            machine.wait()
        if stopping:
            break
    if log:
        log.close()
    stop.restore()
    if stopping and done < steps:
        raise Interrupted(f"stopped at step {done} of {steps} of stage {stage.name}, and saved")
    return ema


def timed(items: Iterable) -> Iterator[tuple[float, object]]:
    """Each item, with the seconds that it was waited for."""
    iterator, begun = iter(items), time.perf_counter()
    for item in iterator:
        yield time.perf_counter() - begun, item
        begun = time.perf_counter()
