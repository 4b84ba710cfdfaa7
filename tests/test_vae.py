"""The autoencoder against its reference, and what a video needs of it."""

import pytest
import torch
from reference import difference, fill, golden

from tinydance import vae as vae_module
from tinydance.toy.losses import ReconstructionLoss
from tinydance.vae import VAE
from tinydance.weights.load import load_weights
from tinydance.weights.safetensors import save_safetensors


def golden_vae():
    config, keys, tensors = golden("vae")
    names = ("block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor")
    return fill(VAE(**{name: config[name] for name in names})), keys, tensors


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
        weights = {k.replace(f"attentions.0.{new_name}", f"attentions.0.{old_name}"): v.clone()
                   for k, v in weights.items()}  # fmt: skip
    assert any("query" in k for k in weights)
    save_safetensors(weights, file)
    again = VAE.from_folder(tmp_path).eval()
    assert difference(again.decode(tensors["z"]), vae.decode(tensors["z"])) == 0


@torch.no_grad()
def test_whitened_latents_are_even_and_give_the_same_pictures(tmp_path):
    vae, _, _ = golden_vae()
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = vae.decode_video(vae.encode_video(x[None]))
    spread = vae.encode(x)[1].exp().mean((0, 2, 3))
    mean = vae.encode(x)[0].transpose(0, 1).flatten(1).double()
    vae.whiten(x)
    z = vae.encode_video(x[None])[0].transpose(0, 1).flatten(1).double()
    assert difference(z.cov(), torch.eye(4)) < 1e-3 and z.mean(1).abs().max() < 1e-3
    assert difference(vae.decode_video(vae.encode_video(x[None])), before) < 1e-4
    # The map M has M cov M^T = 1; the new variances are the diagonal of M diag(spread) M^T.
    m = torch.linalg.lstsq((mean - mean.mean(1, keepdim=True)).T, z.T).solution.T
    expected = (m @ torch.diag(spread.double()) @ m.T).diagonal()
    assert difference(vae.encode(x)[1].exp().mean((0, 2, 3)) / expected, torch.ones(4)) < 1e-3
    vae.save(tmp_path)
    again = VAE.from_folder(tmp_path)
    assert difference(again.decode_video(again.encode_video(x[None])), before) < 1e-4


def test_the_reconstruction_loss_is_its_formula():
    vae, _, _ = golden_vae()
    x = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = ReconstructionLoss(vae, seed=0)
    loss.KL_WEIGHT = 0.0
    plain = float(loss(x, ["", ""], [0, 1]).detach())
    loss.KL_WEIGHT = 1.0
    mean, logvar = vae.encode(x.flatten(0, 1))
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    assert abs(float(loss(x, ["", ""], [0, 1]).detach()) - plain - float(kl.mean().detach())) < 1e-4


def test_the_reconstruction_loss_is_a_function_of_the_samples_numbers():
    vae, _, _ = golden_vae()
    x = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = ReconstructionLoss(vae, seed=0)
    first = loss(x, ["", ""], [5, 6])
    assert torch.equal(first, loss(x, ["", ""], [5, 6]))
    assert not torch.equal(first, loss(x, ["", ""], [5, 7]))
