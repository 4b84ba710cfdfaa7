"""The pseudo-3D UNet: Stable Diffusion's 2-D UNet with a temporal layer behind every spatial one.

"1D convolution layer along temporal dimension after 2D convolution layer, and 1D attention layer
along temporal dimension following 2D attention layer ... disabled for image input" [paper §3.1].
The arrangement is ModelScope's [ModelScope], the only public one that fits the paper's sentence
and size (1,411,245,380 parameters with 8 input channels); every parameter has the name that it
has in diffusers' `UNet3DConditionModel`, so SD 2.1's weights (686 spatial tensors) and ModelScope's
(1,480, all) load with no key map.

Read before: `sampling.py`, which calls it. Read after: `training.py`.
Not here: frame rate embeddings, causal masks, SD 1.x's convolutional projections.
"""




def from_diffusers_config(config: dict) -> dict:
    """The arguments of UNet from a `config.json` of UNet2DConditionModel or UNet3DConditionModel.

    The 2-D class calls the *number* of heads `attention_head_dim` (diffusers issue 2011), the 3-D
    class means the width of one. A 2-D file gets the paper's 8 input channels.
    Raises ValueError for what this file does not implement (SD 1.x's 8 heads at every width).
    """
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    is_2d = kinds[0].endswith("2D")
    head_dim = config.get("attention_head_dim", 64)
    if is_2d:
        counts = head_dim if isinstance(head_dim, list) else [head_dim] * len(widths)
        head_dims = {width // count for width, count in zip(widths, counts)}
        if len(head_dims) > 1 or not config.get("use_linear_projection"):
            raise ValueError(
                "this UNet is not of Stable Diffusion 2's kind (one head width, linear "
                "projections): use a Stable Diffusion 2.x folder"
            )
        head_dim = head_dims.pop()
    return {
        "in_channels": max(config["in_channels"], 8) if is_2d else config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": tuple(widths),
        "layers_per_block": config["layers_per_block"],
        "attention_head_dim": head_dim,
        "cross_attention_dim": config["cross_attention_dim"],
        "norm_num_groups": config.get("norm_num_groups", 32),
        "attention_levels": tuple(kind.startswith("CrossAttn") for kind in kinds),
        "temporal_dropout": config.get("temporal_dropout", 0.1),
    }


def to_diffusers_config(config: dict, spatial: bool = False) -> dict:
    """The `config.json` of UNet3DConditionModel, or of UNet2DConditionModel for an image model."""
    attend, kind = config["attention_levels"], "2D" if spatial else "3D"
    rest = {k: v for k, v in config.items() if k != "attention_levels"}
    if spatial:
        counts = [width // config["attention_head_dim"] for width in config["block_out_channels"]]
        rest |= {"in_channels": config["out_channels"], "attention_head_dim": counts}
        rest |= {"use_linear_projection": True}
    return {
        "_class_name": f"UNet{kind}ConditionModel",
        **rest,
        "down_block_types": [f"{'CrossAttn' * a}DownBlock{kind}" for a in attend],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock{kind}" for a in attend[::-1]],
        "act_fn": "silu",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
    }
