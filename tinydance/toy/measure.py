"""What measures share: hidden clips, a sampler, decibels, means and a table.

`evaluate.py` and `notebooks/pictures/figures.py` measure clip by clip: a record has one clip's
numbers by name, and a table's rows are means over records. Clips are uint8 arrays (f, 3, H, W).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tinydance.model import PixelDance
from tinydance.sampling import sample_frames
from tinydance.toy.world import Scene, World, sample_scene
from tinydance.vae import to_frames, to_pixels

HIDDEN_SEED = 1_000_003_000  # of the clips that are measured; the seeds of trainings are small
AT_A_TIME = 16  # clips in a batch

Record = dict[str, float | str]


def sample_hidden(seed: int, count: int) -> list[Scene]:
    """Scenes that no training saw: those of clips 0, 1, ... of a hidden seed."""
    return [sample_scene(np.random.default_rng([HIDDEN_SEED + seed, n])) for n in range(count)]


def choose_world(model: PixelDance) -> World:
    """The world of a model's clips, or of the clips that an image model's frames begin."""
    frames = model.settings.frames
    return World(model.settings.height, frames if frames > 1 else World.frames)


def stack_pixels(frames: Sequence[np.ndarray], model: PixelDance) -> Tensor:
    """Pictures or clips as one batch of pixels in [-1, 1], for the model."""
    return to_pixels(torch.from_numpy(np.stack(frames))).to(model.device)


def sample_clips(model, prompts, first, last, seed: int, **changes) -> Iterator[np.ndarray]:
    """Yield a clip for each prompt; first, last: None, or a picture (3, H, W) for each as well."""
    for i in range(0, len(prompts), AT_A_TIME):
        part = slice(i, i + AT_A_TIME)
        pictures = [None if x is None else stack_pixels(x[part], model) for x in (first, last)]
        frames = sample_frames(model, prompts[part], *pictures, seed=seed * 1000 + i, **changes)
        yield from to_frames(frames).cpu().numpy()


def make_round_trip(model: PixelDance, clips: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the clips as they come back from the VAE: the best that a model can do with it."""
    for i in range(0, len(clips), AT_A_TIME):
        z_0 = model.vae.encode_video(stack_pixels(clips[i : i + AT_A_TIME], model))
        yield from to_frames(model.vae.decode_video(z_0)).cpu().numpy()


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures."""
    error = ((a.astype(float) - b) ** 2).mean()
    return float(10 * np.log10(255**2 / (error + 1e-6)))


def average(records: list[Record], *by: str, mean=np.mean) -> dict[tuple, dict[str, float]]:
    """Return the mean of each number, NaN left out, over records that agree in the names `by`."""
    groups = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in by), []).append(record)
    rows = {}
    for key, group in groups.items():
        known = {}
        for name, value in (item for record in group for item in record.items()):
            if name not in by and not isinstance(value, str):
                known.setdefault(name, []).extend([value] * (not np.isnan(value)))
        rows[key] = {name: float(mean(values or [np.nan])) for name, values in known.items()}
        rows[key]["clips"] = len(group)
    return rows


def format_table(head: Sequence[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bootstrap(values, statistic=np.mean, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a statistic over samples drawn with replacement [bootstrap]."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(draws, len(values)))
    return tuple(np.quantile([statistic(values[pick]) for pick in picks], (0.025, 0.975)).tolist())
