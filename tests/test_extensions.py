"""What a page outside the core can add without a change in it: instructions, samplers, presets.

Training and sampling ask the network in one place, and whatever they are told travels there by
name. So an addition reaches both, and neither can drift from the other.
"""

import ast
from dataclasses import replace

import pytest
import torch
from reference import HERE, TINY, Spy, difference, fill, tiny_model
from tiny_training import FIELDS

from tinydance import conditioning, training
from tinydance.config import PRESETS, make_config
from tinydance.model import Batch, PixelDance
from tinydance.sampling import guided_denoiser, sample, sample_latents
from tinydance.schedulers import SAMPLERS, ddim_step
from tinydance.training import DiffusionLoss
from tinydance.unet import UNet

ROOT = HERE.parent


def make_deep_model():
    """A tiny model whose network takes a depth map behind c_image: 4 + 4 + 1 channels."""
    model = tiny_model(prediction_type="v_prediction")
    model.unet = Spy(fill(UNet(replace(TINY["unet"], in_channels=9))))
    return model


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_frames(b, f):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (b, f, 3, 16, 16), dtype=torch.uint8, generator=g)


# ---- the one place -------------------------------------------------------------------------------


def test_only_one_function_of_the_package_calls_the_network():
    callers = []
    for path in [*(ROOT / "tinydance").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            called = [ast.unparse(call).removesuffix(".forward").split(".")[-1] for call in calls]
            callers += [(path.name, function.name)] * called.count("unet")
    assert callers == [("conditioning.py", "ask")]


def test_training_and_sampling_ask_the_network_the_same_for_the_same_inputs(monkeypatch):
    model, asked = make_deep_model(), []

    def ask(unet, *given):
        asked.append(given)
        return conditioning.ask(unet, *given)

    monkeypatch.setattr(training, "ask", ask)
    depth = latents(2, 4, 1, 8, 8)
    batch = Batch(0, make_frames(2, 4), ["a red circle", "blue"], [3, 4], ["", ""])
    batch = batch._replace(instructions={"depth": depth})
    DiffusionLoss(model, make_config("toy", **FIELDS))(batch)
    [(z_t, t, c_text, conditions)] = asked
    for k in range(2):  # a clip alone, as its diffusion time is its own
        row = {name: condition[k : k + 1] for name, condition in conditions.items()}
        text = c_text[k : k + 1]
        denoise = guided_denoiser(model.unet, text, text, row, {}, tau=1, guidance=1)
        denoise(z_t[k : k + 1], int(t[k]), 0)
        for trained, sampled in zip(model.unet.seen[0], model.unet.seen[-1], strict=True):
            assert torch.equal(trained[k : k + 1], sampled) and trained.dtype == sampled.dtype


# ---- a further instruction -----------------------------------------------------------------------


def test_a_further_instruction_reaches_the_network_when_sampling():
    """Both branches of the guidance see it, and the first frame made from text sees its first."""
    model, depth = make_deep_model(), latents(2, 4, 1, 8, 8)
    zs = list(sample(model, ["a red circle", "blue"], {"depth": depth}))
    shapes = [tuple(z.shape[:3]) for z, _, _ in model.unet.seen]
    assert shapes == [(4, 1, 9)] * 4 + [(4, 4, 9)] * 4 and zs[-1].shape == (2, 4, 4, 8, 8)
    for z, _, _ in model.unet.seen:
        f = z.shape[1]
        assert torch.equal(z[:, :, 8:], torch.cat([depth, depth])[:, :f])
    nearer = sample_latents(model, ["a red circle", "blue"], {"depth": depth + 1})
    assert difference(zs[-1], nearer) > 1e-4


def test_a_further_instruction_stays_where_the_last_frame_goes():
    model, depth = make_deep_model(), latents(1, 4, 1, 8, 8)
    instructions = {"first": latents(1, 4, 8, 8), "last": latents(1, 4, 8, 8), "depth": depth}
    sample_latents(model, ["a red circle"], instructions, replace(model.settings, tau=1))
    for i, (z, _, _) in enumerate(model.unet.seen):
        assert bool((z[:, -1, 4:8] != 0).any()) == (i < 1)
        assert torch.equal(z[:, :, 8:], torch.cat([depth, depth]))


@pytest.mark.parametrize("f", [4, 1])
def test_a_further_instruction_reaches_the_network_when_training(f):
    model, depth = make_deep_model(), latents(3, 4, 1, 8, 8)
    batch = Batch(0, make_frames(3, f), ["a", "red", "blue"], [0, 1, 2], ["x", "y", "z"])
    batch = batch._replace(instructions={"depth": depth}).part(slice(1, 3), "cpu")
    assert (batch.captions, batch.sample_ids, batch.names) == (["red", "blue"], [1, 2], ["y", "z"])
    loss = DiffusionLoss(model, make_config("toy", **FIELDS))(batch)["loss"]
    [(z, _, _)] = model.unet.seen
    assert z.shape == (2, f, 9, 8, 8) and bool(torch.isfinite(loss))
    assert torch.equal(z[:, :, 8:], depth[1:, :f])


# ---- a sampler -----------------------------------------------------------------------------------


def two_step(denoise, z_T, schedule, settings, noise):
    """Adams and Bashforth's second order: DDIM along a line through the last two answers."""
    z_t, before = z_T, None
    for i, (t, t_prev) in enumerate(schedule.timesteps(settings.steps)):
        out = denoise(z_t, t, i)
        z_t = ddim_step(z_t, out if i == 0 else 1.5 * out - 0.5 * before, t, t_prev, schedule)
        before = out
        yield z_t


def test_a_sampler_in_the_table_is_used_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setitem(SAMPLERS, "two_step", two_step)
    model = tiny_model()
    first = {"first": latents(1, 4, 8, 8)}
    plain = list(sample(model, ["a red circle"], first))
    model.settings = replace(model.settings, sampler="two_step")
    zs = list(sample(model, ["a red circle"], first))
    assert torch.equal(zs[0], plain[0]) and difference(zs[-1], plain[-1]) > 1e-4 and len(zs) == 4
    model.save(tmp_path)
    again = PixelDance.from_folder(tmp_path)
    assert torch.equal(sample_latents(again, ["a red circle"], first), zs[-1])


def test_an_unknown_sampler_is_refused_with_the_names_of_those_that_are_known(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "two_step", two_step)
    model = tiny_model()
    with pytest.raises(ValueError, match="sampler is 'heun'; use ddim or ddpm or dpm or two_step"):
        next(sample(model, ["a red circle"], settings=replace(model.settings, sampler="heun")))


# ---- a preset ------------------------------------------------------------------------------------


def test_a_preset_says_only_what_differs_from_another(monkeypatch):
    monkeypatch.setitem(PRESETS, "night", PRESETS["toy"] | {"lr": 2e-4, "eta": 0.5})
    toy, night = make_config("toy"), make_config(preset="night", steps="12")
    assert night == replace(toy, preset="night", lr=2e-4, eta=0.5, steps=12)
    with pytest.raises(ValueError, match="unknown preset 'nigth'; did you mean 'night'?"):
        make_config(preset="nigth")
