"""One training around `training.training_steps`: resume, log, validate, save, publish, draw, stop.

What an objective tells is logged as it is told: a new number in the log is a change of the
objective alone. [ours] Not here: the step itself.
"""

import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from tinydance.config import Config
from tinydance.data.batches import Quota
from tinydance.data.order import COUNTED, format_counts
from tinydance.run.checkpoints import Writer, average_weights, resume
from tinydance.run.cli import Progress
from tinydance.training import Machine, Stage, Step, Trainee, training_steps
from tinydance.weights.files import whole_file

EARLY = (50, 100, 250)  # steps with pictures too: whether anything is learnt is seen soon


def fit(stage: Stage, config: Config, machine: Machine, signals=()) -> nn.Module:
    """Train a stage to its end, from the newest checkpoint if there is one; -> the EMA weights.
    Raises InterruptedError where `signals` has one, saved; ValueError after `max_skips` steps in a
    row without finite gradients, or for too many bad samples; OSError where the disk is full."""
    folder, is_first = Path(config.out) / stage.name, machine.rank == 0
    trainee, saved = Trainee(stage, config, machine), folder / "checkpoints"
    start, skipped, quota = resume(saved, config, trainee), 0, Quota(config.max_bad)
    writer = Writer(saved, config, machine, stage.publish)
    for left in folder.rglob("*.[0-9]*.part") if is_first else ():
        left.unlink()  # a killed run left it
    if start >= stage.steps:
        return average_weights(trainee)
    log = Log(stage, folder, start) if is_first else None
    tell(machine, f"pictures will be in {folder / 'samples'}, the model in {folder / 'model'}")
    # An error here ends the steps too: as long as they wait, data workers would keep the process.
    with closing(training_steps(stage, config, machine, trainee, start)) as steps:
        for step in steps:
            if step.done % config.sample_every == 0 or step.done == stage.steps:
                step.numbers.update(stage.validate(average_weights(trainee)))
            step, stopping, counts = average(step, bool(signals), machine)
            if log:
                log.write(step, counts)
            quota.add(len(step.batch.sample_ids) * machine.world_size, counts)
            skipped = 0 if math.isfinite(step.grad_norm) else skipped + 1
            if skipped == config.max_skips:
                last = f"the last, {step.done}, had {', '.join(step.batch.names)}"
                raise ValueError(f"{skipped} steps in a row without finite gradients; {last}")
            is_last = step.done == stage.steps or stopping
            if step.done % config.save_every == 0 or is_last:
                writer.save(step.done, trainee)
            if step.done % config.sample_every == 0 or step.done in EARLY or is_last:
                ema = average_weights(trainee)
                if is_first and (picture := stage.show(ema)):
                    save_picture(picture, folder / "samples" / f"step_{step.done:08d}.png")
                machine.wait()
            if stopping:
                break
    writer.finish()
    if log:
        log.bar.close()
    if step.done < stage.steps:
        where = f"step {step.done} of {stage.steps} of stage {stage.name}"
        raise InterruptedError(f"stopped at {where}, and saved")
    return average_weights(trainee)


def average(step: Step, stop: bool, machine: Machine) -> tuple[Step, bool, dict[str, int]]:
    """-> of all ranks, by one exchange: the step's means, whether to stop, counts of samples."""
    values = [*step.numbers.values(), *(step.batch.counts.get(name, 0) for name in COUNTED)]
    # A signal may reach one rank only. The mean of the flags is then above 0 on all ranks: so all
    # of them stop, and after the same step.
    share, waited, *means = machine.mean(float(stop), step.waited, *values)
    numbers, counts = dict(zip(step.numbers, means)), zip(COUNTED, means[len(step.numbers) :])
    counts = {name: round(mean * machine.world_size) for name, mean in counts if mean}
    return step._replace(numbers=numbers, waited=waited), share > 0, counts


class Log:
    """log.jsonl in `folder`, and the progress. Rank 0 has one."""

    def __init__(self, stage: Stage, folder: Path, start: int):
        self.path = folder / "log.jsonl"
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        # Steps after the checkpoint will be taken, and logged, again.
        with whole_file(self.path) as file:
            for line in lines:
                with suppress(ValueError, TypeError, KeyError):  # a crash has cut it
                    file.write(line + b"\n" if json.loads(line)["step"] <= start else b"")
        self.begun, self.waited = time.time(), 0.0
        self.bar = Progress(stage.name, stage.steps, "step", start, leave=True, file=sys.stdout)
        self.smooth: dict[str, float] = {}  # the numbers, averaged over some 50 steps
        self.counts = Counter()  # of skipped steps, and of samples

    def write(self, step: Step, counts: dict[str, int]) -> None:
        seconds, is_skipped = time.time() - self.begun, not math.isfinite(step.grad_norm)
        kind = "image" if step.batch.frames.shape[1] == 1 else "clip"
        numbers = step.numbers | {"grad_norm": step.grad_norm}  # JSON has no NaN
        numbers = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        line = {"step": step.done, **numbers, "lr": step.lr, "kind": kind, "seconds": seconds}
        line |= {"waited": step.waited, "skipped": is_skipped}
        line |= {"counts": counts} if counts else {}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in step.numbers.items():
            # The validation loss is rare, and always of the same clips and noise: not averaged.
            keep = 0.0 if name == "validation" else 0.98
            if math.isfinite(value) and not name.startswith("validation_"):
                self.smooth[name] = keep * self.smooth.get(name, value) + (1 - keep) * value
        self.waited += step.waited
        self.counts.update(counts, skipped=int(is_skipped))
        shown = {name: f"{value:.4f}" for name, value in self.smooth.items()}
        shown |= {"norm": f"{step.grad_norm:.2f}", "lr": f"{step.lr:.1e}"}
        if torch.cuda.is_initialized():
            shown["GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        shown |= {"data": f"{self.waited / max(seconds, 1e-9):.0%}"}
        self.bar.update(**shown, counts=format_counts(self.counts) or "none")


def save_picture(picture, path: Path) -> None:
    """A picture that cannot be written is no reason to end a run."""
    try:
        with whole_file(path) as file:
            picture.save(file, "PNG")
    except OSError as error:
        print(f"note: {path} could not be written: {error}", flush=True)


def tell(machine: Machine, text: str) -> None:
    """Print on the first rank."""
    if machine.rank == 0:
        print(text, flush=True)


@contextmanager
def note_signals() -> Iterator[list[int]]:
    """Yield a list that SIGTERM, SIGUSR1 and Ctrl-C join. A second one acts as it always does."""
    names, came = ("SIGTERM", "SIGUSR1", "SIGINT"), []  # Windows has no SIGUSR1
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame) -> None:
        came.append(number)
        signal.signal(number, before[number])

    try:
        for number in numbers:
            signal.signal(number, note)
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
