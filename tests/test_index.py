"""Claims of `data/index.py` and `rows.py`: rows read themselves, and nothing hostile is obeyed."""

import csv
import gzip
import http.server
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import HERE
from test_video import SIZE, huge_png, make_video, numbers

from tinydance.config import make_config
from tinydance.data import index as index_module
from tinydance.data import rows as rows_module
from tinydance.data.batches import batches
from tinydance.data.index import Folder, Shards, Strings, Table, hash_name, tar_members
from tinydance.data.open import open_source
from tinydance.data.order import Files, collect_words, describe_source
from tinydance.data.rows import Picture, Row, confine
from tinydance.video.read import BadSample, decoding, read_image
from tinydance.weights.safetensors import load_safetensors, save_safetensors


def bad(source, samples):
    """What failed on the way to some samples, by reason."""
    return dict(sum((source.sample(n).counts for n in range(samples)), Counter()))


def read(row):
    with row.open() as file:
        return file.read()


def open_data(data, frames=16, **fields):
    """A source as `--data` opens it."""
    fields = {"height": SIZE[0], "width": SIZE[1], "frames": frames, "held_out": 0} | fields
    return open_source(make_config("paper", data=str(data), **fields))


# --------------------------------------------------------------------------------------------------
# Folders


def test_many_strings_are_kept_in_two_arrays():
    words = ["", "a", "caf\u00e9", "\u4e2d\u6587", "", os.fsdecode(b"\xff.mp4")]
    assert list(Strings(words)) == words and len(Strings(words)) == 6 and len(Strings([])) == 0


def test_a_folder_finds_its_files_and_their_captions(tmp_path):
    for name in ("a.mp4", "b.webm", "inner/c.MOV", "inner/e e.avi", "._a.mp4", "notes.md", "p.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a.txt").write_text("\ufeffclip 0,\n  caf\u00e9 ", "utf-8")
    (tmp_path / "inner" / "c.txt").write_bytes(b"latin \xe9")
    rows = Folder(tmp_path)
    assert list(rows.names) == ["a.mp4", "b.webm", "inner/c.MOV", "inner/e e.avi"]
    assert [row.caption for row in rows] == ["clip 0,\n  caf\u00e9 ", "", "latin \ufffd", ""]
    assert rows.missing_captions == 2 and [read(row) for row in rows] == [
        name.encode() for name in rows.names
    ]
    assert list(Folder(tmp_path, Picture).names) == ["p.jpg"]


def test_a_folder_without_videos_is_refused_in_one_line(tmp_path):
    (tmp_path / "notes.md").write_text("not a video")
    for root, words in {
        tmp_path / "absent": "no such folder",
        tmp_path: "no videos inside",
        tmp_path / "notes.md": "no such folder",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            Folder(root)
        assert str(root) in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Tables


def table(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return Table(path)


def test_a_table_is_text_in_utf_8_with_quotes_over_several_lines(tmp_path):
    rows = table(
        tmp_path / "a.csv",
        "\ufeffcaption,Path,note\r\n"
        '"a, ""red"" circle\r\nmoves",000123.mp4,\r\n\r\n'
        ",b.mp4,x\r\ncaf\u00e9,c d.mp4,\r\n",
    )
    assert len(rows) == 3 and rows.missing_captions == 1
    assert [row.caption for row in rows] == ['a, "red" circle\r\nmoves', "", "caf\u00e9"]
    assert [row.name for row in rows] == ["000123.mp4", "b.mp4", "c d.mp4"]
    assert confine(rows[0].root, rows[0].name) == tmp_path.resolve() / "000123.mp4"


def test_webvids_columns_keep_their_zeros(tmp_path):
    rows = table(
        tmp_path / "w.csv",
        "videoid,contentUrl,duration,page_dir,name\n"
        "0012,http://x/12.mp4,PT00H00M12S,000101_000150,A dog\n",
    )
    assert rows[0].name == "videos/000101_000150/0012.mp4" and rows[0].caption == "A dog"


@pytest.mark.parametrize(
    "text, words",
    [
        ("path,words\na.mp4,x\n", "no columns path and caption among .'path', 'words'"),
        ("", "no columns path and caption among"),
        ("path,caption\n", "no row below"),
        ("path,caption\na.mp4,x\nb.mp4,a dog, running\n", "line 3: not 2 columns"),
        ("path,caption\na.mp4,x\nb.mp4\n", "line 3: not 2 columns"),
        ('path,caption\na.mp4,"x\ny"\nb.mp4,"never closed\nc.mp4,x\n', "line 4: unexpected end"),
        ('path,caption\na.mp4,"x"y\n', "line 2"),
        ("path,caption\na.mp4,caf\u00e9\nb.mp4,\xe9\n".encode("latin-1"), "line 2: 'utf-8' codec"),
        ("path,caption\na.mp4," + "x" * 200_000 + "\n", "line 2: field larger than field limit"),
        ("path,caption,start,end\na.mp4,x,2,1\n", "line 2: start 2.0 is not before end 1.0"),
        ("path,caption,start\na.mp4,x,soon\n", "line 2: could not convert"),
    ],
)
def test_a_damaged_table_is_refused_with_the_lines_number(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as error:
        table(tmp_path / "a.csv", text)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"path": "a.mp4", "caption": "x"}\n{"path": "b.mp4"}\n', "line 2: caption missing among"),
        ('{"path": "a.mp4", "caption": "x"}\n[1]\n', "line 2: not a JSON object"),
        ('{"path": "a.mp4", "caption": "x"\n', "line 1: "),
        ('{"path": "a.mp4", "caption": "x", "start": 2, "end": 1}\n', "line 1: start 2.0 is not"),
        ("[" * 100_000 + "\n", "line 1: "),
        ("", "no row"),
    ],
)
def test_damaged_lines_of_json_are_refused_with_their_number(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as error:
        table(tmp_path / "a.jsonl", text)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_start_and_end_bound_what_is_shown(tmp_path):
    make_video(tmp_path / "v.mp4", frames=200)
    table(tmp_path / "a.csv", "path,caption,start,end\nv.mp4,x,2,4\nv.mp4,x,6,\n")
    source = open_data(tmp_path / "a.csv", 4)
    shown = [numbers(source.sample(n).frames) for n in range(40)]
    early, late = ([clip for clip in shown if (clip[0] < 120) == first] for first in (True, False))
    assert len(early) == len(late) == 20 and len({clip[0] for clip in shown}) > 25
    assert min(map(min, early)) >= 50 and max(map(max, early)) < 100 and min(map(min, late)) >= 150
    long = open_data(tmp_path / "a.csv", 16)
    clips = [numbers(long.sample(n).frames) for n in range(2)]
    assert sorted(clips)[0] == [50, 56, 62, 68, 75, 81, 87, 93] + [93] * 8  # not the next scene
    assert bad(long, 2) == {"padded": 2}


def test_ten_thousand_rows_are_reached_by_offset_in_any_order(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        writer.writerows([f"{k}.mp4", f"{k},\n\u00e9" * (k % 3)] for k in range(10_000))
    rows = Table(tmp_path / "a.csv")
    assert len(rows) == 10_000 and rows.offsets.nbytes == 8 * 10_001
    for k in np.random.default_rng(0).integers(0, 10_000, 300):
        assert rows[k].name == f"{k}.mp4" and rows[k].caption == f"{k},\n\u00e9" * (k % 3)


# --------------------------------------------------------------------------------------------------
# What leads outside


def test_nothing_outside_the_root_is_read_and_no_address_is_opened(tmp_path):
    """Every hostile row is counted as unsafe, and a server on this machine sees no request."""
    requests = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)

        def log_message(self, *arguments):
            pass

    root = tmp_path / "root"
    (root / "deeper").mkdir(parents=True)
    make_video(tmp_path / "secret.mp4", frames=20)
    shutil.copy(tmp_path / "secret.mp4", root / "good.mp4")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "folder").symlink_to(tmp_path)
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    hostile = [
        "../secret.mp4",
        f"{tmp_path}/secret.mp4",
        "link.mp4",
        "folder/secret.mp4",
        f"http://{host}/a.mp4",
        f"concat:{tmp_path}/secret.mp4|good.mp4",
        "pipe:0",
        f"file:{tmp_path}/secret.mp4",
        "deeper/../../secret.mp4",
        "a\0.mp4",
        "C:\\x.mp4",
    ]
    with open(root / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["path", "caption"], ["good.mp4", ""], *([path, "x"] for path in hostile)]
        )
    playlist = f"#EXTM3U\n#EXTINF:4,\nhttp://{host}/b.mp4\n#EXT-X-ENDLIST\n"
    (root / "playlist.mp4").write_text(playlist)
    (root / "list.mp4").write_text(f"ffconcat version 1.0\nfile http://{host}/c.mp4\n")
    try:
        source = open_data(root / "a.csv", 2)
        seen = bad(source, 24)
        assert set(seen) == {"unsafe", "no_caption"} and seen["unsafe"] >= len(hostile)
        assert {source.sample(n).name for n in range(24)} == {"good.mp4"}
        folder = open_data(root, 2)
        assert {folder.sample(n).name for n in range(12)} == {"good.mp4"}
        assert set(bad(folder, 12)) == {"unsafe", "not_a_video", "no_caption"}
    finally:
        server.shutdown()
        server.server_close()
    assert requests == []


def test_paths_that_stay_inside_may_take_any_way(tmp_path):
    root = tmp_path / "Part 1: a"
    (root / "b").mkdir(parents=True)
    for name in ("c.mp4", "b/../c.mp4", str(root / "c.mp4"), "Intro: x.mp4", "..c.mp4"):
        assert confine(root, name).parent == root.resolve()
    with pytest.raises(BadSample, match="unsafe"):
        confine(root / "b", "../c.mp4")


def test_data_on_another_disk_is_read_where_root_allows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    disk, folder = tmp_path / "disk", tmp_path / "clips"
    for place in (disk / "deep", folder):
        place.mkdir(parents=True)
    make_video(disk / "deep" / "a.mp4", frames=20)
    make_video(tmp_path / "secret.mp4", frames=20)
    (disk / "deep" / "a.txt").write_text("a red circle")
    (folder / "link").symlink_to(disk / "deep")
    (folder / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    paths = ["deep/a.mp4", str(disk / "deep" / "a.mp4")]
    with open(folder / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "caption"], *([path, "red"] for path in paths)])
    for data, caption in (("clips", "a red circle"), ("clips/a.csv", "red")):
        with pytest.raises(ValueError, match="unsafe"):
            open_data(data, 2).sample(0)
        source = open_data(data, 2, root=str(disk))
        seen = [source.sample(n) for n in range(12)]
        assert {sample.caption for sample in seen} == {caption}
        assert {os.path.basename(sample.name) for sample in seen} == {"a.mp4"}
    assert set(bad(open_data("clips", 2, root=str(disk)), 12)) == {"unsafe"}  # out.mp4
    with pytest.raises(ValueError, match="root is nowhere: no such folder"):
        open_data("clips/a.csv", 2, root="nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(BadSample, match="missing"):
        Folder(tmp_path)[0].open()


# --------------------------------------------------------------------------------------------------
# Tar shards


def shard(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, bytes), or of (name, type) for what is no plain file."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = content.encode(), "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    deep = "d" * 90 + "/" + "e" * 60 + ".txt"
    names = ["a.txt", "b/c.txt", deep, "empty.txt", "caf\u00e9.txt"]
    if format != tarfile.USTAR_FORMAT:
        names.append("n" * 300 + ".txt")
    shard(
        tmp_path / "a.tar",
        [(name, name.encode() * (name != "empty.txt")) for name in names]
        + [("dir", "5"), ("link.txt", "2"), ("hard.txt", "1"), ("dev.txt", "3")],
        format,
    )
    found = list(tar_members(tmp_path / "a.tar"))
    assert [name for name, _, _ in found] == names
    for name, offset, size in found:
        row = Row(name, tmp_path / "a.tar", offset=offset, size=size)
        assert read(row) == name.encode() * (name != "empty.txt")


def hostile(kind, size, content=b""):
    """A header that lies, and what follows it."""
    member = tarfile.TarInfo("a.mp4")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "content, words",
    [
        (hostile(b"0", 2**40), "cut within member 1"),
        (hostile(b"x", 13, b"13 size=9999\n") + hostile(b"0", 0), "cut within member 1"),
        (hostile(b"x", 13, b"13 size=-512\n") + hostile(b"0", 0), "cut within member 1"),
        (hostile(b"0", -1024), "cut within member 1"),
        (hostile(b"x", 2**50), "compressed|damaged"),
        (hostile(b"L", 2**50), "compressed|damaged"),
        (hostile(b"L", -512), "."),
        (hostile(b"L", 2, b"ab") * 3000, "compressed|damaged"),
        (hostile(b"S", 2**40), "cut within member 1"),
    ],
)
def test_a_tar_whose_headers_lie_ends_with_one_error(tmp_path, content, words):
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    with pytest.raises(ValueError, match=words):
        list(tar_members(tmp_path / "a.tar"))


def test_shards_pair_by_stem_and_take_the_text_before_the_json(tmp_path):
    shard(
        tmp_path / "0.tar",
        [
            ("000.mp4", b"A"),
            ("000.txt", b"one"),
            ("000.json", b'{"caption": "other"}'),
            ("001.json", json.dumps({"caption": "tw\u00f6"}).encode()),
            ("001.MP4", b"BB"),
            ("sub/000.mp4", b"CCC"),
            ("003.webm", b"D"),
            ("003.json", b"[1]"),
            ("003.jpg", b"thumb"),
            ("../../004.mp4", b"E"),
            ("/etc/005.mp4", b"F"),
            ("006.mp4", "2"),
            ("007.txt", b"alone"),
            ("a.b.mp4", b"G"),
            ("a.b.txt", b"dotted"),
            ("._x.mp4", b"mac"),
        ],
    )
    shard(tmp_path / "1.tar", [("000.mp4", b"H"), ("000.txt", b"next"), ("000.mp4", b"twice")])
    rows = Shards([tmp_path / "0.tar", tmp_path / "1.tar"])
    found = {row.name: (read(row), row.caption) for row in rows}
    assert found == {
        "0.tar/000.mp4": (b"A", "one"),
        "0.tar/001.MP4": (b"BB", "tw\u00f6"),
        "0.tar/sub/000.mp4": (b"CCC", ""),
        "0.tar/003.webm": (b"D", ""),
        "0.tar/../../004.mp4": (b"E", ""),
        "0.tar//etc/005.mp4": (b"F", ""),
        "0.tar/a.b.mp4": (b"G", "dotted"),
        "1.tar/000.mp4": (b"H", "next"),
    }
    assert rows.missing_captions == 3 and rows.notes == []
    made = [name for name in os.listdir(tmp_path) if not name.startswith("tinydance_")]
    assert sorted(made) == ["0.tar", "1.tar"]  # nothing was extracted
    assert [row.name for row in Shards([tmp_path / "0.tar"], Picture)] == ["0.tar/003.jpg"]


def test_a_damaged_shard_gives_what_comes_before_and_says_so(tmp_path):
    members = [(f"{k}.{kind}", bytes([k]) * 700) for k in range(4) for kind in ("mp4", "txt")]
    whole = shard(tmp_path / "whole.tar", members).read_bytes()
    step, cases = 512 + 1024, {}
    damaged = bytearray(whole)
    damaged[4 * step + 130] ^= 1
    cases["damaged"] = damaged, 2, "damaged or cut after 4 members"
    cases["boundary"] = whole[: 4 * step], 2, "damaged or cut after 4 members"
    cases["inside"] = whole[: 4 * step + 900], 2, "cut within member 5"
    cases["gzip"] = gzip.compress(whole), 0, "compressed"
    cases["empty"] = b"", 0, "compressed, or no tar"
    cases["noise"] = bytes(range(256)) * 9, 0, "compressed, or no tar"
    for name, (content, count, words) in cases.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        rows = Shards([tmp_path / "whole.tar", tmp_path / f"{name}.tar"])
        assert len(rows) == 4 + count and len(rows.notes) == 1, name
        assert words in rows.notes[0] and f"{name}.tar" in rows.notes[0]
        assert "\n" not in rows.notes[0]
    with pytest.raises(ValueError, match="no videos in 1 shards.*compressed"):
        Shards([tmp_path / "gzip.tar"])


def test_clips_and_pictures_are_read_out_of_shards(tmp_path):
    video = make_video(tmp_path / "v.mp4", frames=100).read_bytes()
    shard(
        tmp_path / "0.tar",
        [
            ("a.mp4", video),
            ("a.txt", b"first"),
            ("b.mp4", video[:500]),
            ("c.mp4", video),
            ("c.txt", b"third"),
        ],
    )
    source = open_data(tmp_path / "0.tar", 5)
    clips = [source.sample(n) for n in range(12)]
    assert {clip.name: clip.caption for clip in clips} == {
        "0.tar/a.mp4": "first",
        "0.tar/c.mp4": "third",
    }
    for clip in clips:
        shown = numbers(clip.frames)
        assert all(b - a in (6, 7) for a, b in zip(shown, shown[1:]))
    assert set(bad(source, 12)) == {"not_a_video"}


def test_a_member_that_is_too_large_for_memory_is_a_bad_sample(tmp_path, monkeypatch):
    rows = Shards([shard(tmp_path / "0.tar", [("a.mp4", bytes(100)), ("b.mp4", bytes(101))])])
    monkeypatch.setattr(rows_module, "MAX_MEMBER", 100)
    assert read(rows[0]) == bytes(100)
    with pytest.raises(BadSample, match="too_large: 101 bytes in a tar"):
        rows[1].open()


def test_damage_anywhere_in_a_shard_is_survived(tmp_path):
    whole = shard(tmp_path / "0.tar", [(f"{'n' * 120}{k}.mp4", bytes(600)) for k in range(6)])
    data, rng = whole.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        hurt = bytearray(data)
        for place in rng.integers(0, len(hurt), 6):
            hurt[place] = rng.integers(256)
        whole.write_bytes(hurt[: rng.integers(len(hurt))])
        try:
            assert len(list(tar_members(whole))) <= 7
        except ValueError:
            pass


def test_a_shard_that_is_taken_away_makes_missing_samples(tmp_path):
    rows = Shards([shard(tmp_path / "0.tar", [("a.mp4", b"A"), ("b.mp4", b"B"), ("b.txt", b"b")])])
    (tmp_path / "0.tar").unlink()
    for look in (lambda: rows[0].open(), lambda: rows[1]):
        with pytest.raises(BadSample, match="missing"):
            look()


# --------------------------------------------------------------------------------------------------
# The saved index of shards


@pytest.fixture
def shards(tmp_path):
    """Two shards of two samples, in a folder of their own."""
    (tmp_path / "data").mkdir()
    members = [("a.mp4", b"A"), ("a.txt", b"an a"), ("b.mp4", b"BB"), ("b.json", b"{}")]
    return [shard(tmp_path / "data" / f"{k}.tar", members) for k in range(2)]


def find_indexes(folder):
    return sorted(folder.glob("tinydance_*.index"))


def tell_rows(rows):
    return [(row.name, read(row), row.caption) for row in rows]


@pytest.fixture
def count_tars(monkeypatch):
    """The tars that were indexed, as they are."""
    seen = []

    def members(path):
        seen.append(path.name)
        return tar_members(path)

    monkeypatch.setattr(index_module, "tar_members", members)
    return seen


def test_shards_are_indexed_once_and_every_process_maps_the_same_file(shards, count_tars):
    first = Shards(shards)
    [place] = find_indexes(shards[0].parent)
    again = Shards(shards)
    assert count_tars == ["0.tar", "1.tar"]
    assert tell_rows(first) == tell_rows(again) and len(again) == 4
    assert tell_rows(again)[2] == ("1.tar/a.mp4", b"A", "an a") and again.missing_captions == 0
    assert again.notes == [] and [*again.hashes] == [hash_name(row.name) for row in again]
    assert len(place.read_bytes()) < 1000 and b"an a" not in place.read_bytes()
    if sys.platform == "linux":
        assert str(place) in Path("/proc/self/maps").read_text()
    Shards(shards[:1])  # of other shards, or of pictures in them, there is an index beside
    with pytest.raises(ValueError, match="no pictures in 2 shards"):
        Shards(shards, Picture)
    assert len(find_indexes(shards[0].parent)) == 2 and len(Shards(shards)) == 4


def test_an_index_takes_less_than_a_hundred_bytes_a_sample(tmp_path):
    members = [(f"{k:09d}.{end}", b"x") for k in range(2000) for end in ("mp4", "txt", "json")]
    rows = Shards([shard(tmp_path / "0.tar", members)])
    assert len(rows) == 2000 and find_indexes(tmp_path)[0].stat().st_size < 100 * 2000


@pytest.mark.parametrize("change", ["more", "time", "gone"])
def test_a_changed_shard_is_indexed_anew_with_one_note(shards, count_tars, change):
    Shards(shards)
    if change == "more":
        shard(shards[1], [("c.mp4", b"C"), *((f"{k}.txt", b"") for k in range(20))])
    elif change == "time":
        os.utime(shards[1], ns=(0, 10**9))
    else:
        shards[1].unlink()
    count_tars.clear()
    rows = Shards(shards)
    assert len(rows) == {"more": 3, "time": 4, "gone": 2}[change] and "0.tar" in count_tars
    [place] = find_indexes(shards[0].parent)
    assert rows.notes[0] == f"{place}: made anew, for a shard has changed"
    count_tars.clear()
    again = Shards(shards)
    assert (
        not count_tars and again.notes == rows.notes[1:] and len(again.notes) == (change == "gone")
    )


def test_the_index_is_in_the_runs_folder_where_the_shards_cannot_be_written(
    shards, tmp_path, count_tars, monkeypatch
):
    def save(tensors, path):
        if path.parent == shards[0].parent:
            raise PermissionError(13, "Permission denied", str(path))
        save_safetensors(tensors, path)

    monkeypatch.setattr(index_module, "save_safetensors", save)
    source = open_data(shards[0].parent, out=str(tmp_path / "run"))
    [place] = find_indexes(tmp_path / "run")
    assert not find_indexes(shards[0].parent) and len(source.rows) == 4
    assert tell_rows(open_data(shards[0].parent, out=str(tmp_path / "run")).rows)
    assert len(count_tars) == 2
    with pytest.raises(PermissionError):
        Shards(shards, out=shards[0].parent)
    count_tars.clear()
    shutil.copy(place, shards[0].parent)  # an old one that cannot be replaced does no harm
    os.utime(shards[1], ns=(0, 10**9))
    assert len(Shards(shards, out=place.parent).notes) == 2  # both are old
    assert Shards(shards, out=place.parent).notes == [] and len(count_tars) == 2


DAMAGES = {
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "noise": lambda data: b"0123456789" * 30,
    "other": lambda data: save({"table": torch.zeros(4, 9)}),
    "columns": lambda data: data.replace(b"[4,9]", b"[9,4]"),
    "types": lambda data: data.replace(b'"I64","shape":[4,9]', b'"F64","shape":[4,9]'),
}


def save(tensors):
    with tempfile.TemporaryDirectory() as folder:
        save_safetensors(tensors, Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_one_line_that_names_it_and_the_cure(shards, damage):
    Shards(shards)
    [place] = find_indexes(shards[0].parent)
    whole = place.read_bytes()
    place.write_bytes(DAMAGES[damage](whole))
    assert place.read_bytes() != whole
    with pytest.raises(ValueError, match="; delete it, and it is made anew") as error:
        Shards(shards)
    assert str(error.value).startswith(str(place)) and "\n" not in str(error.value)
    place.unlink()
    assert len(Shards(shards)) == 4


def test_numbers_of_an_index_that_lie_cost_their_samples_and_no_more(shards, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    Shards(shards)
    [place] = find_indexes(shards[0].parent)
    index = {name: tensor.clone() for name, tensor in load_safetensors(place).items()}
    draw, good = np.random.default_rng(0), index["table"].clone()
    index["names"] = torch.tensor([*b"/../../secret.mp4"], dtype=torch.uint8)
    for _ in range(60):
        lies = torch.from_numpy(draw.choice([-(2**62), -513, -1, 0, 1, 512, 2**40, 2**62], (4, 9)))
        index["table"] = torch.where(torch.from_numpy(draw.random((4, 9)) < 0.5), lies, good)
        save_safetensors(index, place)
        rows = Shards(shards)
        for i in range(4):
            try:
                with decoding():
                    assert b"secret" not in read(rows[i])
            except BadSample:
                pass


def open_often(shards, times):
    for _ in range(times):
        os.utime(shards[1], ns=(0, time.time_ns()))  # so that the others' index is old
        assert len(Shards(shards)) == 4


def test_trainings_that_index_at_once_do_not_disturb_each_other(shards):
    context = multiprocessing.get_context("fork")
    trainings = [context.Process(target=open_often, args=(shards, 10)) for _ in range(3)]
    for training in trainings:
        training.start()
    for training in trainings:
        training.join(300)
        assert training.exitcode == 0
    [place] = find_indexes(shards[0].parent)
    assert sorted(os.listdir(place.parent)) == ["0.tar", "1.tar", place.name]


def test_who_indexes_can_show_how_far_it_is(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.mp4").touch()
    shard(tmp_path / "0.tar", [("a.mp4", b"")])
    table(tmp_path / "a.csv", "path,caption\na.mp4,x\nb.mp4,y\n")
    seen = Counter()

    def track(items, what, unit):
        for item in items:
            seen[what, unit] += 1
            yield item

    for name in (tmp_path / "inner", tmp_path / "0.tar", tmp_path / "a.csv"):
        config = make_config("paper", data=str(name), held_out=0)
        assert len(open_source(config, track)) == len(open_source(config))  # a tar: only once
    assert seen == {("indexing", "folder"): 1, ("indexing", "shard"): 1, ("indexing", "line"): 3}


# --------------------------------------------------------------------------------------------------
# Pictures


@pytest.fixture
def pictures(tmp_path):
    """One good picture among bad ones, in a folder."""
    noise = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    for name, content in {
        "cut.jpg": whole[:2000],
        "page.jpg": b"<html></html>",
        "empty.png": b"",
        "big.png": huge_png(9_000),
        "bomb.png": huge_png(20_000),
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_replaced_and_counted(pictures):
    source = Files(Folder(pictures, Picture), (32, 32))
    clips = [source.sample(n, "first") for n in range(18)]
    assert {clip.name for clip in clips} == {"good.jpg"}
    assert all(clip.frames.shape == (1, 3, 32, 32) for clip in clips)
    seen = sum((clip.counts for clip in clips), Counter())
    assert set(seen) == {"damaged", "not_a_picture", "too_large", "no_caption"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_random_crop_of_a_picture_keeps_its_height(pictures):
    source = Files(Folder(pictures, Picture), (60, 60), crop="random")
    assert len({source.sample(n, "first").frames.sum().item() for n in range(8)}) > 4


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_hostile_files_take_no_memory(pictures):
    """Read in a process that may have 2 GB of addresses, torch's own included."""
    member = tarfile.TarInfo("a.png")
    member.size = 2**40
    (pictures / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2000))
    code = f"""
import resource, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(HERE.parent)!r})
from tinydance.data.order import Files
from tinydance.data.index import Folder, Shards
from tinydance.data.rows import Picture
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
source = Files(Folder({str(pictures)!r}, Picture), (32, 32))
print(len([source.sample(n, "first") for n in range(12)]))
try:
    Shards([{str(pictures / "a.tar")!r}], Picture)
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.startswith("12\n") and "cut within member 1" in done.stdout, done.stderr


def test_a_source_of_pictures_gives_clips_of_one_frame(pictures):
    source = open_data("toyworld", 4, images=str(pictures), height=32, width=32)
    assert source.sample(0, "first").frames.shape == (1, 3, 32, 32)
    assert source.sample(0).frames.shape == (4, 3, 32, 32)
    assert "good" not in collect_words(source) and "circle" in collect_words(source)


# --------------------------------------------------------------------------------------------------
# Rows


@dataclass
class FrameFolder:
    """A video as a folder of numbered pictures, 4 a second."""

    folder: Path
    caption: str = "a film"
    what = "films"
    name = property(lambda self: self.folder.name)

    def read(self, choose_start, frames, fps, size, at):
        paths = sorted(self.folder.glob("*.png"))
        start = choose_start(len(paths) / 4)
        chosen = [paths[min(int((start + k / fps) * 4), len(paths) - 1)] for k in range(frames)]
        return torch.stack([read_image(path, size) for path in chosen])


class FrameFolders:
    kind, notes, missing_captions = FrameFolder, [], 0

    def __init__(self, root):
        self.where, self.folders = root, sorted(Path(root).iterdir())

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, i):
        return FrameFolder(self.folders[i])


def test_a_further_kind_of_data_is_an_index_and_a_row_and_nothing_else(tmp_path):
    for name, length in (("a", 8), ("b", 2)):
        (tmp_path / name).mkdir()
        for k in range(length):
            Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / name / f"{k:03d}.png")
    source = Files(FrameFolders(tmp_path), (8, 8), frames=4, starts="grid")
    assert describe_source(source) == [f"{tmp_path}: 2 films, 0 without caption"]
    [batch] = batches(source, 0, 1, 40, workers=1)
    shown = {name: set() for name in "ab"}
    for name, frames in zip(batch.names, batch.frames[:, :, 0, 0, 0].tolist(), strict=True):
        shown[name].add(tuple(frames))
    assert shown["a"] == {tuple(range(k, k + 4)) for k in range(5)}
    assert shown["b"] == {(0, 1, 1, 1)} and batch.counts == {"padded": 20}
