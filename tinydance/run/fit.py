"""One training around `training.training_steps`: resume, log, save, publish, draw, stop.

The steps come from a generator of the core; this loop does everything else with them. [ours]
Not here: the step itself.
"""

import math
from dataclasses import asdict
from pathlib import Path

from torch import nn

from tinydance.config import Config
from tinydance.data.batches import Quota
from tinydance.data.order import COUNTED
from tinydance.run.checkpoints import resume, save_checkpoint
from tinydance.run.log import Interrupted, Log, StopSignal, save_picture
from tinydance.training import Machine, Stage, Step, Trainee, training_steps


def fit(stage: Stage, config: Config, machine: Machine) -> nn.Module:
    """Train a stage to its end, from the newest checkpoint if there is one; -> the EMA weights.

    Raises Interrupted after SIGTERM, SIGUSR1 or Ctrl-C, saved at the current step; ValueError
    after `max_skips` steps in a row whose gradients are not finite, or where too many samples are
    bad (see `data.batches.Quota`); OSError where the disk is full.
    """
    folder, is_first = Path(config.out) / stage.name, machine.rank == 0
    trainee = Trainee(stage, config, machine)
    start = resume(folder / "checkpoints", config, trainee)
    if start >= stage.steps:
        return trainee.ema
    skipped, quota = 0, Quota(config.max_bad)
    log = Log(stage, folder, start) if is_first else None
    with StopSignal() as stop:
        for step in training_steps(stage, config, machine, trainee, start):
            numbers, waited, stopping, counts = average(step, stop.asked, machine)
            if log:
                log.write(step, numbers, waited, counts)
            quota.add(len(step.batch.sample_ids) * machine.world_size, counts)
            skipped = 0 if math.isfinite(step.grad_norm) else skipped + 1
            if skipped == config.max_skips:
                raise ValueError(
                    f"{skipped} steps in a row without finite gradients; "
                    f"the last, {step.done}, had {', '.join(step.batch.names)}"
                )
            is_last = step.done == stage.steps or stopping
            if step.done % config.save_every == 0 or is_last:
                trainee.gather()
                if is_first:
                    # The model folder before the checkpoint: if the run is killed between the two,
                    # it resumes before this step and writes both again.
                    stage.publish(trainee.ema)
                    head = {"step": step.done, "config": asdict(config)}
                    save_checkpoint(folder / "checkpoints", step.done, head | trainee.state())
                machine.wait()
            if step.done % config.sample_every == 0 or is_last:
                if is_first:
                    picture = stage.show(trainee.ema)
                    save_picture(picture, folder / "samples" / f"step_{step.done:08d}.png")
                machine.wait()
            if stopping:
                break
    if log:
        log.close()
    if stopping and step.done < stage.steps:
        where = f"step {step.done} of {stage.steps} of stage {stage.name}"
        raise Interrupted(f"stopped at {where}, and saved")
    return trainee.ema


def average(step: Step, asked: bool, machine: Machine) -> tuple[dict, float, bool, dict]:
    """-> over all ranks, by one exchange: the objective's numbers, the seconds waited for data,
    whether to stop, and how many samples were bad, padded or without caption."""
    names = sorted(step.numbers)  # the same order on all ranks
    values = [step.numbers[name] for name in names] + [step.batch.counts[name] for name in COUNTED]
    # A signal may reach one rank only. The mean of the flags is then above 0 on all ranks: so all
    # of them stop, and after the same step.
    stop, waited, *means = machine.mean(float(asked), step.waited, *values)
    numbers, counts = dict(zip(names, means)), zip(COUNTED, means[len(names) :])
    counts = {name: round(mean * machine.world_size) for name, mean in counts if mean}
    return {name: numbers[name] for name in step.numbers}, waited, stop > 0, counts
