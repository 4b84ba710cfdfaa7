"""Direct a video by text, a first frame and a last frame: any of the three, with any model folder.

    python sample.py "a red circle bounces to the right"
    python sample.py "a red circle moves up" --first a.png --last b.png --tau 50% --out clip.gif
    python sample.py --story story.toml --out film.mp4      --resume goes on where it was stopped

The manual is `tinydance/video/README.md`. Not here: how a clip is made (`tinydance/sampling.py`).
"""

import itertools
import json
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from tinydance.conditioning import sketch
from tinydance.config import autocast, choose_device, choose_dtype, did_you_mean
from tinydance.data.depth import read_depth
from tinydance.model import PixelDance, Settings
from tinydance.run.cli import Parser, Progress, progress, run_main
from tinydance.sampling import first_frame, sample
from tinydance.toy import SHIPPED
from tinydance.vae import to_frames, to_pixels
from tinydance.video import story
from tinydance.video.read import BadSample, pictures_in, read_clip, read_image, read_seconds
from tinydance.video.write import read_metadata
from tinydance.weights.untrusted import read_text, reading

PROMPT = "a red circle bounces to the right"
# page of variants/ -> what a model's folder has where it was converted by it
CONVERTED = {"videocrafter1": "image_encoder", "make_your_video": "depth.json"}
PICTURES = ("first", "last")  # flags that name pictures, which are instructions by these names
SETTINGS = [f.name for f in fields(Settings) if f.name != "fps"]  # flags that change the model's
HELP = {"tau": "steps that see --last: 12, 0.5 or 50%%; ", "sampler": "ddim, ddpm or dpm; "}
HELP |= {"negative": "prompt to move away from; "}
HELP |= {"guidance": "1 is off; ", "ddim_eta": "0 to 1; ", "cond_noise_t": "noise on pictures; "}


def parse() -> Namespace:
    """The arguments. A setting that is not given is None: the model's own counts."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    text = parser.add_mutually_exclusive_group().add_argument
    text("prompt", nargs="*", default=[], help=f"default, where nothing is given: {PROMPT}")
    text("--prompts", help="a file with a prompt per line, for a video each")
    add("--first", nargs="+", default=[], help="picture: first-frame instruction")
    add("--last", nargs="+", default=[], help="picture: last-frame instruction")
    add("--sketch", action="store_true", help="show --last as an edge drawing")
    add("--edit", help="video to make again, between its first and last frame")
    add("--clips", type=int, default=1, help="chained into one video; default: 1")
    add("--story", help=".toml with a film's shots: see tinydance/video/README.md")
    add("--depth", help="video, light is near, for a model that takes depth: see variants/")
    add("--t2i", help="model folder that makes first frames: Stable Diffusion 2.1's, say")
    for name in SETTINGS:
        kind = str if name == "tau" else type(getattr(Settings, name))
        add(f"--{name}", type=kind, help=HELP.get(name, "") + "default: the model's")
    add("--model", default=SHIPPED, help="model folder; default: the shipped one")
    add("--out", help="x.mp4, x.gif, x.apng, x.png (a film strip) or x/; default: clip.mp4")
    add("--overwrite", action="store_true", help="let --out replace a file")
    add("--resume", action="store_true", help="go on with what was interrupted")
    add("--about", help="print how this video was made, and make none")
    add("--device", default="auto", help="default: cuda before mps before cpu")
    add("--dtype", default="auto", help="float32, bfloat16 (default where fast) or float16")
    args, unknown = parser.parse_known_args()
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], vars(args))}")
    alone = "prompt", "prompts", *PICTURES, "sketch", "edit", "clips", "depth"
    for name in alone if args.story else ():
        if vars(args)[name] != parser.get_default(name):
            raise ValueError(f"--story says what each shot is; leave out {name}")
    args.prompt = " ".join(args.prompt) if args.prompt else None  # whoever leaves out the quotes
    if (args.sketch or args.tau is not None) and not (args.last or args.edit or args.story):
        raise ValueError("--sketch and --tau say how --last is shown: give one")
    return args


def main() -> None:
    args = parse()
    if args.about:
        print(json.dumps(read_metadata(args.about), indent=2, ensure_ascii=False))
        return
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    model = load(args.model, device, dtype)
    image_model = load(args.t2i, device, dtype) if args.t2i else None
    words = [word for word in sys.argv[1:] if word != "--resume"]  # it makes no difference
    metadata = {"device": device, "dtype": str(dtype), "model": story.fingerprint(args.model)}
    metadata |= {"t2i": args.t2i and story.fingerprint(args.t2i)}
    metadata |= {"command": shlex.join(["python", "sample.py", *words])}
    videos = read_videos(args, model)
    outs, todo, kept = name_outputs(args, len(videos)), [], 0
    for n in range(rank, len(videos), world_size):  # each rank has its share
        out, about = outs[n], metadata | story.describe_film(model, videos[n], n)
        if args.resume and Path(out).exists() and not story.is_begun(out):
            with story.claim(out):  # what a kill left of its clips goes
                print(f"note: {out} is finished", file=sys.stderr)
            continue
        kept += story.check_film(out, about, args.overwrite, args.resume)
        todo.append((videos[n], out, about))
    clips = sum(shot.clips for shots, *_ in todo for shot in shots)
    with Progress("clips", clips, "clip", kept, shown=rank == 0 and clips > 1) as bar:

        def make(model, prompts, instructions, settings, keys) -> Tensor:
            if image_model and "first" not in instructions:
                first = first_frame(image_model, model, prompts, settings, keys)
                instructions = instructions | {"first": first}
            own_first = "first" not in instructions and settings.frames > 1
            z_ts = sample(model, prompts, instructions, settings, keys)
            for z_t in progress(z_ts, "steps", "step", settings.steps * (1 + own_first), rank == 0):
                pass
            bar.update()
            return z_t

        for shots, out, about in todo:
            try:
                with autocast(device, dtype):
                    story.save_film(model, shots, out, about, make, args.overwrite, args.resume)
                print(out, flush=True)
            except (BlockingIOError, FileExistsError):
                if args.out or args.resume or len(videos) > 1:
                    raise
                todo.append((shots, *name_outputs(args, 1), about))  # another was quicker
            except KeyboardInterrupt:
                print("\nstopped: the same command with --resume goes on", file=sys.stderr)
                sys.exit(130)


def load(folder: str, device: str, dtype: torch.dtype) -> PixelDance:
    is_there = {page: (Path(folder) / part).exists() for page, part in CONVERTED.items()}
    page = next((page for page, found in is_there.items() if found), None)
    if page:  # imported only here, as a page loads what trains
        open_model = import_module(f"tinydance.variants.{page}").open_model
    else:
        open_model = PixelDance.from_folder
    model = open_model(folder).to(device, dtype)
    for part in (model.unet, model.vae, model.text_tower):
        part.requires_grad_(False)  # else autocast keeps a second copy of every weight
    return model


def read_videos(args: Namespace, model: PixelDance) -> list[list[story.Shot]]:
    """The shots of every video. Raises ValueError for what does not fit together."""
    given = {name: vars(args)[name] for name in SETTINGS if vars(args)[name] is not None}
    settings = replace(model.settings, **given).check(model)  # before any picture is read
    check_depth(args, model)
    if args.story:
        videos = [story.read_story(args.story, model, settings)]
    else:
        videos = [[shot] for shot in read_shots(args, settings)]
    if args.depth:
        for [shot] in videos:
            size = model.latent_size(shot.settings.height, shot.settings.width)
            shot.pictures["depth"] = read_depth(args.depth, shot.settings, size)
    shots = list(itertools.chain(*videos))
    for note in dict.fromkeys(note for shot in shots for note in read_notes(shot, model)):
        print(f"note: {note}", file=sys.stderr)
    return videos


def check_depth(args: Namespace, model: PixelDance) -> None:
    takes_depth = model.unet.config.in_channels > 2 * model.unet.config.out_channels
    if args.depth and not takes_depth:
        raise ValueError(f"{args.model} takes no --depth: see tinydance/variants/README.md")
    if takes_depth and not args.depth:
        raise ValueError(f"{args.model} takes the depth of every frame: give --depth VIDEO")
    if args.depth and args.clips > 1:
        raise ValueError("--depth is of one clip: leave out --clips, and give --frames")


def read_notes(shot: story.Shot, model: PixelDance) -> Iterator[str]:
    """What will hardly give what was meant."""
    now, trained, tokenizer = shot.settings, model.settings, model.tokenizer
    if now.frames not in (1, trained.frames):
        yield f"{now.frames} frames a clip, but trained on {trained.frames}"
    if (now.height, now.width) != (trained.height, trained.width):
        yield f"{now.height}x{now.width}, but trained on {trained.height}x{trained.width}"
    if (
        now.frames > 1
        and trained.frames > 1
        and not model.unet.transformer_in.proj_out.weight.any()
    ):
        yield "the temporal layers of this model were never trained: nothing will move"
    if now.frames > 1 and "last" in shot.pictures and "first" not in shot.pictures and shot.cut:
        yield "a last frame, and no first: the model makes one that may not lead there"
    if dropped := tokenizer.dropped_words(shot.prompt):
        yield f"too long; this part is not read: {dropped}"
    strange = [word for word, ids in tokenizer.words(shot.prompt) if len(ids) > 1]
    if strange and len(tokenizer.vocab) < 2000:  # CLIP's has 49,408, and spells few words
        yield f"words that this model was not taught: {' '.join(strange)}"


def read_shots(args: Namespace, settings: Settings) -> list[story.Shot]:
    """A shot for each video that the other flags describe."""
    size = settings.height, settings.width
    lists = {name: [read_image(path, size) for path in vars(args)[name]] for name in PICTURES}
    if args.edit:
        # "editing the first frame and the last frame of the provided video" [paper §4.5]: what is
        # between is made anew, in as many frames as the video lasts, or --frames of them.
        pictures = sorted(Path(args.edit).glob("*.png"))  # where it is a folder of frames
        try:
            if args.frames is None:
                seconds = len(pictures) / settings.fps if pictures else read_seconds(args.edit)
                frames = max(2, pictures_in(seconds, settings.fps))
                settings = replace(settings, frames=frames)
            times = 0.0, (settings.frames - 1) / settings.fps
            if pictures:
                last = min(settings.frames, len(pictures)) - 1
                ends = [read_image(pictures[n], size) for n in (0, last)]
            else:
                ends = [read_clip(args.edit, time, 1, settings.fps, size)[0] for time in times]
        except BadSample as error:
            raise ValueError(f"{args.edit}: {error}") from None
        lists = {name: lists[name] or [end] for name, end in zip(PICTURES, ends)}
    if args.sketch:
        lists["last"] = [to_frames(sketch(to_pixels(picture))) for picture in lists["last"]]
    lists = {name: pictures for name, pictures in lists.items() if pictures}
    if args.t2i and "first" in lists:
        raise ValueError("--t2i makes a first frame: leave it out, or --first and --edit")
    prompts = [args.prompt if args.prompt is not None else "" if lists else PROMPT]
    if args.prompts:
        with reading(args.prompts):
            lines = read_text(args.prompts).splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompts}: no prompt inside; write one a line")
    count = max(map(len, [prompts, *lists.values()]))
    for name, given in ({"prompts": prompts} | lists).items():
        if len(given) not in (1, count):
            raise ValueError(f"{name}: {len(given)} for {count} videos; give 1, or {count}")
    picked = [{name: given[n % len(given)] for name, given in lists.items()} for n in range(count)]
    return [story.Shot(*own, args.clips, True, settings) for own in zip(prompts * count, picked)]


def name_outputs(args: Namespace, count: int) -> list[str]:
    """--out, or clip.mp4, clip_2.mp4, ...: what is free, or to resume; of several with a number."""
    out = args.out or "clip.mp4"
    if count == 1:
        for name in itertools.chain([out], (f"clip_{n}.mp4" for n in itertools.count(2))):
            is_begun, is_there = story.name_parts(name).exists(), Path(name).exists()
            if args.out or (args.resume if is_begun else not is_there):
                return [name]
    end = "/" if out.endswith("/") else Path(out).suffix
    return [f"{out.removesuffix(end)}_{n:04d}{end}" for n in range(count)]


if __name__ == "__main__":
    run_main(main)
