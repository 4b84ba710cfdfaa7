"""Claims of `tinydance/data`: the order is a function, bad files are survived, and counted."""

import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_video import SIZE, make_sound, make_video, numbers

from tinydance.config import make_config
from tinydance.data.batches import Quota, batches
from tinydance.data.index import Folder, hash_name
from tinydance.data.open import open_source, parse_data
from tinydance.data.order import (
    BLOCK,
    FIRST_IMAGE,
    Files,
    Mixture,
    WithPictures,
    collect_words,
    describe_source,
    shuffled,
)
from tinydance.model import Sample
from tinydance.run import stages
from tinydance.toy.source import ToyWorld
from tinydance.toy.world import World
from tinydance.video.read import REASONS, BadSample


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Five videos of 2, 4, 6, 8 and 10 seconds in two folders; one has no caption."""
    root = tmp_path_factory.mktemp("good")
    (root / "inner").mkdir()
    for k, name in enumerate(["a.mp4", "b.webm", "c.mkv", "inner/d.MOV", "inner/e e.avi"]):
        kind = {
            "b.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}},
            "inner/e e.avi": {"codec": "mpeg4", "options": {}},
        }.get(name, {})
        path = make_video(root / name, frames=50 + 50 * k, **kind)
        if name != "c.mkv":
            path.with_suffix(".txt").write_text(f"\ufeffclip {k},\n  caf\u00e9 ", "utf-8")
    (root / "._a.mp4").write_bytes(b"left by a Mac")
    (root / "notes.md").write_text("not a video")
    return root


@pytest.fixture(scope="module")
def mixed(good, tmp_path_factory):
    """The good ones among five of which nothing can be read."""
    root = tmp_path_factory.mktemp("mixed") / "videos"
    shutil.copytree(good, root)
    spoil(root)
    return root


def spoil(root):
    (root / "empty.mp4").write_bytes(b"")
    (root / "garbage.mp4").write_bytes(bytes(range(256)) * 40)
    (root / "page.mp4").write_text("<html>404</html>")
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    make_sound(root / "sound.mp4")


def video_folder(root, *arguments, **settings):
    return Files(Folder(root), *arguments, **settings)


def open_data(data, size=SIZE, frames=16, **fields):
    """A source as `--data` opens it."""
    fields = {"height": size[0], "width": size[1], "frames": frames, "held_out": 0} | fields
    return open_source(make_config("paper", data=data, **fields))


def counts(clips):
    """What went wrong on the way to these, by reason."""
    bad = sum((clip.counts for clip in clips), Counter())
    return {reason: count for reason, count in bad.items() if reason in REASONS}


def same(a, b):
    return torch.equal(a.frames, b.frames) and a[1:] == b[1:]


def same_batches(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) > 0 and all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and x[2:] == y[2:] for x, y in zip(a, b)
    )


# --------------------------------------------------------------------------------------------------
# Sources


def test_the_toy_world_is_endless_and_a_function_of_seed_and_number():
    source = ToyWorld(3)
    clip = source.sample(10**12)
    assert clip.frames.shape == (source.frames, 3, *source.size)
    assert clip.frames.dtype == torch.uint8 and clip.caption and clip.name == "toy/3/1000000000000"
    assert same(clip, ToyWorld(3).sample(10**12))
    assert not same(clip, ToyWorld(4).sample(10**12)) and not same(clip, source.sample(10**12 + 1))


def test_the_toy_worlds_images_are_first_frames_and_the_vaes_come_from_the_whole_clip():
    source = ToyWorld(0)
    seen = Counter()
    for n in range(400):
        clip, frame, first = source.sample(n), source.sample(n, "any"), source.sample(n, "first")
        assert torch.equal(first.frames, clip.frames[:1]) and first[1:] == clip[1:]
        assert frame.frames.shape[0] == 1 and frame[1:] == clip[1:]
        k = [torch.equal(picture, frame.frames[0]) for picture in clip.frames].index(True)
        seen[clip.caption.split()[2], k * 2 // source.frames] += 1
    shapes = {shape for shape, _ in seen}
    assert len(shapes) == 3
    for shape in shapes:  # early and late frames alike, of every shape
        assert 0.35 < seen[shape, 0] / (seen[shape, 0] + seen[shape, 1]) < 0.65


def test_an_epoch_shows_every_video_once_and_the_next_in_another_order(good):
    source = video_folder(good, SIZE, frames=1, seed=5)
    epochs = [[source.sample(5 * epoch + k).name for k in range(5)] for epoch in range(6)]
    assert all(sorted(epoch) == sorted(source.rows.names) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_clips_run_at_four_fps_from_starts_all_over_the_video(good):
    source = video_folder(good, SIZE, frames=6, seed=1)
    firsts = []
    for n in range(100):
        clip = source.sample(n)
        if clip.name == "inner/d.MOV":  # 8 seconds, 200 frames
            shown = numbers(clip.frames)
            assert all(b - a in (6, 7) for a, b in zip(shown, shown[1:])) and shown[-1] < 200
            firsts.append(shown[0])
    assert len(firsts) == 20 and min(firsts) < 40 and max(firsts) > 130


def test_a_clip_is_a_function_of_seed_and_number_alone(good):
    one, two = video_folder(good, SIZE, seed=2), video_folder(good, SIZE, seed=2)
    late = [two.sample(n) for n in (7, 3, 12)]
    assert all(same(one.sample(n), clip) for n, clip in zip((7, 3, 12), late))
    assert not all(
        same(video_folder(good, SIZE, seed=3).sample(n), clip) for n, clip in zip((7, 3, 12), late)
    )


def test_a_single_frame_comes_from_any_time_of_the_video(good):
    source = video_folder(good, SIZE, frames=16)
    frames = [source.sample(n, "first") for n in range(100)]
    assert all(frame.frames.shape == (1, 3, *SIZE) for frame in frames)
    shown = [numbers(frame.frames)[0] for frame in frames if frame.name == "inner/d.MOV"]
    assert min(shown) < 40 and max(shown) > 160
    assert not counts(frames)


def test_short_videos_are_padded_and_counted_or_rejected_and_counted(good):
    padding = video_folder(good, SIZE, frames=16)  # 3.75 s; a.mp4 has 2 s
    clips = [padding.sample(n) for n in range(10)]
    short = [numbers(clip.frames) for clip in clips if clip.name == "a.mp4"]
    assert short == [[0, 6, 12, 18, 25, 31, 37, 43] + [43] * 8] * 2
    assert sum(clip.counts["padded"] for clip in clips) == 2 and not counts(clips)
    rejecting = video_folder(good, SIZE, frames=16, short="reject")
    clips = [rejecting.sample(n) for n in range(10)]
    assert all(clip.name != "a.mp4" for clip in clips) and counts(clips) == {"too_short": 2}


def test_a_video_that_ends_where_the_clip_does_is_not_short(tmp_path):
    make_video(tmp_path / "a.mp4", frames=16, fps=4)
    source = video_folder(tmp_path, SIZE)
    assert (
        numbers(source.sample(0).frames) == list(range(16))
        and not source.sample(0).counts["padded"]
    )
    make_video(tmp_path / "a.mp4", frames=15, fps=4)
    assert source.sample(0).counts["padded"] == 1


def test_starts_on_the_grid_are_multiples_of_a_clips_step(tmp_path):
    make_video(tmp_path / "a.mp4", frames=150)  # 6 s: 24 pictures, so nine starts
    source = video_folder(tmp_path, SIZE, starts="grid")
    firsts = {numbers(source.sample(n).frames)[0] for n in range(60)}
    assert firsts == {int(k / 4 * 25) for k in range(9)}


def test_a_random_crop_is_anywhere_and_the_same_in_all_frames(good):
    inside = video_folder(good, (48, 24), frames=3, crop="random", seed=1)
    clips = [inside.sample(n).frames for n in range(20)]
    assert len({tuple(clip[0, 0, 4].tolist()) for clip in clips}) > 5
    centre = video_folder(good, (48, 24), frames=3, seed=1).sample(0).frames
    whole = video_folder(good, (48, 64), frames=3, seed=1).sample(0).frames
    assert torch.equal(centre, whole[..., 20:44])
    moved = [x for x in range(41) if torch.equal(clips[0], whole[..., x : x + 24])]
    assert len(moved) == 1


def test_bad_videos_are_replaced_the_same_way_each_time_and_counted_by_reason(mixed, good):
    source, again = (video_folder(mixed, SIZE, frames=2, seed=8) for _ in range(2))
    clips = [source.sample(n) for n in range(30)]
    assert all(same(again.sample(n), clips[n]) for n in reversed(range(30)))
    assert {clip.name for clip in clips} == set(Folder(good).names)
    bad = counts(clips)
    assert set(bad) == {"not_a_video", "no_video_stream", "missing"} and bad["not_a_video"] >= 9


def test_a_folder_of_bad_videos_ends_in_seconds_with_the_reasons(tmp_path):
    spoil(tmp_path)
    begin = time.process_time()
    with pytest.raises(ValueError, match="20 samples in a row cannot be used") as error:
        video_folder(tmp_path, SIZE).sample(0)
    assert "12 not_a_video" in str(error.value) and "4 no_video_stream" in str(error.value)
    assert "4 missing" in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - begin < 5


def test_of_a_truncated_video_another_start_is_tried(tmp_path):
    whole = make_video(tmp_path / "whole.mp4", frames=250).read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "a.mp4").write_bytes(whole[: len(whole) // 2])
    source = video_folder(tmp_path / "cut", SIZE, frames=4)
    clips = [source.sample(n) for n in range(10)]
    for clip in clips:
        shown = numbers(clip.frames)
        assert [b - a in (6, 7) for a, b in zip(shown, shown[1:])] == [True] * 3
    assert set(counts(clips)) == {"damaged"}


def test_a_source_knows_the_words_of_its_captions(good):
    words = ["0,", "1,", "3,", "4,", "caf\u00e9", "clip"]
    assert collect_words(video_folder(good, SIZE)) == words
    toy = ToyWorld(0)
    known = collect_words(toy)
    assert {word for n in range(50) for word in toy.sample(n).caption.split()} <= set(known)
    both = Mixture([video_folder(good, SIZE), toy], [1, 1])
    assert collect_words(both) == sorted({*words, *known})


def test_a_source_is_opened_by_its_name(good):
    folder = open_data(str(good), frames=5, fps=8, seed=3)
    assert same(folder.sample(1), video_folder(good, SIZE, 5, 8, 3).sample(1))
    toy = open_data("toyworld", (48, 48), frames=7, seed=3)
    assert same(toy.sample(1), ToyWorld(3, World(48, 7)).sample(1)) and toy.size == (48, 48)
    other = open_data(str(good), frames=5, fps=8, seed=4)
    assert same(replace(folder, seed=4).sample(1), other.sample(1))
    for name, size, words in [("toyworld", SIZE, "48x64"), ("toy", SIZE, "no such folder")]:
        with pytest.raises(ValueError, match=words):
            open_data(name, size)


def test_pictures_of_their_own_serve_the_image_steps(good, tmp_path):
    Image.new("RGB", (80, 60), (9, 200, 30)).save(tmp_path / "green.png")
    (tmp_path / "green.txt").write_text("green")
    source = open_data(str(good), frames=2, images=str(tmp_path))
    clips, *_, images = batches(source, 2, 4, 2, image_every=4, image_batch=3)
    assert clips.frames.shape[:2] == (2, 2) and images.frames.shape[:2] == (3, 1)
    assert images.captions == ["green"] * 3
    assert (images.frames == torch.tensor([9, 200, 30], dtype=torch.uint8)[:, None, None]).all()


SEEN = {  # suffix: what PyAV's own codecs write into it
    ".3gp": {"codec": "mpeg4", "options": {}},
    ".flv": {"codec": "flv1", "options": {"g": "12"}},
    ".mpg": {"codec": "mpeg1video", "options": {"g": "12"}},
    ".mpeg": {"codec": "mpeg2video", "options": {"g": "12"}},
    ".m2ts": {},
    ".mts": {},
    ".wmv": {"codec": "wmv2", "options": {"g": "12"}},
    ".ogv": {"codec": "libvpx", "options": {"deadline": "realtime"}},
}


@pytest.mark.parametrize("suffix", SEEN)
def test_a_folder_shows_videos_of_every_usual_suffix(tmp_path, suffix):
    make_video(tmp_path / f"one{suffix}", frames=110, muxing={}, **SEEN[suffix])
    clip = open_data(str(tmp_path)).sample(0)
    assert clip.name.endswith(suffix) and not counts([clip])
    shown = numbers(clip.frames)
    assert len({*shown}) == len(shown) and sorted(shown) == shown


HUGGING_FACE = {
    "csv": "file_name,text\na.mp4,a cat\ninner/d.MOV,a dog\n",
    "jsonl": '{"file_name": "a.mp4", "text": "a cat", "size": [1, 2]}\n'
    '{"text": "a dog", "file_name": "inner/d.MOV", "more": null}\n',
}


@pytest.mark.parametrize("suffix", HUGGING_FACE)
def test_a_table_of_hugging_face_is_read(good, tmp_path, suffix):
    table = good / f"metadata.{suffix}"
    table.write_text(HUGGING_FACE[suffix])
    source = open_data(str(table))
    captions = {source.sample(n).caption for n in range(4)}
    table.unlink()
    assert captions == {"a cat", "a dog"}


# --------------------------------------------------------------------------------------------------
# Order and mixtures


@pytest.mark.parametrize("length", [1, 2, 5, 64, 1000, 4097])
def test_a_shuffled_order_is_one_to_one_and_differs_with_its_key(length):
    orders = [[shuffled(k, length, 0, epoch) for k in range(length)] for epoch in range(3)]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length > 60:
        for order in orders:  # no trend, no neighbours kept, no order twice
            assert abs(np.corrcoef(order, range(length))[0, 1]) < 5 / length**0.5
            assert np.mean(np.abs(np.diff(order)) == 1) < 0.1
        assert np.mean(np.equal(*orders[:2])) < 0.1
    assert 0 <= shuffled(10**7 - 1, 10**7, 3, 10**5) < 10**7


@dataclass
class Counting:
    """The name of clip n is its own, its seed and n."""

    name: str
    seed: int = 0
    frames, size = 4, SIZE

    def sample(self, n, kind="clip"):
        pixels = torch.full((1, 3, 2, 2), n % 256, dtype=torch.uint8)
        instructions = {"edges": pixels[:, :1] / 255}
        return Sample(pixels, kind, (self.name, self.seed, n), instructions=instructions)

    def leaves(self):
        return [self]

    def describe(self):
        return [self.name]


def test_a_mixture_has_its_shares_and_leaves_nothing_out():
    mixture = Mixture([Counting("a"), Counting("b"), Counting("c")], [0.9, 0.075, 0.025])
    drawn = [mixture.sample(n).name for n in range(3 * BLOCK)]
    for name, share in (("a", 2700), ("b", 225), ("c", 75)):
        assert sorted(n for other, _, n in drawn if other == name) == list(range(share))
    first = Counter(name for name, *_ in drawn[:200])
    assert 160 <= first["a"] <= 195 and first["b"] >= 5  # mixed from the start, not one by one
    order = [(name, n) for name, _, n in drawn]
    other = [replace(mixture, seed=1).sample(n).name for n in range(3 * BLOCK)]
    assert order != [(name, n) for name, _, n in other]
    with pytest.raises(ValueError, match="below 1 in 1000"):
        Mixture([Counting("a"), Counting("b")], [1, 1e-5])


def test_another_seed_reseeds_all_that_a_source_is_made_of():
    mixture = Mixture([Counting("a", 5), Counting("b")], [1, 1])
    source = WithPictures([mixture, Counting("c")], [1, 1], 3)
    assert [leaf.seed for leaf in source.leaves()] == [3, 3, 3]
    assert [leaf.seed for leaf in replace(source, seed=4).leaves()] == [4, 4, 4]
    assert [leaf.seed for leaf in source.leaves()] == [3, 3, 3]


def test_pictures_of_their_own_are_the_first_frames_and_no_others():
    source = WithPictures([Counting("clips"), Counting("pictures")], [1, 1])
    names = {kind: source.sample(2, kind).name[0] for kind in ("clip", "first", "any")}
    assert names == {"clip": "clips", "first": "pictures", "any": "clips"}


def test_a_source_is_described_by_its_parts_with_their_notes(good):
    files = video_folder(good, SIZE)
    files.rows.notes = ["damaged"]
    source = WithPictures([Mixture([files, Counting("b")], [3, 1]), Counting("c")], [1, 1])
    about = [f"{good}: 5 videos, 1 without caption", "note: damaged", "b", "c"]
    assert describe_source(source) == about


def test_weights_stand_behind_a_colon_and_tar_files_are_one_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for name in ("shards/1.tar", "shards/0.tar", "odd:7"):
        (tmp_path / name).touch()
    tars = [Path("shards/0.tar"), Path("shards/1.tar")]
    assert parse_data("a.csv:0.95|clips:0.05") == [("a.csv", 0.95), ("clips", 0.05)]
    assert parse_data(r"C:\clips|odd:7|x:y") == [
        (name, None) for name in (r"C:\clips", "odd:7", "x:y")
    ]
    assert parse_data("shards/1.tar|b|shards/0.tar") == [("b", None), (tars[::-1], None)]
    assert parse_data("shards/*.tar:2|shards") == [(tars, 2), (tars, None)]
    with pytest.raises(ValueError, match="above 0"):
        parse_data("a:-1")
    some = [Path(f"shards/{n}.tar") for n in ("08", "09", "10")]
    assert parse_data("shards/{08..10}.tar") == [(some, None)]
    with pytest.raises(ValueError, match="b.tar.gz: packed tars .* gunzip"):
        parse_data("b.tar.gz")


def test_sources_without_weights_count_by_their_samples_and_some_weights_are_refused(good, mixed):
    source = open_data(f"{good}|{mixed}", frames=2)
    assert source.weights == [5, 10] and len(describe_source(source)) == 2
    for data in (f"{good}:0.5|{mixed}", f"{good}|toyworld"):
        with pytest.raises(ValueError, match="every source a weight"):
            open_data(data, (48, 48))


def test_too_many_bad_samples_end_a_run_with_the_reasons_and_few_do_not():
    quota = Quota(0.05)
    for _ in range(300):  # 4 % for ever
        quota.add(25, {"missing": 1, "padded": 20})
    assert quota.total["missing"] == 300 and quota.total["padded"] == 6000
    with pytest.raises(ValueError, match="5[1-3] tries failed") as error:
        for step in range(40):
            quota.add(25, {"damaged": 3})
    assert step < 10 and "damaged" in str(error.value) and "missing" in str(error.value)
    assert "\n" not in str(error.value) and "--max_bad" in str(error.value)


# --------------------------------------------------------------------------------------------------
# What is never trained on


@dataclass
class NamedRow:
    """A row whose clip is its number in the name; every seventh is bad."""

    name: str
    caption: str = "a clip"
    what = "clips"

    def read(self, choose_start, frames, fps, size, at):
        if int(self.name) % 7 == 0:
            raise BadSample("damaged", self.name)
        return torch.zeros(frames, 3, 2, 2, dtype=torch.uint8)


class NamedRows:
    kind, notes, missing_captions, where = NamedRow, [], 0, "rows"

    def __init__(self, names):
        self.names, self.hashes = names, np.array([hash_name(name) for name in names])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return NamedRow(self.names[i])


def named(numbers, held_out=0.1, **fields):
    return Files(NamedRows([str(n) for n in numbers]), (2, 2), 1, held_out=held_out, **fields)


def rows_of(source):
    return {source.rows[i].name for i in source.chosen}


def test_what_is_held_out_is_never_trained_on_and_all_else_once_an_epoch():
    source = named(range(1, 400))
    held_out = source.hold_out()
    kept, hidden = rows_of(source), rows_of(held_out)
    assert kept | hidden == {*source.rows.names} and not kept & hidden
    assert 20 < len(hidden) == len(held_out) == 399 - len(source) < 60
    good = [{name for name in names if int(name) % 7} for names in (kept, hidden)]
    for part, names in zip((source, held_out), good):  # bad ones have a substitute of their part
        for epoch in range(3):
            drawn = [part.sample(len(part) * epoch + k) for k in range(len(part))]
            assert {sample.name for sample in drawn} == names
            clean = [sample.name for sample in drawn if not sample.counts["damaged"]]
            assert sorted(clean) == sorted(names)
    assert {replace(source, seed=5).sample(n).name for n in range(3 * len(source))} == good[0]


def test_what_is_held_out_depends_on_names_alone():
    few, more = rows_of(named(range(300)).hold_out()), rows_of(named(range(600)).hold_out())
    assert few == {name for name in more if int(name) < 300} < more  # files were added
    assert rows_of(named(range(299, -1, -1)).hold_out()) == few  # in another order
    assert few < rows_of(named(range(300), 0.2).hold_out())  # a larger share
    assert 60 < len(named(range(10_000), 0.01).hold_out()) < 140


def test_every_index_holds_out_the_same_names(tmp_path):
    names = [f"{k:03d}.mp4" for k in range(200)]
    (tmp_path / "tars").mkdir()
    for k, part in enumerate((names[:80], names[80:])):
        with tarfile.open(tmp_path / "tars" / f"{k}.tar", "w") as tar:
            for name in part:
                tar.addfile(tarfile.TarInfo(name))
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "a.csv").write_text("\n".join(["path,caption", *(f"{name},x" for name in names)]))
    chosen = {
        data: rows_of(open_data(str(tmp_path / data), held_out=0.1).hold_out())
        for data in ("", "a.csv", "tars", "tars/1.tar", "tars/0.tar")
    }
    assert chosen[""] == chosen["a.csv"] == {n for n in names if hash_name(n) < 0.1 * 2**31}
    assert chosen["tars"] == chosen["tars/0.tar"] | chosen["tars/1.tar"]
    backwards = open_data(f"{tmp_path}/tars/1.tar|{tmp_path}/tars/0.tar", held_out=0.1)
    assert rows_of(backwards.hold_out()) == chosen["tars"]


def test_a_mixture_holds_out_of_every_source_and_not_at_all_where_one_cannot():
    mixture = Mixture([named(range(1, 300)), named(range(300, 999))], [0.9, 0.1], seed=3)
    held_out = mixture.hold_out()
    drawn = Counter(int(held_out.sample(n).name) < 300 for n in range(BLOCK))
    assert drawn == {True: 900, False: 100}
    hidden = [rows_of(leaf.hold_out()) for leaf in mixture.leaves()]
    assert [rows_of(leaf) for leaf in held_out.leaves()] == hidden
    toy = Mixture([ToyWorld(1), named(range(300))], [1, 1], seed=1).hold_out()
    assert toy.leaves()[0] == ToyWorld(1).hold_out() != ToyWorld(1)
    for others in (named(range(300), 0), named(range(1, 3))):
        assert others.hold_out() is None
        assert Mixture([named(range(300)), others], [1, 1]).hold_out() is None
    pictures = WithPictures([ToyWorld(0), named(range(1, 300))], [1, 1]).hold_out()
    assert pictures.sample(0, "first").name in rows_of(named(range(1, 300)).hold_out())


def test_the_head_of_a_run_says_how_many_are_held_out_and_refuses_all():
    source = named(range(300))
    count = len(source.hold_out())
    assert describe_source(source) == [f"rows: 300 clips, 0 without caption, {count} held out"]
    few = [n for n in range(100) if hash_name(str(n)) < 0.4 * 2**31]
    with pytest.raises(ValueError, match="rows: --held_out 0.4 leaves none; use 0"):
        named(few, 0.4)


def test_to_resume_and_to_share_among_ranks_is_exact_also_with_clips_held_out():
    source = named(range(1, 100))
    straight = [batch.names for batch in batches(source, 0, 30, 4)]
    assert [batch.names for batch in batches(source, 17, 30, 4)] == straight[17:]
    ranks = [[b.names for b in batches(source, 0, 30, 4, rank, 2)] for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == straight


# --------------------------------------------------------------------------------------------------
# Batches


SETTINGS = dict(batch=4, image_every=4, image_batch=8)


def test_batches_have_the_promised_shapes_and_numbers():
    source = ToyWorld(0)
    for batch in batches(source, 2, 9, **SETTINGS):
        is_image, images = batch.step in (3, 7), (batch.step + 1) // 4
        b, f, turn = (8, 1, images - 1) if is_image else (4, source.frames, batch.step - images)
        start = turn * b + (FIRST_IMAGE if is_image else 0)
        assert batch.frames.shape == (b, f, 3, *source.size) and batch.frames.dtype == torch.uint8
        assert batch.sample_ids == list(range(start, start + b))
        sample = source.sample(batch.sample_ids[1], "first" if f == 1 else "clip")
        assert torch.equal(batch.frames[1], sample.frames) and len(batch.captions) == b
        assert (batch.captions[1], batch.names[1]) == (sample.caption, sample.name)
    assert batch.step == 8


def test_batches_of_any_frame_are_not_those_that_clips_begin_with():
    source = ToyWorld(0)
    settings = dict(batch=16, image_every=1)
    [first] = batches(source, 0, 1, **settings)
    [any_time] = batches(source, 0, 1, **settings, image_kind="any")
    assert not torch.equal(first.frames, any_time.frames)
    assert torch.equal(any_time.frames[3], source.sample(FIRST_IMAGE + 3, "any").frames)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_shows_every_video_once_also_with_image_steps(good, world_size):
    source = open_data(str(good), frames=2)  # five videos; in six steps five batches of two clips
    shares = [
        batches(source, 0, 6, 2, rank, world_size, image_every=4) for rank in range(world_size)
    ]
    clips = [batch for share in shares for batch in share if batch.frames.shape[1] > 1]
    seen = Counter(name for batch in clips for name in batch.names)
    assert len(seen) == 5 and set(seen.values()) == {2}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_instructions_of_samples_are_stacked_by_name(workers):
    [batch] = batches(Counting("a"), 2, 3, 4, workers=workers)
    assert list(batch.instructions) == ["edges"]
    assert torch.equal(batch.instructions["edges"], batch.frames[:, :, :1] / 255)
    assert next(batches(ToyWorld(0), 0, 1, 2)).instructions == {}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_together_see_what_one_alone_does(world_size):
    alone = batches(ToyWorld(0), 0, 5, **SETTINGS)
    ranks = [
        batches(ToyWorld(0), 0, 5, rank=rank, world_size=world_size, **SETTINGS)
        for rank in range(world_size)
    ]
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert {share[0] for share in shares} == {whole[0]}
        assert torch.equal(torch.cat([share[1] for share in shares]), whole[1])
        assert sum((share[2] for share in shares), []) == whole[2]
        assert sum((share[3] for share in shares), []) == whole[3]


def test_no_sample_is_seen_twice():
    shown = [n for batch in batches(ToyWorld(0), 0, 40, **SETTINGS) for n in batch[3]]
    assert len(set(shown)) == len(shown)


def test_to_resume_is_to_start_at_the_step():
    straight = list(batches(ToyWorld(0), 0, 10, **SETTINGS))
    assert same_batches(straight[6:], batches(ToyWorld(0), 6, 10, **SETTINGS))


def test_workers_change_no_byte_and_lose_no_count(mixed):
    by_hand, by_workers = (video_folder(mixed, SIZE, frames=6, seed=4) for _ in range(2))
    assert same_batches(
        batches(by_hand, 0, 9, **SETTINGS), batches(by_workers, 0, 9, workers=2, **SETTINGS)
    )
    assert any(
        batch.counts["not_a_video"] for batch in batches(by_hand, 0, 9, workers=1, **SETTINGS)
    )
    assert same_batches(
        batches(ToyWorld(1), 3, 9, **SETTINGS), batches(ToyWorld(1), 3, 9, workers=2, **SETTINGS)
    )


@pytest.mark.parametrize("preset", ["paper", "toy"])
def test_files_are_read_by_workers_and_the_toy_world_is_not(preset, mixed, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(stages.OTHERS, "inspect", lambda config, *_: seen.append(config.workers))
    for given in ({"data": str(mixed)}, {"data": "toyworld"}, {"data": str(mixed), "workers": 2}):
        stages.train(make_config(preset, device="cpu", out=str(tmp_path), **given), "inspect")
    assert seen == [min(4, os.cpu_count()), 0, 2]


def test_a_stream_with_workers_can_be_left_early():
    before = set(multiprocessing.active_children())
    stream = batches(ToyWorld(0), 0, 10**6, 4, workers=2)
    assert [batch.step for batch in islice(stream, 3)] == [0, 1, 2]
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert set(multiprocessing.active_children()) <= before


def test_a_workers_failure_reaches_the_trainer_with_its_reasons(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="20 not_a_video") as error:
        next(batches(video_folder(tmp_path, SIZE), 0, 1, 2, workers=1))
    assert set(multiprocessing.active_children()) <= before and error  # none outlives the error


@pytest.mark.parametrize("sizes", [dict(batch=3), dict(batch=0), dict(batch=4, image_batch=5)])
def test_a_batch_that_the_ranks_cannot_share_is_refused(sizes):
    with pytest.raises(ValueError, match="make it a multiple"):
        next(batches(ToyWorld(0), 0, 1, world_size=2, **sizes))


class Sleepy(ToyWorld):
    """Tells which processes make the clips."""

    def sample(self, n, kind="clip"):
        time.sleep(0.02)
        return super().sample(n, kind)._replace(caption=str(os.getpid()))


def test_workers_outlive_the_signals_that_ask_the_trainer_to_save():
    stream = batches(Sleepy(0), 0, 40, 4, workers=2)
    workers = {int(pid) for batch in islice(stream, 4) for pid in batch[2]}
    assert len(workers) == 2 and os.getpid() not in workers
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert [batch[0] for batch in islice(stream, 20)] == list(range(4, 24))
    stream.close()
