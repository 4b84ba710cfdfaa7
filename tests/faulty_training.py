"""A tiny training in which rank 1 fails: `faulty_training.py FAULT=STEP ... field=value ...`

FAULT: kill, raise, hang or nan, once, when STEP steps of the video stage are done.
"""

import os
import signal
import sys
import time
from pathlib import Path

from tiny_training import tiny_train

from tinydance import training
from tinydance.run.cli import run_main

FAULTS = {"kill", "raise", "hang", "nan"}


def main() -> None:
    changes = dict(pair.split("=") for pair in sys.argv[1:])
    faults = {int(changes.pop(name)): name for name in FAULTS & changes.keys()}
    happened = Path(changes["out"]) / "happened"
    losses = training.DiffusionLoss.forward
    calls = []

    def forward(self, batch):
        numbers = losses(self, batch)
        calls.append(numbers)
        fault = faults.get(len(calls) - 1) if os.environ["RANK"] == "1" else None
        if not fault or happened.exists():
            return numbers
        if fault != "nan":
            happened.touch()
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raise":
            raise ValueError("clips/7.mp4 is bad; take it out")
        if fault == "hang":  # until torchrun's SIGTERM, not its SIGKILL 30 seconds later
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(1000)
        return {"loss": numbers["loss"] * float("nan")}

    training.DiffusionLoss.forward = forward
    tiny_train("video", dropout=0.0, **changes)


if __name__ == "__main__":
    run_main(main)
