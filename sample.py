"""Make a clip from text, a first frame and a last frame: any of the three, with any model folder.

    python sample.py "a red circle bounces to the right"
    python sample.py "a red circle moves up" --first a.png --last b.png --tau 10 --out clip.gif

The shipped toy model is the default. Text alone makes its own first frame. The end of --out decides
what is written: .mp4, .gif, .apng (animated) or .png (film strip, the instructions beside it).
Read `tinydance/sampling.py` before.
"""

import sys
from pathlib import Path

from tinydance.config import (
    Parser,
    autocast,
    choose_device,
    choose_dtype,
    did_you_mean,
    run_main,
)
from tinydance.model import SHIPPED, PixelDance
from tinydance.sampling import sample_frames
from tinydance.video import check_output, read_image, save_video, to_frames, to_pixels


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="a red circle bounces to the right")
    parser.add_argument("--first", help="picture: the first-frame instruction")
    parser.add_argument("--last", help="picture: the last-frame instruction")
    parser.add_argument("--tau", type=int, help="first steps that see --last; default: half")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's")
    parser.add_argument("--guidance", type=float, help="guidance, 1 is off; default: the model's")
    parser.add_argument("--negative", default="", help="prompt to move away from")
    parser.add_argument("--frames", type=int, help="frames of the clip; default: the model's")
    parser.add_argument("--sampler", default="ddim", help="ddim or ddpm")
    parser.add_argument("--ddim_eta", type=float, default=0.0, help="DDIM's own noise, 0 to 1")
    parser.add_argument("--cond_noise_t", type=int, help="noise on pictures; default: as trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--out", help="x.mp4, x.gif, x.apng or x.png; default: clip.mp4")
    parser.add_argument("--overwrite", action="store_true", help="let --out replace a file")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="float32, or bfloat16 where it is fast")
    args, unknown = parser.parse_known_args()
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], vars(args))}")
    if args.seed < 0:
        raise ValueError(f"seed is {args.seed}; use 0 or more")
    if args.tau and not args.last:
        raise ValueError(f"tau is {args.tau}, but no --last is given whose steps it would count")
    out = Path(args.out) if args.out else next_free("clip", ".mp4")
    check_output(out, args.overwrite)  # before the work, not after it

    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model = PixelDance.from_folder(args.model).to(device)
    dropped = model.tokenizer.dropped_words(args.prompt)
    if dropped:
        print(f"note: the prompt is too long; this part is not read: {dropped}", file=sys.stderr)
    size = model.settings.height, model.settings.width
    I_first, I_last = (read_image(path, size) if path else None for path in (args.first, args.last))
    with autocast(device, dtype):
        frames = sample_frames(
            model,
            [args.prompt],
            None if I_first is None else to_pixels(I_first)[None],
            None if I_last is None else to_pixels(I_last)[None],
            frames=args.frames,
            steps=args.steps,
            guidance=args.guidance,
            tau=args.tau,
            negative=args.negative,
            seed=args.seed,
            sampler=args.sampler,
            ddim_eta=args.ddim_eta,
            cond_noise_t=args.cond_noise_t,
            bar=True,
        )
    save_video(
        to_frames(frames[0]), out, model.settings.fps, overwrite=args.overwrite,
        caption=args.prompt, first=I_first, last=I_last,
    )  # fmt: skip
    print(out)


def next_free(stem: str, suffix: str) -> Path:
    """clip.mp4, or clip_2.mp4, clip_3.mp4, ... where those exist."""
    path, n = Path(stem + suffix), 2
    while path.exists():
        path, n = Path(f"{stem}_{n}{suffix}"), n + 1
    return path


if __name__ == "__main__":
    run_main(main)
