"""Config files and weights of diffusers and transformers, to and from ours: dict to dict.

Their tensors have our names already [hub format]. What does differ: fields of `config.json`, and
the UNets with fewer input channels than ours.
"""

import warnings

import torch.nn.functional as F
from torch import Tensor

from tinydance.weights.files import pick

UNET_FIELDS = "in_channels out_channels block_out_channels layers_per_block attention_head_dim"
UNET_FIELDS += " cross_attention_dim norm_num_groups temporal_dropout"
# Of a scheduler: what the network was trained with, and not how a sampler walks.
TRAINED_WITH = "num_train_timesteps beta_start beta_end beta_schedule prediction_type"
TRAINED_WITH += " rescale_betas_zero_snr"
SAMPLERS = ("DDIMScheduler", "DDPMScheduler")  # those that are ours too


def read_unet_config(config: dict) -> dict:
    """Return our UNet's fields from the file of a UNet2DConditionModel or a UNet3DConditionModel.
    Raises ValueError for other kinds of network."""
    needed = ("in_channels", "out_channels", "block_out_channels", "down_block_types")
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"this config.json is not a UNet's: it lacks {', '.join(missing)}")
    fields, kinds = pick(config, UNET_FIELDS.split()), config["down_block_types"]
    # The 2-D class calls the *number* of heads `attention_head_dim` (diffusers issue 2011), as one
    # number or one per level; the 3-D class means the width of a head, and so do we.
    widths, is_2d = fields["block_out_channels"], kinds[0].endswith("2D")
    sizes = fields.get("attention_head_dim", 8 if is_2d else 64)
    sizes = sizes if isinstance(sizes, tuple) else (sizes,) * len(widths)
    others = [width // size for width, size in zip(widths, sizes, strict=True)]
    head_widths, counts = (others, sizes) if is_2d else (sizes, others)
    fields["attention_head_dim"] = head_widths[0]
    if len({*head_widths}) > 1:  # SD 1.x has 8 heads at every level, SD 2.x a head width of 64
        fields["num_attention_heads"] = counts[0]
        if len({*counts}) > 1:
            raise ValueError(f"neither heads ({counts}) nor their widths ({head_widths}) are one")
    # published networks see z_t alone, ours sees [z_t, c_image]
    fields["in_channels"] = max(fields["in_channels"], 2 * fields["out_channels"])
    fields["attention_levels"] = tuple(kind.startswith("CrossAttn") for kind in kinds)
    return fields


def write_unet_config(fields: dict, spatial: bool = False) -> dict:
    """Return the file of a UNet3DConditionModel; spatial: that of its image model, a 2-D one."""
    kind = "2D" if spatial else "3D"
    config = {"_class_name": f"UNet{kind}ConditionModel", **fields}
    attends, count = config.pop("attention_levels"), config.pop("num_attention_heads", 0)
    widths, head_width = fields["block_out_channels"], fields["attention_head_dim"]
    if spatial:
        heads = [count or width // head_width for width in widths]
        config |= {"in_channels": fields["out_channels"], "attention_head_dim": heads}
        config["use_linear_projection"] = True
    elif count:
        config["attention_head_dim"] = [width // count for width in widths]
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


def read_scheduler_config(config: dict) -> dict:
    """Return our Schedule's fields from the file of any of diffusers' schedulers. Of a sampler that
    we do not have, what the network was trained with counts, and a warning says so. Raises
    ValueError for betas that are no formula."""
    if config.get("trained_betas") is not None:
        raise ValueError("it has trained_betas; only betas by a formula are known")
    name = config.get("_class_name", SAMPLERS[0])
    if name in SAMPLERS and config.get("timestep_spacing") != "linspace":
        return config
    used = "its betas and prediction type are used, with our own sampler"
    warnings.warn(f"the model's scheduler is {name}: {used}", stacklevel=3)
    fields = pick(config, TRAINED_WITH.split())
    is_zero = fields.get("rescale_betas_zero_snr")  # then only the last step is pure noise
    return fields | ({"timestep_spacing": "trailing"} if is_zero else {})


def write_model_index(spatial: bool) -> dict:
    """Return the file by which diffusers' `DiffusionPipeline` knows what is in a model folder."""
    kind, pipeline = ("2D", "StableDiffusion") if spatial else ("3D", "TextToVideoSD")
    index = {"_class_name": f"{pipeline}Pipeline", "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"unet": ["diffusers", f"UNet{kind}ConditionModel"]}
    index |= {"scheduler": ["diffusers", SAMPLERS[0]]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    return index | ({"requires_safety_checker": False} if spatial else {})


def write_vae_config(fields: dict) -> dict:
    """Return the file of an AutoencoderKL."""
    levels = len(fields["block_out_channels"])
    config = {"_class_name": "AutoencoderKL", **fields, "out_channels": fields["in_channels"]}
    config["down_block_types"] = ["DownEncoderBlock2D"] * levels
    return config | {"up_block_types": ["UpDecoderBlock2D"] * levels, "act_fn": "silu"}


def write_text_config(fields: dict) -> dict:
    """Return the file of a CLIPTextModel."""
    return fields | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
