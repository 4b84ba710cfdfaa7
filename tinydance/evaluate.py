"""How well a toy model follows its instructions: the referee's verdict on clips that it never saw.

    python -m tinydance.evaluate --model FOLDER --clips 200
    python -m tinydance.evaluate --strip clips.png              # look before you measure

One row per instruction: text alone, the first frame without and with its text, the last frame as
well, and the strict one, in which the same first frame is given with every motion in turn. The
first row is the ceiling: what the referee reads from true clips after a round trip through the VAE.
[ours; the paper measures FVD and CLIPSIM, whose networks cannot come along]

Read after `sampling.py` and `toyworld.py`. Not here: metrics for real videos.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinydance.config import Parser, run_main
from tinydance.data import ToyWorld
from tinydance.model import SHIPPED, PixelDance
from tinydance.sampling import sample_frames
from tinydance.toyworld import (
    World,
    caption_of,
    judge,
    make_clip,
    referee,
    render,
    sample_scene,
)
from tinydance.training import show_clips
from tinydance.video import to_frames, to_pixels

HIDDEN_SEED = 1_000_003_000  # of the evaluation's clips; training seeds are small numbers
ATTRIBUTES = ("colour", "shape", "background", "motion")
AT_A_TIME = 16


@dataclass
class Row:
    """One instruction: how many clips obey in each attribute, and distances where they apply."""

    name: str
    clips: int
    shares: dict[str, float]  # attribute -> share of the clips whose caption mentions it
    first_psnr: float | None = None  # dB, of the first frame against the VAE's round trip of it
    last_error: float | None = None  # pixels, the object in the last frame, median


def verdicts(frames: np.ndarray, captions: list[str], world: World) -> dict[str, float]:
    """frames uint8 (n, f, 3, H, W) -> for each attribute the share of clips that obey."""
    judged = [judge(clip, caption, world) for clip, caption in zip(frames, captions)]
    return {
        name: float(np.mean([verdict[name] for verdict in judged if name in verdict]))
        for name in ATTRIBUTES
    }


def evaluate(model: PixelDance, clips: int = 100, seed: int = 0, **settings) -> list[Row]:
    """Rows of the table; settings go to `sample_frames` (steps, guidance, tau)."""
    world = World(model.settings.height, model.settings.frames)
    made = [make_clip(HIDDEN_SEED + seed, n, world) for n in range(clips)]
    truth, captions = np.stack([frames for frames, _ in made]), [caption for _, caption in made]
    pixels = to_pixels(torch.from_numpy(truth)).to(model.device)
    round_trip = torch.cat([
        model.vae.decode_video(model.vae.encode_video(part)).clamp(-1, 1)
        for part in pixels.split(AT_A_TIME)
    ])  # fmt: skip
    bar = tqdm(total=5 * clips, desc="evaluate", leave=False, disable=None)

    def sample(prompts: list[str], first: Tensor | None, last: Tensor | None) -> np.ndarray:
        parts = []
        for i in range(0, len(prompts), AT_A_TIME):
            part = slice(i, i + AT_A_TIME)
            frames = sample_frames(
                model, prompts[part], None if first is None else first[part],
                None if last is None else last[part], seed=seed * 1000 + i, **settings,
            )  # fmt: skip
            parts.append(to_frames(frames).cpu().numpy())
            bar.update(len(prompts[part]))
        return np.concatenate(parts)

    def row(name: str, frames: np.ndarray, said: list[str], first=False, last=False) -> Row:
        psnr = error = None
        if first:
            want = to_frames(round_trip[:, 0]).cpu().numpy().astype(float)
            mse = ((want - frames[:, 0]) ** 2).mean(axis=(1, 2, 3)) + 1e-6
            psnr = float(np.mean(10 * np.log10(255**2 / mse)))
        if last:
            tracks = [(referee(a, world).track[-1], referee(b, world).track[-1])
                      for a, b in zip(truth, frames)]  # fmt: skip
            error = float(np.nanmedian([np.linalg.norm(a - b) for a, b in tracks]))
        return Row(name, len(frames), verdicts(frames, said, world), psnr, error)

    first, last = pixels[:, 0], pixels[:, -1]
    ceiling = to_frames(round_trip).cpu().numpy()
    rows = [row("ceiling: true clips through the VAE", ceiling, captions)]
    rows.append(row("text", sample(captions, None, None), captions))
    rows.append(row("first", sample([""] * clips, first, None), captions, first=True))
    rows.append(row("text, first", sample(captions, first, None), captions, first=True))
    rows.append(row("text, first, last", sample(captions, first, last), captions, True, True))
    one_first, turned = same_frame_other_motions(clips, seed, world)
    one_first = to_pixels(torch.from_numpy(one_first)).to(model.device)
    rows.append(row("same first, each motion", sample(turned, one_first, None), turned))
    bar.close()
    return rows


def same_frame_other_motions(clips: int, seed: int, world: World) -> tuple[np.ndarray, list[str]]:
    """First frames (n, 3, H, W), each in a row for every motion in turn, and the captions."""
    frames, captions = [], []
    rng = np.random.default_rng([HIDDEN_SEED + seed, 7])
    while len(captions) < clips:
        scene = sample_scene(rng, world)
        for motion in world.motions:
            if scene.shape == "circle" and motion.startswith("turns"):
                continue
            other = replace(scene, motion=motion)
            frames.append(render(other, world)[0])
            captions.append(caption_of(other))
    return np.stack(frames[:clips]), captions[:clips]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, shares in percent."""
    head = ["instruction", "clips", *ATTRIBUTES, "first frame, dB", "last position, px"]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        cells = [f"{100 * r.shares[name]:.0f}" for name in ATTRIBUTES]
        psnr = "" if r.first_psnr is None else f"{r.first_psnr:.1f}"
        error = "" if r.last_error is None else f"{r.last_error:.1f}"
        lines.append([r.name, str(r.clips), *cells, psnr, error])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--clips", type=int, default=100, help="clips per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--tau", type=int)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--strip", help="draw three of the clips to this .png, and measure nothing")
    args = parser.parse_args()
    settings = {k: getattr(args, k) for k in ("steps", "guidance", "tau")}
    model = PixelDance.from_folder(args.model)
    if args.strip:
        world = World(model.settings.height, model.settings.frames)
        show_clips(model, ToyWorld(HIDDEN_SEED + args.seed, world), args.seed).save(args.strip)
        return
    rows = evaluate(model, args.clips, args.seed, **settings)
    print(table(rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([vars(r) for r in rows], file, indent=2)


if __name__ == "__main__":
    run_main(main)
