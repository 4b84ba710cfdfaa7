"""Depth for every frame, and attention that looks back so far: Make-Your-Video's way."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import difference, fill, tiny_model, tiny_unet
from tiny_training import command

import sample
import train
from tinydance.config import make_config
from tinydance.data.depth import WithDepth, read_depth
from tinydance.data.open import open_source
from tinydance.toy.evaluate import keep_looks
from tinydance.toy.source import ToyWorld
from tinydance.toy.world import World, render, render_depth, sample_scene
from tinydance.unet import Attention, is_temporal
from tinydance.variants import make_your_video
from tinydance.variants.make_your_video import PAGES, CausalAttention, convert, open_model
from tinydance.video.read import read_clip
from tinydance.video.write import save_video
from tinydance.weights import load_weights


@pytest.fixture
def given():
    g = torch.Generator().manual_seed(0)
    z, c_text = torch.randn(2, 6, 9, 8, 8, generator=g), torch.randn(2, 24, 16, generator=g)
    return z, torch.tensor([10, 900]), c_text


# --------------------------------------------------------------------------------- the new network
@pytest.mark.parametrize("reach, frames", [(0, 6), (3, 1)])
def test_a_converted_network_is_what_it_was_whatever_the_depth(reach, frames, given):
    """Bit for bit; one that is masked as a network of pictures."""
    z, t, c_text = given
    unet = fill(tiny_unet())
    new, z = convert(unet, reach).eval(), z[:, :frames]
    assert torch.equal(new(z, t, c_text), unet(z[:, :, :8], t, c_text))
    assert new.state_dict().keys() == unet.state_dict().keys()


def test_a_frame_asks_itself_and_those_before_it_so_far_back():
    like = fill(Attention(8, 2, 4))
    x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
    got = fill(CausalAttention(like, reach=3))(x)
    for i in range(7):
        seen = x[:, max(0, i - 2) : i + 1]
        slow = like(x[:, i : i + 1], seen)
        assert difference(got[:, i : i + 1], slow) < 1e-5


def test_however_long_the_row_a_frame_is_asked_by_those_alone_that_it_is_near():
    """The rest of the row may be anything: 64 frames are rows as long as those of the training."""
    unet = fill(convert(fill(tiny_unet()), 4))
    for layers in unet.modules():
        for convolution in getattr(layers, "temp_convs", []):  # they and their norms look around
            torch.nn.init.zeros_(convolution.conv4[-1].weight)
    for transformer in unet.modules():
        if isinstance(transformer, make_your_video.TemporalTransformer):
            transformer.norm = torch.nn.Identity()
    g = torch.Generator().manual_seed(2)
    z, c_text = torch.randn(1, 40, 9, 8, 8, generator=g), torch.randn(1, 24, 16, generator=g)
    other, t = z.clone(), torch.tensor([500])
    other[:, 20] += 1
    with torch.no_grad():
        moved = (unet(z, t, c_text) - unet(other, t, c_text)).abs().flatten(2).amax(2)[0]
    rows = sum(isinstance(m, make_your_video.TemporalTransformer) for m in unet.modules())
    assert moved[:20].max() == 0 < moved[20]
    assert moved[20 + 2 * rows * 3 + 1 :].numel() == 0 or moved[20 + 2 * rows * 3 + 1 :].max() == 0


def test_what_was_frozen_is():
    unet = fill(tiny_unet())
    for name, p in unet.named_parameters():
        p.requires_grad_(is_temporal(name) or name.startswith("conv_in"))
    new = convert(unet, 16)
    assert [p.requires_grad for p in new.parameters()] == [
        p.requires_grad for p in unet.parameters()
    ]


# ----------------------------------------------------------------------------------------- the data
def test_the_toy_world_renders_its_depth():
    """The object is nearer than the ground, the ground than the sky, and lower ground is nearer."""
    scene = keep_looks(sample_scene(np.random.default_rng([0, 3])))
    depth, frames = render_depth(scene, World()), render(scene, World())
    assert depth.shape == (16, 1, 64, 64) == (16, 1, *frames.shape[2:]) and depth.dtype == "float32"
    assert depth.min() == -1 and depth.max() <= 1
    left = depth[0, 0, :, 0]  # where no object is
    assert (np.diff(left) >= 0).all() and left[0] == -1 and -0.1 < left[-1] <= 0
    gone = replace(scene.mover, radius=1e-3)
    empty = render(replace(scene, mover=gone, end=gone), World())
    is_object = np.abs(frames.astype(int) - empty).max(1) > 60
    assert depth[:, 0][is_object].mean() > 0.8 and depth[:, 0][~is_object].mean() < -0.5


def test_samples_of_the_toy_world_come_with_their_depth():
    source = WithDepth(ToyWorld(seed=4), "", (8, 8))
    clip, first = source.sample(5), source.sample(5, "first")
    scene = sample_scene(np.random.default_rng([4, 5]))
    exact = torch.from_numpy(render_depth(scene)).unflatten(-1, (8, 8)).unflatten(-3, (8, 8))
    assert difference(clip.instructions["depth"], exact.mean((-1, -3))) < 1e-6
    assert torch.equal(first.instructions["depth"], clip.instructions["depth"][:1])
    assert torch.equal(clip.frames, ToyWorld(seed=4).sample(5).frames)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Videos whose frames count, and of the same names depth, which counts down."""
    monkeypatch.chdir(tmp_path)
    light = torch.arange(0, 240, 10, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    for name in ("a.mp4", "b/c.mp4"):
        save_video(light, f"clips/{name}", fps=8)
        save_video(230 - light, f"depth/{name}", fps=8)
    return "clips", "depth"


def test_depth_is_read_at_the_times_of_the_frames(folders):
    config = make_config("toy", data="clips", frames=4, height=16, width=16, held_out=0)
    source = WithDepth(open_source(config), "depth", (4, 4))
    source = pickle.loads(pickle.dumps(source))  # as worker processes get it, on a Mac
    begins = set()
    for n in range(6):
        frames, _, _, _, instructions = source.sample(n)
        light, depth = frames.float().mean((1, 2, 3)), (instructions["depth"] + 1) * 127.5
        assert frames.shape == (4, 3, 16, 16) and depth.shape == (4, 1, 4, 4)
        assert difference(light + depth.mean((1, 2, 3)), torch.full((4,), 230.0)) < 6
        begins.add(round(float(light[0])))
    assert len(begins) > 2


def test_what_has_no_depth_is_told(folders, tmp_path):
    config = make_config("toy", data="clips", frames=4, height=16, width=16, held_out=0)
    with pytest.raises(ValueError, match="depth is ''; give the folder"):
        WithDepth(open_source(config), "")
    (tmp_path / "depth/a.mp4").unlink()
    (tmp_path / "depth/b/c.mp4").unlink()
    with pytest.raises(ValueError, match="20 missing"):
        WithDepth(open_source(config), "depth").sample(0)
    with pytest.raises(ValueError, match="nowhere.mp4: missing"):
        read_depth("nowhere.mp4", tiny_model().settings, (8, 8))


# -------------------------------------------------------------------------------- the command line
def test_a_folder_is_converted_trained_saved_loaded_and_sampled(folders, monkeypatch, capsys):
    tiny_model(timestep_spacing="trailing", prediction_type="v_prediction").save("model")
    given = "--init model --data clips --held_out 0 --frames 4 --height 16 --width 16 --workers 0"
    given += " --batch 2 --image_batch 2 --lr 0.1 --warmup 0 --steps 2 --device cpu --dtype float32"
    given += " --variant make_your_video --depth depth --train temporal --out run"
    for steps in (10, 20):  # it goes on
        command(monkeypatch, train, *given.split(), "--video_steps", steps)
    made, before = open_model("run/video/model"), load_weights("model/unet")
    after = made.unet.state_dict()
    weight = before["conv_in.weight"]
    before["conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight[:, :1])], dim=1)
    moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert after["conv_in.weight"][:, 8].any() and {"conv_in.weight", "conv_in.bias"} <= moved
    assert all(is_temporal(name) for name in moved - {"conv_in.weight", "conv_in.bias"})
    assert made.unet.transformer_in.transformer_blocks[0].attn1.reach == 16
    told = "--frames 9 --device cpu --dtype float32 --model run/video/model"
    for name in ("a", "b/c"):
        words = "a red circle", "--depth", f"depth/{name}.mp4", *told.split()
        command(monkeypatch, sample, *words, "--out", f"{name[0]}.apng")
    save_video(torch.zeros(9, 3, 16, 16, dtype=torch.uint8), "far.mp4", fps=4)
    command(
        monkeypatch,
        sample,
        "a red circle",
        "--depth",
        "far.mp4",
        *told.split(),
        "--out",
        "far.apng",
    )
    clips = [read_clip(f"{name}.apng", 0, 9, 4, (16, 16)) for name in ("a", "b", "far")]
    assert torch.equal(clips[0], clips[1]) and difference(clips[0], clips[2]) > 0
    command(monkeypatch, make_your_video, "depth", "model", "both")
    assert type(open_model("both").unet.transformer_in.transformer_blocks[0].attn1) is Attention
    assert torch.equal(open_model("both").unet.conv_in.weight, before["conv_in.weight"])


@pytest.mark.parametrize(
    "script, words, message",
    [
        (train, "--depth x", "--depth is for --variant make_your_video or depth"),
        (train, "--variant depth --stage vae", "is for the video stage alone"),
        (train, "--variant depth --lora 4", "one of them, is for the video stage"),
        (train, "--variant depth --data clips", "depth is ''; give the folder"),
        (sample, "red --depth depth/a.mp4", "takes no --depth"),
        (sample, "red --model deep", "give --depth VIDEO"),
        (sample, "--story story.toml --model deep", "give --depth VIDEO"),
        (sample, "red --model deep --depth depth/a.mp4 --clips 2", "--frames"),
        (sample, "red --model deep --depth nowhere.mp4", "nowhere.mp4: missing"),
    ],
)
def test_what_does_not_fit_is_one_line(script, words, message, monkeypatch, capsys, folders):
    model = tiny_model()
    model.unet = convert(model.unet, PAGES["depth"])
    model.save("deep")
    Path("deep/depth.json").write_text('{"reach": 0}')
    tiny_model().save("plain")
    words += " --model plain" if script is sample and "--model" not in words else ""
    words += " --init plain --prediction_type epsilon" if "--data" in words else ""
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, script, *words.split(), "--device", "cpu")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error.splitlines()[-1]
