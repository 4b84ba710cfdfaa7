"""How well a toy model follows its instructions: the referee's verdict on clips that it never saw.

    python -m tinydance.toy.evaluate --model FOLDER --clips 200
    python -m tinydance.toy.evaluate --strip clips.png              # look before you measure
    python -m tinydance.toy.evaluate --nearest nearest.png          # is it remembered, or made?

One row per instruction: text alone, the first frame without and with its text, each of them with
the last frame as well; the strict one, in which the same first frame is given with every motion in
turn; and chains, in which each clip goes on from the last frame of the one before. The first row is
the ceiling: what the referee reads from true clips after a round trip through the VAE. The others
are shares of it.
[ours; the paper measures FVD and CLIPSIM, whose networks cannot come along]

Read after `sampling.py` and `toyworld.py`. Not here: metrics for real videos.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tinydance.conditioning import sketch
from tinydance.config import autocast, choose_device, choose_dtype
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, Progress, progress, run_main
from tinydance.sampling import sample_frames
from tinydance.toy import SHIPPED
from tinydance.toy.referee import judge, referee
from tinydance.toy.source import ToyWorld
from tinydance.toy.world import (
    CHANGES,
    CUTS,
    World,
    caption_of,
    is_seen,
    make_clip,
    parse,
    render,
    sample_scene,
)
from tinydance.vae import to_frames, to_pixels
from tinydance.video.strips import film_strip, show_clips

HIDDEN_SEED = 1_000_003_000  # of the evaluation's clips; training seeds are small numbers


ATTRIBUTES = ("colour", "shape", "background", "motion")


AT_A_TIME = 16


CHAIN = 8  # clips


ROWS = ("text", "first", "first, last", "text, first", "text, first, last",
        "same first, each motion", f"chain of {CHAIN}, the last clip")  # fmt: skip


# A chain goes there and back, or it would leave the picture.
BACK = [("moves to the right", "moves to the left"), ("moves up", "moves down"),
        ("grows", "shrinks"), ("bounces to the right", "bounces to the left")]  # fmt: skip


BACK = dict(BACK) | {b: a for a, b in BACK}


@dataclass
class Row:
    """One instruction: how many clips obey, and distances where they apply."""

    name: str
    clips: int
    shares: dict[str, float]  # attribute -> share of the clips whose caption mentions it
    kept: dict[str, float]  # the same of the last frame alone: colour, shape, background
    motions: dict[str, float]  # motion -> share of the clips asked to do it
    first_psnr: float | None = None  # dB, of the first frame against the true one
    last_error: float | None = None  # pixels, of the object in the last frame, likewise, median


def world_of(model: PixelDance, rich: bool) -> World:
    """The world of a model's clips, or of the clips that an image model's frames begin."""
    frames = model.settings.frames
    return World(model.settings.height, frames if frames > 1 else World.frames, rich)


def verdicts(frames: np.ndarray, captions: list[str], world: World) -> dict[str, float]:
    """frames uint8 (n, f, 3, H, W) -> for each attribute the share of clips that obey."""
    judged = [judge(clip, caption, world) for clip, caption in zip(frames, captions)]
    names = ATTRIBUTES if frames.shape[1] > 1 else ATTRIBUTES[:3]  # one frame has no motion
    found = {name: [verdict[name] for verdict in judged if name in verdict] for name in names}
    return {name: float(np.mean(said)) if said else np.nan for name, said in found.items()}


def by_motion(frames: np.ndarray, captions: list[str], world: World) -> dict[str, float]:
    """For each motion the share of clips that do it, of those whose captions ask for it."""
    read = [(parse(caption)["motion"], judge(clip, caption, world)["motion"])
            for clip, caption in zip(frames, captions)]  # fmt: skip
    asked = [name for name in world.motions if any(motion == name for motion, _ in read)]
    return {name: float(np.mean([right for motion, right in read if motion == name]))
            for name in asked}  # fmt: skip


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures."""
    error = ((a.astype(float) - b) ** 2).mean()
    return float(10 * np.log10(255**2 / (error + 1e-6)))


class Evaluation:
    """Hidden true clips, and what a model makes of their instructions.

    sketches: last frames are shown as edge drawings, to models trained with them.
    settings go to `sample_frames` (steps, guidance, tau).
    """

    def __init__(
        self, model: PixelDance, clips: int, bar: Progress, seed=0, rich=False, sketches=False,
        **settings,
    ):  # fmt: skip
        self.model, self.clips, self.seed, self.bar = model, clips, seed, bar
        self.settings = settings
        self.world = world_of(model, rich)
        made = [make_clip(HIDDEN_SEED + seed, n, self.world) for n in range(clips)]
        self.truth = np.stack([frames for frames, _ in made])[:, : model.settings.frames]
        self.captions = [caption for _, caption in made]
        pixels = to_pixels(torch.from_numpy(self.truth)).to(model.device)
        self.I_first, I_last = pixels[:, 0], pixels[:, -1]
        self.I_last = sketch(I_last) if sketches else I_last
        self.round_trip = torch.cat([
            model.vae.decode_video(model.vae.encode_video(part)).clamp(-1, 1)
            for part in pixels.split(AT_A_TIME)
        ])  # fmt: skip

    def sample(self, prompts: list[str], first: Tensor | None, last: Tensor | None, link=0):
        """A clip for every prompt, uint8 (n, f, 3, H, W); `link` parts the seeds of a chain."""
        parts = []
        for i in range(0, len(prompts), AT_A_TIME):
            part = slice(i, i + AT_A_TIME)
            frames = sample_frames(
                self.model, prompts[part], None if first is None else first[part],
                None if last is None else last[part], seed=(self.seed * 1000 + link) * 1000 + i,
                **self.settings,
            )  # fmt: skip
            parts.append(to_frames(frames).cpu().numpy())
            self.bar.update(len(prompts[part]))
        return np.concatenate(parts)

    def measure(self, name: str, frames, captions, true=False) -> Row:
        """The row of some clips; true: also how far from the true ones they begin and end."""
        psnr = error = None
        if true:
            psnr = float(np.mean([decibels(a[0], b[0]) for a, b in zip(self.truth, frames)]))
            tracks = [(referee(a, self.world).track[-1], referee(b, self.world).track[-1])
                      for a, b in zip(self.truth, frames)]  # fmt: skip
            error = float(np.nanmedian([np.linalg.norm(a - b) for a, b in tracks]))
        shares = verdicts(frames, captions, self.world)
        kept = verdicts(frames[:, -1:], captions, self.world)
        motions = by_motion(frames, captions, self.world) if frames.shape[1] > 1 else {}
        return Row(name, len(frames), shares, kept, motions, psnr, error)

    def ceiling(self) -> Row:
        frames = to_frames(self.round_trip).cpu().numpy()
        name = "ceiling: true clips through the VAE"
        return self.measure(name, frames, self.captions, true=True)

    def row(self, name: str) -> Row:
        """One of ROWS."""
        if name == "same first, each motion":
            one, turned = same_frame_other_motions(self.clips, self.seed, self.world)
            one = to_pixels(torch.from_numpy(one)).to(self.model.device)
            return self.measure(name, self.sample(turned, one, None), turned)
        if name.startswith("chain"):
            return self.chain(name)
        given = name.split(", ")
        prompts = self.captions if "text" in given else [""] * self.clips
        first = self.I_first if "first" in given else None
        last = self.I_last if "last" in given else None
        frames = self.sample(prompts, first, last)
        return self.measure(name, frames, self.captions, true=first is not None)

    def chain(self, name: str) -> Row:
        """Each clip starts from the last frame of the one before; the motion is taken back."""
        there = [n for n, said in enumerate(self.captions) if parse(said)["motion"] in BACK]
        there = there[: max(1, self.clips // CHAIN)]
        said, first = [self.captions[n] for n in there], self.I_first[there]
        for link in range(CHAIN):
            frames = self.sample(said, first, None, link)
            judged, first = said, to_pixels(torch.from_numpy(frames[:, -1])).to(self.model.device)
            said = [there_and_back(caption) for caption in said]
        return self.measure(name, frames, judged)


def evaluate(
    model: PixelDance, clips=100, seed=0, rows=None, rich=False, sketches=False, **settings
) -> list[Row]:
    """The rows of the table, the ceiling first. ValueError for one that the model cannot have."""
    known = ROWS if model.settings.frames > 1 else ROWS[:1]  # an image model has its text alone
    rows = rows or known
    for name in rows:
        if name not in known:
            raise ValueError(f"unknown row {name!r}; known are: {'; '.join(known)}")
    bar = Progress("evaluating", clips * len(rows), "clip")
    evaluation = Evaluation(model, clips, bar, seed, rich, sketches, **settings)
    with bar:
        return [evaluation.ceiling(), *(evaluation.row(name) for name in rows)]


def there_and_back(caption: str) -> str:
    """The caption with the opposite motion."""
    motion = parse(caption)["motion"]
    return caption.replace(motion, BACK[motion])


def same_frame_other_motions(clips: int, seed: int, world: World) -> tuple[np.ndarray, list[str]]:
    """First frames (n, 3, H, W), each in a row for every motion in turn, and the captions."""
    frames, captions = [], []
    rng = np.random.default_rng([HIDDEN_SEED + seed, 7])
    while len(captions) < clips:
        scene = sample_scene(rng, world)
        for motion in world.motions:
            if motion in (CHANGES, CUTS) or not is_seen(motion, scene.shape):
                continue
            other = replace(scene, motion=motion, then=None)
            frames.append(render(other, world)[0])
            captions.append(caption_of(other))
    return np.stack(frames[:clips]), captions[:clips]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, in percent; below the ceiling, in percent of it."""
    head = ["instruction", "clips", *ATTRIBUTES, "in the last frame", "first, dB", "last, px"]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        best = rows[0] if r is not rows[0] else None
        cells = [percent(r.shares, best and best.shares, name) for name in ATTRIBUTES]
        cells += [" / ".join(percent(r.kept, best and best.kept, name) for name in r.kept)]
        psnr = "" if r.first_psnr is None else f"{r.first_psnr:.1f}"
        error = "" if r.last_error is None else f"{r.last_error:.1f}"
        lines.append([r.name, str(r.clips), *cells, psnr, error])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(shares: dict[str, float], best: dict[str, float] | None, name: str) -> str:
    if name not in shares:
        return ""
    return f"{100 * shares[name] / (best[name] if best else 1):.0f}"


def seeds(model: PixelDance, clips: int = 16, **settings) -> str:
    """Is a clip a function of its seed, and of nothing else? In grey levels of 255."""
    captions = [make_clip(HIDDEN_SEED, n)[1] for n in range(clips)]
    made = [
        to_frames(sample_frames(model, captions, seed=seed, **settings)).float()
        for seed in (0, 0, 1)
    ]
    same, other = ((made[0] - frames).abs().mean() for frames in made[1:])
    return f"mean difference of pixels: same seed {same:.2f}, another seed {other:.2f}, of 255"


def nearest(model: PixelDance, clips: int, count: int = 5):
    """Clips from text beside the nearest of the first `clips` training clips (seed 0): a film
    strip, and the mean absolute distances; also those of true hidden clips, for comparison."""
    world = World(model.settings.height, model.settings.frames)
    hidden = [make_clip(HIDDEN_SEED, n, world) for n in range(count)]
    captions = [caption for _, caption in hidden]
    made = to_frames(sample_frames(model, captions)).cpu().numpy()
    asked = np.stack([*made, *(frames for frames, _ in hidden)]).astype(np.int16)
    best, found = np.full(len(asked), np.inf), [None] * len(asked)
    for n in progress(range(clips), "nearest", "clip"):
        frames, caption = make_clip(0, n, world)
        distance = np.abs(asked - frames).mean((1, 2, 3, 4))
        for k in np.flatnonzero(distance < best):
            best[k], found[k] = distance[k], (frames, caption)
    rows, titles = [], []
    for k in range(count):
        rows += [made[k], found[k][0]]
        titles += [captions[k], f"the nearest of {clips:,}: {found[k][1]}, {best[k]:.1f} off"]
    line = (f"to the nearest of {clips:,} training clips, in grey levels of 255: "
            f"{best[:count].mean():.1f} from the model's, {best[count:].mean():.1f} from new true "
            "clips")  # fmt: skip
    return film_strip([torch.from_numpy(row) for row in rows], titles), line


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--clips", type=int, help="clips per row: 100; or to draw: 3")
    parser.add_argument("--rows", help=f"some of them, joined by ';': {'; '.join(ROWS)}")
    parser.add_argument("--rich", action="store_true", help="the richer world, for models of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--tau", help="first steps that see the last frame: 12, 0.5 or 50%%")
    parser.add_argument("--sketch", action="store_true", help="show last frames as edge drawings")
    parser.add_argument("--cond_noise_t", type=int, help="noise on pictures; default: as trained")
    parser.add_argument("--dtype", default="auto", help="float32, or bfloat16 where it is fast")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--strip", help="draw clips to this .png instead, and measure nothing")
    parser.add_argument("--nearest", help="draw five clips, each over the nearest trained on")
    parser.add_argument("--seen", type=int, default=10_000, help="training clips to search")
    args = parser.parse_args()
    rows = [name.strip() for name in args.rows.split(";")] if args.rows else None
    device = choose_device("auto")
    dtype = choose_dtype(args.dtype, device)
    with torch.no_grad(), autocast(device, dtype):
        report(PixelDance.from_folder(args.model).to(device), args, rows)


def report(model: PixelDance, args, rows: list[str] | None) -> None:
    """Do what the command line asks for."""
    settings = {k: getattr(args, k) for k in ("steps", "guidance", "tau", "cond_noise_t")}
    if args.strip:
        hidden = ToyWorld(HIDDEN_SEED + args.seed, world_of(model, args.rich))
        show_clips(model, hidden, args.seed, args.clips or 3, **settings).save(args.strip)
        return
    if args.nearest:
        strip, line = nearest(model, args.seen)
        strip.save(args.nearest)
        print(line)
        return
    measured = evaluate(
        model, args.clips or 100, args.seed, rows, args.rich, args.sketch, **settings
    )
    print(table(measured))
    for row in measured[1:] if model.settings.frames > 1 else []:
        shares = ", ".join(f"{name} {100 * share:.0f}" for name, share in row.motions.items())
        print(f"{row.name}, motion by motion: {shares}")
    print(seeds(model, **settings))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([vars(r) for r in measured], file, indent=2)


if __name__ == "__main__":
    run_main(main)
