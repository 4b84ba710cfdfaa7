"""Names of older checkpoints -> ours: latent-diffusion's (LDM), in Stable Diffusion's single files
and the video models made from it, OpenCLIP's, and the hub's autoencoders' of before 2023.

A table's rules are applied in order. A name that none knows stays, and `load_into` reports it."""

import re

from torch import Tensor

LAYER = r"^(mid_block|down_blocks\.\d|up_blocks\.\d)\.(\d)"
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
RESNET |= {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
RESNET_NAMES = "|".join(map(re.escape, RESNET))
UNET_RULES = (
    (r"^time_embed\.([02])\.", lambda m: f"time_embedding.linear_{int(m[1]) // 2 + 1}."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^(input_blocks\.0\.1|init_attn\.0)\.", "transformer_in."),  # ModelScope's, VideoCrafter's
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    # PATH.PLACE.PART: the places of a path run through all levels, three to a level, after conv_in.
    # Parts: 0 is a layer's resnet, 1 its attention, 2 its temporal attention, the last its sampler.
    (r"^input_blocks\.(\d+)", lambda m: "down_blocks.{}.{}".format(*divmod(int(m[1]) - 1, 3))),
    (r"^output_blocks\.(\d+)", lambda m: "up_blocks.{}.{}".format(*divmod(int(m[1]), 3))),
    # The middle has no parts: resnet, attention, a video's temporal attention, resnet.
    (r"^middle_block\.(\d)\.(?=norm|proj|transformer)", r"mid_block.0.\1."),
    (r"^middle_block\.(\d)\.", lambda m: f"mid_block.{min(int(m[1]), 1)}.0."),
    # BLOCK.LAYER.PART: "temporal" is misspelt in every published file.
    (rf"{LAYER}\.0\.({RESNET_NAMES})\.", lambda m: f"{m[1]}.resnets.{m[2]}.{RESNET[m[3]]}."),
    (rf"{LAYER}\.0\.temopral_conv\.", r"\1.temp_convs.\2."),
    (rf"{LAYER}(\.\d)?\.op\.", r"\1.downsamplers.0.conv."),
    (rf"{LAYER}(\.\d)?\.conv\.", r"\1.upsamplers.0.conv."),
    (rf"{LAYER}\.1\.", r"\1.attentions.\2."),
    (rf"{LAYER}\.2\.", r"\1.temp_attentions.\2."),
)
CONVOLVED = r"proj_(in|out)\.weight$"
VAE_RULES = (
    (r"\.down\.(\d)\.", r".down_blocks.\1."),
    # the decoder runs through its levels backwards: LDM calls its first one 3, diffusers 0
    (r"\.up\.(\d)\.", lambda m: f".up_blocks.{3 - int(m[1])}."),
    (r"_blocks\.(\d)\.block\.", r"_blocks.\1.resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    # the attention: q, k, v and proj_out in LDM; query, key, value and proj_attn on the hub, once
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.([qkv])(?:uery|ey|alue)?\.", r".attentions.0.to_\1."),
    (r"\.attentions\.0\.proj_(?:out|attn)\.", ".attentions.0.to_out.0."),
)
OPENCLIP_RULES = (
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_(fc|proj)\.", lambda m: f".mlp.fc{1 if m[1] == 'fc' else 2}."),
    (r"\.attn\.", ".self_attn."),
)


def rename(tensors: dict[str, Tensor], prefix: str, rules) -> dict[str, Tensor]:
    """Rename the part of a checkpoint whose names start with the prefix, or all if none does."""
    part = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    renamed = {}
    for name, tensor in (part or tensors).items():
        for old, new in rules:
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return renamed


def unet_from_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the UNet of SD, ModelScope's original, VideoCrafter2 or DynamiCrafter [SD]."""
    renamed = rename(tensors, "model.diffusion_model.", UNET_RULES)
    # convolutions of width 1 there, 2-D ones in SD 1.x on the hub too; a Linear here
    return {k: x.flatten(1) if re.search(CONVOLVED, k) else x for k, x in renamed.items()}


def vae_from_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an autoencoder of LDM, or of the hub before 2023, as the hub has it now [SD]."""
    renamed = rename(tensors, "first_stage_model.", VAE_RULES)
    # in the attention: a 1x1 convolution there, a Linear here
    flat = {k: x.flatten(1) for k, x in renamed.items() if ".attentions." in k and x.ndim == 4}
    return renamed | flat


def text_from_any(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Rename a text tower of the hub, also inside LDM's file, or of OpenCLIP [SD]. SD 2.x takes
    c_text after block 23 of OpenCLIP's 24: blocks from `layers` on are dropped, as on the hub, and
    so is what is not of the text tower: the image tower, projections, logit_scale."""
    if not any(name.endswith("transformer.resblocks.0.ln_1.weight") for name in tensors):
        rules = [(r"^(text_model\.)?", "text_model.")]  # transformers 5 writes no `text_model.`
        tensors = rename(tensors, "cond_stage_model.transformer.", rules)
        # files of older versions hold 0 ... 76 as position_ids
        return {name: x for name, x in tensors.items() if not name.endswith("position_ids")}
    renamed = {}
    for name, tensor in rename(tensors, "cond_stage_model.model.", OPENCLIP_RULES).items():
        block = re.match(r"text_model\.encoder\.layers\.(\d+)\.", name)
        if not name.startswith("text_model.") or (block and int(block[1]) >= layers):
            continue
        if ".in_proj_" in name:  # queries, keys and values in one tensor, stacked in rows
            for letter, third in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            renamed[name] = tensor
    return renamed
