"""Where clips come from: the toy world, or a folder of videos with their captions.

"For video data, we randomly sample 16 consecutive frames with 4 fps per video" [paper §4.1]. Here
the order is a function: what is seen at global sample number n (which video, from when on) follows
from (seed, n) and is stored nowhere. So the data are the same on any number of machines, and
resuming needs no state but the step.

A source has `clip(n)`, `frame(n)`, `any_frame(n)`, `frames`, `size`, `words()` and `counts`;
`batches` makes a stream of it.
Not included: captions in tables, tar shards, cached latents.
Read `weights.py` before, `toyworld.py` and `video.py` after.
"""

from __future__ import annotations

import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from . import video
from .toyworld import World, make_clip, vocabulary

VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")
TRIES = 20           # bad videos in a row before a folder is given up
FIRST_IMAGE = 2**40  # sample number of the first image, so that images never repeat clips


class Clip(NamedTuple):
    frames: torch.Tensor  # uint8 (f, 3, H, W)
    caption: str
    name: str             # where it comes from


class ToyWorld:
    """The procedural world as an endless source: clip n is `make_clip(seed, n)`."""

    def __init__(self, seed: int = 0, world: World = World()):
        self.seed, self.world = seed, world
        self.frames, self.size = world.frames, (world.size, world.size)
        self.counts = Counter()

    def clip(self, n: int) -> Clip:
        frames, caption = make_clip(self.seed, n, self.world)
        return Clip(torch.from_numpy(frames), caption, f"toy/{self.seed}/{n}")

    def frame(self, n: int) -> Clip:
        """The picture that clip n begins with, as a clip with f = 1.

        Text alone makes its first frame as an image model does: were the images frames of any time,
        a clip could begin where its motion ends.
        """
        clip = self.clip(n)
        return clip._replace(frames=clip.frames[:1])

    def any_frame(self, n: int) -> Clip:
        """A frame of any time of clip n, as a clip with f = 1."""
        clip = self.clip(n)
        k = _random("frame", self.seed, n).integers(self.frames)
        return clip._replace(frames=clip.frames[k:k + 1])

    def words(self) -> list[str]:
        """Every word that a caption can hold; a tokenizer is built from them."""
        return vocabulary(self.world)


class VideoFolder:
    """All videos under `root`; the caption of `a/b.mp4` is the text of `a/b.txt`.

    size: (H, W), to which every video is resized and cropped. frames, fps: of a clip.
    short: what becomes of a video shorter than a clip: "pad" repeats its last frame (and counts it
    as padded), "reject" takes another video.
    A video without .txt has the empty caption; `missing_captions` says how many have. A video that
    cannot be read is replaced by the next in the epoch's order, and `rejected` counts the reasons.
    ValueError where the folder is missing or holds no video.
    """

    def __init__(self, root: str | Path, size: tuple[int, int], frames: int = 16, fps: float = 4,
                 seed: int = 0, short: str = "pad"):
        if short not in ("pad", "reject"):
            raise ValueError(f"short is {short!r}; it must be 'pad' or 'reject'")
        self.root, self.size, self.frames, self.fps = Path(root), size, frames, fps
        self.seed, self.short = seed, short
        if not self.root.is_dir():
            raise ValueError(f"{root}: no such folder; give one that holds videos")
        found = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*")
                 if not path.name.startswith(".")}  # macOS leaves a ._b.mp4 beside b.mp4
        self.names = sorted(name for name in found if name.lower().endswith(VIDEOS))
        if not self.names:
            raise ValueError(f"{root}: no video inside; they end in {' or '.join(VIDEOS)}")
        self.missing_captions = sum(_caption_name(name) not in found for name in self.names)
        self.counts = Counter()

    def __len__(self) -> int:
        return len(self.names)

    def caption(self, name: str) -> str:
        """The caption of one of `names`, on one line; empty where there is none."""
        path = self.root / _caption_name(name)
        text = path.read_text("utf-8-sig", errors="replace") if path.is_file() else ""
        return " ".join(text.split())

    def words(self) -> list[str]:
        """Every word of every caption; a tokenizer is built from them."""
        return sorted({word for name in self.names for word in self.caption(name).lower().split()})

    @property
    def rejected(self) -> dict[str, int]:
        """How many tries at reading a video failed, by reason (see `video.BadVideo`)."""
        return {reason: count for reason, count in self.counts.items() if reason != "padded"}

    def clip(self, n: int) -> Clip:
        """Clip n. An epoch shows every video once, in an order of its own, from a random start.

        Raises ValueError after TRIES bad videos in a row.
        """
        return self._sample(n, self.frames)

    def frame(self, n: int) -> Clip:
        """One picture from a random time of video n, as a clip with f = 1. Decodes no other."""
        return self._sample(n, 1)

    any_frame = frame  # a clip can begin at any time

    def _sample(self, n: int, frames: int) -> Clip:
        epoch, place = divmod(n, len(self))
        order = _permutation(self.seed, epoch, len(self))
        failures = Counter()
        for attempt in range(TRIES):
            name = self.names[order[(place + attempt) % len(self)]]
            where = _random("start", self.seed, n, attempt).random()
            try:
                return self._read(name, frames, where)
            except video.BadVideo as error:
                failures[error.reason] += 1
                self.counts[error.reason] += 1
        reasons = ", ".join(f"{count} {reason}" for reason, count in failures.items())
        raise ValueError(f"{self.root}: {TRIES} unreadable videos in a row ({reasons}); "
                         f"the last was {name}")

    def _read(self, name: str, frames: int, where: float) -> Clip:
        """The clip that starts at the share `where` of the time in which one can start."""
        spare = video.duration(self.root / name) - (frames - 1) / self.fps  # seconds
        if spare < 0 and self.short == "reject":
            raise video.BadVideo("too_short", name)
        pictures = video.read_clip(self.root / name, where * max(0, spare), frames, self.fps,
                                   self.size)
        if spare < 0:
            self.counts["padded"] += 1
        return Clip(pictures, self.caption(name), name)


Source = ToyWorld | VideoFolder


def open_source(data: str, frames: int, fps: float, size: tuple[int, int], seed: int = 0,
                rich: bool = False) -> Source:
    """'toyworld' or a folder of videos -> its source. ValueError for anything else."""
    if data != "toyworld":
        return VideoFolder(data, size, frames, fps, seed)
    if size[0] != size[1]:
        raise ValueError(f"the toy world is square, and the size {size[0]}x{size[1]} is not")
    return ToyWorld(seed, World(size[0], frames, rich))


def _caption_name(name: str) -> str:
    return Path(name).with_suffix(".txt").as_posix()


def _random(purpose: str, *key: int) -> np.random.Generator:
    """The purpose keeps streams apart: were `frame` to draw from the scene's numbers, the frame
    shown would depend on the shape."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return _random("order", seed, epoch).permutation(length)


# --------------------------------------------------------------------------------------------------
# Batches

class Batch(NamedTuple):
    step: int
    frames: torch.Tensor  # uint8 (b, f, 3, H, W)
    captions: list[str]
    numbers: list[int]    # the samples' numbers
    names: list[str]      # where they come from


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
        for step in steps:
            yield dataset[step][0]
        return
    loader = DataLoader(dataset, sampler=steps, batch_size=None, num_workers=workers,
                        collate_fn=_as_it_is, worker_init_fn=_ignore_signals, timeout=300,
                        pin_memory=torch.cuda.is_available())
    for batch, counts in loader:
        source.counts.update(counts)  # the workers' copies of the source have counted
        yield batch


class _Steps(Dataset):
    """Item (step, whether of images): the whole batch, made by one worker, and the new counts."""

    def __init__(self, source, sizes: dict[bool, int], rank: int, world_size: int, any_frame: bool):
        self.source, self.sizes, self.rank, self.world_size = source, sizes, rank, world_size
        self.image = source.any_frame if any_frame else source.frame

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Batch, Counter]:
        step, images = item
        size = self.sizes[images]
        share = size // self.world_size
        start = step * size + self.rank * share + (FIRST_IMAGE if images else 0)
        numbers = list(range(start, start + share))
        before = self.source.counts.copy()
        clips = [self.image(n) if images else self.source.clip(n) for n in numbers]
        frames = torch.stack([clip.frames for clip in clips])
        new = self.source.counts - before
        captions, names = [clip.caption for clip in clips], [clip.name for clip in clips]
        return Batch(step, frames, captions, numbers, names), new


def _as_it_is(batch):
    return batch


def _ignore_signals(worker: int) -> None:
    """torchrun sends SIGTERM to the whole group; without workers the trainer could not save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
