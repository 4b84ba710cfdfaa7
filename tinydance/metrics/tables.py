"""The paper's tables and figures, measured in the toy world, each beside the paper's own numbers.

    python -m tinydance.metrics.tables table3 --clips 500 --out table3

Rows are models under instructions. FVD, FID and IS are by the toy world's own networks against as
many true clips of another seed; the rest is the referee's. Where trainings are compared, those of
--seeds are read from --runs, and one that is missing is named with the command that makes it:
behind +- stands the standard error over the trainings, else half of a bootstrap's 95 % interval.
Prints a table; writes it to OUT.json, and the first clips of each row to OUT.png. [ours]
Not here: tau, drafts, edits (`notebooks/pictures/figures.py`).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinydance.config import autocast, choose_device, choose_dtype
from tinydance.metrics.detectors import Detector
from tinydance.metrics.distances import frechet_distance, inception_score
from tinydance.metrics.toy_networks import CLIPS, FRAMES
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, progress, run_main
from tinydance.sampling import encode_picture, sample_latents
from tinydance.toy import SHIPPED, evaluate, measure
from tinydance.toy.world import describe
from tinydance.vae import to_frames
from tinydance.video.strips import film_strip
from tinydance.weights.files import write_json

# How a model of each name is trained: `python train.py` with these, else alike.
TRAININGS = {
    "full": "",
    "no pictures": "--cond_noise_t 999 --eta 1",  # the first frame drowns in noise: text to video
    "no text": "--text_drop 1",
    "no last frame": "--eta 1",
    "last of one": "--last_frames 1",
    "no noise": "--cond_noise_t 0",
    "no dropping": "--eta 0",
    "none of the three": "--last_frames 1 --cond_noise_t 0 --eta 0",
    "epsilon": "--prediction_type epsilon",
    "no images": "--image_every 0",
}


class Line(NamedTuple):
    """A row: a model of TRAININGS, or "" for --model, that is given what `evaluate.ROWS` say."""

    training: str
    given: str
    changes: dict = {}  # of `Settings`
    paper: str = ""  # its figures for this

    def label(self) -> str:
        changes = (f"{name} {value}" for name, value in self.changes.items())
        return "; ".join(filter(None, [self.training, self.given, *changes]))


THREE = "last of one", "no noise", "no dropping", "none of the three"
LINKS = 68  # clips of 16 frames in a chain of 1,024
T, TF, TFL, F = "text", "text, first", "text, first, last", "first"
AGAINST = "text, first, another last"
FULL, T2V = "FID 49.36, FVD 242.82", "FID 59.35, FVD 450.58"  # Table 3's first two
TABLES = {
    "table2": [Line("no pictures", T, paper=T2V), Line("full", T, paper=FULL)],
    "table3": [
        Line("full", TF, paper=FULL),
        Line("no text", F, paper="FID 51.26, FVD 375.79"),
        Line("no last frame", TF, paper="FID 49.45, FVD 339.08"),
        Line("full", TFL),
        Line("no last frame", TFL),
    ],
    "figure7": [Line(name, AGAINST) for name in ("full", *THREE)],
    "tau": [Line("", AGAINST, {"tau": k / 4}) for k in range(5)],
    "guidance": [Line("", TF, {"guidance": w}) for w in (1.0, 2.0, 4.0, 8.0, 12.0)],
    "condition": [Line("", TFL, {"cond_noise_t": t}) for t in (0, 10, 30, 100)],
    "prediction": [Line(name, TF) for name in ("full", "epsilon", "no images")],
}


class Ruler:
    """FVD, FID and IS of clips against true ones. clips: uint8 (n, f, 3, H, W)."""

    def __init__(self, real: np.ndarray, device: str = "cpu"):
        files = {"FVD": ("i3d", CLIPS), "FID": ("inception", FRAMES), "IS": ("c3d", CLIPS)}
        self.detectors = {name: Detector(*file, device) for name, file in files.items()}
        self.real = self.look(real)
        self.compare("FVD", self.real["FVD"])  # too few clips: an error before any is sampled

    def look(self, clips: np.ndarray) -> dict[str, Tensor]:
        """-> features by name, those of one clip in one row: (n, d), of frames (n, f, d)."""
        pixels = torch.from_numpy(clips)
        found = {name: detector(pixels) for name, detector in self.detectors.items()}
        return found | {"FID": found["FID"].unflatten(0, clips.shape[:2])}

    def __call__(self, clips: np.ndarray) -> dict[str, tuple[float, float]]:
        """-> each figure, and half of its 95 % interval over clips drawn with replacement."""
        made, figures = self.look(clips), {}
        for name, features in made.items():
            values = [self.compare(name, features)]
            rng = np.random.default_rng(0)
            for _ in range(20):
                picks = torch.from_numpy(rng.integers(len(features), size=len(features)))
                values.append(self.compare(name, features[picks]))
            figures[name] = values[0], 1.96 * float(np.std(values[1:]))
        return figures

    def compare(self, name: str, made: Tensor) -> float:
        if name == "IS":
            return inception_score(made, splits=1)[0]
        return frechet_distance(self.real[name].flatten(0, -2), made.flatten(0, -2))


Row = tuple[str, dict[str, tuple[float, float]], np.ndarray]  # label, figures with bars, clips


def measure_lines(lines: list[Line], args, ruler: Ruler) -> Iterator[Row]:
    """A row for each line; of several trainings their mean, and its standard error."""
    for line in lines:
        paths = find_models(line.training, args) if line.training else [args.model]
        found = []
        for path in paths:
            model, scenes = load(path), measure.sample_hidden(args.seed, args.clips)
            row = evaluate.ROWS[line.given]
            made = evaluate.make_clips(model, row, scenes, args.seed, **line.changes)
            made = list(progress(made, line.label(), "clip", args.clips))
            clips = np.stack([clip for clip, *_ in made])
            records = [evaluate.judge("", *three) for three in made]
            found.append(ruler(clips) | evaluate.summarise(records))
        figures = found[0]
        if len(found) > 1:
            for name in figures:
                values = [one[name][0] for one in found]
                figures[name] = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
        yield line.label(), figures, clips


def measure_windows(args, ruler: Ruler) -> Iterator[Row]:
    """Long videos, clip by clip, each from the last frame of the one before [paper §4.4, Fig. 8]:
    that frame carried over as a latent, as pixels, or as a latent without noise on it."""
    model = load(args.model)
    scenes = measure.sample_hidden(args.seed, args.clips)
    truth = np.stack(evaluate.render_all(model, scenes))
    yield "true clips", ruler(truth), truth
    frozen = truth[:, :1].repeat(truth.shape[1], axis=1)
    yield "frozen clips", ruler(frozen), frozen
    for kind in ("latents", "pixels", "latents, clean"):
        settings = replace(model.settings, seed=args.seed)
        settings = replace(settings, cond_noise_t=0) if kind == "latents, clean" else settings
        f_first = encode_picture(model, measure.stack_pixels(truth[:, 0], model))
        prompts, rng = [describe(scene) for scene in scenes], np.random.default_rng(args.seed)
        for link in progress(range(1, LINKS + 1), kind, "clip"):
            keys = [(k, link) for k in range(args.clips)]
            z_0 = sample_latents(model, prompts, {"first": f_first}, settings, keys)
            parts = [to_frames(model.vae.decode_video(z)).cpu() for z in z_0.split(16)]
            clips, f_first = torch.cat(parts).numpy(), z_0[:, -1]
            if kind == "pixels":
                f_first = encode_picture(model, measure.stack_pixels(clips[:, -1], model))
            prompts = [evaluate.go_on(p, clip, rng) for p, clip in zip(prompts, clips)]
            if link & (link - 1) == 0:  # 1, 2, 4, 8 ...
                yield f"{kind}, clip {link}", ruler(clips), clips


def load(path) -> PixelDance:
    return PixelDance.from_folder(path).to(choose_device("auto"))


def find_models(name: str, args) -> list[Path]:
    """The models of a training, one a seed. ValueError: one is not there."""
    folders = [Path(args.runs) / f"{name.replace(' ', '_')}_{k}" for k in range(args.trainings)]
    for k, folder in enumerate(folders):
        if not (folder / "video/model").is_dir():
            command = f"python train.py {TRAININGS[name]} --seed {k} --out {folder}"
            raise ValueError(f"{folder} is missing; make it: {' '.join(command.split())}")
    return [folder / "video/model" for folder in folders]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("table", choices=[*TABLES, "figure8"])
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--clips", type=int, default=200, help="clips per row; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other hidden clips")
    parser.add_argument("--runs", default="runs", help="folder of the trainings that are compared")
    parser.add_argument("--trainings", type=int, default=3, help="of each, seeds 0, 1, ...")
    parser.add_argument("--out", help="write OUT.json and OUT.png")
    args = parser.parse_args()
    device = choose_device("auto")
    with torch.no_grad(), autocast(device, choose_dtype("auto", device)):
        real = measure.sample_hidden(500 + args.seed, args.clips)
        ruler = Ruler(np.stack(evaluate.render_all(load(args.model), real)), device)
        lines = TABLES.get(args.table, [])
        measured = measure_lines(lines, args, ruler) if lines else measure_windows(args, ruler)
        rows = list(measured)
    names = list(dict.fromkeys(name for _, figures, _ in rows for name in figures))
    cells = [
        [label, *(evaluate.format_cell(name, figures.get(name)) for name in names)]
        for label, figures, _ in rows
    ]
    about = [f"{n}: {detector.describe()}" for n, detector in ruler.detectors.items()]
    about += [f"{x.label()}: in the paper {x.paper}" for x in lines if x.paper]
    print("\n".join([measure.format_table([args.table, *names], cells), *about]))
    if args.out:
        figures = {label: figures for label, figures, _ in rows}
        write_json(Path(f"{args.out}.json"), {"about": about, "clips": args.clips, "rows": figures})
        strips = [torch.from_numpy(clips[0]) for *_, clips in rows]
        film_strip(strips, [label for label, *_ in rows]).save(f"{args.out}.png")


if __name__ == "__main__":
    run_main(main)
