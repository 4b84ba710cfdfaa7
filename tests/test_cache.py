"""Claims of `tinydance/data/cache.py`: a cache is the same training, and never the wrong one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from reference import difference, tiny_model
from test_video import make_video
from tiny_training import tiny_train

from tinydance.config import make_config
from tinydance.data import cache as cache_module
from tinydance.data.cache import Latents, find_caches, fingerprint_vae, shard_path, write_cache
from tinydance.data.index import Folder
from tinydance.data.open import open_source
from tinydance.data.order import Files, Mixture, collect_words
from tinydance.noise import draw, generator
from tinydance.vae import to_pixels

SIZE = (16, 16)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos, of which one is shorter than a clip of 4 frames."""
    root = tmp_path_factory.mktemp("videos")
    for k, frames in enumerate([60, 15, 110, 75, 50]):
        make_video(root / f"{k}.mp4", frames=frames, size=(48, 64))
        (root / f"{k}.txt").write_text(f"a red  circle,\n{k}")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    made = tiny_model(timestep_spacing="trailing", prediction_type="v_prediction")
    made.save(folder)
    return made, folder


@pytest.fixture(scope="module")
def cache(videos, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SHARD", 2)  # three shards
        list(write_cache(files(videos), model[0].vae, folder, "videos"))
    return folder


def files(root, **settings):
    return Files(Folder(root), SIZE, frames=4, starts="grid", **settings)


def cached_files(folder, **settings):
    return Files(Latents(folder, SIZE, fps=4), SIZE, frames=4, starts="grid", **settings)


def open_data(data, **fields):
    """A source as `--data` opens it."""
    fields = {"height": SIZE[0], "width": SIZE[1], "frames": 4, "held_out": 0} | fields
    return open_source(make_config("paper", data=str(data), **fields))


def test_a_cached_clip_is_the_online_one_with_its_own_random_start(videos, model, cache):
    vae, online, cached = model[0].vae, files(videos, seed=3), open_data(cache, seed=3)
    assert len(cached) == 5 and collect_words(cached) == collect_words(online)
    starts = set()
    for n in range(25):
        for kind in ("first", "any", "clip"):
            a, b = online.sample(n, kind), cached.sample(n, kind)
            assert a[1:] == b[1:] and a.caption.startswith("a red circle, ")
            eps = draw([generator("x", n)], len(a.frames), 4, 8, 8)
            z_0 = vae.encode_video(to_pixels(a.frames[None]), eps)
            assert b.frames.dtype == torch.float16
            assert difference(vae.encode_frames(b.frames[None], lambda *_: eps), z_0) < 2e-3
        starts.add((b.name, tuple(b.frames[0, 0, 0].tolist())))
    assert len(starts) > 12
    assert sum(cached.sample(n).counts["padded"] for n in range(5)) == 1
    rejecting = open_data(cache, seed=3, short="reject")
    assert all(rejecting.sample(n).name != "1.mp4" for n in range(10))


def test_a_cache_is_of_all_videos_and_holds_out_those_that_are_held_out_online(
    videos, model, cache, tmp_path
):
    online = files(videos, held_out=0.5)
    assert next(write_cache(online, model[0].vae, tmp_path, "videos")).total == 5
    held_out = online.hold_out(), cached_files(cache, held_out=0.5).hold_out()
    names = [{source.sample(n).name for n in range(5)} for source in held_out]
    assert 0 < len(names[0]) < 5 and names[0] == names[1]


def test_training_from_a_cache_has_the_losses_of_training_online(videos, model, cache, tmp_path):
    common = {"init": str(model[1]), "starts": "grid", "image_every": 3, "video_steps": 6}
    tiny_train("video", data=str(videos), out=str(tmp_path / "online"), **common)
    tiny_train("video", data=str(cache), out=str(tmp_path / "cached"), **common)
    lines = [
        (tmp_path / name / "video" / "log.jsonl").read_text().splitlines()
        for name in ("online", "cached")
    ]
    for one, other in zip(*(map(json.loads, some) for some in lines), strict=True):
        assert one["kind"] == other["kind"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert (tmp_path / "cached" / "video" / "samples" / "step_00000006.png").exists()


def test_cached_clips_are_shown_as_pixels_also_in_bfloat16(videos, model, cache):
    online, cached, vae = files(videos), cached_files(cache), model[0].vae
    moments, frames = (
        torch.stack([source.sample(n).frames for n in range(5)]) for source in (cached, online)
    )
    with torch.autocast("cpu", torch.bfloat16):  # on CPUs it knows no float16
        assert vae.decode_frames(moments).shape == (5, 4, 3, *SIZE)
    assert torch.equal(vae.decode_frames(frames), to_pixels(frames))


def test_an_interrupted_cache_goes_on_where_it_stopped(videos, model, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD", 2)
    for written in write_cache(files(videos), model[0].vae, tmp_path, "videos"):
        if written.done == 3:  # in the midst of a shard
            break
    assert shard_path(tmp_path, 0).exists() and not shard_path(tmp_path, 1).exists()
    with pytest.raises(ValueError, match="1 of 3 shards"):
        Latents(tmp_path, SIZE, 4)
    begun = os.stat(shard_path(tmp_path, 0)).st_mtime_ns
    steps = list(write_cache(files(videos), model[0].vae, tmp_path, "videos"))
    assert [(step.done, step.total) for step in steps] == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert os.stat(shard_path(tmp_path, 0)).st_mtime_ns == begun
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in cache.iterdir()
    )
    for path in cache.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_two_ranks_with_workers_write_the_same_cache(videos, model, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD", 2)
    for rank in (0, 1):
        steps = list(
            write_cache(files(videos), model[0].vae, tmp_path, "videos", rank, 2, workers=rank)
        )
        assert [step.done for step in steps] == [[0, 1, 2, 3], [0, 1, 2]][rank]
    for path in cache.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_bad_video_is_left_out_and_many_end_the_work(videos, model, tmp_path):
    shutil.copytree(videos, tmp_path / "mixed")
    (tmp_path / "mixed" / "bad.mp4").write_bytes(b"no video")
    *_, written = write_cache(files(tmp_path / "mixed"), model[0].vae, tmp_path / "a", "mixed")
    assert written.done == written.total == 6 and written.counts == {"not_a_video": 1}
    assert sorted(Latents(tmp_path / "a", SIZE, 4).names) == [f"{k}.mp4" for k in range(5)]
    with pytest.raises(ValueError, match="1 not_a_video"):
        list(write_cache(files(tmp_path / "mixed"), model[0].vae, tmp_path / "b", "x", max_bad=0))


def test_a_cache_of_another_vae_or_size_is_refused(videos, model, cache, tmp_path):
    other = tiny_model().vae
    with torch.no_grad():
        other.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert fingerprint_vae(other) != fingerprint_vae(model[0].vae)
    with pytest.raises(ValueError, match="a cache with other vae, shards; use another --out"):
        next(write_cache(files(videos), other, cache, "videos"))
    with pytest.raises(ValueError, match="a cache with other data, rows"):
        next(write_cache(files(copy_one(videos, tmp_path)), model[0].vae, cache, "x"))
    with pytest.raises(ValueError, match=r"fps \(16, 16, 4\); this run has \(32, 16, 4\)"):
        Latents(cache, (32, 16), 4)
    other_model = tiny_model(prediction_type="v_prediction")
    other_model.vae = other
    other_model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="made with another VAE"):
        tiny_train("video", data=str(cache), init=str(tmp_path / "model"), out=str(tmp_path / "x"))
    with pytest.raises(ValueError, match="stage vae learns from pixels"):
        tiny_train("vae", data=str(cache), out=str(tmp_path / "y"))
    with pytest.raises(ValueError, match="--sketch draws from pixels"):
        tiny_train("video", data=str(cache), out=str(tmp_path / "y"), sketch=True)
    with pytest.raises(ValueError, match="one source of videos"):
        next(write_cache(files(videos, crop="random"), model[0].vae, tmp_path / "z", "videos"))
    with pytest.raises(ValueError, match="one source of videos"):
        next(write_cache(cached_files(cache), model[0].vae, tmp_path / "z", "cache"))


def copy_one(videos, tmp_path):
    """A folder of one of the videos."""
    (tmp_path / "one").mkdir()
    shutil.copy(videos / "0.mp4", tmp_path / "one")
    return tmp_path / "one"


def test_caches_are_mixed_with_caches_and_not_with_pixels(videos, cache):
    both = open_data(f"{cache}:0.9|{cache}:0.1")
    assert isinstance(both, Mixture) and both.sample(0).frames.shape == (4, 8, 8, 8)
    assert len(find_caches(both)) == 2 and find_caches(files(videos)) == []
    with pytest.raises(ValueError, match="mix caches with caches"):
        open_data(f"{cache}:0.9|{videos}:0.1")
    beside = open_data(cache, images="toyworld")
    assert beside.sample(0).frames.dtype == torch.float16
    assert beside.sample(0, "first").frames.dtype == torch.uint8


def test_the_stages_latents_and_inspect_say_what_they_did(
    videos, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("tinydance.run.inspect.ROWS", 20)
    common = {"data": str(videos), "init": str(model[1])}
    tiny_train("latents", out=str(tmp_path / "cache"), **common)
    assert "is written" in capsys.readouterr().out
    tiny_train("inspect", data=str(tmp_path / "cache"), out=str(tmp_path / "x"))
    assert "5 videos, 0 without caption" in capsys.readouterr().out
    (Path(videos) / "bad.mp4").write_bytes(b"no video")
    monkeypatch.setattr("tinydance.run.inspect.SLOW", 0)
    tiny_train("inspect", data=str(videos), out=str(tmp_path / "x"))
    told = capsys.readouterr().out
    (Path(videos) / "bad.mp4").unlink()
    for words in (
        "6 videos, 1 without caption",
        "6 of 6 rows read: ",
        " padded",
        "  not_a_video, such as bad.mp4: ",
        "a red circle, 3",
        "s each to decode: shrink the files once, such as by ffmpeg -i large.mp4 -vf scale=-2:32 ",
    ):
        assert words in told, told
    assert (tmp_path / "x" / "inspect.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="vae is missing: .* give --init FOLDER"):
        tiny_train("latents", data=str(videos), out=str(tmp_path / "y"))
