"""Claims about files that nobody should trust: each costs a sample, or is one ValueError."""

import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import JSON, PICTURES, SHARDS, VIDEOS, WEIGHTS, jpeg_of_scans, mutate, mutate_json, tar
from PIL import Image
from reference import tiny_model
from test_video import make_video
from tiny_training import FIELDS, tiny_train

import tinydance.clip
from tinydance.config import make_config
from tinydance.data.cache import Latents, is_cache, write_cache
from tinydance.data.index import Folder, Shards, Table, tar_members, untracked
from tinydance.data.open import open_one
from tinydance.data.order import Files
from tinydance.data.rows import Picture, Video
from tinydance.model import PixelDance
from tinydance.video import read
from tinydance.video.read import BadSample, printable, read_clip, read_image, read_picture
from tinydance.video.story import read_story
from tinydance.video.write import read_metadata
from tinydance.weights import load_weights
from tinydance.weights.files import read_json
from tinydance.weights.safetensors import load_safetensors, save_safetensors

SIZE = (16, 16)
MOVING = (".mp4", ".mkv", ".ts", ".avi")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("clip") / "a.mp4", frames=50)


def refuses(call, *arguments, but=ValueError):
    """The line of the error; or None where the bytes could be read."""
    try:
        call(*arguments)
    except but as error:
        assert "\n" not in str(error), str(error)
        return str(error)


def files(root, kind=Video, **settings):
    return Files(Folder(root, kind), SIZE, frames=4, **settings)


@pytest.mark.parametrize("name", PICTURES)
def test_a_hostile_picture_is_one_bad_sample_and_one_line(name, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(PICTURES[name])
    source = files(tmp_path, Picture)
    samples = [source.sample(n, "first") for n in range(4)]
    is_bad = refuses(read_image, tmp_path / "bad.png", SIZE)
    assert ({sample.name for sample in samples} == {"good.png"}) == bool(is_bad)
    assert not is_bad or str(tmp_path) in is_bad
    refuses(read_metadata, tmp_path / "bad.png")


@pytest.mark.parametrize("name", VIDEOS)
def test_a_hostile_video_is_one_bad_sample_and_one_line(name, clip, tmp_path):
    make_video(tmp_path / "secret.mp4", frames=5)
    (tmp_path / "data").mkdir()
    shutil.copy(clip, tmp_path / "data")
    (tmp_path / "data" / "bad.mp4").write_bytes(VIDEOS[name])
    source = files(tmp_path / "data")
    assert {source.sample(n).name for n in range(4)} == {"a.mp4"}
    assert str(tmp_path) in refuses(read_metadata, tmp_path / "data" / "bad.mp4")


def test_a_folder_of_them_all_is_inspected_cached_and_trained_on(clip, model, tmp_path, capsys):
    for folder, kind, corpus in (("v", ".mp4", VIDEOS), ("p", ".png", PICTURES)):
        (tmp_path / folder).mkdir()
        for n, content in enumerate(corpus.values()):
            (tmp_path / folder / f"{n}{kind}").write_bytes(content)
    shutil.copy(clip, tmp_path / "v" / "good.mp4")
    Image.new("RGB", (32, 32)).save(tmp_path / "p" / "good.png")
    given = {"data": str(tmp_path / "v"), "init": str(model), "max_bad": 1.0}
    tiny_train("latents", out=str(tmp_path / "cache"), **given)
    given |= {"images": str(tmp_path / "p"), "out": str(tmp_path / "run")}
    tiny_train("inspect", **given)
    told = capsys.readouterr().out
    assert f"of {len(VIDEOS) + 1} rows read" in told and "not_a_video, such as" in told
    assert len(Latents(tmp_path / "cache", (FIELDS["height"], FIELDS["width"]), 4)) == 1
    tiny_train("video", video_steps=4, prediction_type="epsilon", **given)
    assert (tmp_path / "run" / "video" / "model").is_dir()


def test_pipes_and_what_leads_outside_are_refused_everywhere(clip, model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(clip, data)
    for name in ("a.txt", "b.mp4", "c.csv", "d.tar", "e.json", "f.png", "model.safetensors"):
        os.mkfifo(data / name)
    (tmp_path / "secret.txt").write_text("secret")
    shutil.copy(clip, data / "g.mp4")
    (data / "g.txt").symlink_to(tmp_path / "secret.txt")
    source = files(data)
    assert "missing" in refuses(source.sample, 0) and source.words() == set()
    for call in (Table, tar_members, read_json, load_weights, load_safetensors, read_metadata):
        for name in ("c.csv", "d.tar", "e.json", "f.png", "model.safetensors"):
            assert refuses(lambda: list(call(data / name)), but=(ValueError, OSError))
    assert "outside" in refuses(load_weights, data) or "no weights" in refuses(load_weights, data)
    (tmp_path / "out.tar").write_bytes(b"")
    (data / "h.tar").symlink_to(tmp_path / "out.tar")
    assert "leads out of" in refuses(Shards, [data / "h.tar"])
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "vae" / "config.json").unlink()
    os.mkfifo(tmp_path / "copy" / "vae" / "config.json")
    assert "vae" in refuses(PixelDance.from_folder, tmp_path / "copy")


@pytest.mark.parametrize("name", SHARDS)
def test_a_hostile_shard_is_used_up_to_its_damage(name, tmp_path):
    (tmp_path / "a.tar").write_bytes(SHARDS[name])
    refuses(lambda: [row.caption for row in Shards([tmp_path / "a.tar"])])


def test_a_caption_that_vanishes_or_cannot_be_printed_ends_nothing(clip, tmp_path):
    shutil.copy(clip, tmp_path)
    (tmp_path / "a.txt").write_text("red\x1b]0;title\a")
    source = files(tmp_path)
    assert printable(source.sample(0).caption) == "red?]0;title?"
    (tmp_path / "a.txt").unlink()
    assert source.words() == set() and "20 missing" in refuses(source.sample, 0)
    assert "\x1b" not in str(BadSample("missing", "\x1b[2J"))


def test_a_sample_may_cost_seconds_and_pixels_and_frames_are_measured(clip, tmp_path, monkeypatch):
    with open(clip, "rb") as file:
        bounded = read.Bounded(file, 1)
        read_clip(bounded, 0, 4, 4, SIZE)
        bounded.pixels = 3 * 48 * 64  # of three frames
        assert refuses(read_clip, bounded, 1.5, 2, 4, SIZE).startswith("too_slow")
        bounded.pixels, bounded.end = 10**9, time.thread_time()
        assert refuses(read_clip, bounded, 0, 4, 4, SIZE).startswith("too_slow")
    times, options = [k / 25 for k in range(60)], {"frames": 30}
    first = make_video(tmp_path / "a.ts", times=times[:30], **options).read_bytes()
    second = make_video(tmp_path / "b.ts", times=times[30:], size=(480, 640), **options)
    (tmp_path / "both.ts").write_bytes(first + second.read_bytes())
    assert len(read_clip(tmp_path / "both.ts", 0, 9, 4, SIZE)) == 9
    monkeypatch.setattr(read, "MAX_PIXELS", 100_000)  # the header's size is smaller
    assert len(read_clip(tmp_path / "both.ts", 0, 4, 4, SIZE)) == 4
    assert refuses(read_clip, tmp_path / "both.ts", 0, 9, 4, SIZE).startswith("damaged")


def test_a_picture_of_many_scans_is_refused_before_they_are_decoded():
    with pytest.raises(BadSample, match="scans"):
        read_picture(io.BytesIO(jpeg_of_scans(12_000, 512)), SIZE)
    read_picture(io.BytesIO(jpeg_of_scans(20)), SIZE)


def test_of_a_long_word_or_text_no_more_is_merged_than_is_kept(model, monkeypatch):
    tokenizer, merged = PixelDance.from_folder(model).tokenizer, []
    assert len(tinydance.clip.merge_symbols("q" * 65_536, {})) == tinydance.clip.MAX_WORD
    monkeypatch.setattr(
        tinydance.clip, "merge_symbols", lambda word, ranks: merged.append(word) or ["a</w>"]
    )
    assert tokenizer(["red " * 10_000]).shape == (1, 24)
    assert len(merged) <= 24


@pytest.mark.parametrize("name", JSON)
def test_hostile_json_is_one_line_whoever_reads_it(name, model, clip, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    unread = {tmp_path / "model" / "model_index.json"}  # it is for diffusers
    for file in sorted({*(tmp_path / "model").rglob("*.json")} - unread):
        whole = file.read_bytes()
        file.write_bytes(JSON[name])
        assert str(file) in refuses(PixelDance.from_folder, tmp_path / "model")
        file.write_bytes(whole)
    (tmp_path / "a").mkdir()
    (tmp_path / "a.json").write_bytes(JSON[name])
    assert "a.json" in refuses(read_metadata, tmp_path / "a")
    shutil.copy(clip, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_bytes(JSON[name])  # of another program
    assert not is_cache(tmp_path / "a")
    (tmp_path / "a" / "00000.safetensors").write_bytes(b"")
    assert "manifest.json" in refuses(Latents, tmp_path / "a", SIZE, 4)


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_one_line_and_no_gigabytes(name, tmp_path):
    (tmp_path / name).write_bytes(WEIGHTS[name])
    assert name in refuses(load_weights, tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**21  # KiB


def test_a_config_cannot_claim_a_network_that_its_weights_are_not(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    for part, key, value in [
        ("unet", "cross_attention_dim", 10**9),
        ("unet", "in_channels", 10**8),
        ("unet", "layers_per_block", 10**6),
        ("vae", "block_out_channels", [4] * 100),
        ("text_encoder", "num_hidden_layers", 10**7),
        ("text_encoder", "vocab_size", 2**40),
    ]:
        file = tmp_path / "model" / part / "config.json"
        whole = file.read_text()
        file.write_text(json.dumps(json.loads(whole) | {key: value}))
        assert part in refuses(PixelDance.from_folder, tmp_path / "model")
        file.write_text(whole)
    PixelDance.from_folder(tmp_path / "model")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 3000, "guidance = 1" + "0" * 400, "seed = -1", "shot = 1", "\0", "a=1"]
)
def test_a_hostile_story_is_one_line(text, model, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    assert "a.toml" in refuses(read_story, tmp_path / "a.toml", PixelDance.from_folder(model))


def test_a_cache_that_lies_is_refused_before_training(clip, model, tmp_path):
    cache, vae = tmp_path / "cache", PixelDance.from_folder(model).vae
    list(write_cache(files(clip.parent), vae, cache, "x"))
    config = make_config(frames="4", height="16", width="16")
    assert open_one(str(cache), Video, config, untracked).sample(0)
    whole = (cache / "00000.safetensors").read_bytes()
    for change in ({"frames": torch.tensor([9])}, {"clips": torch.zeros(2).byte()}, {"moments": 0}):
        tensors = load_safetensors(cache / "00000.safetensors") | change
        tensors = {name: x for name, x in tensors.items() if torch.is_tensor(x)}
        tensors = {name: x.clone() for name, x in tensors.items()}
        save_safetensors(tensors, cache / "00000.safetensors")
        assert "00000.safetensors" in refuses(Latents, cache, SIZE, 4)
        (cache / "00000.safetensors").write_bytes(whole)
    (tmp_path / "shard").write_bytes(whole)
    (cache / "00000.safetensors").unlink()
    (cache / "00000.safetensors").symlink_to(tmp_path / "shard")
    assert "leads out of" in refuses(Latents, cache, SIZE, 4)
    (cache / "manifest.json").write_text("{}")
    assert "manifest.json: it lacks vae" in refuses(Latents, cache, SIZE, 4)


def make_seeds(root, rng, clip, model):
    """{name: bytes} of an honest file for each reader."""
    noise, seeds = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)), {}
    exif = Image.Exif()
    exif[274] = 6
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        file = io.BytesIO()
        noise.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
        seeds[f"a.{kind.lower()}"] = file.getvalue()
    for suffix in MOVING:
        seeds[f"c{suffix}"] = make_video(root / f"c{suffix}", frames=25).read_bytes()
    seeds["b.tar"] = tar(("a.mp4", clip.read_bytes()), ("a.json", b'{"caption": "a red circle"}'))
    seeds["d.csv"] = b"path,caption,start,end\na.mp4,x y,0,1\nb.mp4,z,,\n" * 4
    seeds["e.toml"] = b'style = "s"\nseed = 3\n[[shot]]\nprompt = "a"\nclips = 2\ntau = "50%"\n'
    parts = [path for path in model.rglob("*") if path.is_file()]
    return seeds | {f"model/{path.relative_to(model)}": path.read_bytes() for path in parts}


def fuzz(count, seed, root, clip, model):
    """Mutated files through every reader, which may raise ValueErrors of one line and no more:
    {file: [how often it was read, how often refused, the longest seconds]}."""
    rng, told = np.random.default_rng(seed), {}
    seeds, whole = make_seeds(root, rng, clip, model), PixelDance.from_folder(model)
    shutil.copytree(model, root / "model")
    for n in range(count):
        name, begun = sorted(seeds)[n % len(seeds)], time.time()
        path, is_config = root / name, name.endswith(".json") and rng.random() < 0.5
        data = seeds[name]
        data = mutate_json(data.decode(), rng).encode() if is_config else mutate(data, rng)
        path.write_bytes(data)
        if name.startswith("model/"):
            error = refuses(PixelDance.from_folder, root / "model")
            path.write_bytes(seeds[name])
        elif name == "b.tar":
            error = refuses(lambda: Files(Shards([path]), SIZE, frames=4).sample(0))
        elif name == "d.csv":
            error = refuses(lambda: [row.caption for row in Table(path)])
        elif name == "e.toml":
            error = refuses(read_story, path, whole)
        elif path.suffix in MOVING:
            error = refuses(read_clip, path, lambda length: length / 3, 3, 4, SIZE)
        else:
            error = refuses(read_image, path, SIZE)
        refuses(read_metadata, path, but=(ValueError, OSError))
        row = told.setdefault(name, [0, 0, 0.0])
        row[bool(error)] += 1
        row[2] = max(row[2], time.time() - begun)
    return told


def test_mutated_files_are_read_or_refused_in_one_line(clip, model, tmp_path):
    told = fuzz(100, 0, tmp_path, clip, model)
    assert sum(refused for _, refused, _ in told.values()) > 15


if __name__ == "__main__":  # python tests/test_hostile.py COUNT SEED
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "m").mkdir()
        tiny_model().save(root / "m")
        clip = make_video(root / "clip.mp4", frames=50)
        (root / "f").mkdir()
        for row in sorted(fuzz(*map(int, sys.argv[1:3]), root / "f", clip, root / "m").items()):
            print(*row)
    print("MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
