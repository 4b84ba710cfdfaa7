"""A captioner for clips of the toy world, and answers about them: Lynx's method in miniature.

    clip -- frozen encoder --> latents -- resampler --> a few prefix tokens
    prefix tokens, question, answer so far -- language model --> the answer's next word

    python -m tinydance.toy.captioner FOLDER                   # a.txt beside a.mp4, if it has none
    python -m tinydance.toy.captioner FOLDER --ask "where to"  # or print answers, see `answer_all`
    python -m tinydance.toy.captioner --train 3000 --prefix 32 --captioner mine   # and measure it

Lynx puts a frozen image tower, a resampler and an adapted language model together, and compares one
choice at a time (arXiv 2307.02469). Here the tower is the model's own VAE, and the language model
is trained along with the resampler, because the toy world's language has 40 words. [ours]
"""

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.config import autocast, choose_dtype
from tinydance.model import PixelDance
from tinydance.run.cli import Parser, progress, run_main
from tinydance.toy import SHIPPED, measure
from tinydance.toy.world import Scene, describe, render, sample_scene, vocabulary
from tinydance.vae import VAE, to_pixels
from tinydance.video.read import BadSample, read_clip
from tinydance.weights import build, load_into, read_part, save_weights
from tinydance.weights.files import whole_file

SHIPPED_CAPTIONER = Path(__file__).parent / "captioner"
ASKED = ("what moves", "which colour", "which shape", "where to", "which landscape", "beside what")
ASKED += ("until when", "describe it")
END, LENGTH = "<end>", 28  # words of the longest question with its answer
LR, BATCH, SEED = 1e-3, 32, 3_000_003_000  # of training; its clips are nobody else's
WORDS = [END, *sorted({*vocabulary(), *"nothing the end".split(), *" ".join(ASKED).split()})]
SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".apng")


def answer_all(scene: Scene) -> dict[str, str]:
    """question -> the true answer."""
    mover, other = scene.mover, scene.other
    looks = {"which colour": mover.colour, "which shape": mover.shape}
    return looks | {
        "what moves": f"a {mover.colour} {mover.shape}",
        "where to": scene.motion,
        "which landscape": scene.land.background,
        "beside what": f"a {other.colour} {other.shape}" if other else "nothing",
        "until when": scene.change.removeprefix("until ") or "the end",
        "describe it": describe(replace(scene, says_background=True)),
    }


@dataclass(frozen=True)
class CaptionerConfig:
    frames: int = 4  # seen, from the first to the last
    prefix: int = 8  # tokens that the language model gets of a clip
    width: int = 96
    channels: int = 8  # of the latents
    places: int = 64  # positions of a latent


class Captioner(nn.Module):
    """Latents z (b, frames, c, h, w) and words (b, l) -> logits of each next word (b, l, words)."""

    def __init__(self, config: CaptionerConfig):
        super().__init__()
        self.config, width = config, config.width
        shape = {"nhead": 4, "dim_feedforward": 4 * width, "dropout": 0.0, "activation": "gelu"}
        shape |= {"batch_first": True, "norm_first": True}
        self.look = nn.Linear(config.channels, width)
        self.place = nn.Parameter(0.02 * torch.randn(config.frames * config.places, width))
        self.queries = nn.Parameter(0.02 * torch.randn(1, config.prefix, width))
        self.resampler = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, **shape), 2)
        self.words = nn.Embedding(len(WORDS), width)
        self.order = nn.Parameter(0.02 * torch.randn(config.prefix + LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, **shape)
        self.language = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        nn.init.normal_(self.words.weight, std=width**-0.5)

    def forward(self, z: Tensor, ids: Tensor) -> Tensor:
        patches = self.look(z.flatten(3).transpose(2, 3)).flatten(1, 2)  # b (f h w) d
        prefix = self.resampler(self.queries.expand(len(z), -1, -1), patches + self.place)
        x = torch.cat([prefix, self.words(ids)], dim=1)
        x = x + self.order[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return F.linear(self.language(x, mask)[:, prefix.shape[1] :], self.words.weight)

    @torch.no_grad()
    def answer(self, z: Tensor, question: str) -> list[str]:
        """The likeliest words one after the other, for each clip. Raises ValueError for a word that
        it does not know."""
        if unknown := [word for word in question.split() if word not in WORDS]:
            raise ValueError(f"{unknown[0]!r} is no word of a question; ask {' or '.join(ASKED)}")
        ids = torch.tensor([[WORDS.index(word) for word in question.split()]] * len(z))
        begin = ids.shape[1]
        while ids.shape[1] < LENGTH and not (ids[:, begin:] == 0).any(1).all():
            ids = torch.cat([ids, self(z, ids)[:, -1:].argmax(-1)], dim=1)
        words = ([WORDS[i] for i in row] for row in ids[:, begin:].tolist())
        return [" ".join(row[: row.index(END)] if END in row else row) for row in words]

    @classmethod
    def from_folder(cls, path) -> "Captioner":
        return read_part(path, lambda c: cls(build(CaptionerConfig, c, f"{path}/config.json")))

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_into(self, tensors)


def see(vae: VAE, clips: list, frames: int) -> Tensor:
    """Latents (b, frames, c, h, w), their means, of some frames of clips, evenly from the first to
    the last. clips: scenes, or uint8 (f, 3, H, W)."""
    clips = [render(clip) if isinstance(clip, Scene) else clip for clip in clips]
    x = torch.from_numpy(np.stack(clips))
    picks = torch.linspace(0, x.shape[1] - 1, frames).long()
    mean, _ = vae.encode(to_pixels(x[:, picks]).flatten(0, 1))
    return mean.unflatten(0, (len(x), frames))


def train(vae: VAE, config: CaptionerConfig, steps: int, frozen=True, size=BATCH):
    """-> a captioner, and the tower: a copy of this VAE, frozen or trained along."""
    torch.manual_seed(SEED)
    captioner, vae = Captioner(config), copy.deepcopy(vae).requires_grad_(not frozen)
    weights = [p for part in (captioner, vae) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.1)
    for n in progress(range(steps), "captioner", "step"):
        scenes = [sample_scene(np.random.default_rng([SEED, n, k])) for k in range(size)]
        ids, target = torch.zeros(2, size, LENGTH, dtype=torch.long)
        for k, scene in enumerate(scenes):
            question = ASKED[(n + k) % len(ASKED)]
            words = f"{question} {answer_all(scene)[question]} {END}".split()
            ids[k, : len(words)] = torch.tensor([WORDS.index(word) for word in words])
            target[k], begin = -100, len(question.split())  # only the answer counts
            target[k, begin - 1 : len(words) - 1] = ids[k, begin : len(words)]
        with autocast("cpu", choose_dtype("auto", "cpu")):
            logits = captioner(see(vae, scenes, config.frames), ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())  # of known words
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    return captioner.eval(), vae.eval()


def score(captioner: Captioner, vae: VAE, clips: int, seed: int = 0) -> dict[str, float]:
    """question -> the share of right answers about clips that no training saw."""
    right, frames = {question: 0 for question in ASKED}, captioner.config.frames
    scenes = measure.sample_hidden(seed, clips)
    for i in range(0, clips, 50):
        some = scenes[i : i + 50]
        with torch.no_grad():
            z = see(vae, some, frames)
        for question in ASKED:
            pairs = zip(captioner.answer(z, question), some)
            right[question] += sum(got == answer_all(scene)[question] for got, scene in pairs)
    return {question: count / clips for question, count in right.items()}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="videos to write captions for")
    parser.add_argument("--ask", help="print answers to this, and write nothing")
    parser.add_argument("--model", default=SHIPPED, help="model folder, whose VAE it sees by")
    parser.add_argument("--captioner", default=SHIPPED_CAPTIONER, help="its folder")
    parser.add_argument("--train", type=int, help="steps of training a new one")
    parser.add_argument("--frames", type=int, default=4, help="that a new one sees; default: 4")
    parser.add_argument("--prefix", type=int, default=8, help="its prefix tokens; default: 8")
    parser.add_argument("--tower", choices=["frozen", "trained"], default="frozen")
    parser.add_argument("--clips", type=int, default=500, help="that a new one is measured on")
    args = parser.parse_args()
    if (args.train is None) == (args.folder is None):
        raise ValueError("give a FOLDER of videos, or --train STEPS")
    model = PixelDance.from_folder(args.model)
    vae, settings = model.vae.requires_grad_(False), model.settings
    if args.train:
        config = CaptionerConfig(args.frames, args.prefix, channels=vae.config.latent_channels)
        captioner, vae = train(vae, config, args.train, args.tower == "frozen")
        shares = score(captioner, vae, args.clips)
        print(measure.format_table(shares, [[f"{100 * x:.0f}" for x in shares.values()]]))
        if args.tower == "frozen":
            save_weights(args.captioner, asdict(config), captioner.state_dict(), torch.float16)
        return
    captioner = Captioner.from_folder(args.captioner).eval()
    size = settings.height, settings.width
    paths = sorted(path for path in Path(args.folder).rglob("*") if path.suffix in SUFFIXES)
    if not paths:
        raise ValueError(f"{args.folder}: no videos inside; use {' or '.join(SUFFIXES)}")
    for path in progress(paths, "captions", "clip"):
        text = path.with_suffix(".txt")
        if text.exists() and not args.ask:
            continue
        try:
            clip = read_clip(path, 0.0, settings.frames, settings.fps, size)
        except BadSample as error:
            print(f"{path}: {error}")
            continue
        [words] = captioner.answer(see(vae, [clip], captioner.config.frames), args.ask or ASKED[-1])
        if not args.ask:
            with whole_file(text) as file:
                file.write(words.encode())
        print(f"{path}: {words}")


if __name__ == "__main__":
    run_main(main)
