"""How far the work is: tqdm's bar on a terminal, and plain lines where there is none.

Read after `config.py`. Not here: what a training says of itself besides (`training.Log`).
"""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

EVERY = 20  # seconds between plain lines


class Progress:
    """Counts up to `total` (None: not known). shown: False is silent, as ranks but the first are.

    initial: what a resumed work had done. leave: its last state stays to be read. file: where to,
    by default standard error.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, initial=0, leave=False, shown=True, file=None
    ):
        self.file = file or sys.stderr
        self.bar = tqdm(desc=what, total=total, unit=unit, initial=initial, leave=leave, delay=1,
                        file=self.file, disable=None if shown else True)  # fmt: skip
        self.shown, self.plain = shown, shown and not self.file.isatty()
        self.what, self.total, self.unit = what, total, unit
        self.initial, self.leave, self.done = initial, leave, initial
        self.begun = self.said = time.time()
        self.told = ""

    def update(self, count: int = 1, **told) -> None:
        """`count` more are done; told: names and values that stand behind the count."""
        self.done += count
        if told:
            self.told = ", ".join(f"{name} {value}" for name, value in told.items())
            self.bar.set_postfix_str(self.told, refresh=False)
        self.bar.update(count)
        if self.plain and time.time() - self.said > EVERY:
            self.say()

    def say(self) -> None:
        self.said = time.time()
        line = tqdm.format_meter(
            self.done, self.total, self.said - self.begun, unit=self.unit, initial=self.initial,
            postfix=self.told, prefix=self.what,
            bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed}<{remaining}, {rate_fmt}{postfix}",
        )  # fmt: skip
        print(line, file=self.file, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        self.bar.close()
        if self.plain and self.leave and self.done > self.initial:
            self.say()


def progress(items: Iterable, what: str, unit: str, total=None, shown=True) -> Iterator:
    """The items, counted as they are done with."""
    total = len(items) if hasattr(items, "__len__") else total
    with Progress(what, total, unit, shown=shown) as bar:
        for item in items:
            yield item
            bar.update()
