"""Films: what each clip begins with, how stories are read, and that no interruption changes one."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import HERE, difference, tiny_model
from tiny_training import FIELDS

import sample
from tinydance import training
from tinydance.conditioning import sketch
from tinydance.config import make_config
from tinydance.model import Batch, PixelDance
from tinydance.run.cli import run_main
from tinydance.sampling import chain, encode_picture, sample_latents
from tinydance.toy import SHIPPED
from tinydance.toy.world import CHANGES, MOTIONS, NIGHT, parse
from tinydance.training import DiffusionLoss
from tinydance.vae import to_pixels
from tinydance.video import story
from tinydance.video.story import (
    Shot,
    check_film,
    describe_film,
    film,
    read_story,
    save_film,
)


@pytest.fixture
def model():
    return tiny_model(timestep_spacing="trailing", prediction_type="v_prediction")


@pytest.fixture
def settings(model):
    return replace(model.settings, guidance=1.0, cond_noise_t=0, tau=1, steps=1)


@pytest.fixture
def shown(model, monkeypatch):
    """What the UNet was shown as c_image, clip by clip (guidance 1, one step)."""
    seen, real = [], model.unet.forward

    def spy(z, t, c_text):
        seen.append(z[0, :, 4:].clone())
        return real(z, t, c_text)

    monkeypatch.setattr(model.unet, "forward", spy)
    return seen


def picture(seed):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, 16, 16), dtype=np.uint8))


def latent_of(model, frame):
    return encode_picture(model, to_pixels(frame)[None])[0]


def test_a_shot_goes_on_from_the_last_latent_and_a_cut_begins_anew(model, settings, shown):
    shots = [
        Shot("a red circle", {"first": picture(0)}, clips=2, settings=settings),
        Shot("a blue circle", {"last": picture(1)}, settings=settings),  # to an unrelated frame
        Shot("a red circle", {"first": picture(2)}, cut=True, settings=settings),
        Shot("a blue circle", cut=True, settings=settings),  # its first frame is the model's own
    ]
    clips = list(film(model, shots))
    assert [(i, z.shape[1]) for i, z in clips] == [(0, 4), (0, 3), (1, 3), (2, 4), (3, 4)]
    lengths = [len(c_image) for c_image in shown]
    assert lengths == [4, 4, 4, 4, 1, 4]
    firsts = [
        latent_of(model, picture(0)),
        clips[0][1][0, -1],
        clips[1][1][0, -1],
        latent_of(model, picture(2)),
        torch.zeros(4, 8, 8),
    ]
    assert all(torch.equal(c_image[0], f) for c_image, f in zip(shown, firsts))
    lasts = [bool((c_image[-1] != 0).any()) for c_image in shown[:4]]
    assert lasts == [False, False, True, False]
    assert torch.equal(shown[2][-1], latent_of(model, picture(1)))


def test_a_film_of_one_shot_is_a_chain_and_its_number_keys_its_noise(model):
    settings = replace(model.settings, seed=5)
    shots = [Shot("a red circle", clips=2, settings=settings)]
    parts = [z_0 for _, z_0 in film(model, shots, number=3)]
    same = list(chain(model, ["a red circle"], 2, settings=settings, keys=[(3,)]))
    assert all(torch.equal(a, b) for a, b in zip(parts, same, strict=True))
    other = next(iter(film(model, shots, number=4)))[1]
    assert difference(parts[0], other) > 0.1


def test_a_shot_without_settings_has_those_of_the_model(model):
    own = Shot("a red circle", settings=model.settings)
    (_, a), (_, b) = *film(model, [Shot("a red circle")]), *film(model, [own])
    assert torch.equal(a, b)
    assert describe_film(model, [Shot("a red circle")]) == describe_film(model, [own])


def test_a_picture_by_another_name_is_an_instruction_by_that_name(model):
    """What a variant of the network is told beside first and last needs no change here."""
    asked = []

    def make(model, prompts, instructions, settings, keys):
        asked.append(instructions)
        return torch.zeros(1, 4, 4, 8, 8)

    depth = torch.stack([picture(k) for k in range(4)])
    list(film(model, [Shot("a red circle", {"depth": depth}, clips=2)], make=make))
    assert [set(instructions) for instructions in asked] == [{"depth"}, {"depth", "first"}]
    for k in range(4):
        assert difference(asked[1]["depth"][0, k], latent_of(model, picture(k))) < 1e-5


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


def test_a_story_says_for_all_shots_or_for_one(folder, model):
    settings = replace(model.settings, steps=3, seed=100)
    a, b, c = read_story(folder / "story.toml", model, settings)
    prompts = ["a red circle at night", "a blue circle at night", "at night"]
    assert [shot.prompt for shot in (a, b, c)] == prompts
    assert torch.equal(a.pictures["first"], picture(0)) and list(a.pictures) == ["first"]
    assert torch.equal(b.pictures["last"], picture(0)) and list(b.pictures) == ["last"]
    assert (a.cut, b.cut, c.cut) == (True, False, True) and (a.clips, b.clips) == (1, 3)
    assert a.settings == replace(settings, seed=7, guidance=1)
    assert b.settings == replace(settings, seed=8, guidance=3.5, tau="50%")
    assert c.settings.seed == 1


FAULTS = [
    ("clips = 3", "clip = 3", "shot 2: unknown key 'clip'; did you mean 'clips'?"),
    ("style", "stlye", "story.toml: unknown key 'stlye'; did you mean 'style'?"),
    ("clips = 3", 'clips = "3"', "shot 2: clips is '3'; it must be int"),
    ("clips = 3", "clips = true", "shot 2: clips is True; it must be int"),
    ("cut = true", "cut = 1", "shot 3: cut is 1; it must be bool"),
    ("clips = 3", "clips = 0", "shot 2: clips is 0; use 1 or more"),
    ('tau = "50%"', "tau = 99", "shot 2: tau is 99; use 0 to 4"),
    ("a.png", "b.png", "no such file"),
    ("[[shot]]", "[[short]]", "unknown key 'short'; did you mean 'shot'?"),
    (STORY, "", "None is no shot; begin each with a line [[shot]]"),
    (STORY, 'shot = ["a red circle"]', "'a red circle' is no shot"),
    ("[[shot]]", "[shot]", "story.toml: "),
    ("seed = 7", "seed = ", "story.toml: Invalid value"),
]


@pytest.mark.parametrize("old, new, message", FAULTS)
def test_a_story_with_a_fault_names_its_place(folder, model, old, new, message):
    (folder / "story.toml").write_text(STORY.replace(old, new))
    with pytest.raises(ValueError) as error:
        read_story(folder / "story.toml", model)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_shot_with_a_first_frame_begins_anew_and_one_without_a_prompt_has_no_words(folder, model):
    text = STORY.replace('last = "pictures/a.png"', 'first = "pictures/a.png"')
    (folder / "story.toml").write_text(text.replace('prompt = "a blue circle"', ""))
    _, shot, _ = read_story(folder / "story.toml", model)
    assert shot.cut and list(shot.pictures) == ["first"] and shot.prompt == "at night"


def test_the_shipped_story_lasts_three_minutes_in_the_toy_worlds_words():
    model = PixelDance.from_folder(SHIPPED)
    shots = read_story(SHIPPED.parent / "stories" / "a_day.toml", model)
    frames = sum(16 * s.cut + 15 * (s.clips - s.cut) for s in shots)
    assert 170 < frames / 4 < 190
    said = [parse(shot.prompt) for shot in shots]
    assert all({"colour", "shape", "motion", "background"} <= set(words) for words in said)
    assert {words["motion"] for words in said} == set(MOTIONS) and any("other" in x for x in said)
    assert {words.get("change", "") for words in said} == {"", *CHANGES}
    assert len({shot.settings.seed for shot in shots}) == len(shots)
    for before, after, shot in zip(said, said[1:], shots[1:]):
        if not shot.cut:  # then it goes on with what the one before ended in, as far as is known
            assert before.get("change", NIGHT) == NIGHT, shot.prompt
            ends = before | ({"background": "at night"} if "change" in before else {})
            looks = ("colour", "shape", "other", "background")
            assert all(ends.get(name) == after.get(name) for name in looks), shot.prompt


# ------------------------------------------------------------------------------------ interruptions
def save(model, shots, out, overwrite=False, resume=False, make=sample_latents):
    """What `sample.py` does with a film."""
    metadata = {"command": f"python sample.py {out}", "model": "tiny"} | describe_film(model, shots)
    save_film(model, shots, out, metadata, make, overwrite, resume)


class Stop(Exception):
    """What ends a film before its end, in place of a signal."""


def stop_after(count):
    """A `make` that makes `count` clips; the list of what it has made."""
    made = []

    def make(*arguments):
        if len(made) == count:
            raise Stop
        made.append(sample_latents(*arguments))
        return made[-1]

    return make, made


@pytest.fixture
def shots(settings):
    return [
        Shot("a red circle", {"first": picture(0)}, clips=2, settings=settings),
        Shot("a blue circle", {"last": picture(1)}, settings=settings),
        Shot("a circle", cut=True, settings=settings),
    ]


def test_finished_clips_are_kept_by_their_numbers_and_not_made_again(model, shots, tmp_path):
    make, made = stop_after(3)
    with pytest.raises(Stop):
        save(model, shots, tmp_path / "x.apng", make=make)
    parts = tmp_path / "x.apng.parts"
    assert sorted(os.listdir(parts)) == ["0000.npy", "0001.npy", "0002.npy", "film.json"]
    assert not (tmp_path / "x.apng").exists()
    for k in range(3):
        assert np.array_equal(np.load(parts / f"{k:04d}.npy"), made[k].numpy())
    make, made = stop_after(9)
    save(model, shots, tmp_path / "x.apng", resume=True, make=make)
    assert len(made) == 1 and not parts.exists()
    save(model, shots, tmp_path / "y.apng")
    assert np.array_equal(*(read_frames(tmp_path / f"{name}.apng") for name in "xy"))


def change(shots, k, **changes):
    return [*shots[:k], replace(shots[k], **changes), *shots[k + 1 :]]


MASK = {"first": picture(0), "mask": picture(1)}  # a name that only a variant would know


OTHER_FILMS = {
    "another prompt": lambda shots: change(shots, 1, prompt="a red circle"),
    "another picture": lambda shots: change(shots, 0, pictures={"first": picture(9)}),
    "a picture more, of another name": lambda shots: change(shots, 0, pictures=MASK),
    "no picture": lambda shots: change(shots, 1, pictures={}),
    "another tau": lambda shots: change(shots, 1, settings=replace(shots[1].settings, tau=0)),
    "a clip more": lambda shots: change(shots, 0, clips=3),
    "a cut": lambda shots: change(shots, 1, cut=True),
    "a shot less": lambda shots: shots[:-1],
}


@pytest.mark.parametrize("name", OTHER_FILMS)
def test_clips_of_another_film_are_refused_in_one_line(model, shots, tmp_path, name):
    out = tmp_path / "x.apng"
    with pytest.raises(Stop):
        save(model, shots, out, make=stop_after(1)[0])
    other = OTHER_FILMS[name](shots)
    with pytest.raises(ValueError, match="holds clips of another film") as error:
        save(model, other, out, resume=True)
    assert "\n" not in str(error.value) and "--overwrite" in str(error.value)
    assert (tmp_path / "x.apng.parts" / "0000.npy").exists()
    with pytest.raises(Stop):
        save(model, other, out, overwrite=True, resume=True, make=stop_after(0)[0])
    assert not (tmp_path / "x.apng.parts").exists()  # it begins anew


def test_another_model_is_another_film_and_another_command_is_not(model, shots, tmp_path):
    out = tmp_path / "x.apng"
    with pytest.raises(Stop):
        save(model, shots, out, make=stop_after(1)[0])
    metadata = {"command": "other words", "model": "tiny"} | describe_film(model, shots)
    assert check_film(out, metadata, overwrite=False, resume=True) == 1
    with pytest.raises(ValueError, match="another film"):
        check_film(out, metadata | {"model": "other"}, overwrite=False, resume=True)
    with pytest.raises(ValueError, match="another film"):
        described = describe_film(model, shots, number=1)
        check_film(out, metadata | described, overwrite=False, resume=True)
    with pytest.raises(ValueError, match="holds clips of a film"):
        check_film(out, metadata, overwrite=False, resume=False)


@pytest.mark.parametrize("is_written", [False, True])
def test_a_film_that_was_killed_after_its_last_clip_resumes(
    model, shots, tmp_path, monkeypatch, is_written
):
    """Before the video is written, and between the video and the end of its clips."""
    out, write = tmp_path / "x.apng", story.save_video

    def stop(frames, *arguments, **options):
        if is_written:
            write(frames, *arguments, **options)
        list(frames)
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(story, "save_video", stop)
        save(model, shots, out)
    assert out.exists() == is_written
    make, made = stop_after(0)
    save(model, shots, out, resume=True, make=make)
    assert not made and out.exists() and not (tmp_path / "x.apng.parts").exists()


def test_a_film_that_was_killed_while_its_clips_went_is_finished(model, shots, tmp_path):
    out, parts = tmp_path / "x.apng", tmp_path / "x.apng.parts"
    save(model, shots, out)
    parts.mkdir()
    for name in ("0002.npy", ".tinydance.lock", "notes.txt"):
        (parts / name).write_bytes(b"left")
    assert not story.is_begun(out)
    with story.claim(out):
        pass
    assert os.listdir(parts) == ["notes.txt"]  # a user's


def test_two_processes_do_not_make_one_film(model, shots, tmp_path):
    with story.claim(tmp_path / "x.apng"), pytest.raises(BlockingIOError, match="another process"):
        save(model, shots, tmp_path / "x.apng", overwrite=True, resume=True)
    assert os.listdir(tmp_path) == []


def test_an_overwriting_film_that_was_interrupted_resumes(model, shots, tmp_path):
    out = tmp_path / "x.apng"
    out.write_bytes(b"an old film")
    with pytest.raises(FileExistsError):
        save(model, shots, out)
    with pytest.raises(Stop):
        save(model, shots, out, overwrite=True, make=stop_after(2)[0])
    assert out.read_bytes() == b"an old film"
    make, made = stop_after(9)
    save(model, shots, out, overwrite=True, resume=True, make=make)
    assert len(made) == 2 and Image.open(out).n_frames == 4 + 3 + 3 + 4


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal")
def test_a_film_that_was_killed_and_resumed_equals_one_in_a_go(model, folder, monkeypatch, capsys):
    """SIGKILL after the second of five clips; what is there before and after, byte by byte."""
    model.save(folder / "model")
    given = ["--story", "story.toml", "--model", "model", "--device", "cpu", "--out"]
    # The process stops itself before its third clip, so that the test need not be quick.
    stopping = (
        "import os, signal, sys, sample; real, made = sample.sample, []\n"
        "def sampled(*arguments):\n"
        "    made.append(0)\n"
        "    if len(made) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "sample.sample = sampled; sample.main()"
    )
    killed = subprocess.run(
        [sys.executable, "-c", stopping, *given, "film.apng"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
    )
    parts = folder / "film.apng.parts"
    assert killed.returncode == -signal.SIGKILL and not (folder / "film.apng").exists()
    assert sorted(path.name for path in parts.glob("*.npy")) == ["0000.npy", "0001.npy"]

    monkeypatch.chdir(folder)
    made, real = [], sample.sample

    def counted(*arguments):
        made.append(arguments)
        return real(*arguments)

    def run(*arguments):
        monkeypatch.setattr(sample, "sample", counted)
        monkeypatch.setattr(sys, "argv", ["sample.py", *given, *arguments])
        run_main(sample.main)

    def refuse(*arguments):
        with pytest.raises(SystemExit):
            run(*arguments)
        error = capsys.readouterr().err
        assert len([line for line in error.splitlines() if "note:" not in line]) == 1
        return error

    assert "--resume go on with its own film, --overwrite begins anew" in refuse("film.apng")
    (folder / "story.toml").write_text(STORY.replace("a blue circle", "a red circle"))
    assert "film.apng.parts holds clips of another film" in refuse("film.apng", "--resume")
    (folder / "story.toml").write_text(STORY)
    run("film.apng", "--resume")
    assert len(made) == 3 and not parts.exists()
    run("straight.apng")
    assert Image.open("film.apng").n_frames == 4 + 3 * 3 + 4
    film, straight = (read_frames(folder / f"{name}.apng") for name in ("film", "straight"))
    assert np.array_equal(film, straight)


def read_frames(path):
    with Image.open(path) as image:
        frames = []
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            frames.append(np.array(image.convert("RGB")))
        return np.stack(frames)


def test_sketches_are_trained_on_where_they_are_asked_for(monkeypatch):
    """f_last is the latent of the drawing of one of the last three frames; images have none."""
    model, seen = tiny_model(), []

    def spy(instructions, *rest):
        seen.append(instructions["last"])
        return make_conditions(instructions, *rest)

    make_conditions = training.make_conditions
    monkeypatch.setattr(training, "make_conditions", spy)
    pixels = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = DiffusionLoss(model, make_config("toy", **FIELDS, sketch="true"))
    loss(Batch(0, pixels, ["a red circle"] * 2, [0, 1], ["", ""]))
    drawn = model.vae.encode_video(sketch(pixels))
    for k in range(2):
        assert min(difference(seen[0][k], drawn[k, -back]) for back in (1, 2, 3)) < 1e-5
    loss(Batch(0, pixels[:, :1], ["a red circle"] * 2, [0, 1], ["", ""]))
    assert seen[1].shape == (2, 4, 8, 8) and difference(seen[1], drawn[:, 0]) > 0.01


def test_the_latents_of_a_clip_do_not_depend_on_how_it_is_asked_for(model):
    """A film's first clip is the clip that `sample_latents` makes."""
    settings = replace(model.settings, seed=2)
    pictures = {"first": picture(0), "last": picture(1)}
    shots = [Shot("a red circle", pictures, settings=settings)]
    instructions = {name: latent_of(model, frame)[None] for name, frame in pictures.items()}
    alone = sample_latents(model, ["a red circle"], instructions, settings)
    assert torch.equal(next(iter(film(model, shots)))[1], alone)
