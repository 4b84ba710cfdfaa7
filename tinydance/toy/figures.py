"""Figures of directing, in the toy world, whose referee reads clips without any network.

    python -m tinydance.toy.figures tau   --clips 200 --out tau.png    # the paper's Figure 7 in numbers
    python -m tinydance.toy.figures drift --clips 8   --out drift.png  # 64 clips in a chain
    python -m tinydance.toy.figures edit  --clips 200 --out edit.png   # section 4.5's video editing

Each prints a table and draws a plot. One process uses one core well; for more, run several, each
with a --seed of its own and --save, and read what they saved together: --read a.json b.json.
[ours: the paper shows pictures]

Read after `evaluate.py`, whose hidden clips these are too. Not here: how a model scores in general.
"""

import json
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tinydance.config import autocast, choose_device, choose_dtype
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, Progress, run_main
from tinydance.sampling import Sampling, encode_picture, sample_frames, sample_latents
from tinydance.toy import SHIPPED
from tinydance.toy.evaluate import AT_A_TIME, BACK, HIDDEN_SEED, decibels, there_and_back
from tinydance.toy.referee import judge, referee
from tinydance.toy.world import BACKGROUNDS, World, caption_of, render, sample_scene
from tinydance.vae import to_frames, to_pixels

LINKS = 64  # clips of a chain


STEPS = 20  # of sampling in `tau`, which goes by 5


INK = ["#2864c8", "#d63031", "#27a04f", "#8e44ad", "#e08e0b", "#555555"]


Record = dict[str, float | str]  # one measured clip


def hidden_scenes(seed: int, count: int):
    """The scenes of the evaluation's clips."""
    return [sample_scene(np.random.default_rng([HIDDEN_SEED + seed, n])) for n in range(count)]


def pixels_of(frames: list[np.ndarray], model: PixelDance) -> Tensor:
    return to_pixels(torch.from_numpy(np.stack(frames))).to(model.device)


def make(model, scenes, prompts, first, last, bar, **settings) -> np.ndarray:
    """Clips (n, f, 3, H, W) from as many first and last frames (3, H, W)."""
    parts = []
    for i in range(0, len(scenes), AT_A_TIME):
        part = slice(i, i + AT_A_TIME)
        frames = sample_frames(
            model, prompts[part], pixels_of(first[part], model), pixels_of(last[part], model),
            **settings | {"seed": settings["seed"] * 1000 + i},
        )  # fmt: skip
        parts.append(to_frames(frames).cpu().numpy())
        bar.update(len(prompts[part]))
    return np.concatenate(parts)


# --------------------------------------------------------------------------------------------- tau
def coarse(frame: np.ndarray) -> np.ndarray:
    """A draft of a frame: 8 x 8 flat tiles."""
    _, height, width = frame.shape
    tiles = frame.reshape(3, 8, height // 8, 8, width // 8).mean((2, 4), keepdims=True)
    return np.broadcast_to(tiles, (3, 8, height // 8, 8, width // 8)).reshape(frame.shape).astype(
        np.uint8
    )


def measure_tau(model: PixelDance, clips: int, seed: int) -> list[Record]:
    """How near the given last frame a clip ends, and how smoothly, against tau [paper Fig. 7].

    Given are the true last frame, a coarse draft of it, and another clip's: a shot transition
    [paper §4.2.2]. jump: the mean change of pixels into the last frame, as a multiple of that into
    the others; 1 is smooth.
    """
    scenes = hidden_scenes(seed, clips)
    truth = [render(scene) for scene in scenes]
    words = [caption_of(scene) for scene in scenes]
    trip = model.vae.encode_video(pixels_of([clip[:1] for clip in truth], model))
    trip = to_frames(model.vae.decode_video(trip))[:, 0].cpu().numpy()
    first, last = [clip[0] for clip in truth], [clip[-1] for clip in truth]
    drafts, others = [coarse(frame) for frame in last], last[1:] + last[:1]
    kinds = {"true": last, "draft": drafts, "another": others}
    taus = range(0, STEPS + 1, 5)
    records = []
    total = len(kinds) * len(taus) * clips
    with Progress("tau", total, "clip") as bar:
        for kind, last in kinds.items():
            for tau in taus:
                made = make(model, scenes, words, first, last, bar, tau=tau, steps=STEPS, seed=seed)
                for clip, true, given, ceiling in zip(made, truth, last, trip):
                    change = np.abs(np.diff(clip.astype(float), axis=0)).mean((1, 2, 3))
                    there = referee(clip).track[-1] - referee(true).track[-1]
                    records.append({
                        "given": kind, "tau": tau,
                        "to the given, dB": decibels(clip[-1], given),
                        "to the true, dB": decibels(clip[-1], true[-1]),
                        "object off, px": float(np.linalg.norm(there)),
                        "jump": float(change[-1] / (change[:-1].mean() + 0.01)),
                        "first frame, dB": decibels(clip[0], true[0]),
                        "the VAE's, dB": decibels(ceiling, true[0]),
                    })  # fmt: skip
    return records


# ------------------------------------------------------------------------------------------- drift
def measure_drift(model: PixelDance, clips: int, seed: int) -> list[Record]:
    """Colour, shape and background after every link of chains, which go there and back.

    By "latent", what is carried over is the last latent; by "pixels", its decoded picture, encoded
    again. sky: how far the topmost rows went from those of the first frame, in grey levels.
    """
    scenes = [scene for scene in hidden_scenes(seed, 4 * clips) if scene.motion in BACK][:clips]
    start = [render(scene)[0] for scene in scenes]
    records = []
    with Progress("drift", 2 * LINKS * len(scenes), "clip") as bar:
        for kind in ("latent", "pixels"):
            said = [caption_of(scene) for scene in scenes]
            f_first = encode_picture(model, pixels_of(start, model))
            for link in range(LINKS):
                z_0 = sample_latents(model, said, f_first, None, Sampling(seed=seed), link=link)
                f_first = z_0[:, -1]
                last = to_frames(model.vae.decode_video(z_0[:, -1:])).cpu()
                if kind == "pixels":
                    f_first = encode_picture(model, to_pixels(last[:, 0]).to(model.device))
                for frame, begin, caption, scene in zip(last.numpy(), start, said, scenes):
                    verdict = judge(frame, f"a {scene.colour} {scene.shape} {scene.background}")
                    sky = np.abs(frame[0, :, :4].astype(float) - begin[:, :4]).mean()
                    records.append({"carried": kind, "link": link + 1, "sky": float(sky)} | {
                        name: float(right) for name, right in verdict.items()
                    })  # fmt: skip
                said = [there_and_back(caption) for caption in said]
                bar.update(len(scenes))
    return records


# -------------------------------------------------------------------------------------------- edit
def measure_edit(model: PixelDance, clips: int, seed: int) -> list[Record]:
    """First and last frame edited, the clip between made again [paper §4.5]: what is in its middle?

    The edit repaints the object or its surroundings, and the caption says so. survives: the
    referee reads the edit from the middle frame; moves: the motion is still the original's.
    """
    scenes, world = hidden_scenes(seed, clips), World()
    choices = {"colour": list(world.colours), "shape": list(world.shapes),
               "background": list(BACKGROUNDS)}  # fmt: skip
    records = []
    with Progress("edit", 3 * 3 * clips, "clip") as bar:
        for edit, values in choices.items():
            edited = []
            for n, scene in enumerate(scenes):
                others = [value for value in values if value != getattr(scene, edit)]
                changed = {edit: others[n % len(others)], "says_background": True}
                edited.append(replace(scene, **changed))
            wanted = [render(scene) for scene in edited]
            words = [caption_of(scene) for scene in edited]
            first, last = [clip[0] for clip in wanted], [clip[-1] for clip in wanted]
            for share in (0.0, model.settings.tau, 1.0):
                made = make(model, scenes, words, first, last, bar, tau=share, seed=seed)
                for clip, scene, want in zip(made, edited, wanted):
                    middle = len(clip) // 2
                    read = referee(clip[middle : middle + 1])
                    off = read.track[0] - referee(want).track[middle]
                    records.append({
                        "edit": edit, "tau": share,
                        "survives": float(getattr(read, edit) == getattr(scene, edit)),
                        "moves": float(referee(clip).motion == scene.motion),
                        "middle off, px": float(np.linalg.norm(off)),
                        "last frame, dB": decibels(clip[-1], want[-1]),
                    })  # fmt: skip
    return records


# ------------------------------------------------------------------------------------------- tables
def means(records: list[Record], *by: str) -> dict[tuple, Record]:
    """The mean of every other column for each combination of the columns `by`; nan left out."""

    def mean(values):
        known = [value for value in values if not np.isnan(value)]
        return float(np.mean(known)) if known else np.nan

    groups = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in by), []).append(record)
    columns = [name for name in records[0] if name not in by]
    return {key: {name: mean([record[name] for record in group]) for name in columns}
            | {"clips": len(group)} for key, group in groups.items()}  # fmt: skip


def table(rows: dict[tuple, Record], *by: str) -> str:
    columns = list(next(iter(rows.values())))
    lines = [[*by, *columns], ["---"] * (len(by) + len(columns))]
    for key, row in rows.items():
        cells = [f"{row[name]:.2f}" if name != "clips" else str(row[name]) for name in columns]
        lines.append([*(str(part) for part in key), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(panels: dict[str, dict[str, list[tuple[float, float]]]], x_label: str) -> Image.Image:
    """Panels side by side: title -> label of a curve -> its points (x, y)."""
    width, height, left, top, gap = 330, 240, 52, 34, 24
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (len(panels) * (width + gap) + gap, height + 60), "white")
    draw = ImageDraw.Draw(picture)
    for k, (title, curves) in enumerate(panels.items()):
        x_0, y_0 = gap + k * (width + gap) + left, top
        x_1, y_1 = x_0 + width - left, top + height - 40
        points = np.array([point for curve in curves.values() for point in curve])
        low, high = points.min(0), points.max(0)
        if 0 <= low[1] and high[1] <= 1:  # shares: their small differences shall look small
            low[1], high[1] = 0, 1
        high = np.where(high > low, high, low + 1)

        def place(point):
            share = (np.array(point) - low) / (high - low)
            return x_0 + share[0] * (x_1 - x_0), y_1 - share[1] * (y_1 - y_0)

        draw.rectangle((x_0, y_0, x_1, y_1), outline="#999999")
        draw.text((x_0, 10), title, "black", font)
        draw.text((x_0, y_1 + 22), x_label, "#666666", font)
        for share in (0, 0.5, 1):
            x, y = low + share * (high - low)
            draw.text((x_0 + share * (x_1 - x_0), y_1 + 4), f"{x:.3g}", "black", font, anchor="ma")
            draw.text((x_0 - 6, y_1 - share * (y_1 - y_0)), f"{y:.3g}", "black", font, anchor="rm")
        right = x_1
        for n, (label, curve) in enumerate(curves.items()):
            draw.line([place(point) for point in curve], INK[n], 2)
            draw.text((right, y_1 + 22), label, INK[n], font, anchor="ra")
            right -= draw.textlength(label, font) + 12
    return picture


FIGURES = {  # how each is measured, what its rows are by, and the columns that are drawn
    "tau": (measure_tau, ("given", "tau"), ("to the given, dB", "to the true, dB", "jump")),
    "drift": (measure_drift, ("carried", "link"), ("colour", "shape", "background", "sky")),
    "edit": (measure_edit, ("edit", "tau"), ("survives", "moves", "last frame, dB")),
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("figure", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--clips", type=int, default=8, help="clips a row; of drift: chains")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other hidden clips")
    parser.add_argument("--dtype", default="auto", help="float32, or bfloat16 where it is fast")
    parser.add_argument("--save", help="write every measured clip to this .json")
    parser.add_argument("--read", nargs="+", help="measure nothing: read what --save wrote")
    parser.add_argument("--out", help="draw to this .png")
    args = parser.parse_args()
    if args.figure not in FIGURES:
        raise ValueError(f"unknown figure {args.figure!r}; known are: {', '.join(FIGURES)}")
    if args.clips < 1:
        raise ValueError(f"clips is {args.clips}; use 1 or more")
    measure, by, drawn = FIGURES[args.figure]
    if args.read:
        records = [record for path in args.read for record in json.load(open(path))]
    else:
        device = choose_device("auto")
        dtype = choose_dtype(args.dtype, device)
        with torch.no_grad(), autocast(device, dtype):
            model = PixelDance.from_folder(args.model).to(device)
            records = measure(model, args.clips, args.seed)
    if args.save:
        with open(args.save, "w") as file:
            json.dump(records, file)
    rows = means(records, *by)
    shown = {key: row for key, row in rows.items() if by[1] != "link" or is_power_of_2(key[1])}
    print(table(shown, *by))
    if args.out:
        panels = {name: {} for name in drawn}
        for name in drawn:
            for (label, x), row in rows.items():
                panels[name].setdefault(label, []).append((x, row[name]))
        plot(panels, by[1]).save(args.out)


def is_power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


if __name__ == "__main__":
    run_main(main)
