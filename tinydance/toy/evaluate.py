"""How well a toy model follows its instructions: the referee's verdict on clips that it never saw.

    python -m tinydance.toy.evaluate --model FOLDER --clips 200

Rows are kinds of instruction (`ROWS`), in percent of the ceiling: true clips after the VAE. [ours]
Not here: measures of real videos; figures of directing (`notebooks/pictures/figures.py`).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from tinydance.conditioning import sketch
from tinydance.config import autocast, choose_device, choose_dtype
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, progress, run_main
from tinydance.toy import SHIPPED, measure
from tinydance.toy.referee import compare, referee
from tinydance.toy.world import MOTIONS, describe, parse, render, reverse_motion, sample_scene
from tinydance.vae import to_frames

LOOKS = ("colour", "shape", "background")  # what a single frame shows
CEILING = "ceiling: true clips through the VAE"
ROWS = {  # what a row gives of each hidden clip: its caption, its first frame, its last frame
    "text": {"text"},
    "first": {"first"},
    "first, last": {"first", "last"},
    "text, first": {"text", "first"},
    "text, first, last": {"text", "first", "last"},
    "same first, each motion": {"text", "first", "each motion"},  # so this frame tells nothing
    "chain of 8, the last clip": {"text", "first"},
}
LINKS = {"chain of 8, the last clip": 8}  # clips, each from the last frame of the one before


def check_rows(model: PixelDance, names: list[str] | None) -> list[str]:
    """Return the names, by default all of ROWS. ValueError: a row that the model cannot have."""
    known = list(ROWS) if model.settings.frames > 1 else ["text"]  # an image model has no other
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"unknown row {unknown[0]!r}; known are: {'; '.join(known)}")
    return names or known


def evaluate(
    model: PixelDance, clips: int, rows: list[str], seed=0, sketches=False, **changes
) -> Iterator[measure.Record]:
    """Yield a record of each clip, those of the ceiling first, then those of the rows. sketches:
    show last frames as edge drawings, to models trained with them. changes: of `Settings`."""
    world, scenes = measure.choose_world(model), measure.sample_hidden(seed, clips)
    truth = [render(scene, world)[: model.settings.frames] for scene in scenes]
    captions, firsts = [describe(scene) for scene in scenes], [clip[0] for clip in truth]
    lasts, ends = [clip[-1] for clip in truth], [referee(clip).track[-1] for clip in truth]
    targets = list(zip(firsts, ends))
    if sketches:
        lasts = list(to_frames(sketch(measure.stack_pixels(lasts, model))).cpu().numpy())

    yield from read_clips(CEILING, measure.make_round_trip(model, truth), captions, targets)
    for name in rows:
        given, links, made = ROWS[name], LINKS.get(name, 1), []
        is_new, count = "each motion" in given, max(1, clips // links)
        first, prompts = pair_each_motion(clips, seed, world) if is_new else (firsts, captions)
        first, prompts = first[:count], prompts[:count]
        for link in range(links):
            if link > 0:  # there and back, or the object would leave the picture
                first = [clip[-1] for clip in made]
                prompts = [reverse_motion(prompt) for prompt in prompts]
            text = prompts if "text" in given else [""] * count
            pictures = first if "first" in given else None, lasts if "last" in given else None
            made = measure.sample_clips(model, text, *pictures, seed * 1000 + link, **changes)
        is_true = "first" in given and not is_new and links == 1
        yield from read_clips(name, made, prompts, targets if is_true else [None] * clips)


def read_clips(name: str, made, captions: list[str], targets) -> Iterator[measure.Record]:
    """Yield the referee's verdict on each clip, and on its last frame alone ("colour, end").
    targets: each clip's true first frame, and the place where its object should end; or None."""
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
    """Return first frames (3, H, W), one for all the motions in turn, and their captions."""
    firsts, captions = [], []
    rng = np.random.default_rng([measure.HIDDEN_SEED + seed, 7])
    while len(captions) < clips:
        scene = sample_scene(rng)
        firsts += [render(scene, world)[0]] * len(MOTIONS)
        captions += [describe(replace(scene, motion=motion)) for motion in MOTIONS]
    return firsts[:clips], captions[:clips]


def format_records(records: list[measure.Record]) -> str:
    """Return a table in percent, below its ceiling in percent of that; and motion by motion."""
    means = measure.average(records, "instruction")
    by_motion = measure.average(records, "instruction", "asked")
    medians = measure.average(records, "instruction", mean=np.median)
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
    parser.add_argument("--clips", type=int, default=100, help="clips per row; default: 100")
    parser.add_argument("--rows", help=f"some of them, joined by ';': {'; '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other hidden clips")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler", help="ddim, ddpm or dpm; default: the model's")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--tau", help="first steps that see the last frame: 12, 0.5 or 50%%")
    parser.add_argument("--cond_noise_t", type=int, help="noise on pictures; default: as trained")
    parser.add_argument("--sketch", action="store_true", help="show last frames as edge drawings")
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
        total = args.clips + sum(max(1, args.clips // LINKS.get(name, 1)) for name in rows)
        records = evaluate(model, args.clips, rows, args.seed, args.sketch, **changes)
        print(format_records(list(progress(records, "evaluating", "clip", total))))


if __name__ == "__main__":
    run_main(main)
