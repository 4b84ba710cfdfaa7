"""What a network makes of noise, and how it learns to: two pictures of a trained model.

    python notebooks/pictures/learning.py guess --out guess.png               # animated
    python notebooks/pictures/learning.py steps --models runs/kept --out steps.png

`guess` shows a hidden clip at growing signal, and below it the network's guess of z_0, from one
call with the caption and the first frame. `steps` shows the same caption, first frame and noise
after growing numbers of training steps. The folder holds, for each number, a model folder or a
checkpoint such as `step_00001000`. A run keeps only its last two checkpoints: copy the others while
it goes on. [ours]
Not here: measurements (`figures.py`), diagrams (`diagrams.py`).
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from tinydance.conditioning import ask, make_conditions, noise_level
from tinydance.model import PixelDance, Sample
from tinydance.noise import draw, generator
from tinydance.run.cli import Parser, run_main
from tinydance.sampling import sample_frames
from tinydance.schedulers import add_noise, split_prediction
from tinydance.toy import SHIPPED, ToyWorld
from tinydance.toy.measure import HIDDEN_SEED, choose_world
from tinydance.vae import to_frames, to_pixels
from tinydance.video.strips import film_strip
from tinydance.weights.safetensors import load_safetensors

SIGNALS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # sqrt(alpha_bar) of each page


@torch.no_grad()
def draw_guess(model: PixelDance, sample: Sample) -> Iterator[Image.Image]:
    """A page for each of SIGNALS: z_t as pixels above, the guess of z_0 as pixels below."""
    schedule, frames = model.schedule, len(sample.frames)
    z_0 = model.vae.encode_video(to_pixels(sample.frames)[None])  # b f 4 h w
    generators = [generator("guess", 0)]
    eps, eps_c = draw(generators, *z_0.shape[1:]), draw(generators, 2, *z_0.shape[2:])
    alpha_bar_c = noise_level(schedule, model.settings.cond_noise_t)
    conditions = make_conditions({"first": z_0[:, 0]}, frames, eps_c, alpha_bar_c)
    c_text = model.encode_text([sample.caption])
    for signal in SIGNALS:
        t = int((schedule.alpha_bar.sqrt() - signal).abs().argmin())
        ab = schedule.alpha_bar_at(t)
        z_t = add_noise(z_0, eps, ab)
        out = ask(model.unet, z_t, torch.tensor([t]), c_text, conditions)
        z_0_hat, _ = split_prediction(z_t, out, ab, schedule.prediction_type)
        rows = [to_frames(model.vae.decode_video(z).clamp(-1, 1))[0] for z in (z_t, z_0_hat)]
        titles = [f"z_t at t = {t}: {ab**0.5:.2f} of the signal", "the network's guess of z_0"]
        yield film_strip(rows, titles, every=max(1, frames // 5))


def read_steps(folder: Path) -> list[tuple[int, Path]]:
    """(training steps, folder) of what lies in a folder, by the last number of each name."""
    found = [(re.findall(r"\d+", path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(numbers[-1]), path) for numbers, path in found if numbers)


def load_averages(model: PixelDance, path: Path) -> PixelDance:
    """A model folder; or a checkpoint, whose averaged weights go into `model`."""
    if (path / "unet").exists():
        return PixelDance.from_folder(path)
    weights = dict(model.unet.named_parameters())
    for file in path.glob("rank_*.safetensors"):  # each rank owns some of the weights
        for name, tensor in load_safetensors(file).items():
            if name.startswith("ema."):
                weights[name.removeprefix("ema.")].data.copy_(tensor)
    return model


@torch.no_grad()
def draw_steps(model: PixelDance, folder: Path, sample: Sample) -> Image.Image:
    """A row for each number of steps in the folder, and last the true clip."""
    first, rows, titles = to_pixels(sample.frames[:1]), [], []
    for steps, path in read_steps(folder):
        trained = load_averages(model, path)
        rows += to_frames(sample_frames(trained, [sample.caption], first))
        titles.append(f"after {steps:,} steps")
    if not rows:
        raise ValueError(f"{folder} has no folder with a number of steps in its name")
    rows, titles = [*rows, sample.frames], [*titles, f"the true clip: {sample.caption}"]
    return film_strip(rows, titles, every=2, first=sample.frames[0])


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("figure", help="guess or steps")
    parser.add_argument("--model", default=SHIPPED, help="model folder; default: the shipped one")
    parser.add_argument("--models", type=Path, help="of steps: folder of models or checkpoints")
    parser.add_argument("--clip", type=int, default=0, help="number of the hidden clip")
    parser.add_argument("--out", required=True, help="draw to this .png")
    args = parser.parse_args()
    if args.figure not in ("guess", "steps") or (args.figure == "steps" and not args.models):
        raise ValueError(f"{args.figure!r}: use guess, or steps with --models FOLDER")
    model = PixelDance.from_folder(args.model)
    sample = ToyWorld(HIDDEN_SEED, choose_world(model)).sample(args.clip)
    if args.figure == "steps":
        draw_steps(model, args.models, sample).save(args.out)
        return
    pages = list(draw_guess(model, sample))
    colours = pages[len(pages) // 2].quantize(128)  # one palette for all
    first, *rest = (page.quantize(palette=colours, dither=Image.Dither.NONE) for page in pages)
    first.save(args.out, save_all=True, append_images=rest, duration=700, loop=0)


if __name__ == "__main__":
    run_main(main)
