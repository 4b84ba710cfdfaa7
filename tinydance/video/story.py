"""Films: shots one after another, read from a story, made clip by clip, safe from interruptions.

A composite shot is "formed by stringing together multiple continuous video clips" [paper §4.4.2],
each from the last frame of the one before; a cut begins anew. The format of stories, and how an
interrupted film is resumed, are [ours: paper silent].
Not here: how a clip is made (`sampling.py`), how a video is encoded (`write.py`).
"""

import hashlib
import itertools
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinydance.config import did_you_mean
from tinydance.model import PixelDance, Settings
from tinydance.sampling import chain, encode_picture, sample_latents
from tinydance.vae import to_frames, to_pixels
from tinydance.video.read import read_image
from tinydance.video.write import check_output, save_video
from tinydance.weights.files import (
    clear_parts,
    hold,
    pick,
    read_json,
    storable,
    whole_file,
    write_json,
)
from tinydance.weights.untrusted import check_types, read_text, reading

# A story's keys and their types; first and last are paths of pictures, from the story's folder.
SETTINGS = {"seed": int, "tau": int | float | str, "guidance": float}
SHOT = SETTINGS | {"prompt": str, "clips": int, "cut": bool, "first": str, "last": str}


@dataclass(frozen=True)
class Shot:
    """One or more clips under one prompt. pictures: uint8 (3, H, W), named as the instructions are,
    "first" and "last"; for a variant also clips (f, 3, H, W), and floats that go in as they are."""

    prompt: str
    pictures: dict[str, Tensor] = field(default_factory=dict)
    clips: int = 1
    cut: bool = False  # begin with a first frame of its own, not with the last frame before
    settings: Settings | None = None  # None: the model's

    def check(self, model: PixelDance) -> "Shot":
        """The shot with its settings. Raises ValueError for what cannot be made."""
        settings = (self.settings or model.settings).check(model)
        if self.clips < 1:
            raise ValueError(f"clips is {self.clips}; use 1 or more")
        if settings.frames == 1 and (self.pictures or self.clips > 1 or not self.cut):
            raise ValueError("frames is 1: a picture is made from text alone, and by itself")
        return replace(self, settings=settings)


def read_story(path: str | Path, model: PixelDance, settings: Settings | None = None) -> list[Shot]:
    """The shots of a story. settings: what it leaves open. ValueError names the key at fault."""
    path, shots = Path(path), []
    with reading(path):
        story = tomllib.loads(read_text(path))
        check_keys(story, SETTINGS | {"style": str, "shot": list})
        settings = replace(settings or model.settings, **pick(story, [*SETTINGS]))
        size = settings.height, settings.width
    for i, table in enumerate(story.get("shot") or [None]):
        with reading(f"{path}, shot {i + 1}"):
            check_keys(table, SHOT)
            prompt = f"{table.get('prompt', '')} {story.get('style', '')}".strip()
            files = pick(table, ["first", "last"])
            pictures = {name: read_image(path.parent / file, size) for name, file in files.items()}
            cut = table.get("cut", i == 0) or "first" in pictures
            own = {"seed": settings.seed + i} | pick(table, [*SETTINGS])
            shot = Shot(prompt, pictures, table.get("clips", 1), cut, replace(settings, **own))
            shots.append(shot.check(model))
    return shots


def check_keys(table: dict, known: dict) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{table!r:.100} is no shot; begin each with a line [[shot]]")
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r:.100}{did_you_mean(key, known)}")
    check_types(table, known)


def film(model: PixelDance, shots: list[Shot], number=0, make=sample_latents) -> Iterator[tuple]:
    """Yield (index of the shot, its next clip): latents (1, f, 4, h, w) of frames not seen before.
    number: of the film, where one seed makes several. make: makes a clip's z_0, see `chain`."""
    carried = {}  # the last frame before, for a shot that goes on from it
    for i, shot in enumerate(shots):
        carried = {} if shot.cut else carried
        given = {name: encode(model, picture) for name, picture in shot.pictures.items()} | carried
        clips = chain(model, [shot.prompt], shot.clips, given, shot.settings, [(number,)], make)
        for link, z_0 in enumerate(clips):
            yield i, z_0[:, 1:] if carried and link == 0 else z_0  # `chain` drops that of others
        carried = {"first": z_0[:, -1]}


def encode(model: PixelDance, picture: Tensor) -> Tensor:
    """uint8 -> scaled latents: a picture (3, H, W) is (1, 4, h, w), a clip (1, f, 4, h, w)."""
    if picture.is_floating_point():  # an instruction already, such as depth (f, 1, h, w)
        return picture[None].to(model.device)
    pixels = to_pixels(picture)[None].to(model.device)
    return encode_picture(model, pixels) if picture.ndim == 3 else model.vae.encode_video(pixels)


def describe_film(model: PixelDance, shots: list[Shot], number: int = 0) -> dict:
    """All that decides what a film of this model shows; of each picture a sha256."""
    fields = [asdict(shot.check(model)) for shot in shots]
    for shot in fields:
        pixels = {
            name: picture.cpu().numpy().tobytes() for name, picture in shot["pictures"].items()
        }
        shot["pictures"] = {name: hashlib.sha256(x).hexdigest() for name, x in pixels.items()}
    return {"number": number, "shots": fields}


def fingerprint(folder: str | Path) -> str:
    """A sha256 of all files of a model's parts, the folders inside its folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in Path(folder).glob("*/*") if path.is_file()):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def name_parts(out: str | Path) -> Path:
    """The folder of a film's finished clips. It is there until the film is finished."""
    return Path(f"{Path(out)}.parts")


def is_begun(out: str | Path) -> bool:
    """Is the film not finished yet? film.json comes before its clips, and goes before them."""
    return (name_parts(out) / "film.json").exists()


def check_film(out: str | Path, metadata: dict, overwrite: bool, resume: bool) -> int:
    """How many clips of this film are there, also where it was asked for in other words. Raises
    what stands in its way: ValueError for a name that cannot be written or has clips of another,
    FileExistsError for one that is taken."""
    parts, any_words = name_parts(out), {"command": ""}
    begun = read_json(parts / "film.json") if is_begun(out) else {}
    is_same = begun | any_words == storable(metadata) | any_words
    clips, may_replace = begun and list(parts.glob("*.npy")), overwrite or (resume and is_same)
    if clips and not may_replace:
        advice = "the same command and --resume go on with its own film, --overwrite begins anew"
        raise ValueError(f"{parts} holds clips of {'another' if resume else 'a'} film; {advice}")
    check_output(out, may_replace)  # a film that was killed at its end has left it
    return len(clips) if is_same else 0


@contextmanager
def claim(out: str | Path) -> Iterator[Path]:
    """Keep a film's name for this process. In the end only clips to go on from are left there."""
    with hold(parts := name_parts(out)):
        clear_parts(out)
        try:
            yield parts
        finally:
            if not (is_begun(out) and list(parts.glob("*.npy"))):
                clear(parts)


def clear(parts: Path) -> None:
    for path in [*parts.glob("film.json*"), *parts.glob("[0-9]*.npy*")]:
        path.unlink()


def save_film(
    model, shots, out, metadata: dict, make=sample_latents, overwrite=False, resume=False
) -> None:
    """Write the film to `out`. Until all of it is written, OUT.parts keeps the latents of finished
    clips; from them another call makes the same film bit for bit. metadata: `describe_film`'s and
    what else the video shall keep. Raises like `check_film`, and BlockingIOError like `hold`."""
    count = itertools.count()
    with claim(out) as parts:
        if not check_film(out, metadata, overwrite, resume):
            clear(parts)
        write_json(parts / "film.json", storable(metadata))

        def read_or_make(model: PixelDance, *arguments) -> Tensor:
            path = parts / f"{next(count):04d}.npy"
            if not path.exists():
                with whole_file(path) as file:
                    np.save(file, make(model, *arguments).cpu().numpy())
            return torch.from_numpy(np.load(path)).to(model.device)

        clips = film(model, shots, metadata["number"], read_or_make)
        frames = (to_frames(model.vae.decode_video(z_0))[0].cpu() for _, z_0 in clips)
        beside = shots[0].prompt, shots[0].pictures.get("first"), shots[-1].pictures.get("last")
        save_video(frames, out, model.settings.fps, True, *beside, metadata)
        (parts / "film.json").unlink()
