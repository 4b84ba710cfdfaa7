"""A cache of latents: the VAE's work, done once and kept on disk.

The VAE is frozen [paper §4.1]: what it makes of a frame never changes, and costs 30 % of the UNet's
arithmetic. manifest.json has the VAE's fingerprint, size, fps, and how many rows and shards there
are; 00000.safetensors the moments (mean and standard deviation, float16 (frames, 8, h, w)) that
training draws latents from as it does online, and each video's frames, name and caption.
Not here: text embeddings, which are larger than the text by far.
"""

import hashlib
import json
from collections import namedtuple
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tinydance.data.batches import Quota, load
from tinydance.data.index import Strings, hash_name
from tinydance.data.order import Files
from tinydance.data.rows import confine
from tinydance.vae import FRAMES_AT_A_TIME, VAE, to_pixels
from tinydance.video.read import BadSample, decoding
from tinydance.weights.files import clear_parts, read_json, storable, write_json
from tinydance.weights.safetensors import load_safetensors, save_safetensors
from tinydance.weights.untrusted import check_types, reading

SHARD = 256  # rows of the data in a shard: what an interruption may cost
MANIFEST = {"vae": str, "height": int, "width": int, "fps": float, "rows": int, "shards": int}
# How far a rank is with its share: rows that are done, of how many, and what was wrong, by reason.
Written = namedtuple("Written", "done total counts")


class CachedVideo(namedtuple("CachedVideo", "name caption path first count fps")):
    """A row of a cache, see `rows.py`: `count` frames of the shard `path`, from `first` on."""

    what = "videos"

    def read(self, choose_start, frames, fps, size, at) -> Tensor:
        """Moments, float16 (frames, 8, h, w); the last is repeated where the video ends."""
        first = self.first + round(choose_start(self.count / self.fps) * self.fps)
        moments = load_safetensors(self.path)["moments"]
        return moments[first + torch.arange(frames).clamp(max=self.count - 1)]


class Latents:
    """The index of a cache. Raises ValueError for another size or rate, or an unfinished one."""

    kind = CachedVideo

    def __init__(self, folder: str | Path, size: tuple[int, int], fps: float):
        self.where, self.notes, root = folder, [], Path(folder)
        with reading(root / "manifest.json"):
            self.manifest = made = read_json(root / "manifest.json")
            check_types(made, MANIFEST)
            if missing := [key for key in MANIFEST if key not in made]:
                raise ValueError(f"it lacks {', '.join(missing)}; make the cache anew")
        before, now = (made["height"], made["width"], made["fps"]), (*size, fps)
        if before != now:
            raise ValueError(f"{folder}: made for height, width, fps {before}; this run has {now}")
        self.paths = paths = [shard_path(root, k) for k in range(made["shards"])]
        if (there := sum(path.is_file() for path in paths)) < len(paths):
            raise ValueError(f"{folder}: {there} of {len(paths)} shards; repeat --stage latents")
        videos, places, shapes = [], [], set()
        for k, path in enumerate(paths):
            with reading(path):
                clips, frames, shape = read_shard(confine(root, path.name))
            videos += clips
            shapes |= {shape} if clips else set()
            places.append(np.stack([np.full_like(frames, k), frames.cumsum() - frames, frames]))
        if len(shapes) != 1:  # one shape of latents
            nothing = "a cache of nothing; no video of its data could be read"
            raise ValueError(f"{folder}: {f'latents of {shapes}' if shapes else nothing}")
        self.places = np.concatenate(places, axis=1)  # shard, first frame there, frames
        self.names, self.captions = (Strings(texts) for texts in zip(*videos, strict=True))
        self.hashes = np.array([*map(hash_name, self.names)])
        self.missing_captions = sum(not caption for caption in self.captions)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> CachedVideo:
        shard, *place = self.places[:, i].tolist()
        given = self.names[i], self.captions[i], self.paths[shard], *place
        return CachedVideo(*given, self.manifest["fps"])


def is_cache(folder: str | Path) -> bool:
    """And not, say, a folder of videos in which another program has its manifest.json."""
    folder = Path(folder)
    return (folder / "manifest.json").is_file() and any(folder.glob("*.safetensors"))


def read_shard(path: Path) -> tuple[list, np.ndarray, tuple]:
    """Its videos (name, caption), the frames of each, the shape of latents. Raises any error."""
    tensors = load_safetensors(path)
    clips, frames = json.loads(tensors["clips"].numpy().tobytes()), tensors["frames"].numpy()
    shape, texts = tensors["moments"].shape, [text for clip in clips for text in clip]
    is_right = frames.shape == (len(clips),) and frames.dtype == np.int64
    is_right &= all(len(clip) == 2 for clip in clips) and {*map(type, texts)} <= {str}
    if not is_right or min([1, *frames]) < 1 or sum(map(int, frames)) != shape[0]:
        raise ValueError("damaged: its videos and latents do not belong together; make it anew")
    return clips, frames, shape[1:]


def shard_path(folder: Path, k: int) -> Path:
    return folder / f"{k:05d}.safetensors"


def find_caches(source) -> list[Latents]:
    """The caches that a source is made of."""
    indexes = (getattr(leaf, "rows", None) for leaf in source.leaves())
    return [rows for rows in indexes if isinstance(rows, Latents)]


def check_vae(source, vae: VAE) -> None:
    """Raises ValueError for a cache made with another VAE."""
    for cache in find_caches(source):
        if cache.manifest["vae"] != fingerprint_vae(vae):
            raise ValueError(f"{cache.where}: made with another VAE; make one with this VAE")


def fingerprint_vae(vae: VAE) -> str:
    """sha256 of all that latents depend on."""
    digest = hashlib.sha256(repr(vae.config.scaling_factor).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_cache(
    source, vae, folder, data, rank=0, world_size=1, workers=0, max_bad=0.05, autocast=nullcontext
) -> Iterator[Written]:
    """Encode this rank's share of a source of videos; yield at the beginning and after each video.
    Stop whenever you like: another call goes on after the last whole shard. data: the source's name
    in the manifest. ValueError: `folder` is another cache, or a share above `max_bad` is bad."""
    is_whole = isinstance(source, Files) and hasattr(source.rows.kind, "pieces")
    if not is_whole or source.crop != "centre":
        raise ValueError(f"--data {data}: a cache holds one source of videos, with --crop centre")
    folder, rows, (height, width) = Path(folder), range(len(source.rows)), source.size
    manifest = {"vae": fingerprint_vae(vae), "height": height, "width": width, "fps": source.fps}
    manifest |= {"data": storable(data), "rows": len(rows), "shards": ceil(len(rows) / SHARD)}
    if (folder / "manifest.json").is_file():
        made = read_json(folder / "manifest.json")
        if other := [name for name in manifest if made.get(name) != manifest[name]]:
            raise ValueError(f"{folder}: a cache with other {', '.join(other)}; use another --out")
    elif rank == 0:
        write_json(folder / "manifest.json", manifest)
    mine = range(rank, manifest["shards"], world_size)
    shards = {shard_path(folder, k): rows[k * SHARD : (k + 1) * SHARD] for k in mine}
    missing = {path: chosen for path, chosen in shards.items() if not path.is_file()}
    total = sum(map(len, shards.values()))
    done, quota = total - sum(map(len, missing.values())), Quota(max_bad)
    yield Written(done, total, quota.total)
    for path, chosen in missing.items():
        clear_parts(path)
        moments, rows_read, unread = {i: [] for i in chosen}, {}, len(chosen)
        for i, row, frames, counts in load(Pieces(source, chosen), workers):
            if frames is not None:
                rows_read[i] = row
                with autocast():
                    moments[i].append(encode_moments(vae, frames))
                continue
            quota.add(1, counts)
            unread, done = unread - 1, done + 1
            if unread == 0:
                save_shard(path, [(rows_read[i], moments[i]) for i in chosen if moments[i]])
            yield Written(done, total, quota.total)


@dataclass
class Pieces(IterableDataset):
    """The videos of some rows in pieces: (i, row i, uint8 (f, 3, H, W), {}), and behind the last
    (i, None, None, why it, or the rest of it, cannot be read). A worker reads every n-th row."""

    source: Files
    chosen: range

    def __iter__(self) -> Iterator[tuple]:
        worker, source = get_worker_info(), self.source
        for i in self.chosen[worker.id :: worker.num_workers] if worker else self.chosen:
            counts = {}
            try:
                with decoding():
                    row = source.rows[i]
                    for frames in row.pieces(source.fps, source.size):
                        yield i, row, frames, counts
            except BadSample as error:
                counts = {error.reason: 1}
            yield i, None, None, counts


@torch.no_grad()
def encode_moments(vae: VAE, frames: Tensor) -> Tensor:
    """uint8 (f, 3, H, W) -> scaled mean and standard deviation, float16 (f, 8, h, w)."""
    device = vae.quant_conv.weight.device
    parts = [vae.encode(to_pixels(some.to(device))) for some in frames.split(FRAMES_AT_A_TIME)]
    mean, logvar = (torch.cat(part).float() for part in zip(*parts))
    moments = torch.cat([mean, (0.5 * logvar).exp()], dim=1)
    return (moments * vae.config.scaling_factor).half().cpu()


def save_shard(path: Path, videos: list) -> None:
    """videos: (row, its moments in pieces)."""
    clips = json.dumps([(row.name, " ".join(row.caption.split())) for row, _ in videos])
    pieces = [piece for _, moments in videos for piece in moments]
    tensors = {"moments": torch.cat(pieces) if pieces else torch.zeros(0)}
    tensors["frames"] = torch.tensor([sum(map(len, moments)) for _, moments in videos]).long()
    tensors["clips"] = torch.frombuffer(bytearray(clips.encode()), dtype=torch.uint8)
    save_safetensors(tensors, path)
