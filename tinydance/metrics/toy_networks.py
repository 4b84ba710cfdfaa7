"""The toy world's own networks for FVD, FID and Inception Score: two small classifiers. [ours]

    python -m tinydance.metrics.toy_networks     # trains both; writes toy_clips.pt, toy_frames.pt

What I3D learned of Kinetics and Inception of ImageNet, these learn of the toy world: to name what a
clip or a frame shows. A feature is their last layer but one. The files are TorchScript and called
as the field's are (`detectors.py`), so one code measures toy clips and real ones.
"""

import io
import warnings
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.noise import generator
from tinydance.run.cli import Parser, progress, run_main
from tinydance.toy.paint import BACKGROUNDS, COLOURS, SHAPES
from tinydance.toy.world import CHANGES, MOTIONS, Scene, render, sample_scene

CLIPS, FRAMES = (Path(__file__).parent / f"toy_{name}.pt" for name in ("clips", "frames"))
NAMED = [*COLOURS], [*SHAPES], [*BACKGROUNDS], [*MOTIONS], ["", *CHANGES]  # of a frame, the first 3
FEATURES, SEED = 48, 2_000_003_000  # numbers of a feature; seed of clips that nothing else uses


class ToyNetwork(nn.Module):
    """Clips (n, 3, f, H, W) or frames (n, 3, H, W) in 0 ... 255 -> features (n, FEATURES), or
    probabilities of each pair of colour and motion, of frames of colour and shape."""

    def __init__(self, of_clips: bool):
        super().__init__()
        self.of_clips = of_clips
        layers = [nn.Conv2d(3, 16, 5, 2, 2)]
        layers += [nn.Conv2d(a, b, 3, 2, 1) for a, b in ((16, 32), (32, 48), (48, 48))]
        layers = [part for layer in layers for part in (layer, nn.GELU())]
        self.space = nn.Sequential(*layers, nn.Flatten(1), nn.Linear(48 * 16, FEATURES))
        layers = [nn.Conv1d(FEATURES, FEATURES, 3, stride, 1) for stride in (1, 2, 2) * of_clips]
        layers = [part for layer in layers for part in (nn.GELU(), layer)]
        self.time = nn.Sequential(*layers, nn.GELU(), nn.Flatten(1))
        self.mix = nn.Linear(FEATURES * (4 if of_clips else 1), FEATURES)
        self.sizes = [len(names) for names in NAMED[: 5 if of_clips else 3]]
        self.heads = nn.Linear(FEATURES, sum(self.sizes))

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1) if self.of_clips else x
        y = self.space(F.interpolate(frames.float() / 127.5 - 1.0, [64, 64], mode="area"))
        if self.of_clips:
            y = F.interpolate(y.unflatten(0, [x.shape[0], x.shape[2]]).transpose(1, 2), [16])
        y = self.mix(self.time(y))
        if return_features:
            return y
        parts = self.name(y)
        a, b = parts[0].softmax(1), parts[3 if self.of_clips else 1].softmax(1)
        return (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)

    def name(self, y: Tensor) -> list[Tensor]:
        """Features -> the logits of each list of names."""
        return self.heads(F.gelu(y)).split(self.sizes, 1)


def draw_batch(n: int, size: int, of_clips: bool) -> tuple[Tensor, Tensor]:
    """Batch n: clips or first frames as the network takes them, and what they show (b, 5)."""
    scenes = [sample_scene(np.random.default_rng([SEED, n, k])) for k in range(size)]
    shown = np.stack([render(s, pick=slice(None if of_clips else 1)) for s in scenes])
    x = torch.from_numpy(shown).transpose(1, 2) if of_clips else torch.from_numpy(shown[:, 0])
    return x, torch.tensor([list_names(scene) for scene in scenes])


def list_names(scene: Scene) -> list[int]:
    said = scene.mover.colour, scene.mover.shape, scene.land.background, scene.motion, scene.change
    return [names.index(name) for names, name in zip(NAMED, said)]


def train(steps: int, of_frames: ToyNetwork | None = None) -> tuple[ToyNetwork, list[float]]:
    """A network of frames, or of clips, which sees with the given one's layers to begin with; and
    the share of right names in the last tenth of its steps, on new clips."""
    of_clips, size = of_frames is not None, 32
    torch.manual_seed(generator("toy network", int(of_clips)).initial_seed())
    network, hits = ToyNetwork(of_clips), []
    if of_clips:
        network.space.load_state_dict(of_frames.space.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for n in progress(range(steps), f"toy_{'clips' if of_clips else 'frames'}", "step"):
        x, truth = draw_batch(n, size, of_clips)
        logits = network.name(network(x, return_features=True))
        loss = sum(F.cross_entropy(part, truth[:, k]) for k, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        hits += [[(p.argmax(1) == truth[:, k]).float().mean().item() for k, p in enumerate(logits)]]
    return network.eval(), np.mean(hits[-max(1, steps // 10) :], axis=0).round(3).tolist()


def save(network: ToyNetwork, path: Path) -> None:
    """As TorchScript, without its debug files, which name folders of this machine."""
    with warnings.catch_warnings():  # torch calls TorchScript old; the field's files are such
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), whole := io.BytesIO())
    with ZipFile(whole) as source, ZipFile(path, "w") as target:
        for item in source.infolist():
            if not item.filename.endswith(".debug_pkl"):
                target.writestr(item, source.read(item))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000, help="on clips; four times on frames")
    parser.add_argument("--out", default=CLIPS.parent, help="folder; default: beside this file")
    args = parser.parse_args()
    network = None  # that of frames first: the other sees with its layers
    for path, steps in ((FRAMES, 4 * args.steps), (CLIPS, args.steps)):
        network, right = train(steps, network)
        save(network, Path(args.out) / path.name)
        names = ("colour", "shape", "background", "motion", "change")
        print(f"{path.name}: right in " + ", ".join(f"{n} {r}" for n, r in zip(names, right)))


if __name__ == "__main__":
    run_main(main)
