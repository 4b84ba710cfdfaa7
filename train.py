"""Train PixelDance: on the toy world, on your videos, on one process or under torchrun.

    python train.py                                  the video stage, from the shipped image model
    python train.py --from-scratch                   all stages: VAE, text, image, video
    python train.py --data FOLDER --out runs/mine    the same on your videos, a.mp4 beside a.txt
    python train.py --stage inspect --data a.csv:0.95 --data clips:0.05 --images 'laion/*.tar'
    torchrun --nproc_per_node=8 train.py --preset paper --init SD21_FOLDER --data webvid.csv

Every field of `tinydance/config.py` is an option. Stopped with Ctrl-C, the same command goes on.
Read `tinydance/stages.py` before.
"""

from dataclasses import fields, replace
from typing import get_args

from tinydance.config import COLUMNS, Config, did_you_mean, make_config
from tinydance.run.cli import Parser, run_main
from tinydance.run.stages import STAGES, train


def main() -> None:
    parser = Parser(description=__doc__)
    known = ("all", *STAGES, "benchmark", "inspect", "latents")
    parser.add_argument("--stage", default="all", help=f"one of {', '.join(known)}")
    parser.add_argument("--preset", default="toy", help=f"one of {', '.join(COLUMNS)}")
    parser.add_argument("--from-scratch", action="store_true", help="start from no trained part")
    names = [f.name for f in fields(Config) if f.name != "preset"]
    for f in fields(Config):
        if f.name in names:
            kind = "|".join(get_args(f.type)) or f.type.__name__
            several = {"action": "extend", "nargs": "+"} if f.name in ("data", "images") else {}
            parser.add_argument(f"--{f.name}", metavar=kind, help=f.metadata["help"], **several)
    args, unknown = parser.parse_known_args()
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], vars(args))}")
    if args.stage not in known:
        raise ValueError(f"unknown stage {args.stage!r}{did_you_mean(args.stage, known)}")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {name: "|".join(given[name]) for name in ("data", "images") if name in given}
    if args.from_scratch and args.init:
        raise ValueError(f"--from-scratch has no use for --init {args.init}: give one of the two")
    config = make_config(args.preset, **given)
    # The shipped parts serve the video stage, and know the plain toy world alone.
    plain = config.data == "toyworld" and not config.rich
    if args.from_scratch or not args.init and (not plain or args.stage in ("vae", "text", "image")):
        config = replace(config, init="")
    if args.stage == "all" and config.preset == "toy" and config.init:  # all but the video stage
        config = replace(config, vae_steps=0, text_steps=0, image_steps=0)
    train(config, args.stage)


if __name__ == "__main__":
    run_main(main)
