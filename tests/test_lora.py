"""Thin matrices beside the attentions': trained alone, kept apart, merged."""

from copy import deepcopy

import pytest
import torch
from reference import difference, fill, tiny_model, tiny_unet
from tiny_training import command

import train
from tinydance.model import PixelDance
from tinydance.unet import Attention
from tinydance.variants import lora
from tinydance.variants.lora import LoRA, add_lora, apply_lora, lora_weights, merge_lora
from tinydance.video.write import save_video
from tinydance.weights import load_weights
from tinydance.weights.safetensors import save_safetensors


@pytest.fixture
def clip():
    g = torch.Generator().manual_seed(0)
    z, c_text = torch.randn(2, 3, 8, 8, 8, generator=g), torch.randn(2, 24, 16, generator=g)
    return z, torch.tensor([10, 900]), c_text


def moved_lora(rank=3):
    """A network, and the same with thin matrices that do something."""
    unet = fill(tiny_unet())
    changed = add_lora(deepcopy(unet), rank)
    with torch.no_grad():
        for module in changed.modules():
            if isinstance(module, LoRA):
                module.lora_B.weight.normal_(std=0.3)
    return unet, changed


def test_at_the_start_the_network_is_what_it_was_and_only_thin_matrices_are_trained(clip):
    unet = fill(tiny_unet())
    before = unet(*clip)
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    add_lora(unet, 3)
    assert torch.equal(unet(*clip), before)
    unet(*clip).square().mean().backward()
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * len(attentions) and all(".lora_" in name for name in trained)
    assert all(3 in p.shape for p in trained.values())
    assert all(p.grad is None for name, p in unet.named_parameters() if name not in trained)
    assert all(p.grad.any() for name, p in trained.items() if "lora_B" in name)


def test_it_adds_b_a_x_to_a_linear_layer():
    base, x = torch.nn.Linear(5, 4), torch.randn(2, 5)
    layer = LoRA(base, 2)
    layer.lora_B.weight.data.normal_()
    slow = base.weight @ x[1] + base.bias + layer.lora_B.weight @ (layer.lora_A.weight @ x[1])
    assert difference(layer(x)[1], slow) < 1e-6


def test_merged_it_is_a_plain_network_that_computes_the_same(clip):
    unet, changed = moved_lora()
    made = changed(*clip)
    assert difference(made, unet(*clip)) > 1e-2
    merge_lora(changed)
    assert changed.state_dict().keys() == unet.state_dict().keys()
    assert difference(changed(*clip), made) < 1e-5


def test_its_file_is_added_to_the_model_that_it_was_trained_on(clip):
    unet, changed = moved_lora()
    weights = {name: p.detach().clone() for name, p in lora_weights(changed).items()}
    assert "unet.mid_block.temp_attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight" in (
        weights
    )
    made = changed(*clip)
    assert difference(apply_lora(deepcopy(unet), weights)(*clip), made) < 1e-5
    doubled = weights | {
        f"{name.rpartition('.lora_')[0]}.alpha": torch.tensor(6.0) for name in weights
    }
    for p in (p for name, p in lora_weights(changed).items() if "lora_B" in name):
        p.data *= 2  # alpha / r
    assert difference(apply_lora(deepcopy(unet), doubled)(*clip), changed(*clip)) < 1e-5


def test_what_does_not_fit_changes_nothing(clip):
    unet, changed = moved_lora()
    weights = {name: p.detach() for name, p in lora_weights(changed).items()}
    name = next(name for name in weights if "lora_B" in name)
    before = unet(*clip)
    wrong = {"another shape": weights | {name: torch.zeros(7, 3)}, "nothing": {}}
    wrong["half"] = {key: x for key, x in weights.items() if key != name}
    wrong["more"] = weights | {"unet.conv_in.weight": torch.zeros(1)}
    for tensors in wrong.values():
        with pytest.raises(ValueError, match="does not fit this network|no file of a LoRA"):
            apply_lora(unet, tensors)
    assert torch.equal(unet(*clip), before)
    with pytest.raises(ValueError, match="rank of LoRA is 0"):
        add_lora(unet, 0)


def test_it_is_trained_kept_and_added_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model(timestep_spacing="trailing", prediction_type="v_prediction").save("model")
    frames = torch.randint(256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    save_video(frames.to(torch.uint8), "clips/a.mp4")
    given = "--init model --data clips --held_out 0 --lora 2 --frames 4 --height 16 --width 16"
    given += " --workers 0"
    given += " --batch 2 --image_batch 2 --lr 0.1 --warmup 0 --steps 2 --device cpu --dtype float32"
    for steps in (2, 3):  # it goes on
        command(monkeypatch, train, *given.split(), "--video_steps", steps, "--out", "run")
    assert "of them trained" in capsys.readouterr().out
    made = "run/video/model"
    weights = load_weights(f"{made}/{lora.FILE}")
    assert all(".lora_" in name for name in weights)
    assert any(x.any() for name, x in weights.items() if "lora_B" in name)
    command(monkeypatch, lora, "model", f"{made}/{lora.FILE}", "added")
    first, second = (PixelDance.from_folder(path).unet.state_dict() for path in (made, "added"))
    assert all(difference(first[name], second[name]) < 1e-6 for name in first)
    with pytest.raises(SystemExit):
        command(monkeypatch, lora, "model", f"{made}/{lora.FILE}", "added")
    assert "added is there already" in capsys.readouterr().err
    words = [*given.replace("--lora 2", "--lora 3").split(), "--video_steps", 4, "--out", "run"]
    with pytest.raises(SystemExit):
        command(monkeypatch, train, *words)
    assert "other weights than this network's: use another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(monkeypatch, train, "--lora", 2, "--stage", "vae")
    assert "is for the video stage alone" in capsys.readouterr().err
    save_safetensors({"x": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(SystemExit):
        command(monkeypatch, lora, "model", "other.safetensors", "more")
    assert "no file of a LoRA: it has x" in capsys.readouterr().err
