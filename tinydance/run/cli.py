"""How far the work is: tqdm's bar on a terminal, and plain lines where there is none.

Read after `config.py`. Not here: what a training says of itself besides (`training.Log`).
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields

import torch
from tqdm import tqdm

from tinydance.config import Config

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


def describe(config: Config) -> str:
    """One line a field, aligned: name, value, and where the choice comes from."""
    rows = ((f.name, str(getattr(config, f.name)), f.metadata["help"]) for f in fields(config))
    return "\n".join(f"  {name:<24}{value:<15} {help}" for name, value, help in rows)


class Parser(argparse.ArgumentParser):
    """argparse, with the script's docstring as help and one line for an error."""

    def __init__(self, description: str):
        shown = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=shown, allow_abbrev=False)

    def error(self, message: str):
        raise ValueError(message)


def run_main(main) -> None:
    """Run a script's main(); what the user gave wrongly ends it in one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        # What is wrong with the arguments every rank finds; what happens later may be one's own.
        rank, joined = os.environ.get("RANK", "0"), torch.distributed.is_initialized()
        if rank == "0" or joined:
            who = f"rank {rank}: " if joined else ""
            print(f"{os.path.basename(sys.argv[0])}: {who}{error}", file=sys.stderr, flush=True)
        sys.exit(2)
