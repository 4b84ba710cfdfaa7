"""The pseudo-3D UNet against the field's references, and the promises its design rests on."""

from dataclasses import replace

import pytest
import torch
from reference import TINY, difference, fill, golden, read_shapes, tiny_model, tiny_unet

from tinydance.config import make_config
from tinydance.model import Batch, PixelDance
from tinydance.sampling import sample_frames
from tinydance.training import DiffusionLoss
from tinydance.unet import (
    MAX_ATTENTION_BATCH,
    Attention,
    TimeConv,
    UNet,
    UNetConfig,
    attention,
    from_time_rows,
    is_temporal,
    to_time_rows,
)
from tinydance.weights.diffusers import read_unet_config
from tinydance.weights.files import write_json
from tinydance.weights.safetensors import save_safetensors


def inputs(b=2, f=3, h=4, w=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(b, f, 8, h, w, generator=g)
    return z, torch.randint(0, 1000, (b,), generator=g), torch.randn(b, 7, 16, generator=g)


@torch.no_grad()
def test_a_clip_is_denoised_as_by_modelscopes_layout():
    config, keys, golden_ = golden("unet3d")
    unet = fill(UNet(UNetConfig(**read_unet_config(config))))
    assert {k: list(v.shape) for k, v in unet.state_dict().items()} == keys
    eps = unet(golden_["x_bcfhw"].transpose(1, 2), golden_["t"], golden_["c_text"])
    assert difference(eps.transpose(1, 2), golden_["eps_bcfhw"]) < 1e-4


@torch.no_grad()
def test_one_frame_is_denoised_as_by_stable_diffusion():
    config, keys, golden_ = golden("unet2d")
    unet = fill(UNet(UNetConfig(**read_unet_config(config) | {"in_channels": 4})))
    spatial = {k: list(v.shape) for k, v in unet.state_dict().items() if not is_temporal(k)}
    assert spatial == keys
    eps = unet(golden_["x"][:, None], golden_["t"], golden_["c_text"])
    assert difference(eps[:, 0], golden_["eps"]) < 1e-4


def test_the_papers_network_has_the_names_and_shapes_of_the_public_checkpoints():
    with torch.device("meta"):
        unet = UNet()
    ours = {k: list(v.shape) for k, v in unet.state_dict().items()}
    assert sum(p.numel() for p in unet.parameters()) == 1_411_245_380
    for name, count in (("sd21", 686), ("ms", 1480)):
        theirs = read_shapes(name)
        assert theirs.pop("conv_in.weight") == [320, 4, 3, 3]  # ours sees c_image as well
        assert len(theirs) == count - 1
        assert all(ours[k] == shape for k, shape in theirs.items())
    assert {k for k in ours if not is_temporal(k)} == set(read_shapes("sd21"))
    assert set(ours) == set(read_shapes("ms"))


def test_both_kinds_of_config_file_mean_the_same_network():
    two_d = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    }
    three_d = two_d | {
        "in_channels": 8,
        "attention_head_dim": 64,
        "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    }
    fields = read_unet_config(two_d)
    assert fields == read_unet_config(three_d) == read_unet_config(three_d | {"in_channels": 4})
    assert UNetConfig(**fields) == UNetConfig()  # the defaults are the paper's network
    eight_heads = read_unet_config(two_d | {"attention_head_dim": 8})  # Stable Diffusion 1.x
    assert eight_heads == fields | {"attention_head_dim": 40, "num_attention_heads": 8}


@torch.no_grad()
def test_at_initialisation_a_clip_is_its_frames_apart():
    unet, (z, t, c_text) = tiny_unet(), inputs()
    apart = torch.cat([unet(z[:, k : k + 1], t, c_text) for k in range(3)], dim=1)
    assert difference(unet(z, t, c_text), apart) < 1e-5


@torch.no_grad()
def test_at_initialisation_the_condition_is_not_seen():
    unet, (z, t, c_text) = tiny_unet(), inputs()
    blind = z.clone()
    blind[:, :, 4:] = 0
    assert difference(unet(z, t, c_text), unet(blind, t, c_text)) < 1e-6


@torch.no_grad()
def test_the_frames_of_a_trained_network_see_each_other_in_both_directions():
    unet, (z, t, c_text) = fill(tiny_unet()), inputs()
    for changed, watched in ((0, 2), (2, 0)):
        other = z.clone()
        other[:, changed] += 1
        moved = (unet(z, t, c_text) - unet(other, t, c_text))[:, watched].abs().max()
        assert float(moved) > 1e-4


@torch.no_grad()
def test_clips_of_a_batch_do_not_mix():
    unet, (z, t, c_text) = fill(tiny_unet()), inputs()
    alone = torch.cat([unet(z[k : k + 1], t[k : k + 1], c_text[k : k + 1]) for k in range(2)])
    assert difference(unet(z, t, c_text), alone) < 1e-4


def test_an_image_step_gives_temporal_layers_no_gradient_and_adamw_leaves_them():
    unet, (z, t, c_text) = fill(tiny_unet()), inputs(f=1)
    unet.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.1, weight_decay=0.5)
    before = {k: p.clone() for k, p in unet.named_parameters()}
    unet(z, t, c_text).square().mean().backward()
    for name, p in unet.named_parameters():
        assert (p.grad is None) == is_temporal(name), name
    optimizer.step()
    for k, p in unet.named_parameters():
        assert torch.equal(p, before[k]) == is_temporal(k), k


def test_gradient_checkpointing_changes_no_gradient():
    z, t, c_text = inputs()
    grads = []
    for switch in (False, True):
        unet = fill(tiny_unet()).train()
        unet.set_gradient_checkpointing(switch)
        unet(z, t, c_text).square().mean().backward()
        grads.append([p.grad for p in unet.parameters()])
    assert max(difference(a, b) for a, b in zip(*grads)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_time_convolution_is_a_conv3d(memory_format):
    conv = fill(TimeConv(6))
    x = torch.randn(2 * 5, 6, 4, 3, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory_format)
    ours = from_time_rows(conv(to_time_rows(x, 5)), x)
    video = x.unflatten(0, (2, 5)).transpose(1, 2)  # b c f h w
    slow = torch.nn.functional.conv3d(video, conv.weight, conv.bias, padding=(1, 0, 0))
    assert difference(ours, slow.transpose(1, 2).flatten(0, 1)) < 1e-5


@torch.no_grad()
def test_attention_is_softmax_of_scaled_products():
    module = fill(Attention(8, heads=2, head_dim=4, context_dim=6)).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=g, dtype=torch.float64)
    context = torch.randn(3, 7, 6, generator=g, dtype=torch.float64)
    slow = torch.zeros_like(x)
    for n in range(3):
        heads = []
        for head in range(2):
            rows = slice(4 * head, 4 * head + 4)
            q = x[n] @ module.to_q.weight[rows].T
            k, v = (context[n] @ m.weight[rows].T for m in (module.to_k, module.to_v))
            weights = torch.exp(q @ k.T / 2)
            heads.append(weights / weights.sum(1, keepdim=True) @ v)
        slow[n] = module.to_out[0](torch.cat(heads, dim=1))
    assert difference(module(x, context), slow) < 1e-10


def test_a_large_attention_batch_is_cut_for_cuda(monkeypatch):
    """64 clips at 256x256 are 65,536 places: one more than CUDA's kernels take."""
    sizes = []

    def kernel(q, k, v):
        sizes.append(len(q))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    q = torch.empty(64 * 32 * 32, 1, 16, 2, device="meta")
    assert attention(q, q, q).shape == q.shape
    assert sizes == [MAX_ATTENTION_BATCH, 1]


@torch.no_grad()
def test_a_unet_survives_its_folder(tmp_path):
    unet, (z, t, c_text) = fill(tiny_unet(attention_levels=(False, True))), inputs()
    unet.save(tmp_path)
    again = UNet.from_folder(tmp_path).eval()
    assert again.config == unet.config
    assert difference(again(z, t, c_text), unet(z, t, c_text)) == 0


@torch.no_grad()
def test_a_four_channel_image_model_starts_a_video_model(tmp_path):
    """What happens to Stable Diffusion's folder: 4 channels in, no temporal layer."""
    config, keys, golden_ = golden("unet2d")
    four_channels = UNetConfig(**read_unet_config(config) | {"in_channels": 4})
    weights = fill(UNet(four_channels)).state_dict()
    spatial = {k: v for k, v in weights.items() if not is_temporal(k)}
    write_json(tmp_path / "config.json", config)
    save_safetensors(spatial, tmp_path / "diffusion_pytorch_model.safetensors")
    unet = UNet.from_folder(tmp_path).eval()
    assert unet.config.in_channels == 8
    x = golden_["x"][:, None].repeat(1, 2, 1, 1, 1)  # a clip of two frames, and a condition
    z = torch.cat([x, torch.ones_like(x)], dim=2)
    eps = unet(z, golden_["t"], golden_["c_text"])
    for k in range(2):
        assert difference(eps[:, k], golden_["eps"]) < 1e-4


@torch.no_grad()
def test_a_four_channel_video_model_does_not_see_its_new_channels_until_it_is_trained(tmp_path):
    """What happens to ModelScope's folder: 4 channels in, temporal layers that are not zero."""
    four, (z, t, c_text) = fill(tiny_unet(in_channels=4)), inputs()
    save_as_published(four, tmp_path, "3D")
    unet = UNet.from_folder(tmp_path).eval()
    assert unet.config == replace(four.config, in_channels=8)
    assert difference(unet(z, t, c_text), four(z[:, :, :4], t, c_text)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("channels", [4, 8])
def test_channels_that_a_folder_does_not_have_start_at_zero(tmp_path, channels):
    saved = fill(tiny_unet(in_channels=channels))
    saved.save(tmp_path)
    unet = UNet.from_folder(tmp_path, in_channels=12)
    assert unet.config == replace(saved.config, in_channels=12)
    weight = unet.conv_in.weight
    assert torch.equal(weight[:, :channels], saved.conv_in.weight)
    assert int(weight[:, channels:].count_nonzero()) == 0 and weight.shape[1] == 12


def save_as_published(unet, folder, kind):
    """A folder as diffusers writes it: 4 channels in; for kind 2D no temporal layers, either."""
    config = {
        "_class_name": f"UNet{kind}ConditionModel",
        "_diffusers_version": "0.15.0",
        "act_fn": "silu",
        "attention_head_dim": 8 if kind == "3D" else [2, 4],  # a width, or numbers of heads
        "block_out_channels": [16, 32],
        "cross_attention_dim": 16,
        "down_block_types": [f"CrossAttnDownBlock{kind}"] * 2,
        "downsample_padding": 1,
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 4,
        "out_channels": 4,
        "sample_size": 8,
        "up_block_types": [f"CrossAttnUpBlock{kind}"] * 2,
    }
    config |= {"use_linear_projection": True} if kind == "2D" else {"temporal_dropout": 0.0}
    weights = {k: v for k, v in unet.state_dict().items() if kind == "3D" or not is_temporal(k)}
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :4].clone()
    write_json(folder / "config.json", config)
    save_safetensors(weights, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", ["2D", "3D"])
def test_published_folders_of_both_kinds_become_networks_that_train_and_sample(tmp_path, kind):
    published = tiny_model()
    published.save(tmp_path)
    save_as_published(published.unet, tmp_path / "unet", kind)
    model = PixelDance.from_folder(tmp_path)
    assert model.unet.config.in_channels == 8
    new = model.unet.conv_in.weight[:, 4:]
    assert int(new.count_nonzero()) == 0

    objective = DiffusionLoss(model, make_config("toy", eta=0.0))
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-2)
    pixels = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    objective(Batch(0, pixels, ["a red circle", "blue"], [0, 1], ["", ""]))["loss"].backward()
    optimizer.step()
    assert int(new.count_nonzero()) > 0  # the first step teaches it to look at c_image
    frames = sample_frames(model, ["a red circle"], torch.zeros(1, 3, 16, 16))
    assert frames.shape == (1, 4, 3, 16, 16) and bool(torch.isfinite(frames).all())


def test_sizes_that_the_network_cannot_halve_are_refused():
    z, t, c_text = inputs(h=5)
    with pytest.raises(ValueError, match="latents of 5x4 do not divide by 2"):
        tiny_unet()(z, t, c_text)


def test_shapes_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="must be a multiple of attention_head_dim"):
        tiny_unet(attention_head_dim=7)
    with pytest.raises(ValueError, match="attention_levels"):
        replace(TINY["unet"], attention_levels=(True, True, False))
