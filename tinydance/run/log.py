"""What a training says while it runs, and how it is asked to stop.

log.jsonl has a line for each step, and the progress on standard output has the same numbers. What
an objective tells is written as it is told: a new number in the log is a change of the objective
alone. [ours] Not here: when to save or draw (`fit.py`).
"""

import json
import math
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tinydance.data.order import format_counts
from tinydance.run.cli import Progress
from tinydance.training import Stage, Step


class Interrupted(Exception):
    """The run was asked to stop, and has saved."""


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C in `asked`. A second signal does what it always does."""

    def __init__(self):
        self.asked = False
        names = ("SIGTERM", "SIGUSR1", "SIGINT")  # Windows has no SIGUSR1
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.handlers = {number: signal.getsignal(number) for number in numbers}

    def note(self, number: int, frame) -> None:
        self.asked = True
        signal.signal(number, self.handlers[number])

    def __enter__(self) -> "StopSignal":
        for number in self.handlers:
            signal.signal(number, self.note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Log:
    """log.jsonl in `folder`, and the progress. Rank 0 has one."""

    def __init__(self, stage: Stage, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # Steps after the checkpoint will be taken, and logged, again.
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(kept))
        self.file, self.begun = path.open("a"), time.time()
        self.bar = Progress(stage.name, stage.steps, "step", start, leave=True, file=sys.stdout)
        self.smooth: dict[str, float] = {}  # the numbers, averaged over some 50 steps
        self.waited, self.skipped, self.counts = 0.0, 0, Counter()

    def write(self, step: Step, numbers: dict, waited: float, counts: dict) -> None:
        """numbers: the objective's, and waited: the seconds until the step's data were there, both
        averaged over the ranks. counts: of samples that were bad, or padded, or without caption."""
        seconds, is_skipped = time.time() - self.begun, not math.isfinite(step.grad_norm)
        kind = "image" if step.batch.frames.shape[1] == 1 else "clip"
        line = {"step": step.done, **numbers, "grad_norm": step.grad_norm, "lr": step.lr}
        line |= {"kind": kind, "seconds": seconds, "waited": waited, "skipped": is_skipped}
        line |= {"counts": counts} if counts else {}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

        for name, value in numbers.items():
            if math.isfinite(value):
                self.smooth[name] = 0.98 * self.smooth.get(name, value) + 0.02 * value
        self.waited, self.skipped = self.waited + waited, self.skipped + is_skipped
        self.counts.update(counts)
        shown = {name: f"{value:.4f}" for name, value in self.smooth.items()}
        shown |= {"lr": f"{step.lr:.1e}", "data": f"{self.waited / max(seconds, 1e-9):.0%}"}
        shown |= {"skipped": self.skipped}
        shown |= {"samples": format_counts(self.counts)} if self.counts else {}
        self.bar.update(**shown)

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def save_picture(picture, path: Path) -> None:
    """Save it, if there is one. A picture that cannot be written is no reason to end a run."""
    if picture is None:
        return
    try:
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    except OSError as error:
        print(f"note: {path} could not be written: {error}", flush=True)
