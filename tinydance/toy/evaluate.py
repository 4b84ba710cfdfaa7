"""How well a toy model follows its instructions: the referee's verdict on clips that it never saw.

    python -m tinydance.toy.evaluate --model FOLDER --clips 200
    python -m tinydance.toy.evaluate --strip clips.png              # look before you measure

The table has a row for each kind of instruction (`ROWS`). Its first row is the ceiling: what the
referee reads from true clips after a round trip through the VAE. The others are shares of it.
[ours; the paper measures FVD and CLIPSIM]
Not here: measures of real videos; figures of directing (`notebooks/pictures/figures.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tinydance.conditioning import sketch
from tinydance.config import autocast, choose_device, choose_dtype
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, progress, run_main
from tinydance.toy import SHIPPED, measure
from tinydance.toy.measure import HIDDEN_SEED, Record, average, choose_world
from tinydance.toy.referee import compare, referee
from tinydance.toy.source import ToyWorld
from tinydance.toy.world import MOTIONS, describe, parse, render, reverse_motion, sample_scene
from tinydance.vae import to_frames
from tinydance.video.strips import show_clips

LOOKS = ("colour", "shape", "background")  # what a single frame shows
CEILING = "ceiling: true clips through the VAE"


@dataclass(frozen=True)
class Given:
    """What a row gives of each hidden clip: its caption, its first frame, its last frame."""

    text: bool = False
    first: bool = False
    last: bool = False
    each_motion: bool = False  # one first frame with every motion in turn: it tells nothing
    clips: int = 1  # in a chain, each going on from the last frame of the one before


ROWS = {
    "text": Given(text=True),
    "first": Given(first=True),
    "first, last": Given(first=True, last=True),
    "text, first": Given(text=True, first=True),
    "text, first, last": Given(text=True, first=True, last=True),
    "same first, each motion": Given(text=True, first=True, each_motion=True),
    "chain of 8, the last clip": Given(text=True, first=True, clips=8),
}


def check_rows(model: PixelDance, names: list[str] | None) -> list[str]:
    """The names, by default all of ROWS. ValueError for a row that the model cannot have."""
    known = list(ROWS) if model.settings.frames > 1 else ["text"]  # an image model has no other
    for name in names or []:
        if name not in known:
            raise ValueError(f"unknown row {name!r}; known are: {'; '.join(known)}")
    return names or known


def evaluate(
    model: PixelDance, clips: int, rows: list[str], seed=0, sketches=False, **changes
) -> Iterator[Record]:
    """Yield a record of each clip, those of the ceiling first, then those of the rows.

    sketches: last frames are shown as edge drawings, to models trained with them.
    changes: fields of `Settings`.
    """
    world, scenes = choose_world(model), measure.sample_hidden(seed, clips)
    truth = [render(scene, world)[: model.settings.frames] for scene in scenes]
    captions, firsts = [describe(scene) for scene in scenes], [clip[0] for clip in truth]
    lasts, ends = [clip[-1] for clip in truth], [referee(clip).track[-1] for clip in truth]
    targets = list(zip(firsts, ends))
    if sketches:
        lasts = list(to_frames(sketch(measure.stack_pixels(lasts, model))).cpu().numpy())

    yield from read_clips(CEILING, measure.make_round_trip(model, truth), captions, targets)
    for name in rows:
        given, prompts, first, made = ROWS[name], captions, firsts, []
        if given.each_motion:
            first, prompts = pair_each_motion(clips, seed, world)
        count = max(1, clips // given.clips)
        prompts, first = prompts[:count], first[:count]
        for link in range(given.clips):
            if link > 0:  # there and back, or the object would leave the picture
                first = [clip[-1] for clip in made]
                prompts = [reverse_motion(prompt) for prompt in prompts]
            text = prompts if given.text else [""] * len(prompts)
            pictures = first if given.first else None, lasts if given.last else None
            made = measure.sample_clips(model, text, *pictures, seed * 1000 + link, **changes)
        is_true = given.first and not given.each_motion and given.clips == 1
        yield from read_clips(name, made, prompts, targets if is_true else [None] * clips)


def read_clips(name: str, made, captions: list[str], targets) -> Iterator[Record]:
    """Yield the referee's verdict on each clip, and on its last frame alone ("colour, end").

    targets: of each clip the true first frame, and the place where its object should end; or None.
    """
    for clip, caption, target in zip(made, captions, targets):
        reading, end = referee(clip), compare(referee(clip[-1:]), caption)
        record = {"instruction": name, "asked": parse(caption)["motion"]}
        record |= compare(reading, caption)
        record |= {f"{look}, end": end[look] for look in LOOKS if look in end}
        if len(clip) == 1:  # a picture has no motion
            del record["motion"]
        if target:
            record["first, dB"] = measure.decibels(target[0], clip[0])
            record["last, px"] = float(np.linalg.norm(target[1] - reading.track[-1]))
        yield record


def pair_each_motion(clips: int, seed: int, world) -> tuple[list[np.ndarray], list[str]]:
    """First frames (3, H, W), each as often as there are motions, and captions, each another."""
    firsts, captions = [], []
    rng = np.random.default_rng([HIDDEN_SEED + seed, 7])
    while len(captions) < clips:
        scene = sample_scene(rng)
        firsts += [render(scene, world)[0]] * len(MOTIONS)
        captions += [describe(replace(scene, motion=motion)) for motion in MOTIONS]
    return firsts[:clips], captions[:clips]


def format_records(records: list[Record]) -> str:
    """A table in percent, the rows below the ceiling in percent of it; shares motion by motion."""
    means, by_motion = average(records, "instruction"), average(records, "instruction", "asked")
    medians = average(records, "instruction", mean=np.median)
    columns, ends = (*LOOKS, "motion"), [f"{look}, end" for look in LOOKS]
    best, rows, notes = means[CEILING,], [], []
    for (name,), row in means.items():
        share = dict.fromkeys((*columns, *ends), "")  # stays empty where no caption mentions it
        for key in share.keys() & row.keys() & best.keys():
            share[key] = f"{100 * row[key] / (1 if row is best else best[key] or np.nan):.0f}"
        psnr = f"{row['first, dB']:.1f}" if "first, dB" in row else ""
        error = f"{medians[name,]['last, px']:.1f}" if "last, px" in row else ""
        cells = [*map(share.get, columns), " / ".join(map(share.get, ends)), psnr, error]
        rows.append([name, str(row["clips"]), *cells])
        if "motion" in row and row is not best:
            shares = {m: by_motion[name, m]["motion"] for m in MOTIONS if (name, m) in by_motion}
            shares = ", ".join(f"{motion} {100 * share:.0f}" for motion, share in shares.items())
            notes.append(f"{name}, motion by motion: {shares}")
    head = ["instruction", "clips", *columns, "in the last frame", "first, dB", "last, px"]
    return "\n".join([measure.format_table(head, rows), *notes])


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--clips", type=int, help="clips per row: 100; or to draw: 3")
    parser.add_argument("--rows", help=f"some of them, joined by ';': {'; '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other hidden clips")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--tau", help="first steps that see the last frame: 12, 0.5 or 50%%")
    parser.add_argument("--cond_noise_t", type=int, help="noise on pictures; default: as trained")
    parser.add_argument("--sketch", action="store_true", help="show last frames as edge drawings")
    parser.add_argument("--dtype", default="auto", help="float32, or bfloat16 where it is fast")
    parser.add_argument("--strip", help="draw clips to this .png, and measure nothing")
    args = parser.parse_args()
    if args.clips is not None and args.clips < 1:
        raise ValueError(f"clips is {args.clips}; use 1 or more")
    device = choose_device("auto")
    model = PixelDance.from_folder(args.model).to(device)
    changes = {name: getattr(args, name) for name in ("steps", "guidance", "tau", "cond_noise_t")}
    changes = {name: value for name, value in changes.items() if value is not None}
    with torch.no_grad(), autocast(device, choose_dtype(args.dtype, device)):
        if args.strip:
            hidden = ToyWorld(HIDDEN_SEED + args.seed, choose_world(model))
            samples = [hidden.sample(n, "clip") for n in range(args.clips or 3)]
            show_clips(model, samples, args.seed, **changes).save(args.strip)
        else:
            names = [name.strip() for name in args.rows.split(";")] if args.rows else None
            rows, clips = check_rows(model, names), args.clips or 100
            total = clips + sum(max(1, clips // ROWS[name].clips) for name in rows)
            records = evaluate(model, clips, rows, args.seed, args.sketch, **changes)
            records = list(progress(records, "evaluating", "clip", total))
            print(format_records(records))


if __name__ == "__main__":
    run_main(main)
