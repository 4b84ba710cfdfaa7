"""The paper's tables in the toy world: its networks, the ladder of figures, the rows."""

import json
import sys

import numpy as np
import pytest
import torch

from tinydance.metrics import tables, toy_networks
from tinydance.model import PixelDance
from tinydance.toy import SHIPPED, evaluate, measure
from tinydance.toy.paint import SHAPES
from tinydance.toy.world import MOTIONS, describe, render

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
CLIPS = 50  # more than the 48 numbers of a feature


@pytest.fixture
def free(monkeypatch):
    """Models whose clips cost nothing: true ones with a blur; what was asked of them is noted."""
    asked = []

    def make_clips(model, row, scenes, seed, **changes):
        asked.append((row, changes))
        for scene in scenes:
            clip = render(scene).astype(float)
            soft = (clip + np.roll(clip, 1, -1) + np.roll(clip, 1, -2)) / 3
            yield soft.astype(np.uint8), describe(scene), render(scene)

    monkeypatch.setattr(evaluate, "make_clips", make_clips)
    return asked


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["tables", *map(str, args)])
    tables.main()


def test_the_networks_of_the_toy_world_are_small_and_name_what_they_see():
    size = sum(path.stat().st_size for path in (toy_networks.CLIPS, toy_networks.FRAMES))
    assert size < 1_000_000
    for of_clips, path in ((True, toy_networks.CLIPS), (False, toy_networks.FRAMES)):
        x, truth = toy_networks.draw_batch(10**6, 200, of_clips)  # a number that no training has
        pairs = torch.jit.load(path)(x)
        assert pairs.sum(1).detach().numpy() == pytest.approx(1, abs=1e-4)
        second = len(MOTIONS) if of_clips else len(SHAPES)
        wanted = truth[:, 0] * second + truth[:, 3 if of_clips else 1]
        assert (pairs.argmax(1) == wanted).float().mean() > 0.7
        assert b".debug_pkl" not in path.read_bytes()  # it names folders of the machine


def test_a_network_of_clips_is_told_by_motion_and_one_of_frames_is_not():
    """Reversed clips have the frames of true ones: FVD rises, FID does not."""
    scenes = [measure.sample_hidden(seed, 100) for seed in (0, 500)]
    truth, real = (np.stack([render(scene) for scene in some]) for some in scenes)
    ruler = tables.Ruler(real)
    true, back = ruler(truth), ruler(truth[:, ::-1].copy())
    assert back["FVD"][0] > 2 * true["FVD"][0]
    assert back["FID"][0] == pytest.approx(true["FID"][0], rel=1e-6)


def test_figures_get_worse_rung_by_rung():
    """True clips < through the VAE < blurred < tiles < shuffled < noise, for FVD: against the clips
    they were made of. Against as few others, chance hides what the VAE does."""
    truth = np.stack([render(scene) for scene in measure.sample_hidden(0, CLIPS)])
    soft = sum(np.roll(truth.astype(float), (i, j), (-2, -1)) for i in range(3) for j in range(3))
    tiles = truth.reshape(*truth.shape[:3], 16, 4, 16, 4).mean((4, 6))
    rng, model = np.random.default_rng(0), PixelDance.from_folder(SHIPPED)
    with torch.no_grad():
        trips = np.stack([*measure.make_round_trip(model, list(truth))])
    rungs = [truth, trips, (soft / 9).astype(np.uint8)]
    rungs += [tiles.repeat(4, 3).repeat(4, 4).astype(np.uint8)]
    rungs += [np.stack([rng.permutation(clip) for clip in truth])]
    rungs += [rng.integers(256, size=truth.shape, dtype=np.uint8)]
    ruler = tables.Ruler(truth)
    fvd = ruler.detectors["FVD"]
    climbed = [ruler.compare("FVD", fvd(torch.from_numpy(clips))) for clips in rungs]
    assert climbed == sorted(climbed) and len({*climbed}) == len(rungs), climbed


def test_a_row_is_of_the_models_that_its_training_left(free, monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="invalid choice: 'nothing'"):
        run(monkeypatch, "nothing")
    with pytest.raises(
        ValueError, match=r"full_0 is missing; make it: python train.py --seed 0 --out"
    ):
        run(monkeypatch, "table3", "--clips", CLIPS, "--runs", tmp_path)
    for training in ("full", "no_pictures"):
        for seed in range(2):
            (tmp_path / f"{training}_{seed}/video").mkdir(parents=True)
            (tmp_path / f"{training}_{seed}/video/model").symlink_to(SHIPPED)
    out = tmp_path / "table2"
    given = "--clips", CLIPS, "--runs", tmp_path, "--trainings", 2, "--out", out
    run(monkeypatch, "table2", *given)
    printed = capsys.readouterr().out
    assert "| no pictures; text |" in printed and "in the paper FID 49.36, FVD 242.82" in printed
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    figures = rows["full; text"]
    assert figures["motion"][0] > 95 and figures["FVD"][1] == 0  # two trainings that are one
    assert out.with_suffix(".png").stat().st_size > 1000


def test_rows_of_one_model_differ_in_what_they_change(free, monkeypatch):
    monkeypatch.setattr(tables.Ruler, "__call__", lambda self, clips: {})
    run(monkeypatch, "condition", "--clips", CLIPS)
    changes = [changes for _, changes in free]
    assert changes == [line.changes for line in tables.TABLES["condition"]]
    for table in ("tau", "guidance", "condition"):
        changes = [str(line.changes) for line in tables.TABLES[table]]
        assert len({*changes}) == len(changes) > 3


def test_every_training_is_a_command_that_train_py_takes():
    from tinydance.config import make_config

    for flags in tables.TRAININGS.values():
        words = flags.split()
        make_config("toy", **dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2])))
    named = {line.training for lines in tables.TABLES.values() for line in lines} - {""}
    assert named == {*tables.TRAININGS}


def test_too_few_clips_are_an_error(free, monkeypatch):
    with pytest.raises(
        ValueError, match="20 samples for features of 48 numbers; measure more than"
    ):
        run(monkeypatch, "tau", "--clips", 20)
