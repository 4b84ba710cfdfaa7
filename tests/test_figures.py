"""The figures measure what they say, on clips that are known; no trained network draws them."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import tiny_model

from tinydance.model import Sample
from tinydance.run.cli import run_main
from tinydance.toy import measure
from tinydance.toy.evaluate import render_all
from tinydance.toy.measure import average, sample_hidden
from tinydance.toy.referee import referee
from tinydance.toy.world import World, describe, parse, render
from tinydance.vae import to_pixels
from tinydance.weights.safetensors import save_safetensors

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks" / "pictures"))
import figures
import learning
from figures import (
    LOOKS,
    find_nearest,
    make_draft,
    measure_drift,
    measure_edit,
    measure_tau,
    repaint,
    sample_plain,
)


@pytest.fixture
def model(monkeypatch):
    """Without networks: the VAE passes pixels, a clip is the true one of its first frame, or else
    that frame held still."""
    model = tiny_model()
    model.settings = replace(model.settings, frames=16, height=32, width=32)
    model.vae.encode_video = model.vae.decode_video = lambda x: x
    scenes = sample_plain(0, 6)
    scenes += [repaint(scene, edit, n) for n, scene in enumerate(scenes) for edit in LOOKS]
    truth = [to_pixels(torch.from_numpy(clip)) for clip in render_all(model, scenes)]

    def sample_frames(model, prompts, first, last, **changes):
        def clip(frame):
            known = [true for true in truth if torch.equal(true[0], frame)]
            return known[0] if known else frame.expand(16, 3, 32, 32)

        return torch.stack([clip(frame) for frame in first])

    def sample_latents(model, prompts, instructions, settings, keys):
        return instructions["first"][:, None].expand(-1, 16, -1, -1, -1)

    monkeypatch.setattr(measure, "sample_frames", sample_frames)
    monkeypatch.setattr(figures, "sample_latents", sample_latents)
    monkeypatch.setattr(figures, "LINKS", 4)
    monkeypatch.setattr(figures, "STEPS", 10)
    return model


def test_true_clips_end_in_their_true_last_frame_smoothly_and_not_in_a_draft(model):
    rows = average(list(measure_tau(model, 6, 0)), "given", "tau")
    kinds = ("true", "draft", "another")
    assert list(rows) == [(kind, tau) for kind in kinds for tau in (0, 5, 10)]
    for (kind, _), row in rows.items():
        assert row["to the true, dB"] > 90 and row["end, % of width"] < 1e-6
        assert row["first frame, dB"] > 90 and row["the VAE's, dB"] > 90
        assert (row["to the given, dB"] > 90) == (kind == "true") and row["clips"] == 6
        assert 0.5 < row["jump"] < 2


def test_an_abrupt_end_is_a_jump(model, monkeypatch):
    real = measure.sample_frames

    def abrupt(*arguments, **changes):
        clips = real(*arguments, **changes).clone()
        clips[:, -1] = -1
        return clips

    monkeypatch.setattr(measure, "sample_frames", abrupt)
    rows = average(list(measure_tau(model, 6, 0)), "given", "tau")
    assert all(row["jump"] > 5 for row in rows.values())


def test_a_draft_keeps_the_means_of_its_tiles():
    frame = np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.uint8)
    draft = make_draft(frame)
    assert draft.shape == frame.shape and len(np.unique(draft[0, :4, :4])) == 1
    assert abs(float(draft[1, 4:8, 8:12].mean()) - float(frame[1, 4:8, 8:12].mean())) < 1


def test_a_chain_that_stands_still_does_not_drift(model):
    rows = average(list(measure_drift(model, 2, 0)), "carried", "link")
    assert list(rows) == [(kind, n) for kind in ("latent", "pixels") for n in (1, 2, 3, 4)]
    for row in rows.values():
        assert row["colour"] == row["shape"] == row["background"] == 1 and row["sky"] == 0


def test_plain_scenes_do_not_change_and_are_repainted_whole():
    for n, scene in enumerate(sample_plain(0, 40)):
        said = parse(describe(scene))
        assert set(said) == {*LOOKS, "motion"} and scene.becomes == scene.land.background
        for edit in LOOKS:
            new = parse(describe(repaint(scene, edit, n)))
            assert {name for name in said if new[name] != said[name]} == {edit}
            frames = render(repaint(scene, edit, n), World(32))
            first, last = (referee(frames[[k]]) for k in (0, -1))
            assert all(getattr(frame, edit) == new[edit] for frame in (first, last))


def test_an_edit_that_is_made_survives_and_moves(model):
    rows = average(list(measure_edit(model, 6, 0)), "edit", "tau")
    assert {edit for edit, _ in rows} == {"colour", "shape", "background"}
    for row in rows.values():
        assert row["survives"] == row["moves"] == 1 and row["middle off, px"] < 1
        assert row["last frame, dB"] > 90


def test_an_edit_that_is_held_still_survives_and_does_not_move(model, monkeypatch):
    def hold(model, prompts, first, last, **changes):
        return first[:, None].expand(-1, 16, -1, -1, -1)

    monkeypatch.setattr(measure, "sample_frames", hold)
    rows = average(list(measure_edit(model, 6, 0)), "edit", "tau")
    for row in rows.values():
        assert row["survives"] > 0.8 and row["moves"] == 0 and row["middle off, px"] > 0.5


def test_what_was_saved_apart_is_read_together(model, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures.PixelDance, "from_folder", lambda path: model)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["figures", *arguments])
        run_main(figures.main)
        return capsys.readouterr().out

    whole = run("drift", "--clips", "2", "--save", "a.json", "--out", "a.png")
    assert "| latent | 4 | " in whole and Image.open("a.png").width > 4 * 300
    both = run("drift", "--read", "a.json", "a.json")
    assert both == whole.replace("| 2 |\n", "| 4 |\n")
    with pytest.raises(SystemExit):
        run("drifts")
    assert "unknown figure 'drifts'" in capsys.readouterr().err


def test_a_strip_has_three_rows_a_clip(monkeypatch, tmp_path):
    model = tiny_model()
    model.settings = replace(model.settings, frames=4, height=32, width=32, steps=2)
    monkeypatch.setattr(figures.PixelDance, "from_folder", lambda path: model)
    out = str(tmp_path / "strip.png")
    monkeypatch.setattr(sys, "argv", ["figures", "strip", "--clips", "2", "--out", out])
    run_main(figures.main)
    assert Image.open(out).height > 6 * 96 and Image.open(out).width > 4 * 96


def test_the_nearest_training_clip_is_found(model, monkeypatch):
    truth = torch.from_numpy(np.stack(render_all(model, sample_hidden(0, 2))))
    monkeypatch.setattr(figures, "sample_frames", lambda model, captions: to_pixels(truth))
    monkeypatch.setattr(measure, "HIDDEN_SEED", 0)  # these clips were trained on: found, 0 off
    strip, line = find_nearest(model, clips=6, count=2)
    assert "0.0 from new true clips" in line and strip.width > 300


# ------------------------------------------------------------------------------------ learning.py
@pytest.fixture
def sample():
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16)).astype(np.uint8)
    return Sample(torch.from_numpy(frames), "a red circle moves left", "noise")


def test_a_network_that_knows_the_noise_guesses_the_same_clip_on_every_page(sample, monkeypatch):
    model = tiny_model()
    z_0 = model.vae.encode_video(to_pixels(sample.frames)[None])
    asked = []

    def ask(unet, z_t, t, c_text, conditions):
        alpha_bar = model.schedule.alpha_bar[t]
        asked.append(float(alpha_bar.sqrt()))
        assert conditions["c_image"][0, 0].any() and not conditions["c_image"][0, 1:].any()
        return (z_t - alpha_bar.sqrt() * z_0) / (1 - alpha_bar).sqrt()

    monkeypatch.setattr(learning, "ask", ask)
    pages = [np.asarray(page).astype(int) for page in learning.draw_guess(model, sample)]
    assert asked == pytest.approx(learning.SIGNALS, abs=0.01)
    half = len(pages[0]) // 2
    below = [page[half + 20 :] for page in pages]
    assert all(abs(page - below[0]).max() <= 2 for page in below)
    assert abs(pages[0][:half] - pages[-1][:half]).max() > 20


def test_models_and_checkpoints_stand_in_the_order_of_their_steps(sample, monkeypatch, tmp_path):
    names = {10: "step_00000010", 9: "model_9", 200: "step_00000200"}
    for steps, name in names.items():
        tensor = torch.full((4,), float(steps))
        save_safetensors({"ema.conv_out.bias": tensor}, tmp_path / name / "rank_0_of_1.safetensors")
    (tmp_path / "notes").mkdir()
    drawn = []

    def sample_frames(model, prompts, first):
        drawn.append(float(model.unet.conv_out.bias[0]))
        return to_pixels(sample.frames)[None]

    monkeypatch.setattr(learning, "sample_frames", sample_frames)
    model = tiny_model()
    picture = learning.draw_steps(model, tmp_path, sample)
    assert drawn == [9, 10, 200] and picture.height > 4 * 96
    model.save(tmp_path / "model_9")
    assert learning.load_averages(model, tmp_path / "model_9") is not model
    with pytest.raises(ValueError, match="no folder with a number of steps"):
        learning.draw_steps(model, tmp_path / "notes", sample)
