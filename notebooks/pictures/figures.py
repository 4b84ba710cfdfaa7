"""Figures of directing, in the toy world, whose referee reads clips without any network.

    python notebooks/pictures/figures.py tau     --clips 200 --out tau.png    # the paper's Figure 7
    python notebooks/pictures/figures.py drift   --clips 8   --out drift.png  # 64 clips in a chain
    python notebooks/pictures/figures.py edit    --clips 200 --out edit.png   # video editing, §4.5
    python notebooks/pictures/figures.py nearest --clips 10000 --out nearest.png  # remembered?
    python notebooks/pictures/figures.py strip   --clips 14  --out strip.png  # look, then measure

Each prints its numbers and draws a picture. One process uses one core well; for more, run several,
each with a --seed of its own and --save, and read what they saved together: --read a.json b.json.
[ours: the paper shows pictures]
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from tinydance.config import autocast, choose_device, choose_dtype
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, progress, run_main
from tinydance.sampling import encode_picture, sample_frames, sample_latents
from tinydance.toy import SHIPPED, ToyWorld, evaluate, measure
from tinydance.toy.paint import BACKGROUNDS, COLOURS, SHAPES
from tinydance.toy.referee import judge, referee
from tinydance.toy.world import Scene, describe, parse
from tinydance.vae import to_frames
from tinydance.video.strips import film_strip, show_clips

LOOKS = ("colour", "shape", "background")
LINKS = 64  # clips of a chain
STEPS = 20  # of sampling in `tau`, which goes by 5


def sample_plain(seed: int, count: int) -> list[Scene]:
    """Hidden scenes without a second object or a change, whose captions say all the looks."""
    scenes = [evaluate.keep_looks(scene) for scene in measure.sample_hidden(seed, count)]
    ends = [replace(scene.end, colour=scene.mover.colour) for scene in scenes]
    return [replace(s, end=end, says_background=True) for s, end in zip(scenes, ends)]


def repaint(scene: Scene, edit: str, n: int) -> Scene:
    """A plain scene in its n-th other colour, shape or background."""
    values = {"colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}[edit]
    others = [value for value in values if value != parse(describe(scene))[edit]]
    new = {edit: others[n % len(others)]}
    if edit == "background":
        return replace(scene, land=replace(scene.land, **new), becomes=new[edit])
    return replace(scene, mover=replace(scene.mover, **new), end=replace(scene.end, **new))


def make_draft(frame: np.ndarray) -> np.ndarray:
    """A picture (3, H, W) in 8 x 8 flat tiles."""
    _, height, width = frame.shape
    tiles = frame.reshape(3, 8, height // 8, 8, width // 8).mean((2, 4))
    return tiles.repeat(height // 8, axis=1).repeat(width // 8, axis=2).astype(np.uint8)


def measure_tau(model: PixelDance, clips: int, seed: int) -> Iterator[measure.Record]:
    """How near the given last frame a clip ends, and how smoothly, against tau [paper Fig. 7].

    Given are the true last frame, a coarse draft of it, and another clip's: a shot transition
    [paper §4.2.2]. end and jump are the evaluation's; a jump of 1 is smooth.
    """
    scenes = sample_plain(seed, clips)
    truth, prompts = evaluate.render_all(model, scenes), [describe(scene) for scene in scenes]
    first, last = [clip[0] for clip in truth], [clip[-1] for clip in truth]
    trips = list(measure.make_round_trip(model, [clip[:1] for clip in truth]))
    kinds = {"true": last, "draft": [make_draft(f) for f in last], "another": last[1:] + last[:1]}
    for kind, given in kinds.items():
        for tau in range(0, STEPS + 1, 5):
            made = measure.sample_clips(model, prompts, first, given, seed, tau=tau, steps=STEPS)
            for clip, prompt, true, goal, trip in zip(made, prompts, truth, given, trips):
                record = evaluate.judge(kind, clip, prompt, true)
                yield {
                    "given": kind,
                    "tau": tau,
                    "to the given, dB": measure.decibels(clip[-1], goal),
                    "to the true, dB": measure.decibels(clip[-1], true[-1]),
                    "end, % of width": record["end"],
                    "jump": record["jump"],
                    "first frame, dB": record["first, dB"],
                    "the VAE's, dB": measure.decibels(trip[0], true[0]),
                }


def measure_drift(model: PixelDance, clips: int, seed: int) -> Iterator[measure.Record]:
    """Colour, shape and background after every link of chains, which turn where there is room.

    By "latent", what is carried over is the last latent; by "pixels", its decoded picture, encoded
    again. sky: how far the topmost rows went from those of the first frame, in grey levels.
    """
    scenes, settings = sample_plain(seed, clips), replace(model.settings, seed=seed)
    start = [clip[0] for clip in evaluate.render_all(model, scenes)]
    for kind in ("latent", "pixels"):
        prompts, rng = [describe(scene) for scene in scenes], np.random.default_rng(seed)
        f_first = encode_picture(model, measure.stack_pixels(start, model))
        for link in range(LINKS):
            keys = [(k, link) if link else (k,) for k in range(clips)]
            z_0 = sample_latents(model, prompts, {"first": f_first}, settings, keys)
            f_first = z_0[:, -1]
            last = to_frames(model.vae.decode_video(z_0[:, -1:])).cpu().numpy()  # b 1 3 H W
            if kind == "pixels":
                f_first = encode_picture(model, measure.stack_pixels(last[:, 0], model))
            prompts = [evaluate.go_on(prompt, clip, rng) for prompt, clip in zip(prompts, last)]
            for clip, begin, scene in zip(last, start, scenes):
                asked = f"a {scene.mover.colour} {scene.mover.shape} {scene.land.background}"
                verdict = judge(clip, asked)
                del verdict["change"]  # a single frame has none
                sky = np.abs(clip[0, :, :4].astype(float) - begin[:, :4]).mean()
                yield {"carried": kind, "link": link + 1, "sky": float(sky)} | verdict


def measure_edit(model: PixelDance, clips: int, seed: int) -> Iterator[measure.Record]:
    """First and last frame edited, the clip between made again [paper §4.5]: what is in its middle?

    The edit repaints the object or its surroundings, and the caption says so. survives: the
    referee reads the edit from the middle frame; moves: the motion is still the original's.
    """
    for edit in LOOKS:
        scenes = [repaint(scene, edit, n) for n, scene in enumerate(sample_plain(seed, clips))]
        wanted, prompts = evaluate.render_all(model, scenes), [describe(scene) for scene in scenes]
        first, last = [clip[0] for clip in wanted], [clip[-1] for clip in wanted]
        for tau in (0.0, model.settings.tau, 1.0):
            made = measure.sample_clips(model, prompts, first, last, seed, tau=tau)
            for clip, asked, want in zip(made, map(parse, prompts), wanted):
                middle = len(clip) // 2
                reading = referee(clip[middle : middle + 1])
                off = np.linalg.norm(reading.end - referee(want).track[middle])
                yield {
                    "edit": edit,
                    "tau": tau,
                    "survives": getattr(reading, edit) == asked[edit],
                    "moves": referee(clip).motion == asked["motion"],
                    "middle off, px": float(off),
                    "last frame, dB": measure.decibels(clip[-1], want[-1]),
                }


class Figure(NamedTuple):
    measure: Callable[[PixelDance, int, int], Iterator[measure.Record]]  # of a model, clips, a seed
    made: int  # clips made for each hidden clip
    by: tuple[str, str]  # what a row of the table is: a curve of the plot, and its x
    plotted: tuple[str, ...]  # columns, each a panel
    rows: set | None = None  # the x that have a row, where these are not all


FIGURES = {
    "tau": Figure(
        measure_tau, 15, ("given", "tau"), ("to the given, dB", "to the true, dB", "jump")
    ),
    "drift": Figure(
        measure_drift, 2 * LINKS, ("carried", "link"), (*LOOKS, "sky"), {1, 2, 4, 8, 16, 32, 64}
    ),
    "edit": Figure(measure_edit, 9, ("edit", "tau"), ("survives", "moves", "last frame, dB")),
}


def plot(panels: dict[str, dict[str, list[tuple[float, float]]]], x_label: str, path: str) -> None:
    """Panels side by side: title -> label of a curve -> its points (x, y)."""
    from matplotlib import pyplot as plt  # of the notebooks' extra

    size = (3.4 * len(panels), 2.9)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for (title, curves), axis in zip(panels.items(), axes[0]):
        for label, points in curves.items():
            axis.plot(*np.transpose(points), label=label)
        values = [y for points in curves.values() for _, y in points]
        if 0 <= min(values) and max(values) <= 1:  # shares: small differences shall look small
            axis.set_ylim(0, 1.02)
        axis.set(title=title, xlabel=x_label)
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def find_nearest(model: PixelDance, clips: int, count: int = 5):
    """Clips from text beside the nearest of the first `clips` training clips (seed 0): a film
    strip, and the mean absolute distances; also those of true hidden clips, for comparison."""
    world = measure.choose_world(model)
    hidden, trained = ToyWorld(measure.HIDDEN_SEED, world), ToyWorld(0, world)
    truth = [hidden.sample(n, "clip") for n in range(count)]
    captions = [sample.caption for sample in truth]
    made = list(to_frames(sample_frames(model, captions)).cpu())
    asked = np.stack(made + [sample.frames for sample in truth]).astype(np.int16)
    best, found = np.full(len(asked), np.inf), [None] * len(asked)
    for n in progress(range(clips), "nearest", "clip"):
        sample = trained.sample(n, "clip")
        distance = np.abs(asked - sample.frames.numpy()).mean((1, 2, 3, 4))
        for k in np.flatnonzero(distance < best):
            best[k], found[k] = distance[k], sample
    rows, titles = [], []
    for k in range(count):
        rows += [made[k], found[k].frames]
        titles += [captions[k], f"the nearest of {clips:,}: {found[k].caption}, {best[k]:.1f} off"]
    return film_strip(rows, titles), (
        f"to the nearest of {clips:,} training clips, in grey levels of 255: "
        f"{best[:count].mean():.1f} from the model's, {best[count:].mean():.1f} from new true clips"
    )


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("figure", help=f"one of {', '.join(FIGURES)}, nearest, strip")
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--clips", type=int, default=8, help="clips a row; of drift: chains")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other hidden clips")
    parser.add_argument("--dtype", default="auto", help="float32, or bfloat16 where it is fast")
    parser.add_argument("--save", help="write every measured clip to this .json")
    parser.add_argument("--read", nargs="+", help="measure nothing: read what --save wrote")
    parser.add_argument("--out", help="draw to this .png")
    args = parser.parse_args()
    known = (*FIGURES, "nearest", "strip")
    if args.figure not in known:
        raise ValueError(f"unknown figure {args.figure!r}; known are: {', '.join(known)}")
    if args.clips < 1:
        raise ValueError(f"clips is {args.clips}; use 1 or more")
    device = choose_device("auto")
    if args.figure in ("nearest", "strip"):
        with torch.no_grad(), autocast(device, choose_dtype(args.dtype, device)):
            model = PixelDance.from_folder(args.model).to(device)
            if args.figure == "nearest":
                strip, line = find_nearest(model, args.clips)
                print(line)
            else:
                hidden = ToyWorld(measure.HIDDEN_SEED + args.seed, measure.choose_world(model))
                strip = show_clips(model, [hidden.sample(n) for n in range(args.clips)], args.seed)
        strip.save(args.out or f"{args.figure}.png")
        return
    figure = FIGURES[args.figure]
    if args.read:
        records = [record for path in args.read for record in json.load(open(path))]
    else:
        with torch.no_grad(), autocast(device, choose_dtype(args.dtype, device)):
            model = PixelDance.from_folder(args.model).to(device)
            records = figure.measure(model, args.clips, args.seed)
            total = figure.made * args.clips
            records = list(progress(records, args.figure, "clip", total))
    if args.save:
        with open(args.save, "w") as file:
            json.dump(records, file)
    means = measure.average(records, *figure.by)
    *columns, _ = next(iter(means.values()))  # the last one counts the clips
    rows = [
        [*map(str, key), *(f"{row[name]:.2f}" for name in columns), str(row["clips"])]
        for key, row in means.items()
        if figure.rows is None or key[1] in figure.rows
    ]
    print(measure.format_table([*figure.by, *columns, "clips"], rows))
    if args.out:
        panels = {name: {} for name in figure.plotted}
        for (label, x), row in means.items():
            for name, curves in panels.items():
                curves.setdefault(label, []).append((x, row[name]))
        plot(panels, figure.by[1], args.out)


if __name__ == "__main__":
    run_main(main)
