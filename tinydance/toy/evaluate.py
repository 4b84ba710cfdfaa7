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
from tinydance.toy.referee import Reading, compare, referee
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
COLUMNS = ("colour", "shape", "background", "other", "change", "motion", "end looks", "end")
COLUMNS += ("jump", "first, dB")


def check_rows(model: PixelDance, names: list[str] | None) -> list[str]:
    """Return the names, by default all of ROWS. ValueError: a row that the model cannot have."""
    known = list(ROWS) if model.settings.frames > 1 else ["text"]  # an image model has no other
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"unknown row {unknown[0]!r}; known are: {'; '.join(known)}")
    return names or known


def evaluate(model: PixelDance, clips: int, rows: list[str], seed=0, **changes) -> Iterator[dict]:
    """Yield a record of each clip: those of the ceiling and the cheat, then those of the rows.
    changes: of `Settings`."""
    place, scenes = measure.choose_world(model), measure.sample_hidden(seed, clips)
    truth = [render(scene, place)[: model.settings.frames] for scene in scenes]
    captions, rng = [describe(scene) for scene in scenes], np.random.default_rng(seed)
    trips = measure.make_round_trip(model, truth)
    yield from (judge(CEILING, *three) for three in zip(trips, captions, truth))
    if model.settings.frames > 1:
        u = np.linspace(0, 1, model.settings.frames)[:, None, None, None]
        fades = (clip[0] + (clip[-1] * 1.0 - clip[0]) * u for clip in truth)
        yield from (judge(CHEAT, *three) for three in zip(fades, captions, truth))
    for name in rows:
        row, count = ROWS[name], max(1, clips // ROWS[name].links)
        chosen, prompts, goals, given = scenes[:count], captions[:count], truth[:count], changes
        if row.each:
            chosen = spread_motions(chosen, rng)
        if row.against:
            chosen, given = [turn_aside(scene, rng) for scene in chosen], changes | {"tau": 1.0}
        if row.each or row.against:
            goals = [render(scene, place)[: model.settings.frames] for scene in chosen]
            prompts = [describe(scene) for scene in chosen]
        first, made = [clip[0] for clip in goals], []
        for link in range(row.links):
            if link > 0:
                first = [clip[-1] for clip in made]
                readings = [referee(clip[-1:]) for clip in made]
                pairs = zip(prompts, readings)
                prompts = [go_on(*pair, place.size / UNITS, rng) for pair in pairs]
            text = prompts if row.text else [""] * count
            last = [clip[-1] for clip in goals] if row.last else None
            pictures = first if row.first else None, last
            made = list(measure.sample_clips(model, text, *pictures, seed * 1000 + link, **given))
        goals = goals if row.first and row.links == 1 else [None] * count
        yield from (judge(name, *three) for three in zip(made, prompts, goals))


def judge(name: str, clip: np.ndarray, caption: str, goal: np.ndarray | None) -> dict:
    """The record of a clip (f, 3, H, W). goal: the true clip of the same first frame, or None."""
    reading, record = referee(clip), {"instruction": name, "asked": parse(caption)["motion"]}
    record |= compare(reading, caption)
    if len(clip) == 1:  # a picture has no motion, and cannot change
        return {key: x for key, x in record.items() if key not in ("motion", "change")}
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


def go_on(caption: str, reading: Reading, unit: float, rng: np.random.Generator) -> str:
    """The caption of the next clip of a chain: a motion for which there is room. unit: pixels."""
    said = parse(caption)
    x, y = np.nan_to_num(reading.end, nan=MIDDLE * unit) / unit
    ways = {"to the right": UNITS - x, "to the left": x, "up": y, "down": UNITS - y}
    ways = {f"moves {way}": room for way, room in ways.items()}
    if y > 12:  # room to hop
        ways |= {key.replace("moves", "bounces"): ways[key] for key in list(ways)[:2]}
    open_ways = [way for way, room in ways.items() if room > 14]
    said["motion"] = str(rng.choice(open_ways))
    parts = [f"a {said['colour']} {said['shape']} {said['motion']}"]
    parts += [f"beside a {said['other']}"] if "other" in said else []
    return " ".join(parts + ([said["background"]] if "background" in said else []))


def format_records(records: list[dict]) -> str:
    """A table of `COLUMNS`, and the share of right motions, motion by motion."""
    head = ["instruction", "clips", *(f"{name}, %" for name in COLUMNS[:7]), "end, % of width"]
    rows, notes = [], []
    for name in dict.fromkeys(record["instruction"] for record in records):
        group = [record for record in records if record["instruction"] == name]
        cells = []
        for column in COLUMNS:
            values = [record[column] for record in group if column in record]
            cells.append(format_cell(column, values) if values else "")
        rows.append([name, str(len(group)), *cells])
        by_motion = {motion: [] for motion in MOTIONS}
        for record in group:
            if "motion" in record:
                by_motion[record["asked"]].append(record["motion"])
        shares = (f"{m} {100 * np.mean(right):.0f}" for m, right in by_motion.items() if right)
        notes += [f"{name}, motion by motion: {', '.join(shares)}"]
    return "\n".join([measure.format_table([*head, "jump", "first, dB"], rows), *notes])


def format_cell(column: str, values: list[float]) -> str:
    """A share in percent, or a median, with half of its 95 % interval."""
    share = column in COLUMNS[:7]
    statistic = np.mean if share or column == "first, dB" else np.median
    low, high = measure.bootstrap(np.array(values, float) * (100 if share else 1), statistic)
    value = statistic(values) * (100 if share else 1)
    return f"{value:.{0 if share else 1}f} +- {(high - low) / 2:.{0 if share else 1}f}"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--clips", type=int, default=100, help="clips per row; default: 100")
    parser.add_argument("--rows", help=f"some of them, joined by ';': {'; '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other hidden clips")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--tau", help="first steps that see the last frame: 12, 0.5 or 50%%")
    parser.add_argument("--cond_noise_t", type=int, help="noise on pictures; default: as trained")
    parser.add_argument("--dtype", default="auto", help="float32, or bfloat16 where it is fast")
    args = parser.parse_args()
    if args.clips < 1:
        raise ValueError(f"clips is {args.clips}; use 1 or more")
    device = choose_device("auto")
    model = PixelDance.from_folder(args.model).to(device)
    changes = {name: getattr(args, name) for name in ("steps", "guidance", "tau", "cond_noise_t")}
    changes = {name: value for name, value in changes.items() if value is not None}
    with torch.no_grad(), autocast(device, choose_dtype(args.dtype, device)):
        names = [name.strip() for name in args.rows.split(";")] if args.rows else None
        rows = check_rows(model, names)
        records = evaluate(model, args.clips, rows, args.seed, **changes)
        print(format_records(list(progress(records, "evaluating", "clip"))))


if __name__ == "__main__":
    run_main(main)
