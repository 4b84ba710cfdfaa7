"""Weights: the format, hostile files, strict loading, and the names of older checkpoints.

`keys/` lists the tensors (name and shape) of the published checkpoints. Here they live on PyTorch's
meta device, where a tensor has a shape and no data, so renaming a whole model takes milliseconds.
"""

import ast
import gzip
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from torch import nn

from tinydance.unet import UNet, UNetConfig
from tinydance.weights import load_into, load_weights, read_config
from tinydance.weights.diffusers import (
    is_temporal,
    read_unet_config,
    spatial_only,
    widen_conv_in,
    write_text_config,
    write_unet_config,
    write_vae_config,
)
from tinydance.weights.files import pick, whole_file, write_json
from tinydance.weights.ldm import text_from_any, unet_from_ldm, vae_from_ldm
from tinydance.weights.safetensors import load_safetensors, save_safetensors

KEYS = Path(__file__).parent / "keys"


def shapes_of(checkpoint):
    """{name: shape} of a published checkpoint."""
    with gzip.open(KEYS / f"{checkpoint}_keys.txt.gz", "rt") as file:
        pairs = [line.split(" ", 1) for line in file]
    return {name: tuple(ast.literal_eval(shape)) for name, shape in pairs}


def on_meta(shapes, prefix=""):
    return {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TENSORS = {
    "float": torch.randn(3, 5),
    "half": torch.randn(3).half(),
    "brain": torch.randn(7).bfloat16(),
    "double": torch.randn(2, dtype=torch.float64),
    "bool": torch.tensor([True, False, True]),
    "byte": torch.arange(5, dtype=torch.uint8),
    "signed": torch.arange(-3, 2, dtype=torch.int8),
    "short": torch.arange(3, dtype=torch.int16),
    "int": torch.arange(3, dtype=torch.int32),
    "long": torch.tensor(2**40),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(4, 6).T,
}


# ---- the format ----------------------------------------------------------------------------------


def test_what_is_saved_is_read_back_bit_for_bit_in_every_dtype(tmp_path):
    save_safetensors(TENSORS, tmp_path / "a.safetensors")
    loaded = load_safetensors(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_the_same_tensors_in_another_order_give_the_same_bytes(tmp_path):
    save_safetensors(TENSORS, tmp_path / "a.safetensors")
    save_safetensors(dict(reversed(TENSORS.items())), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_file_has_the_layout_that_the_format_prescribes(tmp_path):
    save_safetensors({"w": torch.tensor([1.0, 2.0])}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header == {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    assert length % 8 == 0 and content[8 + length :] == b"\0\0\x80\x3f\0\0\0\x40"


def test_tensors_that_start_at_odd_bytes_are_read_too(tmp_path):
    header = {"a": entry([1], 0, 1, "U8"), "b": entry([1], 1, 5)}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"\7\0\0\x80\x3f"))
    loaded = load_safetensors(tmp_path / "a.safetensors")
    assert loaded["a"].item() == 7 and loaded["b"].item() == 1.0


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    save_safetensors({"w": torch.zeros(3)}, tmp_path / "a.safetensors")
    load_safetensors(tmp_path / "a.safetensors")["w"].fill_(1)
    assert load_safetensors(tmp_path / "a.safetensors")["w"].sum() == 0


def test_a_dtype_that_the_format_lacks_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="complex"):
        save_safetensors({"w": torch.zeros(3, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_half_way_leaves_the_old_file_and_no_rest(tmp_path):
    save_safetensors({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="disk"), whole_file(tmp_path / "a.safetensors") as file:
        file.write(b"half")
        raise RuntimeError("the disk is full")
    assert load_safetensors(tmp_path / "a.safetensors")["w"].sum() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# ---- hostile and damaged files -------------------------------------------------------------------

HOSTILE = {
    "an empty file": b"",
    "a header longer than the file": (2**63).to_bytes(8, "little") + b"{}",
    "a header above the limit": (100_000_001).to_bytes(8, "little") + b"{}",
    "no JSON": safetensors_bytes(b"not JSON"),
    "no UTF-8": safetensors_bytes(b'{"\xff": 1}'),
    "a list": safetensors_bytes([1, 2]),
    "an endless nesting": safetensors_bytes(b"[" * 100_000),
    "a name twice": safetensors_bytes(
        b'{"w": %s, "w": %s}' % (2 * (json.dumps(entry()).encode(),)), bytes(8)
    ),
    "a field twice": safetensors_bytes(
        b'{"w": {"dtype": "F32", "shape": [3], "shape": [2], "data_offsets": [0, 8]}}', bytes(8)
    ),
    "an entry that is a number": safetensors_bytes({"w": 3}),
    "a field that lacks": safetensors_bytes({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an unknown dtype": safetensors_bytes({"w": entry(dtype="F4")}, bytes(8)),
    "a dtype that is a list": safetensors_bytes({"w": entry(dtype=["F32"])}, bytes(8)),
    "a negative side": safetensors_bytes({"w": entry([-1, -2])}, bytes(8)),
    "a side that is a fraction": safetensors_bytes({"w": entry([2.0])}, bytes(8)),
    "a side that is a truth value": safetensors_bytes({"w": entry([True], 0, 4)}, bytes(4)),
    "a shape that is a text": safetensors_bytes({"w": {**entry(), "shape": "2"}}, bytes(8)),
    "a shape that overflows": safetensors_bytes({"w": entry([2**62, 4])}, bytes(8)),
    "an empty shape that overflows": safetensors_bytes({"w": entry([0, 2**63], 0, 0)}),
    "a size other than the shape": safetensors_bytes({"w": entry([3])}, bytes(8)),
    "offsets that run backwards": safetensors_bytes({"w": entry([2], 8, 0)}, bytes(8)),
    "three offsets": safetensors_bytes({"w": {**entry(), "data_offsets": [0, 8, 8]}}, bytes(8)),
    "tensors that overlap": safetensors_bytes(
        {"v": entry(), "w": entry(begin=4, end=12)}, bytes(12)
    ),
    "a gap": safetensors_bytes({"v": entry(), "w": entry(begin=12, end=20)}, bytes(20)),
    "a truncated end": safetensors_bytes({"w": entry()}, bytes(7)),
    "bytes behind the end": safetensors_bytes({"w": entry()}, bytes(9)),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_file_is_one_value_error_that_names_the_file(fault, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[fault])
    with pytest.raises(ValueError, match="bad.safetensors"):
        load_safetensors(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_git_lfs_pointer_is_told_apart_from_damage(name, tmp_path):
    (tmp_path / name).write_bytes(HOSTILE["a git-lfs pointer"])
    with pytest.raises(ValueError, match="git lfs pull"):
        load_weights(tmp_path / name)


class Attack:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_code_is_refused_and_never_runs(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Attack(marker)}, tmp_path / "zip.ckpt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Attack(marker), protocol=2))
    for name in ("zip.ckpt", "plain.bin"):
        with pytest.raises(ValueError, match="pickled code"):
            load_weights(tmp_path / name)
    assert not marker.exists()
    torch.load(tmp_path / "zip.ckpt", weights_only=False)
    assert marker.exists(), "the attack works, so its refusal above is worth something"


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\3\4 cut off"])
def test_a_damaged_pytorch_file_is_one_value_error_that_names_it(content, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="bad.ckpt"):
        load_weights(tmp_path / "bad.ckpt")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    torch.save({"w": torch.randn(1000)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.pt"):
        load_weights(tmp_path / "a.pt")


# ---- files and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_lightning_checkpoint_is_unwrapped(zipped, tmp_path):
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "global_step": 875000},
        tmp_path / "a.ckpt",
        _use_new_zipfile_serialization=zipped,
    )
    assert load_weights(tmp_path / "a.ckpt")["w"].tolist() == [1, 1]


def test_the_prefixes_of_ddp_and_compile_fall_away(tmp_path):
    names = [
        "module.a.weight",
        "_orig_mod.b.weight",
        "module._orig_mod.c.weight",
        "d._orig_mod.weight",
        "model.module_e.weight",
    ]
    save_safetensors({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    assert set(load_weights(tmp_path / "a.safetensors")) == {
        "a.weight",
        "b.weight",
        "c.weight",
        "d.weight",
        "model.module_e.weight",
    }


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
        "model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.bin",
        "pytorch_model.bin",
    ],
)
def test_a_folder_is_read_under_each_of_the_hubs_file_names(name, tmp_path):
    save = save_safetensors if name.endswith(".safetensors") else torch.save
    save({"w": torch.ones(2)}, tmp_path / name)
    assert load_weights(tmp_path)["w"].tolist() == [1, 1]


def test_full_precision_is_preferred_to_half_and_safetensors_to_pickles(tmp_path):
    for value, name in enumerate(["model.safetensors", "model.fp16.safetensors", "model.bin"]):
        tensors = {"w": torch.tensor(value)}
        (torch.save if name.endswith("bin") else save_safetensors)(tensors, tmp_path / name)
    assert load_weights(tmp_path)["w"] == 0


def test_a_model_in_shards_is_put_together(tmp_path):
    save_safetensors({"a": torch.ones(1)}, tmp_path / "part1.safetensors")
    save_safetensors({"b": torch.ones(1)}, tmp_path / "part2.safetensors")
    index = {"weight_map": {"a": "part1.safetensors", "b": "part2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(load_weights(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize("shards", [{}, {"a": "../secret.safetensors"}, ["a"]])
def test_an_index_that_points_out_of_its_folder_or_nowhere_is_refused(shards, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match="weight_map"):
        load_weights(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="no weights here"):
        load_weights(tmp_path)
    for name in ("lost.safetensors", "lost.ckpt"):
        with pytest.raises(ValueError, match=name):
            load_weights(tmp_path / name)
    with pytest.raises(ValueError, match="config.json"):
        read_config(tmp_path)


def test_a_config_is_read_back_as_it_was_written(tmp_path):
    write_json(tmp_path / "new" / "config.json", {"hidden_size": 32, "act": "gelu", "name": "é"})
    assert read_config(tmp_path / "new") == {"hidden_size": 32, "act": "gelu", "name": "é"}
    (tmp_path / "new" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json"):
        read_config(tmp_path / "new")


# ---- strict loading ------------------------------------------------------------------------------


def test_one_error_tells_all_that_does_not_fit_and_nothing_is_loaded():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = module[1].weight.clone()
    tensors = {
        "0.weight": torch.ones(3, 4),
        "1.weight": torch.ones(1, 3),
        "2.weight": torch.ones(1),
    }
    with pytest.raises(ValueError) as error:
        load_into(module, tensors)
    for told in (
        "2 missing (0.bias, 1.bias)",
        "1 unexpected (2.weight)",
        "1 of another shape (0.weight: (3, 4) for (3, 2))",
    ):
        assert told in str(error.value)
    assert torch.equal(module[1].weight, before)


def test_what_may_lack_keeps_its_initialisation():
    module = nn.ModuleDict({"spatial": nn.Linear(2, 2), "temporal": nn.Linear(2, 2)})
    before = module["temporal"].weight.clone()
    tensors = {"spatial.weight": torch.ones(2, 2).half(), "spatial.bias": torch.ones(2).half()}
    load_into(module, tensors, may_lack=lambda name: name.startswith("temporal."))
    assert torch.equal(module["temporal"].weight, before)
    assert module["spatial"].weight.dtype == torch.float32 and module["spatial"].weight.sum() == 4


# ---- the names of older checkpoints --------------------------------------------------------------


def test_the_unet_of_stable_diffusions_ckpt_gets_our_names_and_shapes():
    tensors = on_meta(shapes_of("sd21_ldm"), "model.diffusion_model.")
    tensors |= on_meta({"first_stage_model.x": (1,), "model_ema.decay": ()})
    assert shapes(unet_from_ldm(tensors)) == shapes_of("sd21")


def test_modelscopes_original_file_gets_our_names_and_shapes():
    assert shapes(unet_from_ldm(on_meta(shapes_of("ms_orig")))) == shapes_of("ms")


def test_stable_diffusions_unet_is_a_part_of_modelscopes():
    assert shapes_of("sd21").items() <= shapes_of("ms").items()


def test_videocrafter2_is_modelscope_and_an_embedding_of_the_frame_rate():
    renamed, ours = shapes(unet_from_ldm(on_meta(shapes_of("videocrafter2")))), shapes_of("ms")
    assert ours.items() <= renamed.items()
    assert {name.split(".")[0] for name in renamed.keys() - ours.keys()} == {"fps_embedding"}
    assert len(renamed) == len(ours) + 4


def test_dynamicrafter_is_that_with_image_attention_and_eight_input_channels():
    renamed, ours = shapes(unet_from_ldm(on_meta(shapes_of("dynamicrafter512")))), shapes_of("ms")
    ours["conv_in.weight"] = (320, 8, 3, 3)
    assert ours.items() <= renamed.items()
    extra = renamed.keys() - ours.keys()
    image_attention = ("attn2.to_k_ip.weight", "attn2.to_v_ip.weight")
    assert sum(name.endswith(image_attention) for name in extra) == 32
    assert len(extra) == 32 + 4


def test_the_autoencoder_of_an_ldm_checkpoint_gets_our_names_and_shapes():
    tensors = on_meta(shapes_of("sd_vae_ldm"), "first_stage_model.")
    assert shapes(vae_from_ldm(tensors)) == shapes_of("vae")


def test_the_decoders_blocks_are_counted_from_the_other_end():
    renamed = vae_from_ldm({"decoder.up.0.block.1.conv1.weight": torch.zeros(1)})
    assert list(renamed) == ["decoder.up_blocks.3.resnets.1.conv1.weight"]


def test_the_attention_of_the_hubs_older_autoencoders_gets_todays_names():
    today = shapes_of("vae")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = on_meta(today)
    for ours, theirs in old.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    assert len(tensors.keys() - today.keys()) == 16
    assert shapes(vae_from_ldm(tensors)) == today


@pytest.mark.parametrize("rule, checkpoint", [(unet_from_ldm, "ms"), (vae_from_ldm, "vae")])
def test_names_that_are_ours_already_stay(rule, checkpoint):
    assert shapes(rule(on_meta(shapes_of(checkpoint)))) == shapes_of(checkpoint)


def test_openclips_last_block_and_all_that_is_not_text_fall_away():
    names = [
        "token_embedding.weight",
        "positional_embedding",
        "text_projection",
        "logit_scale",
        "attn_mask",
        "visual.conv1.weight",
        "transformer.resblocks.0.ln_1.weight",
        "transformer.resblocks.22.mlp.c_proj.weight",
        "transformer.resblocks.23.ln_1.weight",
    ]
    prefix = "cond_stage_model.model."
    renamed = text_from_any({prefix + name: torch.zeros(3) for name in names}, layers=23)
    assert set(renamed) == {
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.0.layer_norm1.weight",
        "text_model.encoder.layers.22.mlp.fc2.weight",
    }


def test_a_text_tower_is_recognised_in_each_of_its_layouts():
    ours = {"text_model.final_layer_norm.bias", "text_model.encoder.layers.0.layer_norm1.weight"}
    openclip = {"ln_final.bias", "transformer.resblocks.0.ln_1.weight"}
    layouts = [
        ours,
        {name.removeprefix("text_model.") for name in ours},
        ours | {"text_model.embeddings.position_ids"},
        {"cond_stage_model.transformer." + name for name in ours} | {"first_stage_model.x"},
        openclip,
        {"cond_stage_model.model." + name for name in openclip} | {"first_stage_model.x"},
    ]
    for names in layouts:
        tensors = {name: torch.zeros(1) for name in names}
        assert set(text_from_any(tensors, layers=1)) == ours, names


# ---- config files, and networks with fewer channels ----------------------------------------------

MODELSCOPE = {  # the config.json that ModelScope published, as far as it describes the network
    "_class_name": "UNet3DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "cross_attention_dim": 1024,
    "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
    "sample_size": 32,
}
STABLE_DIFFUSION = MODELSCOPE | {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
TINY = replace(reference.TINY["unet"], attention_levels=(False, True), temporal_dropout=0.1)


@pytest.mark.parametrize("published", [MODELSCOPE, STABLE_DIFFUSION])
def test_a_published_config_of_four_channels_means_the_papers_network_of_eight(published):
    assert UNetConfig(**read_unet_config(published)) == UNetConfig()


@pytest.mark.parametrize("published", [MODELSCOPE, STABLE_DIFFUSION])
def test_a_network_of_more_channels_keeps_them(published):
    assert read_unet_config(published | {"in_channels": 12})["in_channels"] == 12


def test_heads_that_follow_no_rule_and_another_network_are_refused():
    with pytest.raises(ValueError, match="neither heads .* nor their widths"):
        read_unet_config(STABLE_DIFFUSION | {"attention_head_dim": [5, 10, 20, 10]})
    with pytest.raises(ValueError, match="not a UNet's: it lacks in_channels, out_channels"):
        read_unet_config({"hidden_size": 64})


def test_a_written_config_is_read_back_and_says_what_the_published_one_says():
    fields = read_unet_config(MODELSCOPE | {"temporal_dropout": 0.0})
    for spatial, published in ((False, MODELSCOPE), (True, STABLE_DIFFUSION)):
        written = json.loads(json.dumps(write_unet_config(fields, spatial)))
        assert read_unet_config(written) == fields
        same = published.keys() - {"sample_size", "in_channels"}
        assert {name: written[name] for name in same} == {name: published[name] for name in same}
        assert written["in_channels"] == (4 if spatial else 8)


def test_the_configs_of_autoencoder_and_text_tower_are_read_back():
    vae = {"in_channels": 3, "latent_channels": 4, "block_out_channels": (8, 16)}
    text = {"vocab_size": 50, "hidden_size": 16, "hidden_act": "gelu"}
    for fields, write in ((vae, write_vae_config), (text, write_text_config)):
        written = json.loads(json.dumps(write(fields)))
        assert pick(written | {"transformers_version": "4"}, list(fields)) == fields


def save_four_channels(config, unet, folder):
    """Write the folder of a video model that sees z_t alone, as ModelScope published its own."""
    tensors = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :4]
    write_json(folder / "config.json", write_unet_config(vars(config)) | {"in_channels": 4})
    save_safetensors(tensors, folder / "diffusion_pytorch_model.safetensors")


@torch.no_grad()
def test_a_four_channel_folder_of_a_video_model_becomes_an_eight_channel_network(tmp_path):
    torch.manual_seed(0)
    before = UNet(TINY).eval()
    for tensor in before.state_dict().values():
        tensor.copy_(0.1 * torch.randn_like(tensor))  # nothing is at its zero start
    save_four_channels(TINY, before, tmp_path)
    unet = UNet.from_folder(tmp_path).eval()
    assert unet.config.in_channels == 8
    weight = unet.conv_in.weight
    assert torch.equal(weight[:, :4], before.conv_in.weight[:, :4]) and not weight[:, 4:].any()
    z_t, c_image = torch.randn(2, 1, 3, 4, 4, 4)
    t, c_text = torch.tensor([500]), torch.randn(1, 7, 16)
    seen, blind = (
        unet(torch.cat([z_t, condition], dim=2), t, c_text)
        for condition in (c_image, torch.zeros_like(c_image))
    )
    assert torch.equal(seen, blind), "the channels of c_image start at zero"


def test_a_folder_can_be_opened_with_more_channels_than_it_has(tmp_path):
    save_four_channels(TINY, UNet(TINY), tmp_path)
    unet = UNet.from_folder(tmp_path, in_channels=12)
    assert unet.conv_in.weight.shape[1] == 12 and not unet.conv_in.weight[:, 4:].any()


def test_conv_in_is_widened_and_never_narrowed():
    tensors = {"conv_in.weight": torch.ones(2, 12, 3, 3), "conv_in.bias": torch.ones(2)}
    assert widen_conv_in(tensors, 12) == tensors == widen_conv_in(tensors, 8)
    wide = widen_conv_in(tensors, 16)
    assert wide["conv_in.weight"].sum() == 2 * 12 * 9 and wide["conv_in.weight"].shape[1] == 16
    assert tensors["conv_in.weight"].shape[1] == 12, "the tensors that were given are left alone"
    assert widen_conv_in({}, 8) == {}


def test_the_image_model_inside_modelscope_is_stable_diffusions_unet():
    video = shapes_of("ms") | {"conv_in.weight": (320, 8, 3, 3)}
    assert shapes(spatial_only(on_meta(video), out_channels=4)) == shapes_of("sd21")
    assert {name for name in video if not is_temporal(name)} == set(shapes_of("sd21"))
