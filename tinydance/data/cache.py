"""A cache of latents: the VAE's work, done once and kept on disk.

The VAE is frozen [paper §4.1], so what it makes of a frame never changes, and online it costs 30 %
of the UNet's arithmetic at full scale. `--stage latents` writes every video whole, at the rate of
the clips, so that the random start remains. Kept are mean and standard deviation: training draws
from them as it would online, and so is the same training, to float16's rounding. What a cache
fixes: starts are multiples of 1 / fps, and the crop is the one that it was made with.

    manifest.json         the VAE's fingerprint, size, fps, number of rows and shards
    00000.safetensors     moments (frames, 8, h, w) float16; how many are whose; names, captions

Read before: `data.py`. Not included: text embeddings, which are larger than the text by far.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tinydance.data.batches import Quota, ignore_signals
from tinydance.data.index import Rows, Texts, open_row
from tinydance.data.order import Files, Mixture, WithPictures, said
from tinydance.run.cli import Progress
from tinydance.training import Clip
from tinydance.vae import FRAMES_AT_A_TIME, VAE, to_pixels
from tinydance.video.read import BadSample, read_all
from tinydance.weights.files import read_json, write_json
from tinydance.weights.safetensors import load_safetensors, save_safetensors

SHARD = 256  # rows of the data in a shard: what an interruption may cost


class CachedRows:
    """The index of a cache, as `sources.py` has them. ValueError for an unfinished one."""

    def __init__(self, folder: str | Path):
        self.where, self.folder, self.notes = folder, Path(folder), []
        self.manifest = read_json(self.folder / "manifest.json")
        count = self.manifest["shards"]
        there = sum(shard_path(self.folder, k).is_file() for k in range(count))
        if there < count:
            raise ValueError(f"{folder}: {there} of {count} shards; the same --stage latents that "
                             "began it goes on")
        names, captions, places = [], [], []
        for k in range(count):
            tensors = load_safetensors(shard_path(self.folder, k))
            clips = json.loads(tensors["clips"].numpy().tobytes())
            frames = tensors["frames"].numpy()
            places.append(np.stack([np.full_like(frames, k), np.cumsum(frames) - frames, frames]))
            names += [name for name, _ in clips]
            captions += [caption for _, caption in clips]
        self.places = np.concatenate(places, axis=1)  # shard, first frame there, frames
        self.names, self.captions = Texts(names), Texts(captions)
        self.missing_captions = sum(not caption for caption in captions)
        if not names:
            raise ValueError(f"{folder}: a cache of nothing; no video of its data could be read")

    def __len__(self) -> int:
        return len(self.names)

    def caption(self, i: int) -> str:
        return self.captions[i]


class Latents(Files):
    """A cache as a source: its clips are moments, float16 (f, 8, h, w), and not pixels.

    ValueError for a cache of another size or rate, or one that is not finished.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int], frames: int = 16, fps: float = 4,
                 seed: int = 0, short: str = "pad"):
        super().__init__(CachedRows(folder), size, frames, fps, seed, short)
        made = self.rows.manifest
        if (made["height"], made["width"], made["fps"]) != (*size, fps):
            raise ValueError(f"{folder}: made for {made['height']}x{made['width']} at "
                             f"{made['fps']} fps, and this run is {size[0]}x{size[1]} at {fps} fps")

    def _read(self, i: int, frames: int, draw: np.random.Generator) -> Clip:
        shard, first, count = self.rows.places[:, i].tolist()
        spare, caption = count - frames, self.rows.captions[i]
        if spare < 0 and self.short == "reject":
            raise BadSample("too_short", f"{self.rows.names[i]} {count / self.fps:.2f} s")
        first += int(draw.random() * (max(0, spare) + 1))  # as Files with starts on the grid
        moments = load_safetensors(shard_path(self.rows.folder, shard))["moments"]
        moments = moments[first + torch.arange(frames).clamp(max=count - 1)]  # the last, repeated
        counts = Counter(padded=int(spare < 0), no_caption=int(not caption))
        return Clip(moments, caption, self.rows.names[i], counts)


def is_cache(path: str | Path) -> bool:
    return (Path(path) / "manifest.json").is_file()


def shard_path(folder: Path, k: int) -> Path:
    return folder / f"{k:05d}.safetensors"


def caches(source) -> list[Latents]:
    """Those that a source is made of."""
    if isinstance(source, Latents):
        return [source]
    parts = [source.clips, source.pictures] if isinstance(source, WithPictures) else []
    parts += source.sources if isinstance(source, Mixture) else []
    return [cache for part in parts for cache in caches(part)]


def check_vae(source, vae: VAE) -> None:
    """ValueError where a cache was made with another VAE, whose latents mean something else."""
    for cache in caches(source):
        if cache.rows.manifest["vae"] != fingerprint(vae):
            raise ValueError(f"{cache.rows.folder}: made with another VAE; make it anew with this "
                             "one, in another folder")


def fingerprint(vae: VAE) -> str:
    """sha256 of all that latents depend on: the encoder's weights and the scale."""
    digest = hashlib.sha256(repr(vae.config["scaling_factor"]).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def moments_of(vae: VAE, frames: Tensor) -> Tensor:
    """uint8 (f, 3, H, W) -> scaled mean and standard deviation, float16 (f, 8, h, w)."""
    device, parts = vae.quant_conv.weight.device, []
    for some in frames.split(FRAMES_AT_A_TIME):
        mean, logvar = vae.encode(to_pixels(some.to(device)))
        parts.append(torch.cat([mean.float(), (0.5 * logvar.float()).exp()], dim=1))
    return (torch.cat(parts) * vae.config["scaling_factor"]).half().cpu()


def write_cache(source, vae: VAE, folder: str | Path, data: str, rank: int = 0, world_size: int = 1,
                workers: int = 0, max_bad: float = 0.05, autocast=None, stopping=lambda: False
                ) -> bool:
    """Encode every video of a source of files; -> whether all of this rank's shards are there.

    Shard k is rank k % world_size's and appears whole or not at all, so an interrupted call goes on
    where it stopped. stopping() is asked between two videos. ValueError where `folder` holds a
    cache of something else, or where too many files are bad.
    """
    if type(source) is not Files or source.pictures or source.crop != "centre":
        raise ValueError(f"--data {data}: a cache is made of one source of videos, with --crop "
                         "centre; several caches can then be mixed")
    folder, rows = Path(folder), source.rows
    manifest = {"vae": fingerprint(vae), "height": source.size[0], "width": source.size[1],
                "fps": source.fps, "data": data, "rows": len(rows),
                "shards": -(-len(rows) // SHARD)}
    if is_cache(folder):
        made = read_json(folder / "manifest.json")
        other = [name for name in manifest if made.get(name) != manifest[name]]
        if other:
            raise ValueError(f"{folder}: a cache with other {', '.join(other)}; use another --out")
    elif rank == 0:
        write_json(folder / "manifest.json", manifest)
    mine = range(rank, manifest["shards"], world_size)
    todo = [k for k in mine if not shard_path(folder, k).is_file()]
    quota = Quota(max_bad)
    bar = Progress("latents", len(mine), "shard", len(mine) - len(todo), True, shown=rank == 0)
    with bar:
        for k in todo:
            chosen = range(k * SHARD, min((k + 1) * SHARD, len(rows)))
            clips = list(_encoded(source, vae, chosen, workers, quota, autocast, stopping))
            if stopping():
                return False
            moments = torch.cat([moments for _, _, moments in clips]) if clips else torch.zeros(0)
            text = json.dumps([clip[:2] for clip in clips]).encode()
            save_safetensors({
                "moments": moments, "frames": torch.tensor([len(clip[2]) for clip in clips]).long(),
                "clips": torch.frombuffer(bytearray(text), dtype=torch.uint8),
            }, shard_path(folder, k))
            bar.update(bad=said(quota.total) or "none")
    return True


def _encoded(source, vae, chosen, workers, quota, autocast, stopping
             ) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (name, caption, moments) of each row that can be read, in their order."""
    loader = DataLoader(_Pieces(source, chosen), batch_size=None, num_workers=workers,
                        worker_init_fn=ignore_signals)
    parts, done = {i: [] for i in chosen}, {}
    for i, piece, name, caption, reason in loader:
        if piece is not None:
            with autocast() if autocast else torch.no_grad():
                parts[i].append(moments_of(vae, piece))
            continue
        quota.add(1, {reason: 1} if reason else {})
        done[i] = name, caption
        if stopping():
            return
    for i in chosen:
        if parts[i]:
            yield *done[i], torch.cat(parts[i])


class _Pieces(IterableDataset):
    """Every video in pieces; after its last, its name, caption and what was wrong with it."""

    def __init__(self, source: Files, chosen: range):
        self.source, self.chosen = source, chosen

    def __iter__(self):
        info = get_worker_info()
        rows: Rows = self.source.rows
        for i in self.chosen[info.id::info.num_workers] if info else self.chosen:
            name, caption, reason = "", "", ""
            try:
                row = rows[i]
                name, caption = row.name, " ".join(row.caption.split())
                with open_row(row) as file:
                    for piece in read_all(file, self.source.fps, self.source.size, row.start,
                                                row.end):
                        yield i, piece, "", "", ""
            except BadSample as error:
                reason = error.reason
            yield i, None, name, caption, reason
