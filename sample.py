"""Direct a video by text, a first frame and a last frame: any of the three, with any model folder.

    python sample.py "a red circle bounces to the right"
    python sample.py "a red circle moves up" --first a.png --last b.png --tau 50% --out clip.gif
    python sample.py "a red circle grows" --clips 4         a long video; --resume goes on with it
    python sample.py --story story.toml --out film.mp4      shots, and film_storyboard.png
    python sample.py --prompts prompts.txt --out clips/x.mp4    a video a line; also under torchrun
    python sample.py "a blue star grows" --edit clip.mp4 --first edited_a.png --last edited_b.png

The shipped toy model is the default. Text alone makes its own first frame. --out ends in .mp4,
.gif, .apng (animated), .png (film strip), .npy (uint8 f 3 H W), or / (a folder of pictures).
Read `tinydance/sampling.py` and `tinydance/story.py` before.
"""

import itertools
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinydance.conditioning import sketch
from tinydance.config import autocast, choose_device, choose_dtype, did_you_mean
from tinydance.run.cli import Parser, run_main
from tinydance.model import PixelDance
from tinydance.toy import SHIPPED
from tinydance.run.cli import Progress
from tinydance.sampling import Sampling
from tinydance.video.story import Shot, check_film, fingerprint, parts_of, read_story, save_film
from tinydance.vae import to_frames, to_pixels
from tinydance.video.read import BadSample, pictures_in, read_clip, read_header, read_image
from tinydance.video.write import read_about

PROMPT = "a red circle bounces to the right"


def parse(parser: Parser):
    parser.add_argument("prompt", nargs="?", help=f"default, where nothing is given: {PROMPT}")
    parser.add_argument("--prompts", help="a file with a prompt a line, for a video each")
    parser.add_argument("--first", nargs="+", default=[], help="picture: first-frame instruction")
    parser.add_argument("--last", nargs="+", default=[], help="picture: last-frame instruction")
    parser.add_argument("--tau", help="steps that see --last: 12, 0.5 or 50%%; else the model's")
    parser.add_argument("--sketch", action="store_true", help="show --last as an edge drawing")
    parser.add_argument("--edit", help="video to make again, between its first and last frame")
    parser.add_argument("--clips", type=int, default=1, help="chained into one video")
    parser.add_argument("--story", help=".toml with a film's shots: see tinydance/story.py")
    parser.add_argument("--t2i", help="model folder that draws first frames: SD 2.1's, say")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's")
    parser.add_argument("--guidance", type=float, help="guidance, 1 is off; default: the model's")
    parser.add_argument("--negative", default="", help="prompt to move away from")
    parser.add_argument("--frames", type=int, help="frames of a clip; default: the model's")
    parser.add_argument("--height", type=int, help="in pixels; default: the model's")
    parser.add_argument("--width", type=int, help="in pixels; default: the model's")
    parser.add_argument("--sampler", default="ddim", help="ddim or ddpm")
    parser.add_argument("--ddim_eta", type=float, default=0.0, help="DDIM's own noise, 0 to 1")
    parser.add_argument("--cond_noise_t", type=int, help="noise on pictures; default: as trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--out", help="x.mp4, x.gif, x.apng, x.png, x.npy or x/; default: clip.mp4")
    parser.add_argument("--overwrite", action="store_true", help="let --out replace a file")
    parser.add_argument("--resume", action="store_true", help="go on with what was interrupted")
    parser.add_argument("--about", help="print how this video was made, and make none")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="float32, or bfloat16 where it is fast")
    args, unknown = parser.parse_known_args()
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], vars(args))}")
    given = [name for name in ("prompt", "prompts", "first", "last", "edit") if vars(args)[name]]
    if args.story and (given or args.clips != 1):
        raise ValueError(f"--story says what each shot is; leave out {(given + ['clips'])[0]}")
    if args.prompt and args.prompts:
        raise ValueError(f"give the prompt {args.prompt!r} or --prompts {args.prompts}, not both")
    if args.tau is not None and not (args.last or args.edit or args.story):
        raise ValueError(f"tau is {args.tau}, but no --last is given whose steps it would count")
    if args.t2i and (args.first or args.edit):
        raise ValueError("--t2i draws a first frame, and one is given: leave one of the two out")
    if args.sketch and not args.last:
        raise ValueError("--sketch draws the edges of --last: give one")
    if args.resume and not args.out:
        raise ValueError("--resume goes on with an --out: give that name")
    if args.clips < 1:
        raise ValueError(f"clips is {args.clips}; use 1 or more")
    if args.frames == 1 and (args.first or args.last or args.edit or args.clips > 1):
        raise ValueError("frames is 1: a picture is made from text alone, and by itself")
    return args


def main() -> None:
    args = parse(Parser(description=__doc__))
    if args.about:
        print(json.dumps(read_about(args.about), indent=2, ensure_ascii=False))
        return
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    model = PixelDance.from_folder(args.model).to(device)
    image_model = PixelDance.from_folder(args.t2i).to(device) if args.t2i else None

    videos = videos_to_make(args, model)
    outs = names_of(args.out, len(videos))
    todo = []
    for n in range(rank, len(videos), world_size):  # each rank has its share
        if args.resume and Path(outs[n]).exists() and not parts_of(outs[n]).exists():
            print(f"note: {outs[n]} is finished", file=sys.stderr)
            continue
        check_film(videos[n], outs[n], args.overwrite, args.resume)
        todo.append(n)

    given = [word for word in sys.argv[1:] if word != "--resume"]  # a film says the same resumed
    about = {
        "command": shlex.join(["python", "sample.py", *given]),
        "model": fingerprint(args.model),
        "t2i": fingerprint(args.t2i) if args.t2i else None,
        "device": device,
        "dtype": str(dtype),
    }
    clips = sum(shot.clips for n in todo for shot in videos[n])
    with autocast(device, dtype), Progress("clips", clips, "clip", shown=rank == 0) as bar:
        for n in todo:
            try:
                save_film(
                    model, videos[n], outs[n], image_model, n, args.overwrite, args.resume, about,
                    bar,
                )  # fmt: skip
            except KeyboardInterrupt:
                if parts_of(outs[n]).exists():
                    print(f"\nstopped: {parts_of(outs[n])} has what is done; the same with --out "
                          f"{outs[n]} --resume goes on", file=sys.stderr)  # fmt: skip
                sys.exit(130)
            print(outs[n], flush=True)


# ------------------------------------------------------------------------------- what is asked for
def videos_to_make(args, model: PixelDance) -> list[list[Shot]]:
    """The shots of every video. Raises ValueError for what does not fit."""
    default = model.settings
    size = (default.height if args.height is None else args.height,
            default.width if args.width is None else args.width)  # fmt: skip
    how = Sampling(
        frames=args.frames, size=size, steps=args.steps, guidance=args.guidance, tau=args.tau,
        negative=args.negative, seed=args.seed, sampler=args.sampler, ddim_eta=args.ddim_eta,
        cond_noise_t=args.cond_noise_t,
    )  # fmt: skip
    how.complete(model)  # raises before any picture is read
    if args.story:
        shots = read_story(args.story, size, how)
        for i, shot in enumerate(shots):
            try:
                shot.how.complete(model)
            except ValueError as error:
                raise ValueError(f"{args.story}, shot {i + 1}: {error}") from None
        videos = [shots]
    else:
        prompts = read_prompts(args)
        firsts, lasts = ([read_image(path, size) for path in paths]
                         for paths in (args.first, args.last))  # fmt: skip
        if args.edit:
            how, first, last = read_edited(args.edit, how, model)
            firsts, lasts = firsts or [first], lasts or [last]
        if args.sketch:
            lasts = [to_frames(sketch(to_pixels(picture))) for picture in lasts]
        count = max(len(prompts), len(firsts), len(lasts))
        columns = []
        for name, given in (("prompts", prompts), ("--first", firsts), ("--last", lasts)):
            if len(given) not in (0, 1, count):
                raise ValueError(f"{len(given)} {name} for {count} videos; give one, or {count}")
            columns.append(given * count if len(given) == 1 else given or [None] * count)
        videos = [[Shot(*row, clips=args.clips, cut=True, how=how)] for row in zip(*columns)]
    if how.frames not in (None, 1, default.frames):
        print(f"note: {how.frames} frames a clip, where the model was trained on {default.frames}",
              file=sys.stderr)  # fmt: skip
    for shots in videos:
        for shot in shots:
            dropped = model.tokenizer.dropped_words(shot.prompt)
            if dropped:
                print(f"note: too long; this part is not read: {dropped}", file=sys.stderr)
    return videos


def read_prompts(args) -> list[str]:
    if not args.prompts:
        shown = args.first or args.last or args.edit
        return [args.prompt if args.prompt is not None else "" if shown else PROMPT]
    try:
        lines = Path(args.prompts).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.prompts}: cannot read: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts}: no prompt inside; write one a line")
    return prompts


def read_edited(path: str, how: Sampling, model: PixelDance) -> tuple[Sampling, Tensor, Tensor]:
    """(settings for as many frames as the video lasts, its first frame, its last one).

    Video editing "by editing the first frame and the last frame of the provided video" [paper
    §4.5]: what is between is made anew. With --frames, the last one is that of their end.
    """
    fps, size = model.settings.fps, how.complete(model).size
    try:
        if how.frames is None:
            how = replace(how, frames=max(2, pictures_in(read_header(path).seconds, fps)))
        times = 0, (how.frames - 1) / fps
        first, last = (read_clip(path, time, 1, fps, size)[0] for time in times)
    except BadSample as error:
        raise ValueError(f"{path}: {error}") from None
    return how, first, last


def names_of(out: str | None, count: int) -> list[str]:
    """--out, or clip.mp4, clip_2.mp4, ... whichever is free; of several videos, with a number."""
    if count == 1:
        free = (f"clip_{n}.mp4" if n > 1 else "clip.mp4" for n in itertools.count(1))
        return [out or next(n for n in free if not (Path(n).exists() or parts_of(n).exists()))]
    out = out or "clip.mp4"
    end = "/" if out.endswith(("/", os.sep)) else Path(out).suffix
    return [f"{out[: len(out) - len(end)]}_{n:04d}{end}" for n in range(count)]


if __name__ == "__main__":
    run_main(main)
