"""How well a toy model follows its instructions: the referee's verdict on clips that it never saw.

    python -m tinydance.toy.evaluate --model FOLDER --clips 500

Rows are kinds of instruction (`ROWS`); shares are in percent, as they are, beside those of true
clips after the VAE, which no model can beat. `end` is how far from where it should the object ends
(median, in percent of the width), `jump` the change into the last frame over that into the others;
behind +- stands half of a bootstrap's 95 % interval. [ours]
Not here: FVD and its kin (`metrics/`); figures of directing (`notebooks/pictures/figures.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tinydance.config import autocast, choose_device, choose_dtype
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, progress, run_main
from tinydance.toy import SHIPPED, measure
from tinydance.toy.paint import MIDDLE, UNITS
from tinydance.toy.referee import compare, referee
from tinydance.toy.world import MOTIONS, Scene, describe, parse, render, sample_path

CEILING, CHEAT = "true clips, after the VAE", "cheat: first and last frame cross-faded"


@dataclass(frozen=True)
class Row:
    """What a model is given of each hidden clip."""

    text: bool = False
    first: bool = False
    last: bool = False
    each: bool = False  # one first frame under every motion in turn: so it tells nothing
    against: bool = False  # the last frame of another end than the words', seen in every step
    links: int = 1  # clips in a chain, each from the last frame of the one before


ROWS = {
    "text": Row(text=True),
    "first": Row(first=True),
    "first, last": Row(first=True, last=True),
    "text, first": Row(text=True, first=True),
    "text, first, last": Row(text=True, first=True, last=True),
    "text, first, another last": Row(text=True, first=True, last=True, against=True),
    "same first, each motion": Row(text=True, first=True, each=True),
    "chain of 8, the last clip": Row(text=True, first=True, links=8),
}
SHARES = ("colour", "shape", "background", "other", "change", "motion", "end looks")
COLUMNS = (*SHARES, "end", "jump", "first, dB")


def check_rows(model: PixelDance, names: list[str] | None) -> list[str]:
    """Return the names, by default all of ROWS. ValueError: a row that the model cannot have."""
    known = list(ROWS) if model.settings.frames > 1 else ["text"]  # an image model has no other
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"unknown row {unknown[0]!r}; known are: {'; '.join(known)}")
    return names or known


def evaluate(model: PixelDance, clips: int, rows: list[str], seed=0, **changes) -> Iterator[dict]:
    """Yield a record of each clip: those of the ceiling and the cheat, then those of the rows.
    changes: of `Settings`."""
    scenes = measure.sample_hidden(seed, clips)
    truth, captions = render_all(model, scenes), [describe(scene) for scene in scenes]
    trips = measure.make_round_trip(model, truth)
    yield from (judge(CEILING, *three) for three in zip(trips, captions, truth))
    if model.settings.frames > 1:
        u = np.linspace(0, 1, model.settings.frames)[:, None, None, None]
        fades = (clip[0] + (clip[-1] * 1.0 - clip[0]) * u for clip in truth)
        yield from (judge(CHEAT, *three) for three in zip(fades, captions, truth))
    for name in rows:
        some = scenes[: max(1, clips // ROWS[name].links)]
        made = make_clips(model, ROWS[name], some, seed, **changes)
        yield from (judge(name, *three) for three in made)


def make_clips(model: PixelDance, row: Row, scenes: list[Scene], seed: int, **changes):
    """Yield of each scene: a clip (f, 3, H, W) that is made from what the row gives, the caption
    that was asked for, and the true clip where the first frame was the true one, else None."""
    rng, count = np.random.default_rng(seed), len(scenes)
    if row.each:
        scenes = spread_motions(scenes, rng)
    if row.against:
        scenes, changes = [turn_aside(scene, rng) for scene in scenes], {"tau": 1.0} | changes
    prompts, goals = [describe(scene) for scene in scenes], render_all(model, scenes)
    first, last, made = [clip[0] for clip in goals], [clip[-1] for clip in goals], []
    for link in range(row.links):
        if link > 0:
            first = [clip[-1] for clip in made]
            prompts = [go_on(*pair, rng) for pair in zip(prompts, made)]
        text = prompts if row.text else [""] * count
        pictures = first if row.first else None, last if row.last else None
        made = measure.sample_clips(model, text, *pictures, seed * 1000 + link, **changes)
        made = list(made) if row.links > 1 else made
    yield from zip(made, prompts, goals if row.first and row.links == 1 else [None] * count)


def render_all(model: PixelDance, scenes: list[Scene]) -> list[np.ndarray]:
    """The true clips, as long as the model's."""
    pick = slice(model.settings.frames)
    return [render(scene, measure.choose_world(model), pick) for scene in scenes]


def judge(name: str, clip: np.ndarray, caption: str, goal: np.ndarray | None) -> dict:
    """The record of a clip (f, 3, H, W). goal: the true clip of the same first frame, or None."""
    reading, record = referee(clip), {"instruction": name, "asked": parse(caption)["motion"]}
    record |= compare(reading, caption)
    if len(clip) == 1:  # a picture has no motion, and cannot change
        return {key: x for key, x in record.items() if key not in ("motion", "change", "asked")}
    steps = np.abs(np.diff(np.asarray(clip, float), axis=0)).mean((1, 2, 3))
    record["jump"] = float(steps[-1] / (steps[:-1].mean() + 0.01))
    if goal is not None:
        true = referee(goal)
        off = np.linalg.norm(reading.end - true.end) / clip.shape[-1]
        record["end"] = 100 * float(np.nan_to_num(off, nan=1.0))  # no object: a whole width off
        looks = ("end_colour", "end_background")
        record["end looks"] = all(getattr(reading, x) == getattr(true, x) for x in looks)
        record["first, dB"] = measure.decibels(goal[0], clip[0])
    return record


def spread_motions(scenes: list[Scene], rng: np.random.Generator) -> list[Scene]:
    """Scenes that begin alike in the middle of the picture, as many as there are motions, and so
    on: their first frames tell nothing of what is to come."""
    made = []
    for k in range(len(scenes)):
        scene, name = keep_looks(scenes[k - k % len(MOTIONS)]), list(MOTIONS)[k % len(MOTIONS)]
        (x, y), end = sample_path(rng, MOTIONS[name], np.full(2, float(MIDDLE)))
        growth, hop = 1.6 ** MOTIONS[name].growth, 5.0 * MOTIONS[name].hops
        mover = replace(scene.mover, x=x, y=y)
        last = replace(mover, x=end[0], y=end[1], radius=mover.radius * growth)
        made.append(replace(scene, motion=name, mover=mover, end=last, hop=hop))
    return made


def turn_aside(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with an end that its words do not say, a quarter of the width or more away."""
    while True:
        x, y = rng.uniform(5, 27, 2)
        if np.hypot(x - scene.end.x, y - scene.end.y) > UNITS / 4:
            return replace(keep_looks(scene), end=replace(scene.mover, x=x, y=y))


def keep_looks(scene: Scene) -> Scene:
    """The scene alone with its object, without a change."""
    plain = {"other": None, "change": "", "cut": 1.0, "after": None}
    return replace(scene, becomes=scene.land.background, **plain)


def go_on(caption: str, clip: np.ndarray, rng: np.random.Generator) -> str:
    """The caption of the next clip of a chain, which begins as this one (f, 3, H, W) ends: a motion
    for which there is room."""
    said, unit = parse(caption), clip.shape[-1] / UNITS
    x, y = np.nan_to_num(referee(clip).end / unit, nan=MIDDLE)
    ways = {"to the right": UNITS - x, "to the left": x, "up": y, "down": UNITS - y}
    ways = {f"moves {way}": room for way, room in ways.items()}
    if y > 12:  # room to hop
        ways |= {key.replace("moves", "bounces"): ways[key] for key in list(ways)[:2]}
    motion = rng.choice([way for way, room in ways.items() if room > 14])
    parts = [f"a {said['colour']} {said['shape']} {motion}"]
    parts += [f"beside a {said['other']}"] if "other" in said else []
    return " ".join(parts + ([said["background"]] if "background" in said else []))


def summarise(records: list[dict]) -> dict[str, tuple[float, float]]:
    """column -> a share in percent, or a median, and half of its 95 % interval."""
    figures = {}
    for column in COLUMNS:
        values = [record[column] for record in records if column in record]
        if values:
            statistic = np.median if column in ("end", "jump") else np.mean
            values = np.array(values, float) * (100 if column in SHARES else 1)
            low, high = measure.bootstrap(values, statistic)
            figures[column] = float(statistic(values)), (high - low) / 2
    return figures


def format_cell(column: str, figure: tuple[float, float] | None) -> str:
    digits = 0 if column in SHARES else 1
    return f"{figure[0]:.{digits}f} +- {figure[1]:.{digits}f}" if figure else ""


def format_records(records: list[dict]) -> str:
    """A table of `COLUMNS`, and the share of right motions, motion by motion."""
    rows, notes = [], []
    for name in dict.fromkeys(record["instruction"] for record in records):
        group = [record for record in records if record["instruction"] == name]
        figures = summarise(group)
        cells = (format_cell(column, figures.get(column)) for column in COLUMNS)
        rows.append([name, str(len(group)), *cells])
        right = {m: [r["motion"] for r in group if r.get("asked") == m] for m in MOTIONS}
        shares = [f"{m} {100 * np.mean(x):.0f}" for m, x in right.items() if x]
        notes += [f"{name}, motion by motion: {', '.join(shares)}"] if shares else []
    return "\n".join([measure.format_table(["instruction", "clips", *COLUMNS], rows), *notes])


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--clips", type=int, default=100, help="clips per row; default: 100")
    parser.add_argument("--rows", help=f"some of them, joined by ';': {'; '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other hidden clips")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler", help="ddim, ddpm or dpm; default: the model's")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--tau", help="first steps that see the last frame: 12, 0.5 or 50%%")
    parser.add_argument("--cond_noise_t", type=int, help="noise on pictures; default: as trained")
    parser.add_argument("--dtype", default="auto", help="float32, or bfloat16 where it is fast")
    args = parser.parse_args()
    if args.clips < 1:
        raise ValueError(f"clips is {args.clips}; use 1 or more")
    device = choose_device("auto")
    model = PixelDance.from_folder(args.model).to(device)
    names = ("steps", "sampler", "guidance", "tau", "cond_noise_t")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with torch.no_grad(), autocast(device, choose_dtype(args.dtype, device)):
        names = [name.strip() for name in args.rows.split(";")] if args.rows else None
        rows = check_rows(model, names)
        records = evaluate(model, args.clips, rows, args.seed, **changes)
        total = args.clips * (2 if model.settings.frames > 1 else 1)  # the ceiling and the cheat
        total += sum(max(1, args.clips // ROWS[name].links) for name in rows)
        print(format_records(list(progress(records, "evaluating", "clip", total))))


if __name__ == "__main__":
    run_main(main)
