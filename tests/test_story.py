"""Films: what each clip begins with, how stories are read, and that no interruption changes one."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import HERE, difference, tiny_model
from tiny_training import FIELDS

import sample
from tinydance import training
from tinydance.video import story
from tinydance.conditioning import sketch
from tinydance.config import make_config
from tinydance.run.cli import run_main
from tinydance.toy import SHIPPED
from tinydance.sampling import Sampling, chain, encode_picture, sample_latents
from tinydance.video.story import Shot, film, memory, read_story, storyboard, to_film
from tinydance.toy.world import parse
from tinydance.training import DiffusionLoss
from tinydance.vae import to_pixels


@pytest.fixture
def model():
    return tiny_model(timestep_spacing="trailing", prediction_type="v_prediction")


@pytest.fixture
def shown(model, monkeypatch):
    """What the UNet was shown as first and last frame, clip by clip (guidance 1, clean)."""
    seen, real = [], model.unet.forward

    def spy(z, t, c_text):
        seen.append(z[0, :, 4:].clone())
        return real(z, t, c_text)

    monkeypatch.setattr(model.unet, "forward", spy)
    return seen


HOW = Sampling(guidance=1.0, cond_noise_t=0, tau=1, steps=1)


def picture(seed):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, 16, 16), dtype=np.uint8))


def latent_of(model, frame):
    return encode_picture(model, to_pixels(frame)[None])[0]


def test_a_shot_goes_on_from_the_last_latent_and_a_cut_begins_anew(model, shown):
    shots = [
        Shot("a red circle", picture(0), clips=2, how=HOW),
        Shot("a blue circle", last=picture(1), how=HOW),  # a transition to an unrelated frame
        Shot("a red circle", picture(2), cut=True, how=HOW),
        Shot("a blue circle", cut=True, how=HOW),  # its first frame is the model's own
    ]
    clips = list(film(model, shots))
    assert [(i, z.shape[1]) for i, z in clips] == [(0, 4), (0, 3), (1, 3), (2, 4), (3, 4)]
    lengths = [len(c_image) for c_image in shown]
    assert lengths == [4, 4, 4, 4, 1, 4]
    firsts = [latent_of(model, picture(0)), clips[0][1][0, -1], clips[1][1][0, -1],
              latent_of(model, picture(2)), torch.zeros(4, 8, 8)]  # fmt: skip
    assert all(torch.equal(c_image[0], f) for c_image, f in zip(shown, firsts))
    lasts = [bool((c_image[-1] != 0).any()) for c_image in shown[:4]]
    assert lasts == [False, False, True, False]
    assert torch.equal(shown[2][-1], latent_of(model, picture(1)))


def test_a_film_of_one_shot_is_a_chain_and_its_number_keys_its_noise(model):
    shots = [Shot("a red circle", clips=2, how=Sampling(seed=5))]
    parts = [z_0 for _, z_0 in film(model, shots, number=3)]
    same = list(chain(model, ["a red circle"], 2, how=Sampling(seed=5), numbers=[3]))
    assert all(torch.equal(a, b) for a, b in zip(parts, same, strict=True))
    other = next(iter(film(model, shots, number=4)))[1]
    assert difference(parts[0], other) > 0.1


def test_an_image_model_draws_the_first_frame_of_every_cut_without_a_picture(model, shown):
    image_model = tiny_model()
    image_model.settings = replace(image_model.settings, frames=1)
    shots = [Shot("a red circle", how=HOW), Shot("a blue circle", how=HOW),
             Shot("a red circle", picture(0), cut=True, how=HOW)]  # fmt: skip
    list(film(model, shots, image_model))
    assert [len(c_image) for c_image in shown] == [4, 4, 4]  # no first frame of the model's own
    assert bool((shown[0][0] != 0).all()) and torch.equal(shown[2][0], latent_of(model, picture(0)))


def test_what_is_remembered_is_not_made_again_but_what_a_change_concerns_is(model, tmp_path):
    shots = [Shot("a red circle", how=HOW), Shot("a blue circle", clips=2, how=HOW),
             Shot("a circle", cut=True, how=HOW)]  # fmt: skip
    made = []

    def remember(make, *key):
        def noted():
            made.append(key[0])
            return make()

        return memory(tmp_path, "the model")(noted, *key)

    first = list(film(model, shots, remember=remember))
    assert len(made) == 4
    again = list(film(model, shots, remember=remember))
    assert len(made) == 4 and all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again))
    shots[1] = replace(shots[1], how=replace(HOW, seed=1))
    list(film(model, shots, remember=remember))
    assert made[4:] == [["a blue circle"]] * 2  # neither the shot before, nor the one after a cut
    list(film(model, shots, remember=lambda make, *key: memory(tmp_path, "other")(make, *key)))
    assert len(list(tmp_path.glob("*.npy"))) == 4 + 2 + 4


STORY = """
style = "at night"
seed = 7
guidance = 1
[[shot]]
prompt = "a red circle"
first = "pictures/a.png"
[[shot]]
prompt = "a blue circle"
last = "pictures/a.png"
tau = "50%"
guidance = 3.5
clips = 3
[[shot]]
prompt = ""
cut = true
seed = 1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.fromarray(picture(0).permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "story.toml").write_text(STORY)
    return tmp_path


def test_a_story_says_for_all_shots_or_for_one(folder):
    a, b, c = read_story(folder / "story.toml", (16, 16), Sampling(steps=3, seed=100))
    assert (a.prompt, b.prompt, c.prompt) == ("a red circle at night", "a blue circle at night",
                                              "at night")  # fmt: skip
    assert torch.equal(a.first, picture(0)) and torch.equal(b.last, picture(0))
    assert (a.cut, b.cut, c.cut) == (True, False, True) and (a.clips, b.clips) == (1, 3)
    assert a.how == Sampling(steps=3, seed=7, guidance=1)
    assert b.how == Sampling(steps=3, seed=8, guidance=3.5, tau="50%") and c.how.seed == 1


@pytest.mark.parametrize("old, new, message", [
    ("clips = 3", "clip = 3", "shot 2: unknown key 'clip'; did you mean 'clips'?"),
    ("style", "stlye", "unknown key 'stlye'; did you mean 'style'?"),
    ("clips = 3", 'clips = "3"', "shot 2: clips is '3'; it must be a whole number"),
    ("clips = 3", "clips = 0", "shot 2: clips is 0; use 1 or more"),
    ("clips = 3", "clips = true", "shot 2: clips is True; it must be a whole number"),
    ("cut = true", "cut = 1", "shot 3: cut is 1; it must be true or false"),
    ('prompt = "a blue circle"', "", "shot 2: no prompt"),
    ('last = "pictures/a.png"', 'first = "pictures/a.png"', "or say cut = true"),
    ("a.png", "b.png", "no such file"),
    ("[[shot]]", "[[short]]", "no shot; begin each with a line"),
    ("seed = 7", "seed = ", "story.toml: cannot read"),
])  # fmt: skip
def test_a_story_with_a_fault_names_its_place(folder, old, new, message):
    (folder / "story.toml").write_text(STORY.replace(old, new))
    with pytest.raises(ValueError) as error:
        read_story(folder / "story.toml", (16, 16))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_storyboard_has_a_row_a_shot(model):
    shots = [Shot("a red circle", clips=5, how=HOW), Shot("a blue circle", how=HOW)]
    rows = [[], []]
    frames = torch.cat(list(to_film(model, shots, film(model, shots), rows)))
    assert frames.shape == (1 + 3 * 6, 3, 16, 16)
    assert [len(row) for row in rows] == [6, 3]
    assert torch.equal(rows[0][0], frames[0]) and torch.equal(rows[1][0], frames[16])
    assert storyboard(shots, rows).height > 2 * 96


def test_the_shipped_story_lasts_three_minutes_in_the_toy_worlds_words():
    shots = read_story(SHIPPED.parent / "stories" / "a_day.toml", (32, 32))
    frames = sum(16 * s.cut + 15 * (s.clips - s.cut) for s in shots)
    assert 170 < frames / 4 < 190
    for shot in shots:
        assert set(parse(shot.prompt)) == {"colour", "shape", "motion", "background"}
    assert len({shot.how.seed for shot in shots}) == len(shots)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal")
def test_a_film_that_was_killed_and_resumed_equals_one_in_a_go(
    model, folder, monkeypatch, capsys
):
    """SIGKILL after the second of five clips; what is there before and after, byte by byte."""
    model.save(folder / "model")
    given = ["--story", "story.toml", "--model", "model", "--device", "cpu", "--out"]
    killed = subprocess.Popen(
        [sys.executable, str(HERE.parent / "sample.py"), *given, "film.npy"], cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    parts = folder / "film.npy.parts"
    while len(list(parts.glob("[0-9a-f]*.npy"))) < 2 and killed.poll() is None:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (folder / "film.npy").exists()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("[0-9a-f]*.npy")}
    assert 2 <= len(done) < 5

    monkeypatch.chdir(folder)
    made, real = [], story.sample_latents

    def counted(*arguments):
        made.append(arguments)
        return real(*arguments)

    def run(*arguments):
        monkeypatch.setattr(story, "sample_latents", counted)
        monkeypatch.setattr(sys, "argv", ["sample.py", *given, *arguments])
        run_main(sample.main)

    with pytest.raises(SystemExit):
        run("film.npy")
    error = capsys.readouterr().err
    assert "go on with --resume, or begin anew" in error and len(error.splitlines()) == 1
    run("film.npy", "--resume")
    assert len(made) == 5 - len(done) and not parts.exists()
    run("straight.npy")
    assert np.load("film.npy").shape == (4 + 3 * 3 + 4, 3, 16, 16)
    for name in ("{}.npy", "{}_storyboard.png"):
        film, straight = ((folder / name.format(n)).read_bytes() for n in ("film", "straight"))
        assert film == straight


def test_sketches_are_trained_on_where_they_are_asked_for(monkeypatch):
    """f_last is the latent of the drawing of one of the last three frames; images have none."""
    model, seen = tiny_model(), []

    def spy(f_first, f_last, *rest):
        seen.append(f_last)
        return make_c_image(f_first, f_last, *rest)

    make_c_image = training.make_c_image
    monkeypatch.setattr(training, "make_c_image", spy)
    pixels = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = DiffusionLoss(model, make_config("toy", **FIELDS, sketch="true"))
    loss(pixels, ["a red circle"] * 2, [0, 1])
    drawn = model.vae.encode_video(sketch(pixels))
    for k in range(2):
        assert min(difference(seen[0][k], drawn[k, back]) for back in (1, 2, 3)) < 1e-5
    loss(pixels[:, :1], ["a red circle"] * 2, [0, 1])
    assert seen[1].shape == (2, 4, 8, 8) and difference(seen[1], drawn[:, 0]) > 0.01


def test_the_latents_of_a_clip_do_not_depend_on_how_it_is_asked_for(model):
    """A film's first clip is the clip that `sample_latents` makes."""
    shots = [Shot("a red circle", picture(0), last=picture(1), how=Sampling(seed=2))]
    f_first, f_last = (encode_picture(model, to_pixels(picture(k))[None]) for k in (0, 1))
    alone = sample_latents(model, ["a red circle"], f_first, f_last, Sampling(seed=2))
    assert torch.equal(next(iter(film(model, shots)))[1], alone)
