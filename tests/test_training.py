"""The loss is section 3.2's, a stopped run equals a straight one, two ranks equal one."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partialmethod

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from reference import HERE, TINY, difference, tiny_model
from test_video import make_video
from tiny_training import FIELDS, tiny_train
from torch import nn

from tinydance import conditioning, noise
from tinydance.config import NETWORKS, make_config
from tinydance.data import Files, batches
from tinydance.data.index import hash_name
from tinydance.model import Batch, PixelDance
from tinydance.run import stages
from tinydance.run.checkpoints import Writer, checkpoints
from tinydance.run.fit import fit
from tinydance.run.stages import make_machine, validation_loss
from tinydance.sampling import sample_frames
from tinydance.schedulers import add_noise
from tinydance.toy import SHIPPED, ToyWorld, World
from tinydance.toy.source import HELD_OUT
from tinydance.training import (
    DiffusionLoss,
    Machine,
    Stage,
    Trainee,
    learning_rate,
    training_steps,
    update_ema,
)
from tinydance.unet import UNet, UNetConfig, is_temporal
from tinydance.vae import VAEConfig, to_pixels
from tinydance.video.strips import psnr
from tinydance.weights import load_weights, read_config
from tinydance.weights.files import hold
from tinydance.weights.safetensors import load_safetensors, save_safetensors


def newest(folder, stage="video"):
    """The newest checkpoint, of all ranks: part -> name -> tensor; "at" is its step."""
    saved = checkpoints(folder / stage / "checkpoints")[-1]
    state = {"at": int(saved.name.removeprefix("step_"))}
    for file in saved.glob("*.safetensors"):
        for name, x in load_safetensors(file).items():
            part, name = name.split(".", 1)
            state.setdefault(part, {})[name] = x
    return state


def log(folder, stage="video"):
    return [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]


def largest_difference(a, b):
    return max(difference(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """All stages of a tiny toy run, without a stop."""
    out = tmp_path_factory.mktemp("straight")
    tiny_train(out=str(out))
    return out


# ------------------------------------------------------------------------------------------- loss
class CheapUNet(torch.nn.Module):
    """For tests of what goes in."""

    def forward(self, z, t, c_text):
        return z[:, :, :4]


def random_frames(b, f):
    """uint8 (b, f, 3, 16, 16)."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (b, f, 3, 16, 16), generator=g, dtype=torch.uint8)


def make_batch(frames, captions, sample_ids, step=0):
    return Batch(step, frames, captions, sample_ids, names=[f"clips/{n}.mp4" for n in sample_ids])


def recorded_loss(monkeypatch, frames, n, cheap=False, **changes):
    """The loss of samples 0..n-1 of a tiny model, with everything that make_c_image was given."""
    config = make_config("toy", **(FIELDS | changes))
    seen = {}

    def spy(f_first, f_last, f, eps, alpha_bar_c, keep_last=None):
        c_image = make_c_image(f_first, f_last, f, eps, alpha_bar_c, keep_last)
        seen.update(f_first=f_first, f_last=f_last, keep_last=keep_last, c_image=c_image)
        seen.update(eps_c=eps, alpha_bar_c=alpha_bar_c)
        return c_image

    make_c_image = conditioning.make_c_image
    monkeypatch.setattr(conditioning, "make_c_image", spy)
    model = tiny_model(beta_schedule="linear", prediction_type=config.prediction_type)
    loss = DiffusionLoss(model, config)
    if cheap:
        loss.unet = CheapUNet()
    calls = []
    loss.unet.register_forward_hook(lambda module, args, out: calls.append((args, out)))
    clips = random_frames(1, frames).expand(n, frames, 3, 16, 16)
    value = loss(make_batch(clips, ["a red circle"] * n, list(range(n))))["loss"]
    (z, t, c_text), out = calls[0]
    return value, seen | {"z": z, "t": t, "c_text": c_text, "out": out, "model": model}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_square_error_of_the_prediction(monkeypatch, prediction):
    value, seen = recorded_loss(monkeypatch, 4, 3, prediction_type=prediction)
    slow, a = 0.0, seen["model"].schedule.alpha_bar
    generators = [noise.generator("train", 0, n) for n in range(3)]
    for g in generators:
        torch.rand(4, generator=g)
    posterior = noise.draw(generators, 4, 4, 8, 8)
    noise.draw(generators, 2, 4, 8, 8)
    eps = noise.draw(generators, 4, 4, 8, 8)
    clips = to_pixels(random_frames(1, 4)).expand(3, 4, 3, 16, 16)
    z_0 = seen["model"].vae.encode_video(clips, posterior)
    for k in range(3):
        a_t = float(a[seen["t"][k]])
        z_t = add_noise(z_0[k], eps[k], a_t)
        assert difference(seen["z"][k, :, :4], z_t) < 1e-5
        v = a_t**0.5 * eps[k] - (1 - a_t) ** 0.5 * z_0[k]
        answer = eps[k] if prediction == "epsilon" else v
        slow += float((seen["out"][k] - answer).square().mean()) / 3
    assert abs(float(value.detach()) - slow) < 1e-4


def test_the_condition_is_the_clips_own_first_and_last_frames_under_other_noise(monkeypatch):
    _, seen = recorded_loss(monkeypatch, 4, 6)
    assert difference(seen["z"][:, :, 4:], seen["c_image"]) == 0
    cond_noise_t = make_config("toy").cond_noise_t
    assert seen["alpha_bar_c"] == float(seen["model"].schedule.alpha_bar[cond_noise_t])
    eps_of_target = [noise.generator("train", 0, n) for n in range(6)]
    for g in eps_of_target:
        torch.rand(4, generator=g)
    assert not torch.equal(seen["eps_c"][0, 0], noise.draw(eps_of_target, 4, 4, 8, 8)[0, 0])


def test_last_frame_and_text_are_dropped_at_their_rates(monkeypatch):
    n = 1500
    _, seen = recorded_loss(monkeypatch, 3, n, cheap=True, eta=0.25, text_drop=0.1)
    dropped = 1 - seen["keep_last"].float().mean()
    empty = seen["model"].encode_text([""])[0]
    no_text = torch.tensor([torch.equal(c, empty) for c in seen["c_text"]]).float().mean()
    for share, p in ((dropped, 0.25), (no_text, 0.1)):
        assert abs(float(share) - p) < 4 * (p * (1 - p) / n) ** 0.5  # four standard deviations
    zero = (seen["c_image"][:, -1] == 0).flatten(1).all(1)
    assert torch.equal(zero, ~seen["keep_last"])
    t = seen["t"].float()
    assert abs(float(t.mean()) - 499.5) < 4 * 288.7 / n**0.5 and t.min() >= 0 and t.max() <= 999


def test_images_have_no_condition_and_leave_temporal_layers_without_gradient(monkeypatch):
    value, seen = recorded_loss(monkeypatch, 1, 4)
    assert seen["z"].shape == (4, 1, 8, 8, 8) and int((seen["z"][:, :, 4:] != 0).sum()) == 0
    unet = seen["model"].unet.requires_grad_(True)
    loss = DiffusionLoss(seen["model"], make_config("toy", **FIELDS))
    loss(make_batch(random_frames(2, 1), ["", ""], [0, 1]))["loss"].backward()
    parameters = dict(unet.named_parameters())
    assert all(p.grad is None for name, p in parameters.items() if is_temporal(name))
    assert unet.conv_out.weight.grad is not None


def test_a_samples_loss_does_not_depend_on_its_batch():
    model, config = tiny_model(), make_config("toy", **FIELDS)
    objective = DiffusionLoss(model, config).requires_grad_(False)
    batch = make_batch(random_frames(3, 4), ["a red circle", "blue", ""], [7, 8, 9])
    together = float(objective(batch)["loss"])
    apart = [float(objective(batch.part(slice(k, k + 1), "cpu"))["loss"]) for k in range(3)]
    assert abs(together - np.mean(apart)) < 1e-5


# ------------------------------------------------------------------------------------- validation
def test_a_fixed_t_is_the_only_thing_that_it_fixes(monkeypatch):
    _, any_t = recorded_loss(monkeypatch, 4, 5)
    loss, batch = DiffusionLoss(any_t["model"], make_config("toy", **FIELDS), 7), []
    loss.unet.register_forward_hook(lambda module, args, out: batch.append((args, out)))
    value = loss(
        make_batch(random_frames(1, 4).expand(5, 4, 3, 16, 16), ["a red circle"] * 5, range(5))
    )
    (z, t, c_text), out = batch[0]
    assert t.tolist() == [7] * 5 and any_t["t"].unique().numel() > 1
    assert torch.equal(z[:, :, 4:], any_t["c_image"]) and torch.equal(c_text, any_t["c_text"])
    assert torch.isfinite(value["loss"])


def validate(model, rank=0, world_size=1, batch=4):
    """The validation loss on 8 toy clips, of which a rank has its share."""
    config = make_config("toy", **(FIELDS | {"seed": 5}))
    machine = Machine(config)
    machine.rank, machine.world_size = rank, world_size
    clips = batches(ToyWorld(9, World(16, 4)), 0, 8 // batch, batch, rank, world_size)
    return validation_loss(model, config, machine, clips)


def test_the_validation_loss_is_the_mean_over_clips_at_each_of_five_t():
    model = tiny_model(beta_schedule="linear")
    found = validate(model)
    assert [*found] == ["validation", *(f"validation_t{t}" for t in (100, 300, 500, 700, 900))]
    config = make_config("toy", **(FIELDS | {"seed": 5 + HELD_OUT}))
    [batch] = batches(ToyWorld(9, World(16, 4)), 0, 1, 8)
    for t in (100, 300, 500, 700, 900):  # all clips in one batch
        slow = float(DiffusionLoss(model, config, t)(batch)["loss"])
        assert found[f"validation_t{t}"] == pytest.approx(slow, rel=1e-4)
    assert found["validation"] == pytest.approx(np.mean([*found.values()][1:]))


def test_only_other_weights_change_the_validation_loss():
    model = tiny_model(beta_schedule="linear")
    one, torch_state = validate(model), torch.get_rng_state()
    assert validate(model) == one == validate(model, batch=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    shares = [validate(model, rank, 2) for rank in range(2)]
    assert shares[0] != shares[1]
    for name, value in one.items():
        assert np.mean([share[name] for share in shares]) == pytest.approx(value, rel=1e-9)
    with torch.no_grad():
        model.unet.conv_out.bias += 1
    assert all(other != one[name] for name, other in validate(model).items())


def film_folder(folder, count):
    folder.mkdir()
    for k in range(count):
        make_video(folder / f"{k}.mp4", frames=30, size=(16, 16))
        (folder / f"{k}.txt").write_text("a red circle moves up")
    return str(folder)


@pytest.mark.parametrize("held_out", [0.4, 0])
def test_strips_and_validation_are_of_clips_that_are_never_trained_on(
    straight, tmp_path, monkeypatch, held_out
):
    before_the_video_stage(straight, tmp_path / "out")
    data, seen = film_folder(tmp_path / "data", 8), {True: set(), False: set()}
    sample = Files.sample

    def spy(self, n, kind="clip"):
        found = sample(self, n, kind)
        seen[self.is_held_out].add(found.name)
        return found

    monkeypatch.setattr(Files, "sample", spy)
    tiny_train("video", data=data, out=str(tmp_path / "out"), held_out=held_out, sample_every=4)
    assert (tmp_path / "out" / "video" / "samples" / "step_00000008.png").exists()
    validated = [line["step"] for line in log(tmp_path / "out") if "validation" in line]
    few = {f"{k}.mp4" for k in range(8) if hash_name(f"{k}.mp4") < held_out * 2**31}
    assert seen == {True: few, False: {f"{k}.mp4" for k in range(8)} - few}
    assert validated == ([4, 8] if few else []) and bool(few) == bool(held_out)


def test_held_out_clips_that_cannot_be_read_are_noticed_at_the_start(straight, tmp_path):
    data, few = film_folder(tmp_path / "data", 1), []
    for k in range(100, 120):
        if hash_name(f"{k}.mp4") < 0.4 * 2**31:
            (tmp_path / "data" / f"{k}.mp4").write_bytes(b"")
            few.append(k)
    assert few and hash_name("0.mp4") >= 0.4 * 2**31
    with pytest.raises(ValueError, match="samples in a row cannot be used: 20 not_a_video"):
        tiny_train("video", data=data, out=str(tmp_path / "out"), held_out=0.4)
    assert not (tmp_path / "out" / "video").exists()


def test_the_validation_loss_is_logged_when_it_is_due_and_shown_as_it_is(tmp_path, capsys):
    config = make_config("toy", **(FIELDS | {"out": str(tmp_path), "sample_every": 2}))
    objective, values = OneWeight(lambda number: 1.0), iter([8.0, 4.0, 2.0])
    stage = Stage("x", objective, objective, 5, 1e-2, black_frames, lambda ema: None)
    seen = []

    def validate(ema):
        seen.append(ema.weight.detach().clone())
        return {"validation": (value := next(values)), "validation_t100": value / 2}

    trained = fit(dataclasses.replace(stage, validate=validate), config, Machine(config))
    assert len(seen) == 3 and torch.equal(seen[-1], trained.weight)  # the averages, as published
    assert not torch.equal(seen[0], seen[1])
    lines = {line["step"]: line for line in log(tmp_path, "x")}
    assert {n: line["validation"] for n, line in lines.items() if "validation" in line} == {
        2: 8.0,
        4: 4.0,
        5: 2.0,
    }
    assert lines[4]["validation_t100"] == 2.0
    shown = capsys.readouterr().out
    assert ", validation 2.0000" in shown and "validation_t100" not in shown


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_opens_the_data_before_the_others(tmp_path, monkeypatch, rank, fails):
    """It saves the index that they read. Where it fails, the others are not left waiting."""
    machine, done = Machine(make_config("toy", device="cpu")), []
    machine.rank, machine.wait = rank, lambda: done.append("wait")

    def open_source(config, track):
        done.append("open")
        if fails:
            raise ValueError("no such data")
        return ToyWorld()

    monkeypatch.setattr(stages, "make_machine", lambda config: machine)
    monkeypatch.setattr(stages, "open_source", open_source)
    monkeypatch.setitem(stages.OTHERS, "inspect", lambda config, machine, source: None)
    with pytest.raises(ValueError, match="no such data") if fails else nullcontext():
        stages.train(make_config("toy", out=str(tmp_path)), "inspect")
    assert done == (["open", "wait"] if rank == 0 else ["wait", "open"])


# ------------------------------------------------------------------------------------------- loop
def test_every_stage_leaves_a_model_folder_a_log_and_a_checkpoint(straight):
    for stage, steps in (("vae", 4), ("text", 3), ("image", 4), ("video", 8)):
        assert [line["step"] for line in log(straight, stage)] == list(range(1, steps + 1))
        assert newest(straight, stage)["at"] == steps
    model = PixelDance.from_folder(straight / "video" / "model")
    assert sample_frames(model, ["a red circle moves up"], steps=2).shape == (1, 4, 3, 16, 16)
    assert (straight / "video" / "samples" / "step_00000008.png").exists()


def test_every_third_step_is_an_image_step_when_asked(straight):
    kinds = [line["kind"] for line in log(straight)]
    assert kinds == ["clip", "clip", "image"] * 2 + ["clip", "clip"]
    assert {line["kind"] for line in log(straight, "image")} == {"image"}


def test_the_video_stage_starts_from_the_image_model(straight, tmp_path):
    """Its spatial weights and, untouched by images, temporal layers that let everything through."""
    image = UNet.from_folder(straight / "image" / "model" / "unet")
    assert all(
        int(p.count_nonzero()) == 0
        for name, p in image.named_parameters()
        if "temp_attentions.0.proj_out" in name or "transformer_in.proj_out" in name
    )
    assert int(image.conv_in.weight[:, 4:].count_nonzero()) == 0
    video = newest(straight)["ema"]
    assert int(video["unet.transformer_in.proj_out.weight"].count_nonzero()) > 0


def test_a_run_that_stopped_equals_a_straight_one_bit_for_bit(straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    for stage in ("vae", "image", "video"):  # forget the last steps of every stage
        saved = checkpoints(tmp_path / stage / "checkpoints")
        if len(saved) > 1:
            shutil.rmtree(saved[-1])
    assert newest(tmp_path)["at"] == 4
    tiny_train(out=str(tmp_path))
    a, b = newest(straight), newest(tmp_path)
    assert a.pop("at") == b.pop("at") == 8
    assert a.keys() == {"weight", "ema", "step", "exp_avg", "exp_avg_sq"} == b.keys()
    for part in a:
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    for one, other in zip(log(straight), log(tmp_path), strict=True):
        assert all(one[name] == other[name] for name in ("step", "loss", "grad_norm", "kind"))


@pytest.mark.parametrize("cut", [b'{"step": 8, "loss": 0.4', b"\x00\x00\xff", b"7\n[]\n{}"])
def test_a_cut_last_line_of_the_log_is_left_out(straight, tmp_path, cut):
    """A crash cuts the last line; what was logged before stays, and the run goes on."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(checkpoints(tmp_path / "video" / "checkpoints")[-1])
    with (tmp_path / "video" / "log.jsonl").open("ab") as file:
        file.write(cut)
    tiny_train("video", out=str(tmp_path), video_steps=5)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_signal_while_a_stage_writes_its_last_checkpoint_stops_all(tmp_path, monkeypatch, capsys):
    def finish(writer):
        last(writer)
        if checkpoints(tmp_path / "vae/checkpoints"):
            os.kill(os.getpid(), signal.SIGTERM)

    last = Writer.finish
    monkeypatch.setattr(Writer, "finish", finish)
    tiny_train(out=str(tmp_path), vae_steps=1)
    assert "stopped after stage vae: the same command goes on" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["vae"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_trainings_do_not_share_an_out(straight):
    with hold(straight), pytest.raises(BlockingIOError, match="in use by another process: wait"):
        tiny_train("video", out=str(straight))


def test_what_kills_left_is_cleared_and_what_a_user_put_there_is_not(straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    left = tmp_path / "video" / "model" / "unet" / "diffusion_pytorch_model.safetensors.77.part"
    own = tmp_path / "video" / "movie.part"
    for path in (left, own):
        path.write_bytes(b"half")
    tiny_train("video", out=str(tmp_path))
    assert own.exists() and not left.exists()


def test_an_image_stage_that_was_killed_before_its_first_checkpoint_starts_from_init(
    straight, tmp_path
):
    """And not from the averaged weights that it had published already."""
    given = {"init": str(straight / "image" / "model"), "unet": "init", "image_steps": 2}
    tiny_train("image", out=str(tmp_path), **given)
    before = newest(tmp_path, "image")["weight"]
    shutil.rmtree(tmp_path / "image" / "checkpoints")
    tiny_train("image", out=str(tmp_path), **given)
    assert largest_difference(before, newest(tmp_path, "image")["weight"]) == 0


def test_an_error_of_the_main_process_ends_it_while_workers_read(straight, tmp_path):
    program = (
        "import sys; from tiny_training import tiny_train; from tinydance.run import fit\n"
        "def fail(*arguments): raise RuntimeError('from the main process')\n"
        "fit.average = fail; tiny_train('video', out=sys.argv[1], workers=2)"
    )
    before_the_video_stage(straight, tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "from the main process" in done.stderr


def test_a_finished_run_has_nothing_to_do(straight):
    before = newest(straight)
    tiny_train(out=str(straight))
    assert largest_difference(before["ema"], newest(straight)["ema"]) == 0


def test_a_changed_configuration_is_refused_with_the_fields_that_differ(straight):
    with pytest.raises(ValueError, match=r"eta was 0\.6 and is 0\.1; lr was 0\.001 and is 0\.5"):
        tiny_train("video", out=str(straight), eta=0.1, lr=0.5)


def test_the_image_stage_leaves_what_stable_diffusion_is(straight):
    """Four channels in, no temporal layer: the video stage starts from it as from SD 2.1."""
    folder = straight / "image" / "model" / "unet"
    config, weights = read_config(folder), load_weights(folder)
    assert config["_class_name"] == "UNet2DConditionModel" and config["in_channels"] == 4
    assert weights["conv_in.weight"].shape[1] == 4
    assert not any(is_temporal(name) for name in weights)
    start = UNet.from_folder(folder)
    begins = start.state_dict() | {"conv_in.weight": start.conv_in.weight[:, :4]}
    assert all(difference(begins[name], weight) == 0 for name, weight in weights.items())
    assert not start.conv_in.weight[:, 4:].any()
    assert PixelDance.from_folder(straight / "image" / "model").settings.frames == 1


def test_the_shipped_image_model_does_not_know_the_latents_of_another_vae(tmp_path):
    tiny_train("vae", out=str(tmp_path))
    with pytest.raises(ValueError, match="a VAE of its own.*add --from-scratch"):
        tiny_train("video", out=str(tmp_path), init="shipped")


def test_another_prediction_than_the_image_models_is_refused(straight, tmp_path):
    changes = {"init": str(straight / "image" / "model"), "prediction_type": "epsilon"}
    with pytest.raises(
        ValueError, match="v_prediction, not epsilon: give --prediction_type v_pred"
    ):
        tiny_train("video", out=str(tmp_path), video_steps=1, **changes)


def test_a_stage_without_its_forerunner_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="run --stage image first"):
        tiny_train("video", out=str(tmp_path))


def test_resume_none_sets_the_old_run_aside(straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    tiny_train("video", out=str(tmp_path), resume="none", video_steps=1)
    assert newest(tmp_path)["at"] == 1 and newest(tmp_path, "video_1")["at"] == 8
    tiny_train("video", out=str(tmp_path), video_steps=2)  # and goes on as ever
    assert newest(tmp_path)["at"] == 2


def test_a_stage_begun_anew_starts_from_init_and_not_from_its_old_self(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    shutil.copytree(straight / "image" / "model", tmp_path / "init")
    weights = tmp_path / "init" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_weights(weights)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 7
    save_safetensors(tensors, weights)
    given = {"init": str(tmp_path / "init"), "unet": "init", "lr": 0.0, "image_steps": 1}
    tiny_train("image", out=str(tmp_path / "run"), resume="none", **given)
    begun = load_weights(tmp_path / "run" / "image" / "model" / "unet")
    assert torch.equal(begun["conv_out.bias"], tensors["conv_out.bias"])


def before_the_video_stage(straight, out):
    """The first three stages of a run, without dropout, whose masks differ from rank to rank."""
    for stage in ("vae", "text", "image"):
        shutil.copytree(straight / stage, out / stage)
    config = out / "image" / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temporal_dropout": 0.0}))


def test_small_passes_add_up_to_a_large_one(straight, tmp_path):
    """Eight steps, two of them of images, a clip at a time."""
    before_the_video_stage(straight, tmp_path / "large")
    before_the_video_stage(straight, tmp_path / "small")
    tiny_train("video", out=str(tmp_path / "large"))
    calls, forward = [], DiffusionLoss.forward

    def spy(self, batch):
        if self.fixed_t is None:  # else it measures
            calls.append(tuple(batch.frames.shape[:2]))
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionLoss, "forward", spy)
        tiny_train("video", out=str(tmp_path / "small"), micro_batch=1)
    assert set(calls) == {(1, 4), (2, 1)} and len(calls) == 6 * 4 + 2 * 4
    large, small = log(tmp_path / "large"), log(tmp_path / "small")
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(large, small, strict=True)) < 1e-5


def test_temporal_training_moves_only_what_the_paper_adds(straight, tmp_path):
    for stage in ("vae", "text", "image"):
        shutil.copytree(straight / stage, tmp_path / stage)
    tiny_train("video", out=str(tmp_path), train="temporal")
    before = UNet.from_folder(straight / "image" / "model" / "unet").state_dict()
    after = newest(tmp_path)["weight"]
    saved = {name.removeprefix("unet.") for name in after}  # what stays as it was is not
    assert {name for name in saved if not is_temporal(name)} == {"conv_in.weight", "conv_in.bias"}
    after = UNet.from_folder(tmp_path / "video" / "model" / "unet").state_dict()
    moved = {name for name, value in before.items() if difference(after[name], value)}
    assert {name for name in moved if not is_temporal(name)} == {"conv_in.weight", "conv_in.bias"}
    assert any("temp_attentions" in name for name in moved)
    assert {line["kind"] for line in log(tmp_path)} == {"clip"}


def test_without_a_compiler_training_goes_on(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler found\nwith a long explanation")

    monkeypatch.setattr(torch, "compile", broken)
    assert not make_machine(make_config("toy", **(FIELDS | {"compile": "on"}))).compile
    assert "does not work here (no C++ compiler found)" in capsys.readouterr().out


def run_script(*arguments, ranks=1, script="tiny_training.py", launch=()):
    """Start a training of `ranks` processes, by torchrun with the options `launch`."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        launcher += launch or ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(HERE / script), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_output(process):
    """What a training printed until its end: soon, but a busy machine may take minutes."""
    try:
        return process.communicate(timeout=900)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        pytest.fail(f"no end after 15 minutes: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def hung(straight, tmp_path_factory):
    """A rank that hangs, while the tests before it run: most of its half minute is waiting."""
    out = tmp_path_factory.mktemp("hung")
    before_the_video_stage(straight, out)
    # timeout: the ranks of a busy machine start seconds apart, and must not give up before the hang
    fault = ["hang=3", f"out={out}", "timeout=0.5"]
    return out, run_script(*fault, ranks=2, script="faulty_training.py")


@pytest.fixture(scope="module")
def two_ranks(straight, hung, tmp_path_factory):
    """The video stage on two machines: two agents of one rank each, that meet at an address."""
    out = tmp_path_factory.mktemp("two_ranks")
    before_the_video_stage(straight, out)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    launch = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test"]
    launch += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    agents = [run_script("video", f"out={out}", ranks=2, launch=launch) for _ in range(2)]
    outputs = [read_output(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    return out


def test_two_ranks_equal_one(straight, two_ranks, tmp_path):
    """Same global batch, image steps included; gloo, without dropout."""
    before_the_video_stage(straight, tmp_path)
    tiny_train("video", out=str(tmp_path), dropout=0.0)
    losses = [[line["loss"] for line in log(folder)] for folder in (tmp_path, two_ranks)]
    assert len(losses[0]) == 8
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    alone, shared = (log(folder)[-1] for folder in (tmp_path, two_ranks))
    for name in ("validation", "validation_t100", "validation_t900"):  # each rank has a part of it
        assert alone[name] == pytest.approx(shared[name], rel=1e-4)
    # Single weights may part by Adam's step where a gradient is all rounding; together they do not.
    one, two = newest(tmp_path)["weight"], newest(two_ranks)["weight"]
    for name in one:
        assert float((one[name] - two[name]).square().mean().sqrt()) < 1e-4


def test_each_rank_saves_a_share_and_another_number_of_ranks_goes_on(two_ranks, tmp_path):
    """One goes on from two; for 1, 2 and 4 in turns see `test_checkpoints.py`."""
    out, losses = tmp_path / "out", [line["loss"] for line in log(two_ranks)]
    shutil.copytree(two_ranks, out)
    sizes = {file.name: file.stat().st_size for file in out.rglob("rank_*.safetensors")}
    one, two = sizes["rank_0_of_2.safetensors"], sizes["rank_1_of_2.safetensors"]
    assert abs(one - two) < 0.1 * one
    shutil.rmtree(checkpoints(out / "video" / "checkpoints")[-1])
    tiny_train("video", out=str(out), dropout=0.0)  # from step 4 on, on one rank
    again = [line["loss"] for line in log(out)]
    assert max(abs(a - b) for a, b in zip(again, losses, strict=True)) < 1e-5


def test_sigterm_saves_at_the_current_step_and_leaves_with_zero(straight, tmp_path):
    for stage in ("vae", "text", "image"):
        shutil.copytree(straight / stage, tmp_path / stage)
    process = run_script("video", f"out={tmp_path}", "video_steps=100000", "save_every=100000")
    deadline = time.time() + 900
    while not (tmp_path / "video" / "log.jsonl").exists() or len(log(tmp_path)) < 3:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = read_output(process)
    assert process.returncode == 0 and "goes on from there" in output, output
    assert newest(tmp_path)["at"] == log(tmp_path)[-1]["step"] >= 3


def test_two_graphs_are_compiled_one_for_clips_and_one_for_images(tmp_path, monkeypatch):
    """DDP would have them cut into buckets of gradients, 131 of the paper's network."""
    graphs, compile_ = [], nn.Module.compile
    shape = dataclasses.replace(TINY["unet"], block_out_channels=(32,), attention_levels=(True,))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(compile_, backend=backend))
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 10_000)  # of a tiny network too
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):
            machine, unet = Machine(make_config("toy", device="cpu", compile="on")), UNet(shape)
            machine.world_size = 2  # of which one is here
            distributed = machine.distribute(unet, unet)
            for b, f in ((2, 4), (5, 1), (2, 4)):
                t = torch.randint(0, 1000, (b,))
                distributed(torch.randn(b, f, 8, 8, 8), t, torch.randn(b, 24, 16)).sum().backward()
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert len(graphs) == 2


def test_a_killed_rank_is_restarted_and_the_run_ends_as_if_undisturbed(
    straight, two_ranks, tmp_path, monkeypatch
):
    before_the_video_stage(straight, tmp_path)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # why: see stages.make_machine
    launch = ["--standalone", "--max-restarts=3"]
    fault = ["kill=6", f"out={tmp_path}", "save_every=2"]
    process = run_script(*fault, ranks=2, launch=launch, script="faulty_training.py")
    output = read_output(process)
    assert process.returncode == 0 and (tmp_path / "happened").exists(), output
    for part in ("weight", "ema"):
        assert largest_difference(newest(two_ranks)[part], newest(tmp_path)[part]) == 0


def test_a_nan_on_one_rank_is_skipped_by_all_and_an_error_told_in_its_own_words(straight, tmp_path):
    before_the_video_stage(straight, tmp_path)
    faults = ["nan=3", "raise=6", f"out={tmp_path}"]
    process = run_script(*faults, ranks=2, script="faulty_training.py")
    output = read_output(process)
    assert process.returncode != 0
    assert "faulty_training.py: rank 1: clips/7.mp4 is bad; take it out" in output
    assert [line["skipped"] for line in log(tmp_path)] == [False] * 3 + [True] + [False] * 2
    assert all(torch.isfinite(value).all() for value in newest(tmp_path)["weight"].values())


def test_a_hung_rank_ends_the_run(hung):
    out, process = hung
    output = read_output(process)
    assert process.returncode != 0 and "imed out" in output, output
    assert (out / "happened").exists(), output


def test_restarts_without_a_fresh_store_are_refused(monkeypatch):
    changes = {"WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in (changes | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"):
        tiny_train()


class OneWeight(torch.nn.Module):
    """A loss whose gradient is factor(number of the sample); it tells another number as well, and
    keeps what its weight was."""

    def __init__(self, factor):
        super().__init__()
        self.weight, self.factor = torch.nn.Parameter(torch.ones(2)), factor
        self.weights = []

    def forward(self, batch):
        self.weights.append(self.weight.detach().clone())
        total = self.weight.sum()
        return {"loss": total * self.factor(batch.sample_ids[0]), "total": total.detach()}


def black_frames(first, last):
    for step in range(first, last):
        yield make_batch(torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), [""], [step], step)


def test_a_step_without_finite_gradients_changes_neither_weights_nor_their_average(tmp_path):
    fields = FIELDS | {"out": str(tmp_path), "decay": False, "save_every": 1}
    config, averages = make_config("toy", **fields), []
    objective = OneWeight(lambda number: float("nan") if number == 1 else 1.0)

    def publish(ema):
        averages.append(ema.weight.clone())

    stage = Stage("x", objective, objective, 4, 1e-2, black_frames, publish)
    fit(stage, config, Machine(config))
    skipped = [False, True, False, False]
    assert [line["skipped"] for line in log(tmp_path, "x")] == skipped
    assert [line["loss"] is None for line in log(tmp_path, "x")] == skipped
    assert "NaN" not in (tmp_path / "x" / "log.jsonl").read_text()  # which is no JSON
    for values in (objective.weights[1:], averages):  # after each step
        assert torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    assert torch.isfinite(averages[3]).all() and not torch.equal(averages[0], torch.ones(2))


def test_a_run_whose_gradients_stay_infinite_ends_with_the_samples_names(tmp_path):
    config = make_config("toy", **(FIELDS | {"out": str(tmp_path), "max_skips": 3}))
    objective = OneWeight(lambda number: float("inf"))
    stage = Stage("x", objective, objective, 9, 1e-2, black_frames, lambda ema: None)
    with pytest.raises(ValueError, match=r"3 steps in a row .* had clips/2\.mp4"):
        fit(stage, config, Machine(config))


def test_every_number_that_an_objective_tells_is_logged(tmp_path, capsys):
    config = make_config("toy", **(FIELDS | {"out": str(tmp_path)}))
    objective = OneWeight(lambda number: 1.0)
    stage = Stage("x", objective, objective, 3, 1e-2, black_frames, lambda ema: None)
    fit(stage, config, Machine(config))
    lines = log(tmp_path, "x")
    assert [line["total"] for line in lines] == [line["loss"] for line in lines]
    keys = {"step", "loss", "total", "grad_norm", "lr", "kind", "seconds", "waited", "skipped"}
    assert all(set(line) == keys for line in lines)
    assert ", loss " in capsys.readouterr().out


def test_pictures_come_early_and_a_run_says_where(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinydance.run.fit.EARLY", (1, 3))
    config, objective = make_config("toy", out=str(tmp_path)), OneWeight(lambda number: 1.0)
    stage = Stage("x", objective, objective, 5, 1e-2, black_frames, lambda ema: None)
    stage = dataclasses.replace(stage, show=lambda ema: Image.new("RGB", (2, 2)))
    fit(stage, config, Machine(config))
    names = sorted(path.name for path in (tmp_path / "x" / "samples").iterdir())
    assert names == [f"step_{n:08d}.png" for n in (1, 3, 5)]
    told, x = capsys.readouterr().out, tmp_path / "x"
    assert f"pictures will be in {x / 'samples'}, the model in {x / 'model'}" in told
    assert ", norm " in told and ", lr " in told


def test_the_steps_are_a_generator_that_anybody_may_iterate():
    """As a notebook does: no folder, no log, no checkpoint."""
    config = make_config("toy", **(FIELDS | {"decay": False}))
    objective = OneWeight(lambda number: 1.0)
    stage = Stage("x", objective, objective, 4, 1e-2, black_frames, lambda ema: None)
    machine = Machine(config)
    trainee = Trainee(stage, config, machine)
    steps = list(training_steps(stage, config, machine, trainee))
    assert [step.done for step in steps] == [1, 2, 3, 4]
    assert steps[0].numbers["loss"] == 2.0 > steps[-1].numbers["loss"]
    assert [step.batch.names for step in steps] == [[f"clips/{n}.mp4"] for n in range(4)]


def test_a_device_that_is_too_small_names_what_helps(straight, tmp_path, monkeypatch):
    before_the_video_stage(straight, tmp_path)

    def forward(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiffusionLoss, "forward", forward)
    with pytest.raises(ValueError, match="too little memory for stage video: try --micro_batch 1"):
        tiny_train("video", out=str(tmp_path))


def test_the_benchmark_prints_where_the_time_goes(capsys, monkeypatch):
    from tinydance.run import benchmark

    monkeypatch.setattr(benchmark, "measure_matmul", lambda machine: 1e12)
    tiny_train("benchmark")
    table = capsys.readouterr().out
    parts = ("| data |", "| VAE |", "| backward |", "clips/s", "MFU", "peak memory")
    assert all(part in table for part in parts), table


def test_the_benchmarks_networks_are_the_runs_and_not_those_of_the_presets_name():
    from tinydance.run.benchmark import make_random_model

    with torch.device("meta"):  # sizes without memory
        model = make_random_model(make_config("paper", unet="small"))
    assert model.unet.config == NETWORKS["small"]["unet"]
    assert model.vae.config == VAEConfig() and model.text_tower.config.hidden_size == 1024


def test_flops_are_counted_as_two_for_each_multiplication_and_addition():
    from tinydance.run.benchmark import count_flops

    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_the_average_of_the_weights_is_its_formula():
    weight, ema = torch.randn(2, 2), torch.randn(2, 2)
    before = ema.clone()
    update_ema([ema], [weight], 10_000, 0.99)
    assert difference(ema, 0.99 * before + 0.01 * weight) < 1e-6


def test_the_learning_rate_warms_up_and_may_fall_to_zero():
    config = make_config("toy", warmup=9, decay=False)
    rates = [learning_rate(step, 100, 1.0, config) for step in (0, 4, 9, 50, 99)]
    assert np.allclose(rates, [0.1, 0.5, 1, 1, 1])
    falling = make_config("toy", warmup=0, decay=True)
    assert learning_rate(50, 100, 1.0, falling) == pytest.approx(0.5)
    assert learning_rate(99, 100, 1.0, falling) < 1e-3


# --------------------------------------------------------------------------------- it really learns
def test_one_clip_is_learnt_until_it_is_reproduced_from_its_first_frame_and_caption(tmp_path):
    """By a small network with the shipped VAE and text tower; dB against the VAE's round trip."""
    shipped = PixelDance.from_folder(SHIPPED)
    frames, caption = ToyWorld(5, World(32, 4)).sample(0)[:2]
    truth = to_pixels(frames)[None]
    with torch.no_grad():
        mean, logvar = shipped.vae.encode(truth[0])
    moments = torch.cat([mean, (0.5 * logvar).exp()], dim=1) * shipped.vae.config.scaling_factor
    torch.manual_seed(0)
    shape = UNetConfig(
        in_channels=2 * mean.shape[1],
        out_channels=mean.shape[1],
        block_out_channels=(48, 96),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=8,
        cross_attention_dim=shipped.unet.config.cross_attention_dim,
        attention_levels=(False, True),
        temporal_dropout=0.0,
    )
    model = dataclasses.replace(shipped, unet=UNet(shape))
    for part in (shipped.vae, shipped.text_tower):
        part.requires_grad_(False)
    fields = {"height": 32, "width": 32, "frames": 4, "image_every": 0}
    fields |= {"warmup": 10, "decay": True, "ema": 0.98, "save_every": 1000}

    def stream(first, last):
        for step in range(first, last):
            same = moments[None].repeat(8, 1, 1, 1, 1)  # as from a cache
            yield make_batch(same, [caption] * 8, list(range(8 * step, 8 * step + 8)), step)

    config = make_config("toy", **(FIELDS | fields | {"out": str(tmp_path)}))
    objective = DiffusionLoss(model, config)
    stage = Stage("clip", objective, model.unet, 280, 4e-3, stream, publish=lambda ema: None)
    model.unet = fit(stage, config, Machine(config))
    round_trip = model.vae.decode_video(model.vae.encode_video(truth)).clamp(-1, 1)
    made = sample_frames(model, [caption], truth[:, 0], frames=4, steps=20, guidance=1.0)
    still = round_trip[:, :1].expand_as(round_trip)
    # The clip moves: repeating its first frame is not enough.
    assert psnr(round_trip, made) >= 25 > psnr(round_trip, still)


def test_batches_do_not_repeat_between_clip_and_image_steps():
    source = ToyWorld(0, World(16, 4))
    stream = batches(source, 0, 4, 2, image_every=2, image_batch=3)
    sample_ids = [n for batch in stream for n in batch.sample_ids]
    assert len(set(sample_ids)) == len(sample_ids) == 10
