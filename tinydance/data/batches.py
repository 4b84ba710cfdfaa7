"""Which clips are trained on, and in which order: the toy world, users' files, mixtures of them.

"For video data, we randomly sample 16 consecutive frames with 4 fps per video" [paper §4.1], from
WebVid-10M and 500 thousand clips without watermark; images from LAION. Here the order is a
function: what is seen at global sample number n (which source, which video, from when on) follows
from (seed, n) and is stored nowhere. So the data are the same on any number of machines, and
resuming needs no state but the step.

A source has `clip(n)`, `frame(n)`, `any_frame(n)`, `frames`, `size`, `words()`, `about()` and
`reseeded(seed)`; `batches` makes a stream of it. What was bad on the way to a clip travels with it.
Read `weights.py` before, `sources.py` and `toyworld.py` after; cached latents are in `latents.py`.
"""

from __future__ import annotations

import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from tinydance.data.order import FIRST_IMAGE, said
from tinydance.training import Batch
from tinydance.video.read import REASONS

WINDOW = 1000        # samples among which too many bad ones end a run


class Quota:
    """Ends a run, with the reasons, when too many of the last WINDOW samples were bad."""

    def __init__(self, max_bad: float):
        self.max_bad, self.recent, self.bad, self.total = max_bad, deque(), Counter(), Counter()
        self.samples = 0

    def add(self, samples: int, counts: dict[str, int]) -> None:
        """Count the bad among some more samples. Raises ValueError."""
        bad = Counter({reason: counts.get(reason, 0) for reason in REASONS})
        self.recent.append((samples, bad))
        self.samples += samples
        self.bad += bad
        self.total += Counter(counts)
        while self.samples - self.recent[0][0] >= WINDOW:
            samples, bad = self.recent.popleft()
            self.samples -= samples
            self.bad -= bad
        if self.bad.total() > self.max_bad * max(WINDOW, self.samples):
            raise ValueError(
                f"of the last {self.samples} samples {self.bad.total()} tries failed: "
                f"{said(self.bad)}; look at them with --stage inspect, or raise --max_bad")


def batches(source, first_step: int, last_step: int, global_batch: int, rank: int = 0,
            world_size: int = 1, workers: int = 0, single: Callable[[int], bool] | None = None,
            image_batch: int | None = None, any_frame: bool = False) -> Iterator[Batch]:
    """Yield this rank's share of each batch of first_step <= step < last_step.

    frames: uint8 (b, f, 3, H, W) on the CPU; made float on the device, they travel as a quarter.
    Slot j of a share is sample number n = step * global_batch + rank * b + j.
    single: tells which steps train on images: f = 1, and `image_batch` samples, numbered from
    FIRST_IMAGE on ("utilized every 8 training iterations" [paper §4.1]). any_frame: images are
    frames of any time, and not only such as a clip begins with.
    workers: processes that prepare batches ahead; the bytes are the same with any number.
    The two batch sizes count all ranks; ValueError where `world_size` does not divide them.
    """
    sizes = {False: global_batch, True: image_batch or global_batch}
    for size in sizes.values():
        if size < 1 or size % world_size:
            raise ValueError(f"a batch of {size} for {world_size} ranks; make it a multiple")
    steps = [(step, bool(single and single(step))) for step in range(first_step, last_step)]
    dataset = _Steps(source, sizes, rank, world_size, any_frame)
    if workers == 0:
        yield from (dataset[step] for step in steps)
        return
    loader = DataLoader(dataset, sampler=steps, batch_size=None, num_workers=workers,
                        collate_fn=_as_it_is, worker_init_fn=ignore_signals, timeout=300,
                        pin_memory=torch.cuda.is_available())
    yield from loader


class _Steps(Dataset):
    """Item (step, whether of images): the whole batch, made by one worker."""

    def __init__(self, source, sizes: dict[bool, int], rank: int, world_size: int, any_frame: bool):
        self.source, self.sizes, self.rank, self.world_size = source, sizes, rank, world_size
        self.image = source.any_frame if any_frame else source.frame

    def __getitem__(self, item: tuple[int, bool]) -> Batch:
        step, images = item
        size = self.sizes[images]
        share = size // self.world_size
        start = step * size + self.rank * share + (FIRST_IMAGE if images else 0)
        numbers = list(range(start, start + share))
        clips = [self.image(n) if images else self.source.clip(n) for n in numbers]
        frames = torch.stack([clip.frames for clip in clips])
        captions, names = [clip.caption for clip in clips], [clip.name for clip in clips]
        counts = sum((clip.counts for clip in clips), Counter())
        return Batch(step, frames, captions, numbers, names, counts)


def _as_it_is(batch):
    return batch


def ignore_signals(worker: int) -> None:
    """torchrun sends SIGTERM to the whole group; without workers the trainer could not save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
