"""Weights in and out: .safetensors, .ckpt, a folder of the hub; and the rules that rename tensors.

Our modules are named as the hub's checkpoints name theirs, so Stable Diffusion's and ModelScope's
files load with no rule at all. The rules below are for checkpoints in the older LDM layout.

    bytes <-> tensors     load_safetensors, save_safetensors, load_weights
    config.json <-> dict  read_config, write_config
    tensors -> module     load_into: strict, so that a wrong file is an error, not a bad picture
    old names -> ours     unet_from_ldm, vae_from_ldm, vae_attention_names, text_from_openclip

A file from the internet is not trusted: pickled code is refused, and every offset is checked.
Read `clip.py` before this file, `data.py` after it. Not here: downloads; resuming a training run.
"""

import re

from torch import Tensor

# ---- old names to ours ---------------------------------------------------------------------------
# Dict to dict. A name that no rule knows passes unchanged, so that `load_into` reports it; a name
# that is ours already passes unchanged too.

UNET_TOP = {"time_embed.0.": "time_embedding.linear_1.",
            "time_embed.2.": "time_embedding.linear_2.",
            "input_blocks.0.0.": "conv_in.", "input_blocks.0.1.": "transformer_in.",
            "init_attn.0.": "transformer_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out."}


RESNET_PARTS = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
                "out_layers.0": "norm2", "out_layers.3": "conv2",
                "skip_connection": "conv_shortcut"}


VAE_RULES = ((r"\.down\.(\d)\.", r".down_blocks.\1."),
             (r"\.up\.(\d)\.", lambda match: f".up_blocks.{3 - int(match[1])}."),  # LDM counts back
             (r"_blocks\.(\d)\.block\.", r"_blocks.\1.resnets."),
             (r"\.(down|up)sample\.", r".\1samplers.0."),
             (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
             (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
             (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
             (r"\.nin_shortcut\.", ".conv_shortcut."),
             (r"coder\.norm_out\.", "coder.conv_norm_out."))


VAE_ATTENTION = {  # LDM's names, then those of diffusers before 2023
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


TEXT_TOP = {"token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}


TEXT_PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def _below(tensors, prefix):
    """The tensors whose names start with the prefix, without it; all tensors where none does."""
    below = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return below or tensors


def unet_from_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet of SD 2.x, ModelScope's original, VideoCrafter2 or DynamiCrafter, renamed [SD].

    Also of a whole LDM checkpoint, which has it as `model.diffusion_model.*`. Tensors that our UNet
    has no place for (`fps_embedding.*`, `attn2.to_k_ip`, `attn2.to_v_ip`) stay in the dict."""
    renamed = {}
    for name, tensor in _below(tensors, "model.diffusion_model.").items():
        if name.endswith(("proj_in.weight", "proj_out.weight")) and tensor.ndim == 3:
            tensor = tensor.squeeze(-1)  # a Conv1d of width 1 there, a Linear here
        renamed[_unet_name(name)] = tensor
    return renamed


def _unet_name(name):
    for old, new in UNET_TOP.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    match = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)\.(?:(\d+)\.)?(.+)", name)
    if match is None:
        return name
    stack, i, kind, rest = match[1], int(match[2]), match[3], match[4]
    part = next((old for old in RESNET_PARTS if rest.startswith(old + ".")), None)
    temporal_conv = rest.startswith("temopral_conv.")  # the published spelling
    if stack == "input":  # 0 is conv_in; then three places a block, the third for the downsampler
        block, layer = f"down_blocks.{(i - 1) // 3}", (i - 1) % 3
    elif stack == "output":
        block, layer = f"up_blocks.{i // 3}", i % 3
    else:  # a resnet, an attention, where it is a video's a temporal attention, a resnet
        block, layer, kind = "mid_block", int(i > 0 and bool(part or temporal_conv)), match[2]
    if part:
        return f"{block}.resnets.{layer}.{RESNET_PARTS[part]}{rest.removeprefix(part)}"
    if temporal_conv:
        return f"{block}.temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}"
    if rest.startswith("op."):
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{block}.upsamplers.0.{rest}"
    return f"{block}.{'temp_attentions' if kind == '2' else 'attentions'}.{layer}.{rest}"


def vae_from_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder of an LDM checkpoint, whole or cut out, under our names [SD]."""
    renamed = {}
    for name, tensor in _below(tensors, "first_stage_model.").items():
        if ".mid.attn_1." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # 1x1 convs there, Linear here
        for old, new in VAE_RULES:
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return vae_attention_names(renamed)


def vae_attention_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's attention as diffusers names it today; SD's files on the hub still have
    query, key, value and proj_attn [hub format]."""
    def today(match):
        return f".attentions.0.{VAE_ATTENTION.get(match[1], match[1])}.{match[2]}"
    return {re.sub(r"\.attentions\.0\.(\w+)\.(weight|bias)$", today, name): t
            for name, t in tensors.items()}


def text_from_openclip(tensors: dict[str, Tensor], layers: int = 23) -> dict[str, Tensor]:
    """The first `layers` blocks of OpenCLIP's text tower under the hub's names [SD].

    SD 2.x takes c_text after block 23 of 24, so the hub's files, and ours, lack the last.
    A whole LDM checkpoint has the tower as `cond_stage_model.model.*`. The image side, projections
    and logit_scale are dropped."""
    renamed = {}
    for name, tensor in _below(tensors, "cond_stage_model.model.").items():
        if name in TEXT_TOP:
            renamed[f"text_model.{TEXT_TOP[name]}"] = tensor
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if match is None or int(match[1]) >= layers:
            continue
        block, part, kind = f"text_model.encoder.layers.{match[1]}", match[2], match[3]
        if part == "attn.in_proj":  # queries, keys and values, one above the other
            for letter, third in zip("qkv", tensor.chunk(3)):
                renamed[f"{block}.self_attn.{letter}_proj.{kind}"] = third
        else:
            renamed[f"{block}.{TEXT_PARTS.get(part, part)}.{kind}"] = tensor
    return renamed
