"""Claims of `tinydance/video`: reading, writing, film strips. The videos are made here; each frame
shows its number as stripes."""

import struct
import weakref
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tinydance.model import PixelDance, Sample
from tinydance.sampling import sample_frames
from tinydance.toy import SHIPPED
from tinydance.vae import to_frames, to_pixels
from tinydance.video import read, write
from tinydance.video.read import (
    ATTEMPTS,
    BadSample,
    read_clip,
    read_image,
    read_pieces,
    read_seconds,
    resize_crop,
)
from tinydance.video.strips import film_strip, psnr, show_clips, show_images
from tinydance.video.write import SUFFIXES, check_output, read_metadata, save_video

SIZE = (48, 64)
TIMES = (0.0, 0.02, 0.59, 1.3, 1.81, 2.93)  # seconds; at 25 fps none is close to a new frame
H264 = {"g": "30", "bf": "3", "preset": "ultrafast"}
KINDS = {
    "mp4": {},
    "mov": {},
    "mkv": {},
    "ts": {},
    "avi": {"codec": "mpeg4", "options": {}},
    "webm": {"codec": "libvpx-vp9", "options": {"g": "30", "deadline": "realtime"}},
}


def numbered(n, size=SIZE):
    """A picture that says n: eight bits as upright stripes, in the lower half their negative."""
    height, width = size
    stripes = np.repeat([n >> k & 1 for k in range(8)], width // 8)
    above = np.broadcast_to(stripes, (height // 2, 8 * (width // 8)))
    picture = np.concatenate([above, 1 - above]) * 200 + 28
    picture = np.pad(picture, ((0, height % 2), (0, width % 8)), "edge")
    return np.repeat(picture[:, :, None], 3, 2).astype(np.uint8)


def number(frame):
    """The number in uint8 (3, h, w), or -1 where the picture is turned or torn."""
    light = frame.float().mean(0)
    h, w = light.shape
    cells = light[: h // 2 * 2, : w // 8 * 8].reshape(2, h // 2, 8, w // 8)
    cells = cells[:, 4:-4].mean((1, 3)) > 128
    return sum(1 << k for k in range(8) if cells[0, k]) if (cells[0] != cells[1]).all() else -1


def numbers(clip):
    return [number(frame) for frame in clip]


def make_video(
    path,
    frames=100,
    fps=25,
    times=None,
    codec="libx264",
    options=H264,
    size=SIZE,
    rotation=0,
    muxing={"movflags": "+faststart"},
    form=None,
):
    """A video in which frame k says k and comes at times[k] seconds; stored lying, if rotated."""
    with av.open(str(path), "w", format=form, options=muxing) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = size if rotation % 180 == 0 else size[::-1]
        stream.pix_fmt = "yuv420p" if size[0] % 2 == 0 else "yuv444p"
        tick = Fraction(1, fps) if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = tick
        if rotation:
            stream.set_display_rotation(rotation)
        for k in range(frames):
            picture = np.rot90(numbered(k, size), -rotation // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            frame.time_base = tick
            frame.pts = k if times is None else round(times[k] / tick)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def reason(path, start=0.0, frames=16, **how):
    with pytest.raises(BadSample) as error:
        read_clip(path, start, frames, 4, SIZE, **how)
    assert "\n" not in str(error.value)
    return error.value.reason


# --------------------------------------------------------------------------------------------------
# Reading clips


@pytest.mark.parametrize("suffix", KINDS)
def test_frames_are_those_on_screen_at_their_times(suffix, tmp_path):
    path = make_video(tmp_path / f"v.{suffix}", **KINDS[suffix])
    assert read_seconds(path) == pytest.approx(4.0, abs=0.05)
    for start in TIMES:
        clip = read_clip(path, start, 5, 4, SIZE)
        assert clip.shape == (5, 3, *SIZE) and clip.dtype == torch.uint8
        assert numbers(clip) == [int((start + k / 4) * 25) for k in range(5)]


def test_an_avi_with_b_frames_counts_them_in_the_order_they_are_shown(tmp_path):
    """It holds no times, and FFmpeg's guess of them goes back and forth. By order, each is as late
    as its decoder holds frames back: two, as ffprobe has it."""
    path = make_video(tmp_path / "v.avi")
    for start in TIMES[2:]:
        clip = read_clip(path, start, 5, 4, SIZE)
        assert numbers(clip) == [int((start + k / 4) * 25) - 2 for k in range(5)]


def test_an_mpeg_without_a_container_is_read(tmp_path):
    path = make_video(tmp_path / "v.mpg", codec="mpeg1video", options={}, form="mpeg1video")
    assert read_seconds(path) == pytest.approx(4.0, abs=0.05)
    for start in TIMES[2:]:
        clip = read_clip(path, start, 5, 4, SIZE)
        assert numbers(clip) == [int((start + k / 4) * 25) - 1 for k in range(5)]  # as above


def test_a_key_frame_that_needs_what_lies_before_it_is_not_trusted(tmp_path):
    """Two videos in one: the second's headers come once, at its start. Whoever jumps behind that
    decodes rubbish by the first's, as all players do in imageio's cockatoo."""
    options = {"preset": "medium", "bf": "0", "g": "25"}
    first = make_video(tmp_path / "a.mp4", 25, options=options)
    second = make_video(tmp_path / "b.mp4", options=options | {"x264-params": "cabac=0"})
    path = tmp_path / "v.mp4"
    with (
        av.open(str(first)) as a,
        av.open(str(second)) as b,
        av.open(str(path), "w") as container,
    ):
        stream = container.add_stream_from_template(a.streams.video[0])
        headers = bytes(b.streams.video[0].codec_context.extradata)[
            6:
        ]  # length, SPS, 1, length, PPS
        end = 2 + int.from_bytes(headers[:2])
        headers = [headers[2:end], headers[end + 3 :][: int.from_bytes(headers[end + 1 : end + 3])]]
        headers = b"".join(len(x).to_bytes(4) + x for x in headers)
        for n, packet in enumerate([*a.demux(video=0)][:25] + [*b.demux(video=0)][:100]):
            copy = av.Packet(headers + bytes(packet) if n == 25 else bytes(packet))
            copy.stream, copy.time_base, copy.is_keyframe = stream, Fraction(1, 25), n % 25 == 0
            copy.pts = copy.dts = n
            container.mux(copy)
    assert numbers(read_clip(path, 2.7, 5, 4, SIZE)) == [
        int((2.7 + k / 4) * 25) - 25 for k in range(5)
    ]


@pytest.mark.parametrize("attempts", [ATTEMPTS, ATTEMPTS[-1:]], ids=["all", "the last"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_time_counts_from_the_first_frame(suffix, attempts, tmp_path, monkeypatch):
    path = make_video(tmp_path / f"v.{suffix}", times=[5 + k / 25 for k in range(100)])
    monkeypatch.setattr(read, "ATTEMPTS", attempts)
    for start in TIMES:
        wanted = [int((start + k / 4) * 25) for k in range(5)]
        assert numbers(read_clip(path, start, 5, 4, SIZE)) == wanted


def test_each_attempt_gives_the_right_frames_or_too_few(tmp_path):
    gaps = np.random.default_rng(0).choice([0.02, 0.033, 0.3, 0.9], 60)
    varying = np.concatenate([[0], np.cumsum(gaps)])
    files = {
        "steady.mp4": ([k / 25 for k in range(100)], {0, 1, 2}),
        "varying.mp4": (varying, {1, 2}),
        "steady.ts": ([k / 25 for k in range(100)], {2}),
    }
    for name, (times, right) in files.items():
        path = make_video(tmp_path / name, frames=len(times), times=times)
        wanted = [np.searchsorted(times, 2.01 + k / 4 + 1e-6) - 1 for k in range(5)]
        for n, attempt in enumerate(ATTEMPTS):
            with read.open_video(path) as (container, stream):
                length = read.read_length(container, stream)
                moments = [2.01 + k / 4 for k in range(5)]
                frames = read.decode_shown(container, stream, moments, length, attempt)
                shown = [number(read.cut_out(frame, SIZE, read.CENTRE)) for frame in frames]
            assert shown == wanted[: len(shown)] and (len(shown) == 5) == (n in right), (name, n)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_varying_frame_rates_are_read_by_time(suffix, tmp_path):
    gaps = np.random.default_rng(0).choice([0.02, 0.033, 0.3, 0.9], 60)
    times = np.concatenate([[0], np.cumsum(gaps)])
    path = make_video(tmp_path / f"v.{suffix}", frames=61, times=times, **KINDS[suffix])
    for start in (0.0, 1.111, 4.567, 9.876):
        wanted = [np.searchsorted(times, start + k / 4 + 1e-6) - 1 for k in range(16)]
        assert numbers(read_clip(path, start, 16, 4, SIZE)) == wanted


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_phones_lying_video_is_stood_up(rotation, tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=30, rotation=rotation)
    assert numbers(read_clip(path, 0.1, 3, 4, SIZE)) == [2, 8, 15]


@pytest.mark.parametrize("size", [(49, 67), (31, 65)])
def test_odd_sizes_are_read(size, tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=30, size=size)
    assert numbers(read_clip(path, 0.1, 3, 4, size)) == [2, 8, 15]
    assert read_clip(path, 0.1, 3, 4, (20, 20)).shape == (3, 3, 20, 20)


@pytest.mark.parametrize("size", [(20, 20), (21, 20), (33, 8), (15, 40)])
@pytest.mark.parametrize("rotation", [0, 90])
def test_shrinking_takes_the_mean_of_the_area_and_keeps_the_middle(size, rotation, tmp_path):
    path = make_video(
        tmp_path / "v.mp4", frames=1, size=(82, 120), rotation=rotation, options={"crf": "0"}
    )
    with av.open(str(path)) as container:
        whole = next(container.decode(video=0)).to_ndarray(format="rgb24")
    exact = resize_crop(Image.fromarray(np.rot90(whole, rotation // 90)), size)
    shrunk = read_clip(path, 0, 1, 4, size)[0]
    assert shrunk.shape == exact.shape
    assert (shrunk.float() - exact.float()).abs().mean() < 12  # half a pixel's shift, other filters


@pytest.mark.parametrize("suffix", ["mp4", "webm", "ts"])
def test_a_short_video_is_padded_with_its_last_picture(suffix, tmp_path):
    path = make_video(tmp_path / f"v.{suffix}", frames=20, **KINDS[suffix])
    assert numbers(read_clip(path, 0.3, 6, 4, SIZE)) == [7, 13, 13, 13, 13, 13]
    assert reason(path, 1.5) == "too_short"


def test_a_video_of_one_frame_is_a_still(tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=1)
    assert numbers(read_clip(path, 0.0, 16, 4, SIZE)) == [0] * 16


def test_a_stream_that_states_no_length_is_measured(tmp_path):
    path = make_video(tmp_path / "v.mkv", muxing={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    assert read_seconds(path) == pytest.approx(4.0, abs=0.01)
    assert numbers(read_clip(path, 2.93, 6, 4, SIZE)) == [73, 79, 85, 92, 98, 98]


def test_the_last_frame_may_stay_for_seconds(tmp_path):
    path = make_video(tmp_path / "v.mkv", frames=3, times=[0, 0.1, 7.0])
    assert numbers(read_clip(path, 0.05, 5, 4, SIZE)) == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_a_truncated_video_only_the_good_part_is_used(suffix, tmp_path):
    whole = make_video(tmp_path / f"whole.{suffix}", frames=250).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    assert numbers(read_clip(path, 0.59, 5, 4, SIZE)) == [14, 21, 27, 33, 39]
    assert reason(path, 6.0) == reason(path, 3.0) == "damaged"


def test_what_is_no_video_says_what_it_is(tmp_path):
    make_video(tmp_path / "good.mp4")
    files = {
        "empty": b"",
        "garbage": bytes(range(256)) * 40,
        "html": b"<html>404</html>",
        "text": b"a red circle\n",
        "list": b"ffconcat version 1.0\nfile good.mp4\n",
        "hls": b"#EXTM3U\n#EXTINF:4,\ngood.mp4\n#EXT-X-ENDLIST\n",
        "headless": (tmp_path / "good.mp4").read_bytes().replace(b"moov", b"junk"),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        assert reason(tmp_path / f"{name}.mp4") == "not_a_video", name
    Image.new("RGB", (64, 48)).save(tmp_path / "png.mp4", "PNG")
    assert reason(tmp_path / "png.mp4") == "not_a_video"
    assert reason(make_sound(tmp_path / "sound.mp4")) == "no_video_stream"
    assert reason(tmp_path / "absent.mp4") == reason(tmp_path) == "missing"
    for address in ("http://127.0.0.1:9/good.mp4", f"concat:{tmp_path}/good.mp4"):
        with pytest.raises(BadSample, match="missing"):
            read_seconds(address)


def test_a_video_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = make_video(tmp_path / "v.mp4", frames=2)
    monkeypatch.setattr(read, "MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    monkeypatch.setattr(av.VideoFrame, "to_ndarray", None, raising=False)
    assert reason(path) == "too_large"


def test_a_stretch_of_a_video_shows_nothing_of_what_follows(tmp_path):
    path = make_video(tmp_path / "v.mp4")
    assert numbers(read_clip(path, 1.0, 6, 4, SIZE, end=2.0)) == [25, 31, 37, 43, 43, 43]


def test_the_start_may_be_chosen_when_the_length_is_known(tmp_path):
    path = make_video(tmp_path / "v.mp4")
    clip = read_clip(path, lambda seconds: seconds - 1, 2, 4, SIZE)
    assert numbers(clip) == [75, 81]


def test_an_open_file_is_read_as_its_path_is(tmp_path):
    path = make_video(tmp_path / "v.ts")  # read twice, for the seek goes too far
    with open(path, "rb") as file:
        file.seek(77)
        assert torch.equal(read_clip(file, 1.3, 5, 4, SIZE), read_clip(path, 1.3, 5, 4, SIZE))
        assert read_seconds(file) == read_seconds(path)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "ts"])
def test_a_whole_video_is_read_in_pieces(suffix, tmp_path):
    path = make_video(tmp_path / f"v.{suffix}", frames=110, **KINDS[suffix])  # 4.4 s
    pieces = list(read_pieces(path, 4, SIZE, at_once=7))
    assert [len(piece) for piece in pieces] == [7, 7, 4]
    assert numbers(torch.cat(pieces)) == [int(k / 4 * 25) for k in range(18)]
    some = torch.cat(list(read_pieces(path, 4, SIZE, 1, 2.5)))
    assert numbers(some) == [25, 31, 37, 43, 50, 56]
    with pytest.raises(BadSample, match="too_short"):
        list(read_pieces(path, 4, SIZE, start=5))


def test_of_a_truncated_video_the_good_pieces_come_first(tmp_path):
    whole = make_video(tmp_path / "whole.mp4", frames=250).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    pieces = read_pieces(tmp_path / "cut.mp4", 4, SIZE, at_once=5)
    assert numbers(next(pieces)) == [0, 6, 12, 18, 25]
    with pytest.raises(BadSample, match="damaged"):
        list(pieces)


def test_damage_anywhere_gives_frames_or_bad_video_and_nothing_else(tmp_path):
    whole = make_video(tmp_path / "good.mp4").read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 30):
            data[place] = rng.integers(256)
        (tmp_path / "bad.mp4").write_bytes(data[: rng.integers(1, len(data) + 1)])
        try:
            assert read_clip(tmp_path / "bad.mp4", rng.random() * 3, 3, 4, SIZE).shape[0] == 3
        except BadSample:
            pass


# --------------------------------------------------------------------------------------------------
# Pictures


def test_pixels_and_frames_are_each_others_inverse():
    frames = torch.arange(256, dtype=torch.uint8).expand(2, 3, 256)
    pixels = to_pixels(frames)
    assert pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(to_frames(pixels), frames)
    assert to_frames(torch.tensor([-9.0, 9.0, 0.001])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("size", [(64, 64), (48, 64), (64, 20), (7, 9)])
def test_resize_crop_keeps_the_middle_and_the_shape(size):
    y, x = np.mgrid[-60:60, -100:100] + 0.5
    disc = Image.fromarray(np.uint8(255 * (x**2 + y**2 < 30**2))).convert("RGB")
    out = resize_crop(disc, size)[0].float() / 255
    scale = min(120 / size[0], 200 / size[1])
    ys, xs = torch.meshgrid(*(torch.arange(n) + 0.5 - n / 2 for n in size), indexing="ij")
    assert (out * xs).sum().abs() / out.sum() < 0.05 and (out * ys).sum().abs() / out.sum() < 0.05
    if min(size) * scale > 60:
        assert out.sum() * scale**2 == pytest.approx(np.pi * 30**2, rel=0.05)


def test_shrinking_averages_and_the_same_size_changes_nothing():
    checker = np.indices((128, 128)).sum(0) % 2 * 255
    picture = Image.fromarray(np.repeat(checker[:, :, None], 3, 2).astype(np.uint8))
    assert (resize_crop(picture, (16, 16)).float() - 127.5).abs().max() < 3
    assert torch.equal(resize_crop(picture, (128, 128))[0], torch.from_numpy(checker).byte())


def corners(picture):
    """The colours of the four corners, row by row, from uint8 (3, H, W)."""
    return [tuple(int(v) for v in picture[:, y, x]) for y in (2, -3) for x in (2, -3)]


RED, LIME, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def four_corners():
    picture = Image.new("RGB", (64, 64))
    for k, colour in enumerate((RED, LIME, BLUE, WHITE)):
        picture.paste(colour, (k % 2 * 32, k // 2 * 32, k % 2 * 32 + 32, k // 2 * 32 + 32))
    return picture


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "noname"])
def test_pictures_of_each_kind_are_read(name, tmp_path):
    exact = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 100}}.get(name, {})
    four_corners().save(tmp_path / name, None if "." in name else "PNG", **exact)
    read = read_image(tmp_path / name, (32, 32))
    assert read.shape == (3, 32, 32) and read.dtype == torch.uint8
    assert np.abs(np.subtract(corners(read), (RED, LIME, BLUE, WHITE))).max() < 4


def test_exif_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    four_corners().save(tmp_path / "a.png", exif=exif)
    assert corners(read_image(tmp_path / "a.png", (64, 64))) == [BLUE, RED, WHITE, LIME]


def test_alpha_lies_over_white(tmp_path):
    picture = four_corners().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 32, 32))
    picture.save(tmp_path / "rgba.png")
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("LA", (64, 64), (0, 0)).save(tmp_path / "gray.png")
    assert corners(read_image(tmp_path / "rgba.png", (64, 64)))[0] == WHITE
    assert corners(read_image(tmp_path / "palette.png", (64, 64)))[0] == WHITE
    assert corners(read_image(tmp_path / "gray.png", (64, 64)))[0] == WHITE


def test_gray_sixteen_bit_and_cmyk_become_rgb(tmp_path):
    Image.new("L", (64, 64), 100).save(tmp_path / "gray.png")
    Image.fromarray(np.full((64, 64), 100 * 257, np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (64, 64), 1).save(tmp_path / "bits.png")
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    for name, colour in {"gray.png": (100,) * 3, "deep.png": (100,) * 3, "bits.png": WHITE}.items():
        assert corners(read_image(tmp_path / name, (16, 16)))[0] == colour
    assert np.abs(np.subtract(corners(read_image(tmp_path / "cmyk.jpg", (16, 16))), RED)).max() < 5


def test_of_an_animation_the_first_picture_is_read(tmp_path):
    Image.new("RGB", (64, 64), RED).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (64, 64), BLUE)]
    )
    assert corners(read_image(tmp_path / "a.gif", (16, 16)))[0] == RED


def huge_png(side):
    """A PNG of side x side pixels, one bit each, in a few kilobytes."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    rows = zlib.compress(bytes(side // 8 + 2) * side, 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_refused_in_one_line_with_the_way_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    files = {
        "text.png": b"not a picture\n",
        "empty.png": b"",
        "page.jpg": b"<html></html>",
        "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:2000],
        "big.png": huge_png(9_000),
        "bigger.png": huge_png(10_000),
        "bomb.png": huge_png(20_000),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (64, 64)).save(tmp_path / "other.tiff")
    advice = {
        "text.png": "convert",
        "empty.png": "convert",
        "page.jpg": "convert",
        "cut.jpg": "damaged",
        "big.png": "megapixels",
        "bigger.png": "megapixels",
        "bomb.png": "megapixels",
        "other.tiff": "convert",
        "absent.png": "no such file",
        ".": "no such file",
    }
    for name, words in advice.items():
        with pytest.raises(ValueError, match=words) as error:
            read_image(tmp_path / name, (32, 32))
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_very_long_picture_costs_no_memory(tmp_path):
    Image.new("L", (1, 60_000), 77).save(tmp_path / "a.png")
    assert corners(read_image(tmp_path / "a.png", (256, 256))) == [(77, 77, 77)] * 4


# --------------------------------------------------------------------------------------------------
# Writing


def striped(count=6, size=SIZE):
    return torch.from_numpy(np.stack([numbered(k, size) for k in range(count)])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("fps", [4, 7.5, 30000 / 1001])
def test_an_mp4_reads_back_and_plays_everywhere(fps, tmp_path):
    path = save_video(striped(), tmp_path / "new" / "clip.mp4", fps=fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert [frame.time for frame in frames] == pytest.approx([k / fps for k in range(6)])
        assert (stream.codec_context.name, frames[0].format.name) == ("h264", "yuv420p")
        assert (frames[0].height, frames[0].width) == (288, 384)  # six times, to 256 or more
    assert numbers(read_clip(path, 0, 6, fps, SIZE)) == list(range(6))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_odd_sizes_are_made_even_by_one_repeated_line(tmp_path):
    path = save_video(striped(size=(31, 65)), tmp_path / "clip.mp4")  # nine times as large
    with av.open(path) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (586, 280)
    assert numbers(read_clip(path, 0, 6, 4, (280, 586))[:, :, :279, :585]) == list(range(6))


def test_without_x264_the_mp4_is_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    path = save_video(striped(), tmp_path / "clip.mp4")
    assert numbers(read_clip(path, 0, 6, 4, SIZE)) == list(range(6))


@pytest.mark.parametrize("fps, shown", [(4, [250] * 6), (24, [40, 40, 40, 50, 40, 40])])
def test_a_gif_keeps_time_and_loops(fps, shown, tmp_path):
    with Image.open(save_video(striped(), tmp_path / "clip.gif", fps=fps)) as gif:
        assert gif.n_frames == 6 and gif.size == (384, 288) and gif.info["loop"] == 0
        for k, milliseconds in enumerate(shown):
            gif.seek(k)
            assert gif.info["duration"] == milliseconds


def test_an_animated_png_keeps_every_pixel(tmp_path):
    frames = torch.randint(0, 256, (5, 3, 9, 11), dtype=torch.uint8)
    with Image.open(save_video(frames, tmp_path / "clip.apng")) as apng:
        for k in range(5):
            apng.seek(k)
            assert apng.info["duration"] == 250
            assert np.array_equal(np.array(apng.convert("RGB")), frames[k].permute(1, 2, 0))


def test_a_png_is_the_film_strip(tmp_path):
    with Image.open(save_video(striped(), tmp_path / "clip.png")) as strip:
        assert np.array_equal(np.array(strip), np.array(film_strip([striped()])))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_file_is_replaced_unless_allowed(suffix, tmp_path):
    path = tmp_path / f"clip{suffix}"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_video(striped(), path)
    assert path.read_text() == "mine"
    save_video(striped(), path, overwrite=True)
    assert path.stat().st_size > 100 and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    def full(pictures, path, rate, comment):
        next(pictures)
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    path = tmp_path / "clip.mp4"
    path.write_text("mine")
    monkeypatch.setattr(write, "write_mp4", full)
    with pytest.raises(OSError, match="No space"):
        save_video(striped(), path, overwrite=True)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


NAMES = [f"clip{suffix}" for suffix in SUFFIXES] + ["clip/"]


@pytest.mark.parametrize("name", NAMES)
def test_clips_that_stop_half_way_leave_no_file(name, tmp_path):
    def stops():
        yield striped(16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_video(stops(), f"{tmp_path}/{name}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_keeps_how_it_was_made(name, tmp_path):
    metadata = {"prompt": 'a "gr\u00fcn" circle', "seed": 3, "shots": [{"tau": 8}] * 40}
    save_video(striped(), f"{tmp_path}/{name}", metadata=metadata)
    assert read_metadata(f"{tmp_path}/{name}") == metadata
    save_video(striped(), f"{tmp_path}/plain_{name}")
    assert read_metadata(f"{tmp_path}/plain_{name}") == {}


def test_metadata_that_is_not_ours_is_refused_in_one_line_with_the_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.gif", comment=b"Created with GIMP")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (tmp_path / "words.txt").write_text("words")
    for name in ("foreign.gif", "list.mp4", "words.txt", "absent.mp4"):
        with pytest.raises(ValueError, match=name) as error:
            read_metadata(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_clips_that_come_one_by_one_are_one_video(name, tmp_path):
    whole = striped(9)
    save_video(whole, f"{tmp_path}/a_{name}")
    save_video(iter([whole[:4], whole[4:5], whole[5:]]), f"{tmp_path}/b_{name}")
    a, b = tmp_path / f"a_{name}", tmp_path / f"b_{name}"
    if name.endswith(".png"):
        with Image.open(b) as strip:  # a row for each clip
            assert np.array_equal(strip, film_strip([whole[:4], whole[4:5], whole[5:]]))
    elif name.endswith("/"):
        for k, frame in enumerate(whole):
            with Image.open(b / f"{k:06d}.png") as picture:
                assert np.array_equal(picture, frame.permute(1, 2, 0))
    else:
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("name", ["clip.mp4", "clip/"])
def test_a_long_video_never_holds_more_than_a_clip_in_memory(name, tmp_path):
    alive = []

    def clips():
        for k in range(8):
            assert not any(ref() is not None for ref in alive)
            clip = striped(3) + k
            alive.append(weakref.ref(clip))
            yield clip
            del clip

    save_video(clips(), f"{tmp_path}/{name}")
    assert len(alive) == 8


def test_a_folder_is_replaced_picture_by_picture_and_keeps_what_is_not_a_frame(tmp_path):
    out = f"{tmp_path}/clip/"
    save_video(striped(6), out)
    (tmp_path / "clip" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_video(striped(2), out)
    save_video(striped(2), out, overwrite=True)
    names = sorted(path.name for path in (tmp_path / "clip").iterdir())
    assert names == ["000000.png", "000001.png", "notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_names_that_cannot_be_used_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken.json").write_text("{}")
    (tmp_path / "folder.mp4").mkdir()
    for name, words in {
        "file/clip.mp4": "is a file, not a folder",
        "file/": "exists already, as a file",
        "folder.mp4": "exists already, as a folder",
        "taken/": "taken.json exists already",
        "clip.webm": "cannot write '.webm'",
        "folder": "cannot write ''",
    }.items():
        with pytest.raises((FileExistsError, ValueError), match=words):
            check_output(f"{tmp_path}/{name}")
    check_output(f"{tmp_path}/folder.mp4/")  # it is empty
    check_output(f"{tmp_path}/taken/", overwrite=True)
    check_output(f"{tmp_path}/new/folder/clip.gif")


def test_captions_lose_their_accents_and_not_their_letters():
    clip = striped(2, (96, 96))
    strips = [np.array(film_strip([clip], [caption])) for caption in ("gr\u00fcn \u00e9", "grun e")]
    assert np.array_equal(*strips)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    for frames, name, fps, words in [
        (striped(), "a.webm", 4, ".mp4 or .gif or .apng or .png"),
        (striped(), "a", 4, ".mp4"),
        (to_pixels(striped()), "a.mp4", 4, "to_frames"),
        (striped()[0], "a.mp4", 4, "f, 3, H"),
        (striped()[:0], "a.mp4", 4, "f, 3, H"),
        (striped(), "a.mp4", 0, "fps"),
    ]:
        with pytest.raises(ValueError, match=words):
            save_video(frames, tmp_path / name, fps=fps)
    assert not list(tmp_path.iterdir())


def test_a_film_strip_has_each_frame_in_its_place():
    clips = [torch.randint(0, 256, (8, 3, 100, 120), dtype=torch.uint8) for _ in range(2)]
    strip = np.array(film_strip(clips, every=2))
    assert strip.shape == (12 + 2 * (100 + 8 + 12), 12 + 4 * 122 - 2 + 12, 3)
    for row in range(2):
        for column in range(4):
            y, x = 12 + 4 + row * 120, 12 + column * 122
            tile = torch.from_numpy(strip[y : y + 100, x : x + 120]).permute(2, 0, 1)
            assert torch.equal(tile, clips[row][2 * column])
            strip[y : y + 100, x : x + 120] = 255
    assert (strip == 255).all()


def test_instructions_stand_beside_the_row_in_blue_and_orange():
    clip, picture = striped(4, (96, 96)), torch.full((3, 96, 96), 7, dtype=torch.uint8)
    plain = film_strip([clip, clip])
    strip = film_strip([clip, clip], first=picture, last=[None, picture])
    assert strip.width == plain.width + 2 * (96 + 8 + 12) and strip.height == plain.height
    middle, right = 12 + 4 + 48, strip.width - 12 - 1
    assert strip.getpixel((12, middle)) == (0, 114, 178)
    assert strip.getpixel((16, middle)) == (7, 7, 7)
    assert strip.getpixel((right, middle)) == WHITE
    assert strip.getpixel((right, middle + 116)) == (201, 80, 0)


def test_captions_get_a_line_and_are_cut_where_the_row_ends():
    clip = striped(2, (96, 96))
    plain = film_strip([clip, clip])
    long = "\u4e2d\n\u6587 \U0001f600" + " very" * 300 + " long"
    strip = film_strip([clip, clip], ["a circle", long])
    assert strip.size == (plain.width, plain.height + 2 * 22)
    margin = np.array(strip)[:, -12:]
    assert (margin == 255).all() and (np.array(strip)[12:30, 12:80] < 200).any()
    film_strip([clip], ["narrow"], scale=0.05)
    with pytest.raises(ValueError):
        film_strip([clip, clip], ["one caption"])


# --------------------------------------------------------------------------------------------------
# Strips of a model


def test_decibels_count_the_peak_from_black_to_white():
    x = 2 * torch.rand(2, 3, 8, 8) - 1
    error = to_frames(x).double() - to_frames(-x).double()
    grey_levels = 10 * torch.log10(255**2 / (error**2).mean())
    assert psnr(to_pixels(to_frames(x)), to_pixels(to_frames(-x))) == pytest.approx(
        float(grey_levels), abs=1e-3
    )
    assert psnr(torch.ones(4), torch.full((4,), 1.7)) == float("inf")  # clamped: a white is a white


@pytest.fixture(scope="module")
def toy():
    model = PixelDance.from_folder(SHIPPED)
    model.settings = replace(model.settings, height=32, width=32, steps=1, guidance=1.0)
    return model


def held_out(count=2):
    frames = torch.randint(0, 256, (count, 16, 3, 32, 32), dtype=torch.uint8)
    return [Sample(clip, f"a red circle, number {n}", f"clip {n}") for n, clip in enumerate(frames)]


def sampled(model, samples, *pictures, **changes):
    """What a model makes of the captions of some samples, as frames."""
    captions = [sample.caption for sample in samples]
    return to_frames(sample_frames(model, captions, *pictures, **changes))


def test_a_strip_of_images_has_a_row_of_eight_for_each_caption(toy):
    samples = held_out(3)
    strip = show_images(toy, samples, seed=4)
    frames = sampled(toy, samples * 8, frames=1, seed=4)[:, 0]
    captions = [sample.caption for sample in samples]
    assert np.array_equal(strip, film_strip([frames[n::3] for n in range(3)], captions))


def test_a_strip_of_clips_has_three_rows_for_each_caption(toy):
    samples = held_out()
    frames = torch.stack([sample.frames for sample in samples])
    first, last = to_pixels(frames[:, 0]), to_pixels(frames[:, -1])
    made = {
        "text": sampled(toy, samples, seed=4, tau=1.0),
        "text, first": sampled(toy, samples, first, seed=4, tau=1.0),
        "text, first, last": sampled(toy, samples, first, last, seed=4, tau=1.0),
    }
    rows = [clips[n] for n in range(2) for clips in made.values()]
    titles = [f"{sample.caption} ({name})" for sample in samples for name in made]
    firsts = [x for clip in frames for x in (None, clip[0], clip[0])]
    lasts = [x for clip in frames for x in (None, None, clip[-1])]
    strip = show_clips(toy, samples, seed=4, tau=1.0)
    assert np.array_equal(strip, film_strip(rows, titles, first=firsts, last=lasts))


def test_cached_latents_are_shown_as_pixels(toy):
    samples = held_out()
    z_0 = toy.vae.encode_video(to_pixels(torch.stack([sample.frames for sample in samples])))
    moments = torch.cat([z_0, torch.zeros_like(z_0)], dim=2).half()  # the standard deviation is 0
    cached = [sample._replace(frames=m) for sample, m in zip(samples, moments)]
    decoded = to_frames(toy.vae.decode_video(z_0.half().float()))
    online = [sample._replace(frames=frames) for sample, frames in zip(samples, decoded)]
    one, other = (np.asarray(show_clips(toy, x, seed=1), dtype=int) for x in (cached, online))
    with torch.autocast("cpu", torch.bfloat16):  # as a training draws them where bfloat16 is fast
        assert np.asarray(show_clips(toy, cached, seed=1)).shape == one.shape
    assert one.shape == other.shape and np.abs(one - other).mean() < 0.1  # pixels are not rounded
