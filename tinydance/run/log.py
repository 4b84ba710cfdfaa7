"""Training: the diffusion loss under PixelDance's three instructions, and the loop that lowers it.

`DiffusionLoss.forward` is section 3.2 of the paper in one straight line. `fit` is the loop, on a
laptop and under torchrun on many machines the same; what it trains is a `Stage`, and `stages.py`
has those of the real pipeline.

Read before: `unet.py`. Read after: `checkpoints.py`, `stages.py`, `train.py`.
Not here: weights sharded over devices (the optimizer's state can be).
"""

import json
import math
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tinydance.data.order import said
from tinydance.run.cli import Progress


def save_picture(picture, path: Path) -> None:
    """A sample that cannot be written is no reason to lose a run."""
    if picture is None:
        return
    try:
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    except OSError as error:
        print(f"note: {path} could not be written: {error}", flush=True)


class Interrupted(Exception):
    """The run was asked to stop, and has saved."""


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C; the loop looks at it once a step. A second one kills."""

    def __init__(self):
        self.asked = False
        names = [n for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n)]
        self.before = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in names}
        for number in self.before:
            signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """log.jsonl, a line a step, and the progress."""

    def __init__(self, stage: str, folder: Path, start: int, steps: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = []
        if path.exists():  # steps after the checkpoint will be taken again
            lines = path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self.file, self.begun = path.open("a"), time.time()
        self.bar = Progress(stage, steps, "step", start, leave=True, file=sys.stdout)
        self.smooth, self.waited, self.skipped = math.nan, 0.0, 0
        self.counts = Counter()

    def step(self, done, loss, norm, rate, waited: float, images: bool, counts: dict) -> None:
        """waited: seconds of this step that went by until its data were there; counts: of samples
        that were bad, or padded, or without caption."""
        kind, seconds = "image" if images else "clip", time.time() - self.begun
        record = {"step": done, "loss": loss, "grad_norm": norm, "lr": rate, "kind": kind}
        record |= {"seconds": seconds, "waited": waited, "skipped": not math.isfinite(norm)}
        record |= {"counts": counts} if counts else {}
        self.counts.update(counts)
        told = {"samples": said(self.counts)} if self.counts else {}
        self.waited, self.skipped = self.waited + waited, self.skipped + record["skipped"]
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if math.isfinite(loss):
            self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        data = self.waited / max(seconds, 1e-9)
        self.bar.update(loss=f"{self.smooth:.4f}", lr=f"{rate:.1e}", data=f"{data:.0%}",
                        skipped=self.skipped, **told)  # fmt: skip

    def close(self) -> None:
        self.bar.close()
        self.file.close()
