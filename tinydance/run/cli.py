"""What the commands share: the parser, errors in one line, and progress.

On a terminal progress is tqdm's bar. Where there is none (a log file, a notebook) it is a plain
line every 20 seconds. [ours] Not here: a training's options, which are `config.Config`.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterable

import torch
from tqdm import tqdm

LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed}<{remaining}, {rate_fmt}{postfix}"


class Parser(argparse.ArgumentParser):
    """argparse, with the command's docstring as help and a ValueError for a wrong argument."""

    def __init__(self, description: str):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=as_written, allow_abbrev=False)

    def error(self, message: str):
        raise ValueError(message)


def run_main(main: Callable[[], None]) -> None:
    """Run a command's main(). An error that the user can mend is one line and exit code 2."""
    sys.stdout.reconfigure(errors="surrogateescape")  # file names may be any bytes
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"  # without the line of code
    try:
        main()
    except (ValueError, OSError) as error:
        # Before the ranks have met, every rank finds the same error (a wrong argument): one line
        # from rank 0 is enough. Later each rank may have an error of its own, and says so.
        rank, has_met = os.environ.get("RANK", "0"), torch.distributed.is_initialized()
        who = f"rank {rank}: " if has_met else ""
        if rank == "0" or has_met:
            print(f"{os.path.basename(sys.argv[0])}: {who}{error}", file=sys.stderr, flush=True)
        sys.exit(2)


class PlainLines:
    """A file for tqdm where there is no terminal: what tqdm redraws becomes a line of its own."""

    def __init__(self, file):
        self.file = file

    def write(self, text: str) -> None:
        if text.strip():  # and not "\r" or spaces, by which tqdm removes its bar
            print(text.strip(), file=self.file, flush=True)


class Progress(tqdm):
    """Counts from `done` to `total` (None: unknown). leave: keep the last state on the screen;
    without it, work of less than a second shows nothing. shown: False on ranks but the first."""

    monitor_interval = 0  # tqdm's thread, which is not needed: every update looks at the clock

    def __init__(self, what, total, unit, done=0, leave=False, shown=True, file=None, items=None):
        file, layout = file or sys.stderr, {"miniters": 1, "delay": 0 if leave else 1}
        if not file.isatty():
            file, layout = PlainLines(file), layout | {"mininterval": 20, "bar_format": LINE}
        layout |= {"initial": done, "unit": unit, "disable": not shown}
        super().__init__(items, what, total, leave, file, **layout)

    def update(self, count: int = 1, **values) -> None:
        """`count` more are done; names and values to show behind the count."""
        if values:
            self.set_postfix_str(", ".join(f"{k} {v}" for k, v in values.items()), refresh=False)
        super().update(count)


def progress(items: Iterable, what: str, unit: str, total=None, shown=True) -> Iterable:
    """Yield the items, and count each when the caller asks for the next one."""
    return Progress(what, total, unit, shown=shown, items=items)
