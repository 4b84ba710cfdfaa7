"""Config files and weights of diffusers and transformers, to and from ours: dict to dict.

Their tensors have our names already [hub format]. What does differ: fields of `config.json`, and
the UNets with fewer input channels than ours.
"""

import torch.nn.functional as F
from torch import Tensor

from tinydance.weights.files import pick

UNET_FIELDS = "in_channels out_channels block_out_channels layers_per_block attention_head_dim"
UNET_FIELDS += " cross_attention_dim norm_num_groups temporal_dropout"


def read_unet_config(config: dict) -> dict:
    """Return our UNet's fields from the file of a UNet2DConditionModel or a UNet3DConditionModel.
    Raises ValueError for other kinds, Stable Diffusion 1.x's UNet among them."""
    needed = ("in_channels", "out_channels", "block_out_channels", "down_block_types")
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"this config.json is not a UNet's: it lacks {', '.join(missing)}")
    fields, kinds = pick(config, UNET_FIELDS.split()), config["down_block_types"]
    if kinds[0].endswith("2D"):
        # The 2-D class calls the *number* of heads `attention_head_dim` (diffusers issue 2011), as
        # one number or one per level; the 3-D class means the width of a head, and so do we.
        widths, heads = fields["block_out_channels"], fields.get("attention_head_dim", 64)
        heads = heads if isinstance(heads, tuple) else (heads,) * len(widths)
        head_widths = {width // count for width, count in zip(widths, heads)}
        # SD 1.x has 8 heads at every level, and convolutions where SD 2.x projects linearly.
        if len(head_widths) > 1 or not config.get("use_linear_projection"):
            kind = "Stable Diffusion 2's kind (one head width, linear projections)"
            raise ValueError(f"this UNet is not of {kind}: use a Stable Diffusion 2.x folder")
        fields["attention_head_dim"] = head_widths.pop()
    # published networks see z_t alone, ours sees [z_t, c_image]
    fields["in_channels"] = max(fields["in_channels"], 2 * fields["out_channels"])
    fields["attention_levels"] = tuple(kind.startswith("CrossAttn") for kind in kinds)
    return fields


def write_unet_config(fields: dict, spatial: bool = False) -> dict:
    """Return the file of a UNet3DConditionModel; spatial: that of its image model, a 2-D one."""
    kind = "2D" if spatial else "3D"
    config = {"_class_name": f"UNet{kind}ConditionModel", **fields}
    attends = config.pop("attention_levels")
    if spatial:
        heads = [width // fields["attention_head_dim"] for width in fields["block_out_channels"]]
        config |= {"in_channels": fields["out_channels"], "attention_head_dim": heads}
        config["use_linear_projection"] = True
    config["down_block_types"] = [f"{'CrossAttn' * a}DownBlock{kind}" for a in attends]
    config["up_block_types"] = [f"{'CrossAttn' * a}UpBlock{kind}" for a in reversed(attends)]
    config |= {"act_fn": "silu", "downsample_padding": 1, "mid_block_scale_factor": 1}
    return config | {"norm_eps": 1e-5}


def is_temporal(name: str) -> bool:
    """Return whether a parameter of this name belongs to one of the UNet's temporal layers."""
    return "temp_convs" in name or "temp_attentions" in name or name.startswith("transformer_in")


def widen_conv_in(tensors: dict[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """Give conv_in at least `in_channels` input channels; the new ones have the weight zero: so a
    network that never saw c_image predicts the same with it as without [SD inpainting]."""
    weight = tensors.get("conv_in.weight")  # (c_out, c_in, 3, 3)
    if weight is None or weight.shape[1] >= in_channels:
        return tensors
    missing = in_channels - weight.shape[1]
    return tensors | {"conv_in.weight": F.pad(weight, (0, 0, 0, 0, 0, missing))}


def spatial_only(tensors: dict[str, Tensor], out_channels: int) -> dict[str, Tensor]:
    """Return the image model inside a video model: no temporal layers, and conv_in for z_t only."""
    spatial = {name: tensor for name, tensor in tensors.items() if not is_temporal(name)}
    spatial["conv_in.weight"] = spatial["conv_in.weight"][:, :out_channels].contiguous()
    return spatial


def write_vae_config(fields: dict) -> dict:
    """Return the file of an AutoencoderKL."""
    levels = len(fields["block_out_channels"])
    config = {"_class_name": "AutoencoderKL", **fields, "out_channels": fields["in_channels"]}
    config["down_block_types"] = ["DownEncoderBlock2D"] * levels
    return config | {"up_block_types": ["UpDecoderBlock2D"] * levels, "act_fn": "silu"}


def write_text_config(fields: dict) -> dict:
    """Return the file of a CLIPTextModel."""
    return fields | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
