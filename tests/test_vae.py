"""The autoencoder against its reference, and what a video needs of it."""

import pytest
import torch
from reference import difference, fill, golden

from tinydance import vae as vae_module
from tinydance.vae import VAE, VAEConfig, holds_moments, to_frames, to_pixels
from tinydance.weights import pick
from tinydance.weights.load import load_weights
from tinydance.weights.safetensors import save_safetensors


def golden_vae():
    config, keys, tensors = golden("vae")
    return fill(VAE(VAEConfig(**pick(config, VAEConfig)))), keys, tensors


@torch.no_grad()
def test_encoder_and_decoder_answer_as_the_reference():
    vae, keys, tensors = golden_vae()
    assert {k: list(v.shape) for k, v in vae.state_dict().items()} == keys
    mean, logvar = vae.encode(tensors["x"])
    assert difference(mean, tensors["mean"]) < 1e-4
    assert difference(logvar, tensors["logvar"]) < 1e-4
    assert difference(vae.decode(tensors["z"]), tensors["decoded"]) < 1e-4


def test_stable_diffusions_size():
    with torch.device("meta"):
        vae = VAE()
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert len(vae.state_dict()) == 248 and vae.stride == 8


def test_a_video_is_encoded_frame_by_frame_and_scaled(monkeypatch):
    monkeypatch.setattr(vae_module, "FRAMES_AT_A_TIME", 3)  # 2 clips of 4: parts of 3, 3 and 2
    vae, _, _ = golden_vae()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 8, 8, generator=g)
    z, eps = vae.encode_video(x), torch.randn(2, 4, 4, 4, 4, generator=g)
    mean, logvar = vae.encode(x.flatten(0, 1))
    assert z.shape == (2, 4, 4, 4, 4)
    assert difference(z.flatten(0, 1), mean * 0.18215) < 1e-5
    drawn = (mean + (0.5 * logvar).exp() * eps.flatten(0, 1)) * 0.18215
    assert difference(vae.encode_video(x, eps).flatten(0, 1), drawn) < 1e-5
    slow = torch.stack([vae.decode(frame[None] / 0.18215)[0] for frame in z.flatten(0, 1)])
    assert difference(vae.decode_video(z).flatten(0, 1), slow) < 1e-4


def test_frames_become_pixels_and_pixels_the_same_frames():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    pixels = to_pixels(frames)
    assert (float(pixels.min()), float(pixels.max())) == (-1, 1)
    assert torch.equal(to_frames(pixels), frames)
    beyond = to_frames(torch.tensor([-1.5, 1.5, 0.003]))  # clamped and rounded
    assert beyond.dtype == torch.uint8 and beyond.tolist() == [0, 255, 128]


def test_what_a_source_gives_is_encoded_whether_it_is_frames_pixels_or_moments():
    """And of all three the same z_0 is drawn, with the noise that the caller draws."""
    vae, g = golden_vae()[0], torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8, generator=g)
    eps = torch.randn(2, 3, 4, 4, 4, generator=g)
    asked = []

    def draw_eps(*shape):
        asked.append(shape)
        return eps

    pixels = to_pixels(frames)
    mean, logvar = vae.encode(pixels.flatten(0, 1))
    scaled = torch.cat([mean, (0.5 * logvar).exp()], dim=1) * vae.config.scaling_factor
    moments = scaled.unflatten(0, (2, 3)).detach()
    z_0 = vae.encode_video(pixels, eps)
    assert torch.equal(vae.encode_frames(frames, draw_eps), z_0)
    assert torch.equal(vae.encode_frames(pixels, draw_eps), z_0)
    assert difference(vae.encode_frames(moments, draw_eps), z_0) < 1e-5
    assert asked == [(3, 4, 4, 4)] * 3
    assert holds_moments(moments) and not holds_moments(frames)
    assert torch.equal(vae.decode_frames(frames), pixels)
    assert torch.equal(vae.decode_frames(pixels), pixels)
    decoded = vae.decode_video(vae.encode_video(pixels)).clamp(-1, 1)
    assert difference(vae.decode_frames(moments), decoded) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(None, 0), (torch.float16, 5e-3)])
def test_a_vae_survives_its_folder(tmp_path, dtype, tolerance):
    vae, _, tensors = golden_vae()
    vae.save(tmp_path, dtype)
    again = VAE.from_folder(tmp_path).eval()
    assert again.config == vae.config and next(again.parameters()).dtype == torch.float32
    assert difference(again.decode(tensors["z"]), vae.decode(tensors["z"])) <= tolerance


@torch.no_grad()
def test_the_older_attention_names_load_too(tmp_path):
    vae, _, tensors = golden_vae()
    vae.save(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_weights(tmp_path)
    for new_name, old_name in old.items():
        new_name, old_name = f"attentions.0.{new_name}", f"attentions.0.{old_name}"
        weights = {k.replace(new_name, old_name): v.clone() for k, v in weights.items()}
    assert any("query" in k for k in weights)
    save_safetensors(weights, file)
    again = VAE.from_folder(tmp_path).eval()
    assert difference(again.decode(tensors["z"]), vae.decode(tensors["z"])) == 0
