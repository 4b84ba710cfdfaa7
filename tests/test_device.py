"""What runs on a GPU runs on a device that is not there (`pretend.py`), or a test says why not."""

import inspect
import sys
import textwrap
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pretend import OnDevice, pretend
from reference import tiny_model
from tiny_training import tiny_train
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory

import sample
from tinydance import model, noise, training
from tinydance.config import choose_dtype, make_config
from tinydance.data.batches import Batches
from tinydance.run import benchmark, checkpoints, fit, stages
from tinydance.toy import ToyWorld, World, evaluate
from tinydance.training import Machine, Stage, Trainee
from tinydance.video import strips
from tinydance.video.write import save_video
from tinydance.weights.safetensors import load_safetensors

KINDS = ("cuda", "mps")


# One step or two of each stage, the last one drawn; the third of "video" is an image step.
SHORT = {"vae_steps": 1, "text_steps": 1, "image_steps": 1, "video_steps": 3}
SHORT |= {"batch": 2, "image_batch": 2, "steps": 2, "save_every": 3, "frames": 3}


def train_all(out, kind, stage="all", **changes):
    given = {"out": str(out), "device": kind, "compile": "off"}
    tiny_train(stage, dropout=0.0, validated=1, **SHORT | given | changes)


def read_state(out):
    state = load_safetensors(out / "video/checkpoints/step_00000003/rank_0_of_1.safetensors")
    return {name: x for name, x in state.items() if name.startswith("ema.")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_trains_draws_saves_and_resumes(tmp_path, kind):
    with pretend(kind):
        train_all(tmp_path / kind, kind)
        if kind == "cuda":
            train_all(tmp_path / kind, kind, stage="video", dtype="bfloat16", video_steps=4)
    pictures = {path.name for path in (tmp_path / kind / "video/samples").iterdir()}
    assert pictures >= {"step_00000003.png"}
    if kind == "cuda":  # it resumes, and what is pretended computes what the CPU does
        train_all(tmp_path / "cpu", "cpu")
        one, two = (read_state(tmp_path / name) for name in (kind, "cpu"))
        assert max((one[name] - two[name]).abs().max() for name in two) < 1e-4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny model, pictures, a video, and a story."""
    monkeypatch.chdir(tmp_path)
    tiny_model(timestep_spacing="trailing", prediction_type="v_prediction").save("model")
    frames = torch.randint(256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    for name in ("a.png", "b.png", "clip.mp4", "clips/one.mp4", "clips/two.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_video(frames.to(torch.uint8)[: 1 if ".png" in name else 4], name)
    (tmp_path / "film.toml").write_text('shot = [{prompt = "a red circle"}, {last = "b.png"}]')
    return tmp_path


GIVEN = {"init": "model", "unet": "init", "frames": 4}  # nothing before the video stage


def test_a_step_waits_for_the_device_once(folder, monkeypatch):
    waits = []

    def count(*args):
        for step in training.training_steps(*args):
            waits.append(OnDevice.waits)
            yield step

    monkeypatch.setattr(fit, "training_steps", count)
    with pretend("cuda"):
        train_all("run", "cuda", "video", video_steps=4, save_every=9, micro_batch=1, **GIVEN)
    assert np.diff(waits[-4:]).tolist() == [1, 1, 1]  # of clips and of images


INSTRUCTIONS = {
    "text": ["a red circle moves left"],
    "first": ["", "--first", "a.png"],
    "first, last": ["a circle", "--first", "a.png", "--last", "b.png", "--guidance", "1"],
    "sketch": ["a circle", "--first", "a.png", "--last", "b.png", "--sketch", "--clips", "2"],
    "edit": ["a circle", "--edit", "clip.mp4"],
    "story": ["--story", "film.toml"],
    "another's first frame": ["a circle", "--t2i", "model", "--sampler", "ddpm"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_is_sampled_and_gives_what_a_cpu_gives(folder, monkeypatch, kind):
    some = INSTRUCTIONS if kind == "cuda" else ("first, last", "sketch")
    for name in some:
        words = INSTRUCTIONS[name]
        compared = kind == "cuda" and name in ("first, last", "story")
        for device in (kind, "cpu") if compared else (kind,):
            given = ["--model", "model", "--steps", "2", "--dtype", "float32", "--device", device]
            argv = ["sample.py", *words, *given, "--out", f"{name} {device}.png"]
            monkeypatch.setattr(sys, "argv", argv)
            with pretend(kind):
                sample.main()
        if compared:
            pair = (np.array(Image.open(f"{name} {x}.png"), np.int16) for x in (kind, "cpu"))
            assert np.abs(next(pair) - next(pair)).max() <= 2, name  # of 255: another rounding


def test_latents_are_cached_and_trained_on(folder, kind="cuda"):
    with pretend(kind):
        train_all("latents", kind, data="clips", stage="latents", **GIVEN)
        train_all("run", kind, data="latents", stage="video", video_steps=1, **GIVEN)
    assert (folder / "run/video/samples/step_00000001.png").exists()


def test_a_model_is_evaluated(folder, monkeypatch, capsys, kind="cuda"):
    monkeypatch.setattr(
        sys,
        "argv",
        [*"evaluate --model model --clips 1 --steps 1 --rows".split(), "text, first, last"],
    )
    with pretend(kind):
        evaluate.main()
    assert "| text, first, last |" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_timed(tmp_path, monkeypatch, capsys, kind):
    # Not here: the counter of arithmetic, which asks torch itself for tensors of the device; and
    # the matrix products, in sizes for a GPU.
    monkeypatch.setattr(benchmark, "measure_matmul", lambda machine: 1.0)
    monkeypatch.setattr(benchmark, "count_flops", lambda work: work() is None or 1)
    monkeypatch.setattr(benchmark, "measure", lambda work: work() is None or 1.0)
    with pretend(kind):
        train_all(tmp_path, kind, stage="benchmark")
    assert f"preset toy on {kind}" in capsys.readouterr().out


# ------------------------------------------------------------------------- faults that were there
def put_back(monkeypatch, owner, name, now, then):
    """Make a function of a module, or a method, what it was before it was mended."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(now) == 1, source
    scope = dict(vars(sys.modules[getattr(owner, name).__module__]))
    exec(source.replace(now, then), scope)
    monkeypatch.setattr(owner, name, scope[name])


def strip():
    strips.film_strip([torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=OnDevice.kind)])


def vae_stage():
    train_all("run", OnDevice.kind, "vae")


def video_stage():
    train_all("run", OnDevice.kind, "video", **GIVEN)


FAULTS = {
    "a film strip of a device's tensor": (
        ("cuda", strip, strips, "scaled_pictures"),
        (".cpu().numpy()", ".numpy()", "can't convert cuda:0"),
    ),
    "whitening in float64": (
        ("mps", vae_stage, stages, "vae_stage"),
        (".flatten(0, 1))  #", ".flatten(0, 1).to(machine.device))  #", "float64|one device"),
    ),
    "whitening of weights in float64": (
        ("mps", vae_stage, checkpoints.Writer, "save"),
        ("ema.cpu() if", "ema if", "float64|one device"),
    ),
    "noise by a generator of the host": (
        ("cuda", video_stage, noise, "draw"),
        ("generator=g)", "generator=g, device=device)", "'cuda' generator"),
    ),
    "words that stay on the host": (
        ("cuda", video_stage, model.PixelDance, "encode_text"),
        (".to(self.device)", "", "all tensors must be on one device"),
    ),
    "a choice that stays on the host": (
        ("cuda", video_stage, training.DiffusionLoss, "forward"),
        ("(u_last >= config.eta).to(device)", "u_last >= config.eta", "must be on one device"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_put_back_is_found(folder, monkeypatch, fault):
    (kind, work, *function), (now, then, message) = FAULTS[fault]
    put_back(monkeypatch, *function, now, then)
    monkeypatch.setattr(training, "draw", noise.draw)  # others know these two by their own name
    monkeypatch.setitem(stages.STAGES, "vae", stages.vae_stage)
    with pretend(kind), pytest.raises((TypeError, RuntimeError), match=message):
        work()


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A process group of one, that stands for two."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield SimpleNamespace(world_size=2)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("mended", [True, False])
def test_moments_resume_on_a_gpu(tmp_path, monkeypatch, mended):
    """Fused Adam refuses a number of steps on the host: where torch's own ZeRO leaves it [pytorch
    issue 124133], and where ours would if it were not brought back."""
    if not mended:
        put_back(monkeypatch, checkpoints, "load", "x.to(p.device, copy=True)", "x.clone()")
    with pretend("cuda"):

        def make():
            objective = nn.Linear(3, 4)
            stage = Stage("x", objective, objective, 9, 0.1, None, lambda ema: None)
            return Trainee(stage, config, machine)

        def step(trainee):
            trainee.objective(torch.ones(2, 3, device="cuda")).sum().backward()
            trainee.step(0, 0.9)

        config = make_config("toy", device="cuda", compile="off")
        machine = Machine(config)
        step(trainee := make())
        writer = checkpoints.Writer(tmp_path, config, machine, lambda ema: None)
        writer.save(1, trainee)
        writer.finish()
        assert checkpoints.resume(tmp_path, config, trainee := make()) == 1
        if mended:
            step(trainee)
        else:
            with pytest.raises(RuntimeError, match="must be on one device"):
                step(trainee)


@pytest.mark.parametrize("mended", [True, False])
def test_bad_samples_count_once_in_a_pinned_batch(monkeypatch, mended):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
    batch = Batches(ToyWorld(0, World(16, 2)))[0, "clip", range(2)]
    counts = {"damaged": 2} if mended else Counter(damaged=2)
    assert type(batch.counts) is dict
    pinned = pin_memory(batch._replace(counts=counts))
    assert pinned.counts["damaged"] == (2 if mended else 4)


def test_a_card_that_emulates_bfloat16_computes_in_float32():
    with pretend("cuda", bfloat16=False):
        assert choose_dtype("auto", "cuda") == torch.float32
    with pretend("cuda"):
        assert choose_dtype("auto", "cuda") == torch.bfloat16
    assert choose_dtype("auto", "mps") == torch.float32
