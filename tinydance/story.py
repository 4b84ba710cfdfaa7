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

Read before: `sampling.py`. Read after: `sample.py`. Not here: pictures into files (`video.py`).
"""

import hashlib
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinydance.config import did_you_mean
from tinydance.model import PixelDance
from tinydance.sampling import Sampling, chain, encode_picture, first_frame, sample_latents
from tinydance.video import film_strip, read_image, to_frames, to_pixels
from tinydance.weights import whole_file

# What a story says for all shots, and what for one; pictures by their paths from the story's folder.
SHARED = {"style": str, "seed": int, "tau": (int, float, str), "guidance": (int, float)}
OF_A_SHOT = SHARED | {"prompt": str, "first": str, "last": str, "clips": int, "cut": bool}
OF_A_SHOT.pop("style")
WANTED = {str: "words in quotes", int: "a whole number", bool: "true or false",
          (int, float): "a number", (int, float, str): "a number of steps or a share"}  # fmt: skip
TILES = 8  # of a storyboard's row, at most


@dataclass(frozen=True)
class Shot:
    """One or more clips under one prompt. first, last: uint8 (3, H, W) or None."""

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
    if not isinstance(told, list) or not told:
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


def film(
    model: PixelDance,
    shots: list[Shot],
    image_model: PixelDance | None = None,
    number: int = 0,
    bar: bool = False,
    remember: Callable[..., Tensor] = lambda make, *key: make(),
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
            with whole_file(path) as file:
                np.save(file, make().cpu().numpy())
        return torch.from_numpy(np.load(path))

    return remember


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
    return film_strip(
        [torch.stack(row) for row in rows], titles,
        first=[shot.first for shot in shots], last=[shot.last for shot in shots],
    )  # fmt: skip
