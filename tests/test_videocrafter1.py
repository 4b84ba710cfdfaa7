"""Pictures as tokens among the words: VideoCrafter1's way, and with c_image DynamiCrafter's."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import difference, fill, read_shapes, tiny_model, tiny_unet
from tiny_training import command

import sample
import train
from tinydance.clip import ImageConfig
from tinydance.model import PixelDance
from tinydance.sampling import sample_latents
from tinydance.unet import UNetConfig
from tinydance.variants import videocrafter1
from tinydance.variants.videocrafter1 import (
    PAGES,
    TOKENS,
    Eye,
    Resampler,
    TextAndImageAttention,
    VideoCrafter1,
    attach,
    convert,
    is_new,
    open_model,
)
from tinydance.video.read import read_clip
from tinydance.video.write import save_video
from tinydance.weights import load_weights

EYE = ImageConfig(24, 48, 1, 2, image_size=16, patch_size=4)


@pytest.fixture
def given():
    g = torch.Generator().manual_seed(0)
    z, c_text = torch.randn(2, 3, 8, 8, 8, generator=g), torch.randn(2, 24, 16, generator=g)
    return z, torch.tensor([10, 900]), c_text


@pytest.fixture(scope="module")
def converted():
    """A whole model that looks at pictures, of which nothing is at its zero start."""
    model, eye = tiny_model(), fill(Eye(EYE))
    model.unet = fill(convert(model.unet, 24, beside=True))
    return attach(model, eye), eye


# --------------------------------------------------------------------------------- the new network
@pytest.mark.parametrize("variant", PAGES)
def test_a_converted_network_is_what_it_was(variant, given):
    """Bit for bit, while a picture is looked at. Without c_image, what it was for an image model,
    whose weights for c_image are zero."""
    unet = fill(tiny_unet())
    if not PAGES[variant]:
        unet.conv_in.weight.data[:, 4:] = 0
    new = convert(unet, 24, PAGES[variant]).eval()
    new.look = lambda f_first: torch.ones(len(f_first), 5, 24)
    assert new.conv_in.weight.shape[1] == (8 if PAGES[variant] else 4)
    assert torch.equal(new(*given), unet(*given))
    assert {name for name in new.state_dict() if is_new(name)} == (
        new.state_dict().keys() - unet.state_dict().keys()
    )


def test_the_resampler_is_ip_adapters():
    """diffusers' IPAdapterPlusImageProjection 0.42.1, with our weights by its names."""
    tensors = np.load(Path(__file__).parent / "golden" / "resampler.npz")
    tokens = fill(Resampler(12, 16, depth=2))(torch.from_numpy(tensors["patches"]))
    assert difference(tokens, torch.from_numpy(tensors["tokens"])) < 1e-5


def test_the_same_queries_ask_text_and_picture_apart():
    like = fill(tiny_unet()).mid_block.attentions[0].transformer_blocks[0].attn2
    both = fill(TextAndImageAttention(deepcopy(like)))
    g = torch.Generator().manual_seed(1)
    width = both.to_q.in_features
    x = torch.randn(1, 6, width, generator=g)
    text, image = torch.randn(1, 5, 16, generator=g), torch.randn(1, TOKENS, 16, generator=g)

    def ask(tokens, to_k, to_v):
        q, k, v = (both.split_heads(y) for y in (both.to_q(x), to_k(tokens), to_v(tokens)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    slow = ask(text, both.to_k, both.to_v) + ask(image, both.to_k_ip, both.to_v_ip)
    fast = both(x, torch.cat([text, image], dim=1))
    assert difference(fast, both.to_out[0](slow)) < 1e-5
    nothing = both(x, torch.cat([text, torch.zeros_like(image)], dim=1))
    assert difference(nothing, both.to_out[0](ask(text, both.to_k, both.to_v))) < 1e-6


def test_the_frame_rate_is_added_to_the_time(given):
    new = fill(convert(tiny_unet(), 24))
    four = new(*given)
    new.time_embedding.fps = 8.0
    assert difference(new(*given), four) > 1e-3
    x = torch.randn(2, new.time_embedding.linear_1.in_features)
    embedded = new.time_embedding(x)
    angles = 8.0 * torch.exp(-np.log(10_000) * torch.arange(x.shape[1] // 2) / (x.shape[1] // 2))
    rate = new.time_embedding.fps_embedding(torch.cat([angles.cos(), angles.sin()])[None].float())
    own = new.time_embedding
    assert difference(embedded, own.linear_2(F.silu(own.linear_1(x))) + rate) < 1e-5


def test_the_picture_in_the_first_slot_is_looked_at_and_nothing_is_where_none_is(converted):
    model, eye = converted
    unet, g = model.unet, torch.Generator().manual_seed(2)
    z, c_text = torch.randn(3, 4, 8, 8, 8, generator=g), torch.randn(3, 24, 16, generator=g)
    z[1, 0, 4:] = 0  # nothing is said in the second clip
    given = z, torch.tensor([5, 5, 5]), c_text
    with torch.no_grad():
        seen = unet(*given)
        blind = deepcopy(unet)
        blind.look = None
        unseen = blind(*given)
        pixels = model.vae.decode_video(z[:1, :1, 4:])[:, 0]
        patches = model.unet.look(z[:1, 0, 4:])
    assert difference(seen[1], unseen[1]) < 1e-5 < difference(seen[0], unseen[0])
    assert torch.equal(patches, eye(pixels)) and patches.shape == (1, 17, 24)


@pytest.mark.parametrize("names, asks_pictures", [("videocrafter2", 0), ("dynamicrafter512", 32)])
def test_published_networks_fit_without_a_rest(names, asks_pictures):
    """By name and shape, at full size, in LDM's spelling. Only the Resampler, which is no part of
    the published UNet, stays as it was initialised; of VideoCrafter2 also what asks pictures."""
    shapes = read_shapes(names)
    with torch.device("meta"):
        tensors = {f"model.diffusion_model.{k}": torch.empty(x) for k, x in shapes.items()}
        channels = shapes["input_blocks.0.0.weight"][1]
        network = VideoCrafter1(UNetConfig(in_channels=channels))
        network.load(dict(tensors))
        assert sum("_ip." in name for name in shapes) == asks_pictures
        resampler = sum(name.startswith("image_proj") for name in network.state_dict())
        assert len(network.state_dict()) == len(shapes) + resampler + 32 - asks_pictures
        tensors["model.diffusion_model.more"] = torch.empty(1)
        with pytest.raises(ValueError, match="1 unexpected .more."):
            network.load(tensors)


# -------------------------------------------------------------------------------- the command line
def test_a_folder_is_converted_trained_saved_loaded_and_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model(timestep_spacing="trailing", prediction_type="v_prediction").save("model")
    fill(Eye(EYE)).save("eye")
    frames = torch.randint(256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    save_video(frames.to(torch.uint8), "clips/a.mp4")
    given = "--init model --data clips --held_out 0 --frames 4 --height 16 --width 16 --workers 0"
    given += " --batch 2 --image_batch 2 --lr 0.01 --warmup 0 --steps 2 --device cpu --dtype float32"
    given += " --variant videocrafter1 --out run"
    for steps in (10, 20):  # it goes on
        words = *given.split(), "--image_encoder", "eye", "--video_steps", steps
        command(monkeypatch, train, *words)
    made = open_model("run/video/model")
    before = load_weights("model/unet")["conv_in.weight"]
    assert made.unet.conv_in.weight.shape[1] == 4 == before.shape[1] - 4
    new = {name: p for name, p in made.unet.named_parameters() if is_new(name)}
    assert all(p.any() for name, p in new.items() if name.endswith("to_v_ip.weight"))
    told = "--first eye.png --frames 4 --device cpu --dtype float32 --model run/video/model"
    Image.new("RGB", (16, 16), "red").save("eye.png")
    command(monkeypatch, sample, "a red circle", *told.split(), "--out", "red.apng")
    Image.new("RGB", (16, 16), "blue").save("eye.png")
    command(monkeypatch, sample, "a red circle", *told.split(), "--out", "blue.apng")
    assert difference(*(read_clip(f"{x}.apng", 0, 4, 4, (16, 16)) for x in ("red", "blue"))) > 0
    command(monkeypatch, videocrafter1, "dynamicrafter", "model", "eye", "both")
    both, plain = open_model("both"), PixelDance.from_folder("model")
    f_first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    clips = [sample_latents(x, ["a red circle"], {"first": f_first}) for x in (both, plain)]
    assert torch.equal(*clips)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--variant videocrafter1", "--variant and --image_encoder belong together"),
        ("--variant videocrafter2 --image_encoder x", "invalid choice: 'videocrafter2'"),
        ("--variant videocrafter1 --image_encoder x --stage vae", "is for the video stage alone"),
        ("--variant videocrafter1 --image_encoder nowhere", "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, train, *words.split())
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error.splitlines()[-1]
