"""The two scripts as a user types them: what works, and one clear line for what cannot."""

import hashlib
import io
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from reference import tiny_model

import sample
import train
from tinydance.config import NETWORKS, autocast, make_config
from tinydance.model import PixelDance, Settings
from tinydance.run.cli import run_main
from tinydance.sampling import sample_frames
from tinydance.toy import SHIPPED, SHIPPED_IMAGE, evaluate
from tinydance.toy.referee import judge
from tinydance.unet import UNet
from tinydance.vae import to_frames
from tinydance.video import story
from tinydance.video.read import read_clip, read_image
from tinydance.video.story import fingerprint
from tinydance.video.write import read_metadata, save_video
from tinydance.weights import pick
from tinydance.weights.files import hold


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny model, a picture and a text file."""
    monkeypatch.chdir(tmp_path)
    tiny_model(timestep_spacing="trailing", prediction_type="v_prediction").save("model")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    (tmp_path / "words.txt").write_text("this is no picture")
    (tmp_path / "taken.mp4").write_bytes(b"precious")
    (tmp_path / "empty").mkdir()
    return tmp_path


def run(monkeypatch, capsys, script, *arguments):
    """(exit code, standard output, standard error) of `python SCRIPT.py ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    code = 0
    try:
        run_main(script.main)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


OUTPUTS = ["x.mp4", "x.gif", "x.apng", "x.png", "deeper/x.mp4", "x/"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_sample_writes_what_the_name_says_and_in_it_how_it_was_made(
    folder, monkeypatch, capsys, name
):
    given = ["--model", "model", "--first", "photo.jpg", "--last", "photo.jpg", "--tau", "50%"]
    code, out, err = run(monkeypatch, capsys, sample, "a red circle", *given, "--out", name)
    assert (code, out.strip()) == (0, name), err
    if name.endswith("mp4"):
        assert read_clip(name, 0.0, 4, 4, (16, 16)).shape == (4, 3, 16, 16)
    elif name == "x/":
        assert sorted(os.listdir("x")) == [f"{k:06d}.png" for k in range(4)]
    else:
        frames = {"x.gif": 4, "x.apng": 4, "x.png": 1}[name]
        assert getattr(Image.open(name), "n_frames", 1) == frames
    about = json.loads(run(monkeypatch, capsys, sample, "--about", name)[1])
    assert about["command"].endswith(f"'a red circle' {' '.join(given)} --out {name}")
    shot = about["shots"][0]
    assert (shot["prompt"], set(shot["pictures"])) == ("a red circle", {"first", "last"})
    assert (shot["settings"]["tau"], shot["settings"]["seed"]) == ("50%", 0)
    assert about["model"] == fingerprint("model")


def test_the_command_inside_a_video_makes_it_again(folder, monkeypatch, capsys):
    given = ["a red circle", "--model", "model", "--clips", 2, "--seed", 5, "--out", "x.apng"]
    run(monkeypatch, capsys, sample, *given)
    words = shlex.split(read_metadata("x.apng")["command"])
    assert words[:2] == ["python", "sample.py"]
    made = (folder / "x.apng").read_bytes()
    (folder / "x.apng").unlink()
    assert run(monkeypatch, capsys, sample, *words[2:])[0] == 0
    assert (folder / "x.apng").read_bytes() == made


def test_a_file_of_prompts_makes_a_video_each_the_same_on_one_rank_and_two(
    folder, monkeypatch, capsys
):
    (folder / "prompts.txt").write_text("a red circle\n\na blue circle moves left\nred\n")
    given = ["--prompts", "prompts.txt", "--model", "model", "--first", "photo.jpg"]
    _, out, _ = run(monkeypatch, capsys, sample, *given, "--out", "one/x.apng")
    names = [f"x_{n:04d}.apng" for n in range(3)]
    assert out.split() == [f"one/{name}" for name in names]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, share in (("0", names[::2]), ("1", names[1::2])):
        monkeypatch.setenv("RANK", rank)
        _, out, _ = run(monkeypatch, capsys, sample, *given, "--out", "two/x.apng")
        assert out.split() == [f"two/{name}" for name in share]
    made = [read_pixels(f"one/{name}") for name in names]
    for name, pixels in zip(names, made):  # the files differ in the command that is inside
        assert np.array_equal(pixels, read_pixels(f"two/{name}"))
    assert len({pixels.tobytes() for pixels in made}) == 3
    (folder / "two" / "x_0001.apng").unlink()
    _, out, err = run(monkeypatch, capsys, sample, *given, "--out", "two/x.apng", "--resume")
    assert out.split() == ["two/x_0001.apng"]  # rank 1's share; what is there is not made again


def read_pixels(path):
    """All frames of a GIF or an animated PNG."""
    with Image.open(path) as image:
        return np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def read_shots(monkeypatch, capsys, *arguments):
    """The shots that a command line asks for; nothing is sampled."""
    asked = []

    def save_film(model, shots, *rest):
        asked.append(shots)

    monkeypatch.setattr(story, "save_film", save_film)
    code, _, err = run(monkeypatch, capsys, sample, "--model", "model", *arguments)
    assert code == 0, err
    return asked, err


def test_pictures_are_for_all_videos_or_for_one_each(folder, monkeypatch, capsys):
    Image.new("RGB", (16, 16), "red").save("red.png")
    videos, _ = read_shots(
        monkeypatch, capsys, "red", "--first", "red.png", "photo.jpg", "--last", "red.png"
    )
    assert [shots[0].prompt for shots in videos] == ["red", "red"]
    a, b = (shots[0].pictures for shots in videos)
    assert not torch.equal(a["first"], b["first"]) and torch.equal(a["last"], b["last"])


def test_editing_makes_a_clip_as_long_as_the_video_between_its_first_and_last_frame(
    folder, monkeypatch, capsys
):
    frames = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 16, 16) * 40
    save_video(frames, "old.mp4", fps=4)
    [[shot]], err = read_shots(
        monkeypatch, capsys, "red", "--edit", "old.mp4", "--last", "photo.jpg"
    )
    assert shot.settings.frames == 6
    assert "6 frames a clip, but trained on 4" in err
    assert abs(float(shot.pictures["first"].float().mean()) - 0) < 3
    assert torch.equal(shot.pictures["last"], read_image("photo.jpg", (16, 16)))
    [[shot]], err = read_shots(monkeypatch, capsys, "--edit", "old.mp4", "--frames", 5)
    assert abs(float(shot.pictures["last"].float().mean()) - 160) < 3
    assert shot.settings.frames == 5 and "5 frames" in err
    assert shot.prompt == ""


def test_a_sketch_of_the_last_frame_is_its_edges(folder, monkeypatch, capsys):
    [[shot]], _ = read_shots(monkeypatch, capsys, "red", "--last", "photo.jpg", "--sketch")
    assert set(shot.pictures["last"].unique().tolist()) <= {0, 255}
    assert list(shot.pictures) == ["last"]


def test_what_is_given_changes_the_settings_of_the_model_and_the_rest_stays(
    folder, monkeypatch, capsys
):
    given = ["--steps", 3, "--negative", "blue", "--sampler", "ddpm", "--height", 32, "--seed", 2]
    [[shot]], _ = read_shots(monkeypatch, capsys, "red", *given)
    changes = {"steps": 3, "negative": "blue", "sampler": "ddpm", "height": 32, "seed": 2}
    assert shot.settings == replace(PixelDance.from_folder("model").settings, **changes)


def test_the_first_frame_may_come_from_an_image_model_in_stable_diffusions_form(
    folder, monkeypatch, capsys
):
    given = ["a red circle at night", "--steps", 6, "--frames", 2]
    t2i = ["--t2i", SHIPPED_IMAGE]
    assert run(monkeypatch, capsys, sample, *given, *t2i, "--out", "x.apng")[0] == 0
    assert run(monkeypatch, capsys, sample, *given, "--out", "y.apng")[0] == 0
    theirs, own = read_pixels("x.apng"), read_pixels("y.apng")
    first = theirs[:1].transpose(0, 3, 1, 2)  # f H W 3 -> f 3 H W
    assert not np.array_equal(theirs, own) and judge(first, given[0])["background"]
    assert read_metadata("x.apng")["t2i"] == fingerprint(SHIPPED_IMAGE)


def test_the_image_model_makes_the_first_frame_of_each_cut_that_has_no_picture(
    folder, monkeypatch, capsys
):
    """And takes no notice of tau in steps, of which it may have fewer than the clips."""
    made = []

    def first_frame(image_model, model, prompts, settings, keys):
        made.append((prompts, keys))
        return real(image_model, model, prompts, settings, keys)

    real = sample.first_frame
    monkeypatch.setattr(sample, "first_frame", first_frame)
    (folder / "story.toml").write_text("""
        [[shot]]
        prompt = "a red circle"
        clips = 2
        [[shot]]
        prompt = "a blue circle"
        last = "photo.jpg"
        tau = 6
        [[shot]]
        prompt = "red"
        cut = true
        first = "photo.jpg"
        [[shot]]
        prompt = "blue"
        cut = true
        """)
    given = ["--story", "story.toml", "--model", "model", "--t2i", "model", "--steps", 6]
    code, _, err = run(monkeypatch, capsys, sample, *given, "--out", "x.apng")
    assert code == 0 and made == [(["a red circle"], [(0,)]), (["blue"], [(0,)])], err


def test_an_interruption_keeps_what_is_done_and_resume_goes_on(folder, monkeypatch, capsys):
    given = ["a red circle", "--model", "model", "--clips", 4]
    real, made = sample.sample, []

    def interrupted(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(sample, "sample", interrupted)
    code, out, err = run(monkeypatch, capsys, sample, *given, "--out", "x.apng")
    assert code == 130 and out == "" and "--resume goes on" in err and not Path("x.apng").exists()
    made.clear()
    code, out, err = run(monkeypatch, capsys, sample, *given, "--out", "x.apng", "--resume")
    assert code == 0 and len(made) == 2 and not Path("x.apng.parts").exists(), err
    made.clear()
    assert run(monkeypatch, capsys, sample, *given)[0] == 130  # and without --out likewise
    made.clear()
    code, out, err = run(monkeypatch, capsys, sample, *given, "--resume")
    assert code == 0 and out.strip() == "clip.mp4" and len(made) == 2, err
    monkeypatch.setattr(sample, "sample", real)
    assert run(monkeypatch, capsys, sample, *given, "--out", "y.apng")[0] == 0
    x, y = read_pixels("x.apng"), read_pixels("y.apng")
    assert len(x) == 13 and np.array_equal(x, y)


def test_sample_without_out_takes_the_next_free_name(folder, monkeypatch, capsys):
    for name in ("clip.mp4", "clip_2.mp4", "clip_3.mp4"):
        _, out, _ = run(monkeypatch, capsys, sample, "a red circle", "--model", "model")
        assert out.strip() == name and (folder / name).exists()


def test_a_name_that_another_process_makes_is_not_taken(folder, monkeypatch, capsys):
    """Also where it takes the name between the choice and the first clip."""
    given = ["a red circle", "--model", "model"]
    with hold("clip.mp4.parts"):
        assert run(monkeypatch, capsys, sample, *given)[1].strip() == "clip_2.mp4"
        code, _, err = run(monkeypatch, capsys, sample, *given, "--out", "clip.mp4", "--overwrite")
        assert code == 2 and "clip.mp4.parts is in use by another process" in err
    save_film, rivals = story.save_film, []

    def save_late(model, shots, out, *rest):
        if not rivals:
            rivals.append(Path(out).write_bytes(b"made by another"))
        return save_film(model, shots, out, *rest)

    monkeypatch.setattr(story, "save_film", save_late)
    assert run(monkeypatch, capsys, sample, *given)[1].strip() == "clip_3.mp4"
    assert Path("clip.mp4").read_bytes() == b"made by another"
    assert not list(folder.glob("*.parts"))


def test_a_sampling_that_fails_leaves_nothing(folder, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError("no space left on device")

    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sample, "sample", fail)
    code, _, err = run(monkeypatch, capsys, sample, "a red circle", "--model", "model")
    assert code == 2 and "no space left" in err and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("end", [".mp4", ".gif", ".apng", ".png", "/"])
def test_names_and_prompts_may_be_any_bytes(folder, monkeypatch, capsys, end):
    prompt, name = os.fsdecode(b"caf\xe9 circle"), os.fsdecode(b"caf\xe9") + end
    given = [prompt, "--model", "model", "--out", name, "--clips", "2"]
    real, made = sample.sample, []

    def interrupted(*arguments):
        if made:
            raise KeyboardInterrupt
        made.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(sample, "sample", interrupted)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))  # capsys knows UTF-8 alone
    assert run(monkeypatch, capsys, sample, *given)[0] == 130
    monkeypatch.setattr(sample, "sample", real)
    code, _, err = run(monkeypatch, capsys, sample, *given, "--resume")
    assert code == 0 and Path(name).exists(), err
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == os.fsencode(name) + b"\n"
    assert read_metadata(name)["shots"][0]["prompt"] == "caf? circle"


def test_the_same_seed_makes_the_same_video_and_another_seed_another(folder, monkeypatch, capsys):
    for name, seed in (("a.apng", 1), ("b.apng", 1), ("c.apng", 2)):
        run(monkeypatch, capsys, sample, "x", "--model", "model", "--seed", seed, "--out", name)
    a, b, c = (read_pixels(name) for name in ("a.apng", "b.apng", "c.apng"))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_prompt_that_is_too_long_says_what_is_not_read(folder, monkeypatch, capsys):
    prompt = " ".join(["red"] * 22 + ["forgotten"])
    code, _, err = run(monkeypatch, capsys, sample, prompt, "--model", "model")
    assert code == 0 and "is not read: forgotten" in err


SAMPLE_ERRORS = [
    (["--first", "missing.png"], "missing.png"),
    (["--first", "words.txt"], "words.txt"),
    (["--last", "empty"], "empty"),
    (["--last", "photo.jpg", "--tau", "99"], "tau is 99; use 0 to 4"),
    (["--last", "photo.jpg", "--tau", "-1"], "tau is -1"),
    (["--tau", "2"], "--tau say how --last is shown"),
    (["--last", "photo.jpg", "--tau", "half"], "tau is half; use 0 to 4 steps, or"),
    (["--last", "photo.jpg", "--tau", "101%"], "tau is 101%"),
    (["--sketch"], "--sketch and --tau say how --last is shown"),
    (["--first", "photo.jpg", "photo.jpg", "--last", *["photo.jpg"] * 3], "first: 2 for 3 videos"),
    (["--prompts", "words.txt"], "--prompts: not allowed with argument prompt"),
    (["--story", "words.txt"], "leave out prompt"),
    (["--clips", "0"], "clips is 0; use 1 or more"),
    (["--frames", "1", "--clips", "2"], "a picture is made from text alone"),
    (["--height", "18"], "size is 18x16; both must be multiples of 4"),
    (["--height", "0"], "size is 0x16; both must be multiples of 4"),
    (["--edit", "words.txt"], "words.txt: not_a_video"),
    (["--t2i", "nowhere"], "nowhere is no folder"),
    (["--about", "words.txt"], "words.txt"),
    (["--out", "taken.mp4/"], "taken.mp4 exists already, as a file"),
    (["--out", "taken.mp4/x.gif"], "taken.mp4 is a file, not a folder"),
    (["--steps", "0"], "steps is 0; use 1 to 1000"),
    (["--steps", "1001"], "steps is 1001"),
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--guidance", "nan"], "guidance is nan"),
    (["--seed", "-4"], "seed is -4"),
    (["--frames", "0"], "frames is 0"),
    (["--out", "taken.mp4"], "taken.mp4 exists already"),
    (["--out", "x.avi"], "cannot write '.avi'"),
    (["--model", "nowhere"], "nowhere is no folder"),
    (["--model", "empty"], "config.json"),
    (["--device", "abacus"], "device is 'abacus'"),
    (["--dtype", "float8"], "dtype is 'float8'; use auto or float32 or bfloat16"),
    (["--sampler", "euler"], "sampler is 'euler'"),
    (["--out", "x.npy"], "cannot write '.npy'"),
    (["--ddim_etta", "1"], "unknown argument '--ddim_etta'; did you mean 'ddim_eta'"),
]


@pytest.mark.parametrize("arguments, message", SAMPLE_ERRORS)
def test_sample_refuses_in_one_line(folder, monkeypatch, capsys, arguments, message):
    before = sorted(folder.rglob("*"))
    if "--model" not in arguments:
        arguments = ["--model", "model", *arguments]
    code, out, err = run(monkeypatch, capsys, sample, "a red circle", *arguments)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1, err
    assert sorted(folder.rglob("*")) == before  # nothing was written
    assert (folder / "taken.mp4").read_bytes() == b"precious"


TRAIN_ERRORS = [
    (["--preset", "papper"], "unknown preset 'papper'; did you mean 'paper'?"),
    (["--stage", "benchmrak"], "invalid choice: 'benchmrak' (choose from"),
    (["--resume", "maybe"], "resume is 'maybe'; use auto or none"),
    (["--train", "spatial"], "train is 'spatial'; use all or temporal"),
    (["--stage", "vidio"], "invalid choice: 'vidio' (choose from"),
    (["--bacth", "4"], "unknown argument '--bacth'; did you mean 'batch'?"),
    (["--batch", "four"], "batch is 'four'; it must be a whole number"),
    (["--batch", "0"], "batch is 0; use 1 or more"),
    (["--lr", "fast"], "lr is 'fast'; it must be a number"),
    (["--eta", "1.5"], "eta is 1.5; use 0 to 1"),
    (["--held_out", "2"], "held_out is 2.0; use 0 to 0.5"),
    (["--decay", "perhaps"], "decay is 'perhaps'; it must be true or false"),
    (["--cond_noise_t", "1000"], "cond_noise_t is 1000; use 0 to 999"),
    (["--dtype", "float8"], "dtype is 'float8'"),
    (["--data", "nowhere"], "nowhere: no such folder"),
    (["--data", "empty"], "empty: no videos inside"),
    (["--stage", "video", "--from-scratch"], "run --stage image first"),
    (["--from-scratch", "--init", "model"], "has no use for --init model"),
    (["--stage", "video", "--init", "nowhere"], "nowhere"),
    (["--preset", "paper", "--data", "videos"], "give --init FOLDER"),
    (["--width", "48"], "the toy world is square"),
    (["--beta_schedule", "cosine", "--stage", "image", "--init", "model"], "'cosine'"),
    (["--timeout", "inf"], "timeout is inf; use 0 to 1000000"),
    (["--num_train_timesteps", "5"], "steps is 16; use 1 to 5"),
    (["--num_train_timesteps", "5", "--steps", "4"], "cond_noise_t is 10; use 0 to 4"),
]


@pytest.mark.parametrize("arguments, message", TRAIN_ERRORS)
def test_train_refuses_in_one_line(folder, monkeypatch, capsys, arguments, message):
    (folder / "videos").mkdir()
    (folder / "videos" / "a.mp4").write_bytes(b"no video, but nobody will look")
    code, _, err = run(monkeypatch, capsys, train, "--device", "cpu", *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


STARTS = [
    ([], "shipped"),  # a newcomer's training starts from the shipped image model
    (["--stage", "video"], "shipped"),
    (["--from-scratch"], ""),
    (["--stage", "image"], ""),
    (["--data", "videos"], ""),
    (["--data", "videos", "--init", "model"], "model"),
    (["--stage", "image", "--init", "shipped"], "shipped"),
    (["--preset", "paper"], ""),
    (["--preset", "paper-hd", "--data", "videos"], "runs/paper/video/model"),
]


@pytest.mark.parametrize("arguments, init", STARTS)
def test_what_a_training_starts_from(monkeypatch, capsys, arguments, init):
    started = []
    monkeypatch.setattr(train, "train", lambda config, stage: started.append(config))
    code, _, err = run(monkeypatch, capsys, train, *arguments)
    assert code == 0 and started[0].init == init, err


def test_values_are_typed_by_the_dataclass():
    config = make_config("toy", batch="4", lr="1e-4", decay="false", data="x")
    assert (config.batch, config.lr, config.decay, config.data) == (4, 1e-4, False, "x")


def test_the_papers_preset_is_the_papers_run():
    """Section 4.1, number by number."""
    config = make_config("paper")
    assert (config.frames, config.fps, config.height, config.width) == (16, 4, 256, 256)
    assert (config.num_train_timesteps, config.cond_noise_t, config.eta) == (1000, 100, 0.25)
    assert (config.batch, config.video_steps, config.image_every) == (192, 200_000, 8)
    assert config.prediction_type == "epsilon" and config.vae_steps == config.text_steps == 0


def test_the_other_presets_are_what_the_readme_says():
    hd, small = make_config("paper-hd"), make_config("small")
    assert (hd.height, hd.width, hd.video_steps) == (320, 512, 50_000)
    assert hd.init == f"{make_config('paper').out}/video/model"
    with torch.device("meta"):
        unet = UNet(NETWORKS["small"]["unet"])
    assert sum(p.numel() for p in unet.parameters()) == 104_117_764
    assert unet.config.cross_attention_dim == 1024 and small.image_steps > 0  # SD 2.1's text
    for preset in ("paper", "paper-hd", "small"):
        batch = make_config(preset)
        assert batch.image_batch == 8 * batch.batch


def test_what_samples_cannot_be_trained():
    """Autocast keeps a second copy of every weight that could: 2.6 GiB at full size."""
    model = sample.load(SHIPPED, "cpu", torch.float32)
    parts = (model.unet, model.vae, model.text_tower)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_make_the_same_clip(dtype):
    """What autocast would make of them at each step is made once: not a bit differs."""
    clips, sizes = [], []
    for kept in (torch.float32, dtype):
        model = sample.load(SHIPPED, "cpu", kept)
        parts = (model.unet, model.vae, model.text_tower)
        sizes.append(sum(p.nbytes for part in parts for p in part.parameters()))
        with autocast("cpu", dtype):
            clips.append(sample_frames(model, ["a red circle moves up"], steps=2, frames=2))
    assert torch.equal(*clips) and clips[0].std() > 0.1 and sizes[1] < 0.52 * sizes[0]


@pytest.mark.parametrize("script", [sample, train])
def test_help_shows_every_option(monkeypatch, capsys, script):
    code, out, _ = run(monkeypatch, capsys, script, "--help")
    assert code == 0 and "python" in out and "--seed" in out
    assert " ".join(out.split()).count("default: the model's" if script is sample else "(toy: ") > 7


def test_evaluate_prints_a_table(folder, monkeypatch, capsys):
    given = ["--model", "model", "--clips", 2, "--rows", "text; text, first"]
    code, out, err = run(monkeypatch, capsys, evaluate, *given)
    assert code == 0 and "| text | 2 |" in out and "| text, first | 2 |" in out, err
    code, _, err = run(monkeypatch, capsys, evaluate, "--model", "nowhere")
    assert code == 2 and "nowhere is no folder" in err


@pytest.mark.parametrize("folder", [SHIPPED, SHIPPED_IMAGE])
def test_a_shipped_model_is_under_20_mb_and_what_its_card_says(folder):
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert 1e6 < size < 20e6
    card = (folder / "README.md").read_text()
    weights = sorted(folder.rglob("*.safetensors"))
    assert len(weights) == 3
    for file in weights:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"{digest}  {file.relative_to(folder).as_posix()}" in card


@pytest.mark.parametrize("folder", [SHIPPED, SHIPPED_IMAGE])
def test_a_shipped_model_samples_as_its_preset_says(folder):
    settings = PixelDance.from_folder(folder).settings
    assert replace(settings, frames=16) == Settings(**pick(vars(make_config("toy")), Settings))


def test_a_newcomers_training_starts_and_leaves_a_model(folder, monkeypatch, capsys):
    """`python train.py`, but for its length: the video stage, from the shipped image model."""
    monkeypatch.setattr("tinydance.run.stages.VALIDATED", 2)
    few = ["--video_steps", 2, "--batch", 2, "--image_every", 2, "--image_batch", 2, "--steps", 2]
    code, out, err = run(monkeypatch, capsys, train, *few)
    assert code == 0 and "stage video" in out and "stage image" not in out, err
    assert sorted(path.name for path in (folder / "runs" / "toy").iterdir()) == ["video"]
    model = ["--model", "runs/toy/video/model", "--steps", 2]
    assert run(monkeypatch, capsys, sample, "a red circle moves up", *model)[0] == 0


def test_the_shipped_image_model_draws_what_it_is_told():
    captions = ["a red circle moves up at night", "a blue star grows on snow"] * 4
    model = PixelDance.from_folder(SHIPPED_IMAGE)
    frames = to_frames(sample_frames(model, captions, frames=1)).numpy()
    verdicts = [judge(frame, caption) for frame, caption in zip(frames, captions)]
    assert sum(verdict["background"] for verdict in verdicts) >= 7
    assert sum(verdict["colour"] for verdict in verdicts) >= 6
    assert sum(verdict["shape"] for verdict in verdicts) >= 5


def test_the_shipped_model_follows_its_words(monkeypatch):
    """A few clips, a few steps: colours and backgrounds are those of the captions."""
    captions = ["a red circle moves up at night", "a blue star grows on snow"]
    frames = to_frames(sample_frames(PixelDance.from_folder(SHIPPED), captions, steps=10)).numpy()
    for clip, caption in zip(frames, captions):
        verdict = judge(clip, caption)
        assert verdict["colour"] and verdict["background"], (caption, verdict)
    assert torch.from_numpy(frames).float().diff(dim=1).abs().mean() > 0.1  # and something moves


def test_a_prompt_needs_no_quotes(folder, monkeypatch, capsys):
    words = ["a", "red", "circle", "--model", "model", "--steps", "1"]
    code, out, _ = run(monkeypatch, capsys, sample, *words, "--out", "bare.mp4")
    assert (code, out) == (0, "bare.mp4\n")
    assert read_metadata("bare.mp4")["shots"][0]["prompt"] == "a red circle"


NOTES = {
    "words that this model was not taught: dragon": ["a red dragon"],
    "a last frame, and no first": ["a circle", "--last", "photo.jpg"],
    "32x16, but trained on 16x16": ["a circle", "--height", "32"],
    "2 frames a clip, but trained on 4": ["a circle", "--frames", "2"],
    "were never trained: nothing will move": ["a circle", "--model", "image"],
}


@pytest.mark.parametrize("note", NOTES)
def test_what_will_hardly_give_what_was_meant_is_noted_once(folder, monkeypatch, capsys, note):
    tiny_model(filled=False, timestep_spacing="trailing").save("image")  # new layers are zero
    given = ["--steps", "1", "--clips", "2", "--out", "x.png"]
    model = [] if "--model" in NOTES[note] else ["--model", "model"]
    code, _, err = run(monkeypatch, capsys, sample, *NOTES[note], *model, *given)
    assert code == 0 and err.count(note) == 1
    code, _, err = run(
        monkeypatch, capsys, sample, "a circle", *given[:-1], "y.png", "--model", "model"
    )
    assert code == 0 and "note" not in err


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.apng", "x/"])
def test_what_was_made_can_be_edited(folder, monkeypatch, capsys, name):
    frames = torch.arange(0, 240, 40, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 16, 16)
    save_video(frames, name, fps=4)
    [[shot]], _ = read_shots(monkeypatch, capsys, "--edit", name, "--model", "model")
    assert shot.settings.frames == 6
    given = [int(shot.pictures[end].float().mean().round()) for end in ("first", "last")]
    assert given == pytest.approx([0, 200], abs=4)
