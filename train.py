"""Train PixelDance: on the toy world, on your videos, on one process or under torchrun.

    python train.py                                  the video stage, from the shipped image model
    python train.py --from-scratch                   all stages: VAE, text, image, video
    python train.py --data FOLDER --out runs/mine    the same on your videos, a.mp4 beside a.txt
    python train.py --stage inspect --data a.csv:0.95 --data clips:0.05 --images 'laion/*.tar'
    torchrun --nproc_per_node=8 train.py --preset paper --init SD21_FOLDER --data webvid.csv

Every field of `tinydance/config.py` is an option. Stopped with Ctrl-C, the same command goes on.
"""

from dataclasses import fields, replace
from functools import partial
from typing import get_args

from tinydance.config import PRESETS, Config, did_you_mean, make_config
from tinydance.data.depth import WithDepth
from tinydance.run.cli import Parser, run_main
from tinydance.run.stages import OTHERS, STAGES, train
from tinydance.variants import make_your_video, videocrafter1
from tinydance.variants.lora import lora_stage


def main() -> None:
    parser, stages = Parser(description=__doc__), ("all", *STAGES, *OTHERS)
    toy = make_config()
    parser.add_argument("--stage", default="all", choices=stages, help="which alone; default: all")
    parser.add_argument("--from-scratch", action="store_true", help="start from no trained part")
    parser.add_argument(
        "--lora", type=int, help="train thin matrices of this rank, no other weight"
    )
    variants = {**make_your_video.PAGES, **videocrafter1.PAGES}
    parser.add_argument("--variant", choices=variants, help="a neighbour's way; see variants/")
    parser.add_argument("--image_encoder", help="folder of CLIP, for a variant that looks")
    parser.add_argument("--depth", default="", help="folder of depth videos, for one that takes it")
    for f in fields(Config):
        words = PRESETS if f.name == "preset" else get_args(f.type)
        repeat = {"action": "extend", "nargs": "+"} if f.name in ("data", "images") else {}
        kind = "|".join(words) or f.type.__name__
        about = f"{f.metadata['help']} (toy: {getattr(toy, f.name)})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", metavar=kind, help=about, **repeat)
    args, unknown = parser.parse_known_args()
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], vars(args))}")
    if args.from_scratch and args.init:
        raise ValueError(f"--from-scratch has no use for --init {args.init}: give one of the two")
    given = {f.name: x for f in fields(Config) if (x := getattr(args, f.name)) is not None}
    given |= {name: "|".join(given[name]) for name in ("data", "images") if name in given}
    config = make_config(**given)
    # The toy preset starts from the shipped image model, which knows the toy world alone and is
    # trained already: whoever has other data, or trains one of its parts anew, starts without it.
    no_use = config.data != "toyworld" or args.stage in ("vae", "text", "image")
    if args.from_scratch or (config.init == "shipped" and not args.init and no_use):
        config = replace(config, init="")
    # With --init, a preset that trains a VAE, words and images of its own goes straight to videos.
    if args.stage == "all" and config.init and config.vae_steps > 0:
        config = replace(config, vae_steps=0, text_steps=0, image_steps=0)
    looks, is_deep = args.variant in videocrafter1.PAGES, args.variant in make_your_video.PAGES
    if looks != (args.image_encoder is not None):
        raise ValueError("--variant and --image_encoder belong together: give both")
    if args.depth and not is_deep:
        raise ValueError(f"--depth is for --variant {' or '.join(make_your_video.PAGES)}")
    pages = [partial(lora_stage, args.lora)] if args.lora is not None else []
    if looks:
        pages.append(partial(videocrafter1.image_token_stage, args.variant, args.image_encoder))
    if is_deep:
        with_depth = partial(WithDepth, folder=args.depth)
        pages.append(partial(make_your_video.depth_stage, args.variant, with_depth))
    if pages and (len(pages) > 1 or args.stage not in ("all", "video")):
        raise ValueError("--lora or --variant, one of them, is for the video stage alone")
    STAGES.update({"video": page for page in pages})
    train(config, args.stage)


if __name__ == "__main__":
    run_main(main)
