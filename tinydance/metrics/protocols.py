"""The paper's measures of text-to-video, for those who have its data [paper §4.2.1, Tables 1, 2].

    python -m tinydance.metrics.protocols ucf101 --videos UCF-101 --model M --t2i SD21 \\
        --i3d i3d_torchscript.pt --c3d c3d_ucf101.pt --inception inception-2015-12-05.pt
    python -m tinydance.metrics.protocols msrvtt --videos TestVideo --model M --t2i SD21 \\
        --captions test_videodatainfo.json --i3d i3d_torchscript.pt --clip clip-vit-base-patch32

Zero-shot, from text alone: `--t2i` makes the first frames. Only features are kept, in blocks under
--out: stopped, the same command goes on, and under torchrun each rank makes its share of them.
What the paper leaves open is [ours]: the prompts (`ucf101.txt`), the real videos' rate (the
model's), and that FID is of every frame. Not here: the figures themselves (`distances.py`).
"""

import json
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinydance.config import autocast, choose_device, choose_dtype
from tinydance.data.index import Folder
from tinydance.data.order import Files
from tinydance.data.rows import Video
from tinydance.metrics.detectors import CALLS, CLIP, Detector
from tinydance.metrics.distances import clip_similarity, frechet_distance, inception_score
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, progress, run_main
from tinydance.sampling import first_frame, sample_latents
from tinydance.vae import to_frames, to_pixels
from tinydance.video.story import fingerprint
from tinydance.weights.files import read_json, write_json
from tinydance.weights.safetensors import load_safetensors, save_safetensors

BLOCK = 16  # videos in a file of features: what an interruption may cost
PROMPTS = Path(__file__).parent / "ucf101.txt"


def read_ucf101(args: Namespace) -> tuple[list[str], Folder]:
    """A prompt for each made video, the classes in turn; the real videos, in a folder a class."""
    prompts = dict(line.split(": ", 1) for line in PROMPTS.read_text("utf-8").splitlines())
    real = Folder(args.videos, Video)
    classes = sorted({Path(real[i].name).parent.name for i in range(len(real))})
    if unknown := [name for name in classes if name not in prompts]:
        raise ValueError(f"{args.videos}: {unknown[0]!r} is no class of UCF-101; name its folder")
    return [prompts[classes[n % len(classes)]] for n in range(args.count or 10_000)], real


def read_msrvtt(args: Namespace) -> tuple[list[str], list[Video]]:
    """One caption of each test video, chosen at random; and these videos."""
    if not args.captions:
        raise ValueError("msrvtt needs --captions test_videodatainfo.json")
    captions = {}
    try:
        for row in read_json(args.captions)["sentences"]:
            captions.setdefault(row["video_id"], []).append(row["caption"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{args.captions}: no list of sentences inside: {error!r}") from None
    picked = torch.Generator().manual_seed(args.seed)
    real = []
    for name in sorted(captions)[: args.count]:
        k = int(torch.randint(len(captions[name]), (), generator=picked))
        real.append(Video(f"{name}.mp4", Path(args.videos), captions[name][k]))
    return [row.caption for row in real], real


PROTOCOLS = {"ucf101": read_ucf101, "msrvtt": read_msrvtt}


class Measurer:
    """Features of clips, by every network that was given. texts: of the same clips, or None."""

    def __init__(self, args: Namespace, device: str):
        named = {kind: getattr(args, kind) for kind in CALLS}
        self.detectors = {k: Detector(k, path, device) for k, path in named.items() if path}
        self.clip = CLIP(args.clip).to(device) if args.clip else None
        if not (self.detectors or self.clip):
            raise ValueError(f"nothing to measure with: give --clip or --{' or --'.join(CALLS)}")

    def __call__(self, clips: Tensor, texts: list[str] | None) -> dict[str, Tensor]:
        """uint8 (n, f, 3, H, W) -> features by name."""
        found = {kind: detector(clips) for kind, detector in self.detectors.items()}
        if self.clip and texts:
            device = self.clip.text_projection.weight.device
            frames = self.clip.encode_images(to_pixels(clips.flatten(0, 1)).to(device))
            found["clip"] = frames.unflatten(0, clips.shape[:2]).cpu()
            found["text"] = self.clip.encode_texts(texts).cpu()
        return found

    def describe(self) -> list[str]:
        networks = [*self.detectors.values(), *([self.clip] if self.clip else [])]
        return [network.describe() for network in networks]


def make_clips(model, image_model, prompts: list[str], first: int, seed: int) -> Tensor:
    """Videos number first, first + 1, ... of the prompts: uint8 (n, f, 3, H, W)."""
    settings = replace(model.settings, seed=seed).check(model)
    keys = [(first + k,) for k in range(len(prompts))]
    given = {}
    if image_model:
        given = {"first": first_frame(image_model, model, prompts, settings, keys)}
    z_0 = sample_latents(model, prompts, given, settings, keys)
    return to_frames(model.vae.decode_video(z_0)).cpu()


def format_figures(made: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, float]:
    """The figures that the features allow, by name."""
    figures = {}
    if "i3d" in made:
        figures["FVD"] = frechet_distance(real["i3d"], made["i3d"])
    if "inception" in made:
        figures["FID"] = frechet_distance(real["inception"], made["inception"])
    if "c3d" in made:
        figures["IS"], figures["IS, deviation of 10 splits"] = inception_score(made["c3d"])
    if "clip" in made:
        figures["CLIPSIM"] = clip_similarity(made["clip"], made["text"])
    return figures


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--t2i", help="model folder that makes the first frames: SD 2.1's")
    parser.add_argument("--videos", required=True, help="folder of the real videos")
    parser.add_argument("--captions", help="msrvtt: test_videodatainfo.json")
    parser.add_argument("--count", type=int, help="made videos: 10,000; msrvtt: 2,990")
    parser.add_argument("--seed", type=int, default=0)
    for name in (*CALLS, "clip"):
        parser.add_argument(f"--{name}", help="its folder" if name == "clip" else "TorchScript")
    parser.add_argument("--out", help="folder of the features; default: runs/PROTOCOL")
    args = parser.parse_args()
    device, out = choose_device("auto"), Path(args.out or f"runs/{args.protocol}")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    model = PixelDance.from_folder(args.model).to(device)
    image_model = PixelDance.from_folder(args.t2i).to(device) if args.t2i else None
    prompts, rows = PROTOCOLS[args.protocol](args)
    s = model.settings
    real = Files(rows, (s.height, s.width), s.frames, s.fps, seed=args.seed)
    measurer = Measurer(args, device)
    about = {"protocol": args.protocol, "model": fingerprint(args.model), "seed": args.seed}
    about |= {"t2i": args.t2i and fingerprint(args.t2i), "videos": len(prompts)}
    about |= {"frames": s.frames, "fps": s.fps, "size": [s.height, s.width]}
    about |= {"networks": measurer.describe()}
    check_folder(out, about)
    todo = [(kind, n) for kind in ("made", "real") for n in range(0, len(prompts), BLOCK)]
    for kind, n in progress(todo[rank::world_size], "measuring", "block", shown=rank == 0):
        path, some = out / f"{kind}_{n:06d}.safetensors", prompts[n : n + BLOCK]
        if path.exists():
            continue
        with torch.no_grad(), autocast(device, choose_dtype("auto", device)):
            if kind == "made":
                clips = make_clips(model, image_model, some, n, args.seed)
            else:
                clips = torch.stack([real.sample(n + k).frames for k in range(len(some))])
        save_safetensors(measurer(clips, some if kind == "made" else None), path)
    paths = [out / f"{kind}_{n:06d}.safetensors" for kind, n in todo]
    if missing := sum(not path.exists() for path in paths):
        print(f"{missing} of {len(paths)} blocks are not made yet; the same command goes on")
        return
    figures = format_figures(*(join(paths, kind) for kind in ("made", "real")))
    write_json(out / "figures.json", about | {"figures": figures})
    print("\n".join([*(f"{k}: {v}" for k, v in about.items()), "", "| figure | |\n| --- | --- |"]))
    print("\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items()))


def check_folder(out: Path, about: dict) -> None:
    """Raises ValueError where `out` holds features of something else."""
    file = out / "about.json"
    if file.exists() and (before := read_json(file)) != json.loads(json.dumps(about)):
        other = [name for name in about if before.get(name) != about[name]]
        raise ValueError(f"{out} has features with another {', '.join(other)}; use another --out")
    write_json(file, about)


def join(paths: list[Path], kind: str) -> dict[str, Tensor]:
    parts = [load_safetensors(path) for path in paths if path.name.startswith(kind)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    run_main(main)
