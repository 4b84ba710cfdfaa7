"""Stories: shots, one after another, chained into one film, as the paper's authors directed theirs.

    style = "at night"                              # the end of every prompt
    [[shot]]
    prompt = "a red circle moves to the right"      # its first frame: the model's own
    clips = 2
    [[shot]]
    prompt = "a red circle moves to the left"       # goes on from the last frame before
    last = "end.png"

A composite shot is "formed by stringing together multiple continuous video clips" [paper §4.4.2],
each from the last frame of the one before; a cut begins anew. How stories are written down is
[ours: paper silent].

Read before: `sampling.py`. Read after: `sample.py`. Not here: how a video is encoded (`video.py`).
"""

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinydance.config import did_you_mean
from tinydance.model import PixelDance
from tinydance.run.checkpoints import sha256
from tinydance.run.cli import Progress
from tinydance.sampling import Sampling, chain, encode_picture, first_frame, sample_latents
from tinydance.vae import to_frames, to_pixels
from tinydance.video.read import read_image
from tinydance.video.strips import film_strip
from tinydance.video.write import check_output, save_video
from tinydance.weights.files import whole_file

# What a story says for all shots, and what for one. Pictures: by paths from the story's folder.
SHARED = {"style": str, "seed": int, "tau": (int, float, str), "guidance": (int, float)}


OF_A_SHOT = SHARED | {"prompt": str, "first": str, "last": str, "clips": int, "cut": bool}


OF_A_SHOT.pop("style")


WANTED = {str: "words in quotes", int: "a whole number", bool: "true or false",
          (int, float): "a number", (int, float, str): "a number of steps or a share"}  # fmt: skip


TILES = 8  # of a storyboard's row, at most


@dataclass(frozen=True)
class Shot:
    """One or more clips under one prompt.

    first, last: uint8 (3, H, W) or None; first is of use at a cut, last ends the last clip.
    """

    prompt: str
    first: Tensor | None = None
    last: Tensor | None = None
    clips: int = 1
    cut: bool = False  # begins with its own first frame, not with the last one before
    how: Sampling = Sampling()


def read_story(path: str | Path, size: tuple[int, int], how: Sampling = Sampling()) -> list[Shot]:
    """The shots of a story; pictures are cut to size (H, W), `how` is what the story leaves open.

    A shot without a seed has the story's plus its number. Raises ValueError naming the file, the
    shot and the key at fault.
    """
    path = Path(path)
    try:
        story = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read: {error}") from None
    told = story.pop("shot", [])
    if not isinstance(told, list) or not told or not all(isinstance(t, dict) for t in told):
        raise ValueError(f"{path}: no shot; begin each with a line [[shot]]")
    _check(f"{path}", story, SHARED, "shot")
    how = replace(how, **{k: v for k, v in story.items() if k != "style"})
    shots = []
    for i, said in enumerate(told):
        where = f"{path}, shot {i + 1}"
        _check(where, said, OF_A_SHOT)
        if "prompt" not in said:
            raise ValueError(f"{where}: no prompt; prompt = \"\" is one without words")
        if said.get("clips", 1) < 1:
            raise ValueError(f"{where}: clips is {said['clips']}; use 1 or more")
        if i and "first" in said and not said.get("cut"):
            raise ValueError(f"{where}: begins with the last frame before, and so has no use for "
                             f"first = {said['first']!r}; or say cut = true")  # fmt: skip
        pictures = {name: read_image(path.parent / said[name], size)
                    for name in ("first", "last") if name in said}  # fmt: skip
        own = {name: said[name] for name in ("tau", "guidance", "seed") if name in said}
        shots.append(Shot(
            prompt=f"{said['prompt']} {story.get('style', '')}".strip(),
            clips=said.get("clips", 1), cut=said.get("cut", i == 0),
            how=replace(how, **({"seed": how.seed + i} | own)), **pictures,
        ))  # fmt: skip
    return shots


def _check(where: str, said: dict, known: dict, *others: str) -> None:
    for key, value in said.items():
        if key not in known:
            near = did_you_mean(key, [*known, *others])
            raise ValueError(f"{where}: unknown key {key!r}{near}")
        kind = known[key]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{where}: {key} is {value!r}; it must be {WANTED[kind]}")


def forget(make: Callable[[], Tensor], *key) -> Tensor:
    """The `memory` of a film that keeps nothing."""
    return make()


def film(
    model: PixelDance,
    shots: list[Shot],
    image_model: PixelDance | None = None,
    number: int = 0,
    bar: bool = False,
    remember: Callable[..., Tensor] = forget,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the shot, its next clip), latents (1, f, 4, h, w) of frames not seen before.

    A cut without a first picture begins with the image model's own, or else with the model's.
    number: of the film, where one seed makes several. remember: see `memory`.
    """
    carried = None

    def sample(model, prompts, f_first, f_last, how, numbers, link, bar):
        def make():
            return sample_latents(model, prompts, f_first, f_last, how, numbers, link, bar)

        z_0 = remember(make, prompts, f_first, f_last, how.complete(model), numbers, link)
        return z_0.to(model.device)

    for i, shot in enumerate(shots):
        goes_on = carried is not None and not shot.cut
        f_first = carried
        if not goes_on:
            f_first = encode_picture(model, to_batch(shot.first))
        if f_first is None and image_model:
            f_first = remember(
                lambda: first_frame(image_model, model, [shot.prompt], shot.how, [number], bar),
                "first frame", shot.prompt, shot.how.complete(model), number,
            ).to(model.device)  # fmt: skip
        f_last = encode_picture(model, to_batch(shot.last))
        for z_0 in chain(model, [shot.prompt], shot.clips, f_first, f_last, shot.how, [number],
                         bar, sample):  # fmt: skip
            carried = z_0[:, -1]
            yield i, z_0[:, 1:] if goes_on else z_0
            goes_on = False  # the chain drops the frames that it shares itself


def to_batch(picture: Tensor | None) -> Tensor | None:
    """uint8 (3, H, W) -> pixels (1, 3, H, W)."""
    return None if picture is None else to_pixels(picture)[None]


def to_film(
    model: PixelDance, shots: list[Shot], clips: Iterator[tuple[int, Tensor]], rows: list[list]
) -> Iterator[Tensor]:
    """Decode what `film` yields, uint8 (f, 3, H, W); rows[i] gets some frames of shot i."""
    seen = [0] * len(shots)
    for i, z_0 in clips:
        with torch.no_grad():
            frames = to_frames(model.vae.decode_video(z_0))[0].cpu()
        every = ceil(shots[i].clips * shots[i].how.complete(model).frames / TILES)
        rows[i] += [frame for k, frame in enumerate(frames) if (seen[i] + k) % every == 0]
        seen[i] += len(frames)
        yield frames


def storyboard(shots: list[Shot], rows: list[list[Tensor]]):
    """A picture with a row a shot: its words, frames from `to_film`, its image instructions."""
    titles = [f"{i + 1}. {'' if shot.cut else '... '}{shot.prompt}" for i, shot in enumerate(shots)]
    short = min(rows[0][0].shape[-2:])
    return film_strip(
        [torch.stack(row) for row in rows], titles, scale=max(64, min(short, 128)) / short,
        first=[shot.first for shot in shots], last=[shot.last for shot in shots],
    )  # fmt: skip


# ------------------------------------------------------------------------------------ onto the disk
def save_film(
    model: PixelDance,
    shots: list[Shot],
    out: str | Path,
    image_model: PixelDance | None = None,
    number: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    about: dict = {},
    bar: Progress | None = None,
) -> None:
    """Write the film to what `out` ends in, see `video.save_video`, and with several shots their
    storyboard beside it.

    Finished clips are in OUT.parts until all are there: an interruption keeps them, and `resume`
    goes on. about: what else the file shall say of itself; clips are taken from OUT.parts only
    where all of it but the "command" is the same: name the model, `fingerprint`. bar: counts clips.
    Raises FileExistsError as `check_film`.
    """
    check_film(shots, out, overwrite, resume)
    parts, total, rows = parts_of(out), sum(shot.clips for shot in shots), [[] for _ in shots]
    if parts.exists() and not resume:
        shutil.rmtree(parts)
    remember = forget
    if total > 1:
        parts.mkdir(parents=True, exist_ok=True)
        same = {name: value for name, value in about.items() if name != "command"}
        remember = memory(parts, json.dumps(same))
    clips = film(model, shots, image_model, number, bar is not None and bar.shown, remember)
    about = about | {"number": number, "shots": [said_of(shot, model) for shot in shots]}
    save_video(
        counted(to_film(model, shots, clips, rows), bar), out, model.settings.fps,
        overwrite=overwrite, caption=shots[0].prompt, first=shots[0].first, last=shots[-1].last,
        about=about, unfinished=parts if total > 1 else None,
    )  # fmt: skip
    if len(shots) > 1:
        storyboard(shots, rows).save(storyboard_of(out))
    if parts.exists():
        shutil.rmtree(parts)


def check_film(shots: list[Shot], out: str | Path, overwrite: bool, resume: bool) -> None:
    """Raise before the work what would be raised after it: FileExistsError for names that are
    taken, or for clips of an interrupted film that neither `resume` nor `overwrite` is for."""
    check_output(out, overwrite)
    if len(shots) > 1:
        check_output(storyboard_of(out), overwrite)
    if parts_of(out).exists() and not (resume or overwrite):
        raise FileExistsError(f"{parts_of(out)} holds clips of an interrupted {out}; go on with "
                              "--resume, or begin anew with --overwrite")  # fmt: skip


def parts_of(out: str | Path) -> Path:
    """The folder of a film's finished clips, until all are there."""
    path = Path(out)
    return path.with_name(f"{path.name}.parts")


def storyboard_of(out: str | Path) -> Path:
    path = Path(out)
    return path.with_name(f"{path.stem}_storyboard.png")


def memory(folder: Path, identity: str) -> Callable[..., Tensor]:
    """remember(make, *key): what make() gave for this key once before, or else make() now.

    A tensor is a file in the folder, whose name is a hash of all that it is made from: the
    identity (of the model, say) and the key. So a film that was interrupted goes on where it
    stopped, and of one whose story was changed only what the change concerns is made anew.
    """

    def remember(make: Callable[[], Tensor], *key) -> Tensor:
        digest = hashlib.sha256(identity.encode())
        for part in key:
            is_tensor = torch.is_tensor(part)
            digest.update(part.cpu().numpy().tobytes() if is_tensor else repr(part).encode())
            digest.update(b";")
        path = folder / f"{digest.hexdigest()[:24]}.npy"
        if not path.exists():
            made = make().cpu().numpy()
            with whole_file(path) as file:
                np.save(file, made)
        return torch.from_numpy(np.load(path))

    return remember


def fingerprint(folder: str | Path) -> str:
    """A sha256 of all files of a model folder's parts."""
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    files = [file for part in parts for file in sorted((Path(folder) / part).iterdir())]
    digests = [sha256(file) for file in files if file.is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def said_of(shot: Shot, model: PixelDance) -> dict:
    """A shot for the file's own record; of pictures, only whether there were any."""
    told = {"prompt": shot.prompt, "first": shot.first is not None, "last": shot.last is not None}
    return told | {"clips": shot.clips, "cut": shot.cut} | asdict(shot.how.complete(model))


def counted(clips: Iterator[Tensor], bar: Progress | None) -> Iterator[Tensor]:
    for frames in clips:
        if bar is not None:
            bar.update()
        yield frames
