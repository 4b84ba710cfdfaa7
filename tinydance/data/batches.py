"""Batches: a source's samples in the order of their numbers, shared among ranks and workers.

Which samples make a batch is a function of the step: a resumed run sees what it would have seen,
and the ranks together see what one alone would. Frames stay uint8, a quarter of floats' size.
Not here: what a sample is (`order.py`); the floats that a batch becomes (`training.py`).
"""

import signal
from collections import Counter, deque
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from traceback import clear_frames

import torch
from torch.utils.data import DataLoader

from tinydance.data.order import FIRST_IMAGE, format_counts
from tinydance.model import Batch
from tinydance.video.read import REASONS

WINDOW = 1000  # samples among which too many bad ones end a run
WAIT = 1800  # seconds until a worker counts as dead: a batch may have many slow samples


def batches(
    source,
    first_step: int,
    last_step: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    image_every: int = 0,
    image_batch: int | None = None,
    image_kind: str = "first",
) -> Iterator[Batch]:
    """Yield this rank's share of each batch of first_step <= step < last_step.

    batch, image_batch: clips and images (f = 1) of all ranks together. Raises ValueError where
    `world_size` does not divide them. image_every: one step of so many is a batch of images, 1: all
    are, 0: none. image_kind: "first" or "any", see `Files.sample`.
    """
    image_batch = image_batch or batch
    for size in (batch, image_batch):
        if size < 1 or size % world_size:
            raise ValueError(f"a batch of {size} for {world_size} ranks; make it a multiple")

    def items() -> Iterator[tuple[int, str, range]]:
        for step in range(first_step, last_step):
            images = (step + 1) // image_every if image_every else 0  # steps of images, up to here
            is_image = image_every > 0 and (step + 1) % image_every == 0
            share, turn = (image_batch, images - 1) if is_image else (batch, step - images)
            share //= world_size
            first = (turn * world_size + rank) * share + (FIRST_IMAGE if is_image else 0)
            yield step, image_kind if is_image else "clip", range(first, first + share)

    dataset, pin = Batches(source), torch.cuda.is_available()
    if workers:
        yield from load(dataset, workers, sampler=items(), timeout=WAIT, pin_memory=pin)
    else:
        yield from map(dataset.__getitem__, items())


@dataclass
class Batches:
    """Item (step, kind of samples, their numbers): a whole batch, made by one worker."""

    source: object

    def __getitem__(self, item: tuple[int, str, range]) -> Batch:
        step, kind, ids = item
        samples = (self.source.sample(n, kind) for n in ids)
        frames, captions, names, counts, given = zip(*samples, strict=True)
        instructions = {name: torch.stack([c[name] for c in given]) for name in given[0]}
        lists = list(captions), list(ids), list(names)
        counts = dict(sum(counts, Counter()))  # torch's pinned copy of a Counter counts twice
        return Batch(step, torch.stack(frames), *lists, counts, instructions)


def load(dataset, workers: int, **options) -> Iterator:
    """Yield the items of a dataset, which worker processes prepare."""
    # Torch's own conversion would add a batch's counts to a copy of themselves.
    options |= {"worker_init_fn": ignore_signals, "collate_fn": copy}
    try:
        yield from DataLoader(dataset, batch_size=None, num_workers=workers, **options)
    except BaseException as error:
        # The workers end when nothing refers to their iterator, so the traceback must not: a
        # process that ends waits for its workers, and these ignore its SIGTERM.
        clear_frames(error.__traceback__)
        if isinstance(error, ValueError):  # whose text is its traceback in the worker
            raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from None
        raise


def ignore_signals(worker: int) -> None:
    """torchrun sends SIGTERM to all processes; without its workers the trainer could not save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Quota:
    """Ends a run, with the reasons, when too many of the last WINDOW samples were bad."""

    def __init__(self, max_bad: float):
        self.max_bad, self.recent, self.total = max_bad, deque(), Counter()

    def add(self, samples: int, counts: dict[str, int]) -> None:
        """Count the bad among some more samples. Raises ValueError."""
        self.total += Counter(counts)
        self.recent.append((samples, counts))
        seen = sum(samples for samples, _ in self.recent)
        while seen - self.recent[0][0] >= WINDOW:
            seen -= self.recent.popleft()[0]
        bad = Counter({name: sum(c.get(name, 0) for _, c in self.recent) for name in REASONS})
        if bad.total() > self.max_bad * max(WINDOW, seen):
            failed = f"of the last {seen} samples {bad.total()} tries failed: {format_counts(bad)}"
            raise ValueError(f"{failed}; look at them with --stage inspect, or raise --max_bad")
