"""Which sample comes when: a source of the user's files, and mixtures of sources.

What sample n is (which source, which video, from when on) is a function of (seed, n), on any number
of machines and after a restart. A source is a dataclass with `seed`, `frames`, `size`, `leaves()`
(its parts), `sample(n, kind)` and `hold_out()`, a source of what is never trained on, or None;
`replace(source, seed=...)` is the same data in another order.
Not here: the toy world, a source too (`toy/source.py`); what a row is (`rows.py`).
"""

import hashlib
from bisect import bisect
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tinydance.data.index import Folder, Shards, Table
from tinydance.model import Sample
from tinydance.noise import rng
from tinydance.toy.source import HELD_OUT
from tinydance.video.read import CENTRE, REASONS, BadSample, decoding, pictures_in

TRIES = 20  # bad samples in a row before a source is given up
FIRST_IMAGE = 2**40  # sample number of the first image, so that images never repeat clips
BLOCK = 1000  # samples among which each source of a mixture has exactly its share
COUNTED = (*REASONS, "padded", "no_caption")


@dataclass
class Files:
    """Rows of an index as a source; a bad row is replaced by the next in the epoch's order.
    "[W]e randomly sample 16 consecutive frames with 4 fps per video" [paper §4.1]."""

    rows: Folder | Table | Shards  # or any other index, see `index.py`
    size: tuple[int, int]  # (H, W)
    frames: int = 16  # of a clip
    fps: float = 4
    seed: int = 0
    short: Literal["pad", "reject"] = "pad"  # repeat a short video's last picture, or skip it
    crop: Literal["centre", "random"] = "centre"
    starts: Literal["any", "grid"] = "any"  # of a clip; grid: at multiples of 1 / fps
    held_out: float = 0  # share of the rows, by the hash of a row's name, that is never trained on
    is_held_out: bool = False  # are these rows the source's, or the others?

    def __post_init__(self):
        self.chosen = range(len(self.rows))
        if self.held_out:  # 8 bytes a row, which forked workers share
            few = np.asarray(self.rows.hashes) < self.held_out * 2**31
            self.chosen = np.flatnonzero(few == self.is_held_out)
        if not len(self):
            raise ValueError(f"{self.rows.where}: --held_out {self.held_out} leaves none; use 0")

    def __len__(self) -> int:
        return len(self.chosen)

    def sample(self, n: int, kind: Literal["clip", "first", "any"] = "clip") -> Sample:
        """A clip, or else ("first" or "any") one picture from a random time, with f = 1. An epoch
        shows every row once, in an order of its own. ValueError: TRIES bad rows in a row."""
        epoch, place = divmod(n, len(self))
        frames, failed = self.frames if kind == "clip" else 1, Counter()
        for attempt in range(TRIES):
            i = self.chosen[shuffled((place + attempt) % len(self), len(self), self.seed, epoch)]
            try:
                sample = self.read(i, frames, rng("start", self.seed, n, attempt))
                return sample._replace(counts=failed + sample.counts)
            except BadSample as error:
                failed[error.reason] += 1
                reasons = f"{format_counts(failed)}; the last: {error}"
        raise ValueError(f"{TRIES} samples in a row cannot be used: {reasons}")

    def read(self, i: int, frames: int, draw: np.random.Generator) -> Sample:
        """Row i, from a start and with a crop that are drawn. Raises BadSample."""
        counts, (u_start, *u_crop) = Counter(), draw.random(3)
        with decoding():  # a caption, too, may be gone
            row = self.rows[i]

        def choose_start(seconds: float) -> float:
            spare = pictures_in(seconds, self.fps) - frames  # the last start on the grid
            if spare < 0 and self.short == "reject":
                raise BadSample("too_short", f"{seconds:.2f} s")
            counts["padded"] = int(spare < 0)
            if self.starts == "grid":
                return int(u_start * (max(0, spare) + 1)) / self.fps
            return u_start * max(0, seconds - (frames - 1) / self.fps)

        at = CENTRE if self.crop == "centre" else u_crop
        with decoding(row.name):
            pixels = row.read(choose_start, frames, self.fps, self.size, at)
        caption = " ".join(row.caption.split())
        counts["no_caption"] = int(not caption)
        return Sample(pixels, caption, row.name, counts)

    def hold_out(self) -> "Files | None":
        return replace(self, is_held_out=True) if len(self) < len(self.rows) else None

    def leaves(self) -> list["Files"]:
        return [self]

    def words(self) -> set[str]:
        words = set()
        for i in range(len(self.rows)):
            with suppress(BadSample), decoding():  # a bad row is a bad sample, when its turn comes
                words |= {*self.rows[i].caption.lower().split()}
        return words

    def describe(self) -> list[str]:
        rows, notes = self.rows, [f"note: {note}" for note in self.rows.notes]
        count = f"{len(rows):,} {rows.kind.what}, {rows.missing_captions:,} without caption"
        count += f", {len(rows) - len(self):,} held out" if self.held_out else ""
        return [f"{rows.where}: {count}", *notes]


@dataclass
class Mixture:
    """Sources that have their shares of every BLOCK samples, as the paper mixes WebVid with clips
    without a watermark [paper §4.1]. Within a source nothing is left out or repeated."""

    sources: list
    weights: list[float]
    seed: int = 0  # also of every source

    def __post_init__(self):
        self.sources = [replace(source, seed=self.seed) for source in self.sources]
        self.frames, self.size = self.sources[0].frames, self.sources[0].size
        sums = [sum(self.weights[:k]) for k in range(len(self.weights) + 1)]
        self.ends = [round(BLOCK * part / sums[-1]) for part in sums]
        if min(np.diff(self.ends)) < 1:
            raise ValueError(f"weights {self.weights}: one is below 1 in {BLOCK}")

    def sample(self, n: int, kind: Literal["clip", "first", "any"] = "clip") -> Sample:
        block, place = divmod(n, BLOCK)
        slot = shuffled(place, BLOCK, self.seed, block)
        k = bisect(self.ends, slot) - 1  # the source that has this slot
        first, end = self.ends[k : k + 2]
        return self.sources[k].sample(block * (end - first) + slot - first, kind)

    def hold_out(self) -> "Mixture | None":
        held_out = [source.hold_out() for source in self.sources]
        return replace(self, sources=held_out, seed=self.seed + HELD_OUT) if all(held_out) else None

    def leaves(self) -> list:
        return [leaf for source in self.sources for leaf in source.leaves()]


class WithPictures(Mixture):
    """Two sources: the images of image steps are the second's, all else is the first's."""

    def sample(self, n: int, kind: Literal["clip", "first", "any"] = "clip") -> Sample:
        return self.sources[kind == "first"].sample(n, kind)


def collect_words(source) -> list[str]:
    """Every word of every caption; a tokenizer is built from them."""
    return sorted({word for leaf in source.leaves() for word in leaf.words()})


def describe_source(source) -> list[str]:
    """Lines for the head of a run: how much there is, and what is wrong with it."""
    return [line for leaf in source.leaves() for line in leaf.describe()]


def shuffled(place: int, length: int, *key: int) -> int:
    """Where `place` stands in an order of 0 .. length - 1 that is a function of the key."""
    # A Feistel network is one to one whatever its rounds compute; an array would be 80 MB a worker.
    bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for turn in range(4):
            text = ",".join(map(str, (turn, right, *key))).encode()
            mixed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
            left, right = right, left ^ mixed & mask
        place = left << bits | right
        if place < length:  # or else it is sent through again
            return place


def format_counts(counts: Counter) -> str:
    """Such as "3 missing, 1 damaged", the commonest first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common() if count)
