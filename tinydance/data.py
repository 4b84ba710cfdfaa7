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
import glob
import hashlib
import signal
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tinydance import video
from tinydance.sources import PICTURE_FILES, VIDEO_FILES, Folder, Rows, Shards, Table, open_row
from tinydance.toyworld import World, make_clip, vocabulary

TRIES = 20           # bad samples in a row before a source is given up
FIRST_IMAGE = 2**40  # sample number of the first image, so that images never repeat clips
BLOCK = 1000         # samples among which each source of a mixture has exactly its share
WINDOW = 1000        # samples among which too many bad ones end a run
COUNTED = (*video.REASONS, "padded", "no_caption")


class Clip(NamedTuple):
    frames: torch.Tensor  # uint8 (f, 3, H, W); from a cache, latents float16 (f, 8, h, w)
    caption: str
    name: str             # where it comes from
    counts: Counter = Counter()  # of COUNTED: what happened on the way to it


class ToyWorld:
    """The procedural world as an endless source: clip n is `make_clip(seed, n)`."""

    def __init__(self, seed: int = 0, world: World = World()):
        self.seed, self.world = seed, world
        self.frames, self.size = world.frames, (world.size, world.size)

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
        k = random("frame", self.seed, n).integers(self.frames)
        return clip._replace(frames=clip.frames[k:k + 1])

    def words(self) -> list[str]:
        """Every word that a caption can hold; a tokenizer is built from them."""
        return vocabulary(self.world)

    def reseeded(self, seed: int) -> ToyWorld:
        return ToyWorld(seed, self.world)

    def about(self) -> list[str]:
        return ["the toy world, endless"]


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
            except video.BadSample as error:
                bad[error.reason] += 1
                last = error
        raise ValueError(f"{TRIES} samples in a row cannot be used: {said(bad)}; the last: {last}")

    def _read(self, i: int, frames: int, draw: np.random.Generator) -> Clip:
        row, counts = self.rows[i], Counter()
        where, *at = draw.random(3)
        at = video.CENTRE if self.crop == "centre" else at

        def start(length: float) -> float:
            end = min(length, row.end)
            spare = video.pictures_in(end - row.start, self.fps) - frames  # starts on the grid - 1
            if spare < 0 and self.short == "reject":
                raise video.BadSample("too_short", f"{end - row.start:.2f} s")
            counts["padded"] = int(spare < 0)
            if self.starts == "grid":
                return row.start + int(where * (max(0, spare) + 1)) / self.fps
            return row.start + where * max(0, end - row.start - (frames - 1) / self.fps)

        try:
            with open_row(row) as file:
                if self.pictures:
                    pixels = video.read_picture(file, self.size, at)[None]
                else:
                    pixels = video.read_clip(file, start, frames, self.fps, self.size, row.end, at)
        except video.BadSample as error:
            raise video.BadSample(error.reason, f"{row.name}: {error.message}") from None
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


Source = ToyWorld | Files | Mixture | WithPictures


def open_source(data: str, frames: int, fps: float, size: tuple[int, int], seed: int = 0,
                rich: bool = False, images: str = "", short: str = "pad", crop: str = "centre",
                starts: str = "any") -> Source:
    """What `--data` and `--images` name, several joined by "|", as one source.

    Each is 'toyworld', a folder of videos, of tar shards or of cached latents, a .csv, or .tar
    files; after a colon its weight, as in "webvid.csv:0.95|clips:0.05". Without weights, every
    sample counts the same. ValueError for anything else.
    """
    from tinydance.latents import Latents, is_cache  # whose import needs this file

    def open_one(name: str | list[Path], pictures: bool):
        suffixes = PICTURE_FILES if pictures else VIDEO_FILES
        if name == "toyworld":
            if size[0] != size[1]:
                raise ValueError(f"the toy world is square, and {size[0]}x{size[1]} is not")
            return ToyWorld(seed, World(size[0], frames, rich))
        if isinstance(name, list):
            rows = Shards(name, suffixes)
        elif is_cache(name):
            return Latents(name, size, frames, fps, seed, short)
        elif Path(name).suffix.lower() == ".csv":
            rows = Table(name)
        else:
            rows = Folder(name, suffixes)
        return Files(rows, size, frames, fps, seed, short, crop, starts, pictures)

    def open_all(text: str, pictures: bool):
        named = parse_data(text)
        sources = [open_one(name, pictures) for name, _ in named]
        if len(sources) == 1:
            return sources[0]
        weights = [weight for _, weight in named]
        if None in weights and any(weights) or None in weights and "toyworld" in text.split("|"):
            raise ValueError(f"{text}: give every source a weight, as in a.csv:0.95, or none")
        if 0 < sum(isinstance(source, Latents) for source in sources) < len(sources):
            raise ValueError(f"{text}: a batch is of latents or of pixels; mix caches with caches")
        return Mixture(sources, [w or len(s) for w, s in zip(weights, sources)], seed)

    clips = open_all(data, False)
    return WithPictures(clips, open_all(images, True)) if images else clips


def parse_data(text: str) -> list[tuple[str | list[Path], float | None]]:
    """"a.csv:0.95|b" -> [("a.csv", 0.95), ("b", None)]; tar files, or a folder of them, as a list.

    Patterns such as laion/*.tar may stand unexpanded; tar files without a weight are one source.
    """
    named, loose = [], []
    for item in text.split("|"):
        name, colon, tail = item.rpartition(":")
        weight = None
        if colon and not Path(item).exists():
            try:
                weight = float(tail)
            except ValueError:  # the colon of C:\clips
                name = item
            if weight is not None and not 0 < weight < float("inf"):
                raise ValueError(f"{item}: the weight must be above 0")
        else:
            name = item
        tars = sorted(map(Path, glob.glob(name))) if glob.has_magic(name) else [Path(name)]
        if len(tars) == 1 and tars[0].is_dir():
            tars = sorted(tars[0].glob("*.tar"))
        if not tars or any(path.suffix != ".tar" for path in tars):
            named.append((name, weight))
        elif weight is None:
            loose += tars
        else:
            named.append((tars, weight))
    return named + [(loose, None)] * bool(loose)


def random(purpose: str, *key: int) -> np.random.Generator:
    """The purpose keeps streams apart: were `frame` to draw from the scene's numbers, the frame
    shown would depend on the shape."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


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


class Quota:
    """Ends a run, with the reasons, when too many of the last WINDOW samples were bad."""

    def __init__(self, max_bad: float):
        self.max_bad, self.recent, self.bad, self.total = max_bad, deque(), Counter(), Counter()
        self.samples = 0

    def add(self, samples: int, counts: dict[str, int]) -> None:
        """Count the bad among some more samples. Raises ValueError."""
        bad = Counter({reason: counts.get(reason, 0) for reason in video.REASONS})
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


# --------------------------------------------------------------------------------------------------
# Batches

class Batch(NamedTuple):
    step: int
    frames: torch.Tensor  # uint8 (b, f, 3, H, W); from a cache, latents float16 (b, f, 8, h, w)
    captions: list[str]
    numbers: list[int]    # the samples' numbers
    names: list[str]      # where they come from
    counts: Counter = Counter()  # of COUNTED, over the samples


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
