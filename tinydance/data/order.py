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

import copy
import hashlib
from collections import Counter

import numpy as np

from tinydance.data.index import Rows, open_row
from tinydance.noise import random
from tinydance.training import Clip
from tinydance.video.read import CENTRE, REASONS, BadSample, pictures_in, read_clip, read_picture

TRIES = 20           # bad samples in a row before a source is given up


FIRST_IMAGE = 2**40  # sample number of the first image, so that images never repeat clips


BLOCK = 1000         # samples among which each source of a mixture has exactly its share


COUNTED = (*REASONS, "padded", "no_caption")


class Files:
    """Videos, or single pictures, of a folder, a table or shards, as a source.

    size: (H, W), to which each is resized and cropped, at the centre or at random. frames, fps: of
    a clip. short: what becomes of a video shorter than a clip: "pad" repeats its last picture,
    "reject" takes another video. starts: "any" time, or "grid": a multiple of 1 / fps, as in a
    cache of latents.
    A row that cannot be read is replaced by the next in the epoch's order.
    """

    def __init__(self, rows: Rows, size: tuple[int, int], frames: int = 16, fps: float = 4,
                 seed: int = 0, short: str = "pad", crop: str = "centre", starts: str = "any",
                 pictures: bool = False):
        self.rows, self.size, self.frames, self.fps, self.seed = rows, size, frames, fps, seed
        self.short, self.crop, self.starts, self.pictures = short, crop, starts, pictures

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, n: int) -> Clip:
        """Clip n. An epoch shows every video once, in an order of its own, from a random start.

        Raises ValueError after TRIES bad videos in a row.
        """
        return self._sample(n, self.frames)

    def frame(self, n: int) -> Clip:
        """One picture from a random time of video n, as a clip with f = 1. Decodes no other."""
        return self._sample(n, 1)

    any_frame = frame  # a clip can begin at any time

    def words(self) -> list[str]:
        """Every word of every caption; a tokenizer is built from them."""
        captions = map(self.rows.caption, range(len(self)))
        return sorted({word for caption in captions for word in caption.lower().split()})

    def reseeded(self, seed: int) -> Files:
        """The same files in another order; the index is shared."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def about(self) -> list[str]:
        """Lines for the head of a run: how much there is, and what is wrong with it."""
        kind, lacking = "pictures" if self.pictures else "videos", self.rows.missing_captions
        first = f"{self.rows.where}: {len(self):,} {kind}, {lacking:,} without caption"
        return [first, *(f"note: {note}" for note in self.rows.notes)]

    def _sample(self, n: int, frames: int) -> Clip:
        epoch, place = divmod(n, len(self))
        bad = Counter()
        for attempt in range(TRIES):
            i = shuffled((place + attempt) % len(self), len(self), self.seed, epoch)
            try:
                clip = self._read(i, frames, random("start", self.seed, n, attempt))
                return clip._replace(counts=bad + clip.counts)
            except BadSample as error:
                bad[error.reason] += 1
                last = error
        raise ValueError(f"{TRIES} samples in a row cannot be used: {said(bad)}; the last: {last}")

    def _read(self, i: int, frames: int, draw: np.random.Generator) -> Clip:
        row, counts = self.rows[i], Counter()
        where, *at = draw.random(3)
        at = CENTRE if self.crop == "centre" else at

        def start(length: float) -> float:
            end = min(length, row.end)
            spare = pictures_in(end - row.start, self.fps) - frames  # starts on the grid - 1
            if spare < 0 and self.short == "reject":
                raise BadSample("too_short", f"{end - row.start:.2f} s")
            counts["padded"] = int(spare < 0)
            if self.starts == "grid":
                return row.start + int(where * (max(0, spare) + 1)) / self.fps
            return row.start + where * max(0, end - row.start - (frames - 1) / self.fps)

        try:
            with open_row(row) as file:
                if self.pictures:
                    pixels = read_picture(file, self.size, at)[None]
                else:
                    pixels = read_clip(file, start, frames, self.fps, self.size, row.end, at)
        except BadSample as error:
            raise BadSample(error.reason, f"{row.name}: {error.message}") from None
        caption = " ".join(row.caption.split())
        counts["no_caption"] = int(not caption)
        return Clip(pixels, caption, row.name, counts)


class Mixture:
    """Several sources, each with its share of every BLOCK samples, as the paper mixes WebVid with
    clips that have no watermark [paper §4.1]. Within a source nothing is left out or repeated."""

    def __init__(self, sources: list, weights: list[float], seed: int = 0):
        self.sources, self.weights, self.seed = sources, weights, seed
        self.frames, self.size = sources[0].frames, sources[0].size
        ends = [round(BLOCK * sum(weights[:k]) / sum(weights)) for k in range(len(weights) + 1)]
        self.ends = ends
        if min(np.diff(ends)) < 1:
            raise ValueError(f"weights {weights}: one is below 1 in {BLOCK}")

    def _pick(self, n: int) -> tuple:
        """The source of sample n, and the number that the sample has there."""
        block, place = divmod(n, BLOCK)
        slot = shuffled(place, BLOCK, self.seed, block)
        k = int(np.searchsorted(self.ends, slot, "right")) - 1
        share = self.ends[k + 1] - self.ends[k]
        return self.sources[k], block * share + slot - self.ends[k]

    def clip(self, n: int) -> Clip:
        source, m = self._pick(n)
        return source.clip(m)

    def frame(self, n: int) -> Clip:
        source, m = self._pick(n)
        return source.frame(m)

    def any_frame(self, n: int) -> Clip:
        source, m = self._pick(n)
        return source.any_frame(m)

    def words(self) -> list[str]:
        return sorted({word for source in self.sources for word in source.words()})

    def reseeded(self, seed: int) -> Mixture:
        return Mixture([source.reseeded(seed) for source in self.sources], self.weights, seed)

    def about(self) -> list[str]:
        shares = [f"{100 * weight / sum(self.weights):.3g} %: " for weight in self.weights]
        return [share + line for share, source in zip(shares, self.sources)
                for line in source.about()]


class WithPictures:
    """Clips of one source; the images of image steps are another's."""

    def __init__(self, clips, pictures):
        self.clips, self.pictures = clips, pictures
        self.frames, self.size = clips.frames, clips.size
        self.clip, self.any_frame, self.frame = clips.clip, clips.any_frame, pictures.frame

    def words(self) -> list[str]:
        return sorted({*self.clips.words(), *self.pictures.words()})

    def reseeded(self, seed: int) -> WithPictures:
        return WithPictures(self.clips.reseeded(seed), self.pictures.reseeded(seed))

    def about(self) -> list[str]:
        return [*self.clips.about(), *self.pictures.about()]


def shuffled(place: int, length: int, *key: int) -> int:
    """Where `place` stands in an order of 0 .. length - 1 that is a function of the key.

    An array of ten million would be 80 MB in every process, for every epoch. A Feistel network is
    one to one whatever its rounds compute; a number above the length is sent through again.
    """
    bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for turn in range(4):
            said = ",".join(map(str, (turn, right, *key))).encode()
            mixed = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest())
            left, right = right, left ^ mixed & mask
        place = left << bits | right
        if place < length:
            return place


def said(counts: Counter) -> str:
    """"3 missing, 1 damaged", the commonest first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common() if count)
