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

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinydance.weights.diffusers import from_diffusers_config, to_diffusers_config
from tinydance.weights.files import read_config, write_config
from tinydance.weights.ldm import unet_from_ldm
from tinydance.weights.load import load_into, load_weights
from tinydance.weights.safetensors import save_safetensors

MAX_ATTENTION_BATCH = 65_535  # CUDA's fused attention kernels launch one block row per batch entry


# ------------------------------------------------------------------------------- attention
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (n, heads, l, d).

    On a CPU the three products are written out: torch's fused kernel spends most of a bfloat16
    training step in its backward pass there. [ours: measured, see README]
    """
    if q.device.type == "cpu":
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    if len(q) > MAX_ATTENTION_BATCH:  # temporal attention has a batch of b * h * w
        parts = zip(*(x.split(MAX_ATTENTION_BATCH) for x in (q, k, v)))
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention of x (n, l, d) to itself, or to a context (n, l', d')."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # n l (heads d) -> n heads l d
            for proj, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, then attention to the text (or, in time, to itself again), then a GEGLU."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = Attention(dim, heads, head_dim)
        self.attn2 = Attention(dim, heads, head_dim, context_dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        if context is None:
            x = x + self.attn2(self.norm2(x))
        else:
            # To the text, the frames of a clip are one long row of queries: its keys and values
            # are computed once per clip and nothing is repeated.
            y = self.norm2(x).reshape(len(context), -1, x.shape[-1])  # (b f) hw d -> b (f hw) d
            x = x + self.attn2(y, context).reshape(x.shape)
        return x + self.ff(self.norm3(x))


# ----------------------------------------------------------------------- the spatial layers [SD]
class ResBlock(nn.Module):
    """ResnetBlock2D: two convolutions, the diffusion time added between them."""

    def __init__(self, c_in: int, c_out: int, temb_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class SpatialTransformer(nn.Module):
    """Transformer2DModel: the pixels of each frame attend to each other and to the text."""

    def __init__(self, dim: int, head_dim: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        block = TransformerBlock(dim, dim // head_dim, head_dim, context_dim)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, c_text: Tensor) -> Tensor:
        h = self.norm(x).permute(0, 2, 3, 1)  # n c h w -> n h w c
        tokens = self.proj_in(h.flatten(1, 2))  # n (h w) c
        tokens = self.proj_out(self.transformer_blocks[0](tokens, c_text))
        return x + tokens.reshape(h.shape).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# --------------------------------------------------------------- the temporal layers [ModelScope]
def to_time_rows(x: Tensor, f: int) -> Tensor:
    """(b f) c h w -> b c f (h w): a picture whose rows are the frames.

    A view and no copy where x is channels_last: both are the bytes of b f h w c.
    """
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n // f, f, h * w, c).permute(0, 3, 1, 2)


def from_time_rows(rows: Tensor, like: Tensor) -> Tensor:
    """b c f (h w) -> (b f) c h w, the shape of `like`."""
    n, c, h, w = like.shape
    return rows.permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)


class TimeConv(nn.Module):
    """A Conv3d of kernel (3, 1, 1) by its name and shape, computed as a 2-D one of kernel (3, 1).

    The 2-D form needs no transposed copy and runs several times faster on a CPU. [ours: measured]
    """

    def __init__(self, dim: int):
        super().__init__()
        like = nn.Conv3d(dim, dim, (3, 1, 1))
        self.weight, self.bias = like.weight, like.bias

    def forward(self, rows: Tensor) -> Tensor:
        return F.conv2d(rows, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class TemporalConv(nn.Module):
    """TemporalConvLayer: four convolutions along time; the last starts at zero, so x passes.

    The zero padding at both ends of a clip is the network's only sense of which frame is which.
    """

    def __init__(self, dim: int, groups: int, dropout: float):
        super().__init__()

        def layer(*before_conv: nn.Module) -> nn.Sequential:
            return nn.Sequential(nn.GroupNorm(groups, dim), nn.SiLU(), *before_conv, TimeConv(dim))

        self.conv1 = layer()
        self.conv2, self.conv3, self.conv4 = (layer(nn.Dropout(dropout)) for _ in range(3))

    def forward(self, x: Tensor, f: int) -> Tensor:
        rows = to_time_rows(x, f)
        rows = rows + self.conv4(self.conv3(self.conv2(self.conv1(rows))))
        return from_time_rows(rows, x)


class TemporalTransformer(nn.Module):
    """TransformerTemporalModel: each place attends to itself across the frames, in both directions.

    "We use bi-directional self-attention in all temporal attention layers" [paper §3.1].
    """

    def __init__(self, dim: int, heads: int, head_dim: int, groups: int):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, head_dim)])
        self.proj_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, f: int) -> Tensor:
        rows = to_time_rows(x, f)
        h = self.norm(rows).permute(0, 3, 2, 1)  # b c f hw -> b hw f c
        tokens = self.proj_in(h.flatten(0, 1))  # (b hw) f c
        tokens = self.proj_out(self.transformer_blocks[0](tokens))
        return from_time_rows(rows + tokens.reshape(h.shape).permute(0, 3, 2, 1), x)


# ------------------------------------------------------------------------------------ the blocks
class Block(nn.Module):
    """One level of the UNet: resnet -> temp_conv (-> attention -> temp_attention), some times over.

    The lists carry the names of the checkpoints; `attentions` is absent where the level has none.
    """

    def __init__(self, widths: list[tuple[int, int]], temb_dim: int, spec: dict, attend: bool):
        super().__init__()
        groups, head_dim = spec["norm_num_groups"], spec["attention_head_dim"]
        self.resnets = nn.ModuleList(ResBlock(i, o, temb_dim, groups) for i, o in widths)
        self.temp_convs = nn.ModuleList(
            TemporalConv(o, groups, spec["temporal_dropout"]) for _, o in widths
        )
        if attend:
            self.attentions = nn.ModuleList(
                SpatialTransformer(o, head_dim, spec["cross_attention_dim"], groups)
                for _, o in widths
            )
            self.temp_attentions = nn.ModuleList(
                TemporalTransformer(o, o // head_dim, head_dim, groups) for _, o in widths
            )
        self.attend = attend

    def layer(self, j: int, x: Tensor, temb: Tensor, c_text: Tensor, f: int) -> Tensor:
        """x: (b f) c h w; f = 1 skips everything temporal."""
        x = self.resnets[j](x, temb)
        if f > 1:
            x = self.temp_convs[j](x, f)
        if self.attend:
            x = self.attentions[j](x, c_text)
            if f > 1:
                x = self.temp_attentions[j](x, f)
        return x


class DownBlock(Block):
    def __init__(self, c_in, c_out, layers, temb_dim, spec, attend, last):
        widths = [(c_in if j == 0 else c_out, c_out) for j in range(layers)]
        super().__init__(widths, temb_dim, spec, attend)
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])


class UpBlock(Block):
    def __init__(self, c_in, c_out, skips, temb_dim, spec, attend, last):
        widths = [(c_in if j == 0 else c_out, c_out) for j in range(len(skips))]
        super().__init__([(i + s, o) for (i, o), s in zip(widths, skips)], temb_dim, spec, attend)
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])


class MidBlock(nn.Module):
    """resnet -> temp_conv -> attention -> temp_attention -> resnet -> temp_conv."""

    def __init__(self, dim: int, temb_dim: int, spec: dict):
        super().__init__()
        groups, head_dim = spec["norm_num_groups"], spec["attention_head_dim"]
        self.resnets = nn.ModuleList(ResBlock(dim, dim, temb_dim, groups) for _ in range(2))
        self.temp_convs = nn.ModuleList(
            TemporalConv(dim, groups, spec["temporal_dropout"]) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            [SpatialTransformer(dim, head_dim, spec["cross_attention_dim"], groups)]
        )
        self.temp_attentions = nn.ModuleList(
            [TemporalTransformer(dim, dim // head_dim, head_dim, groups)]
        )

    def forward(self, x: Tensor, temb: Tensor, c_text: Tensor, f: int) -> Tensor:
        x = self.resnets[0](x, temb)
        if f > 1:
            x = self.temp_convs[0](x, f)
        x = self.attentions[0](x, c_text)
        if f > 1:
            x = self.temp_attentions[0](x, f)
        x = self.resnets[1](x, temb)
        return self.temp_convs[1](x, f) if f > 1 else x


# ------------------------------------------------------------------------------------ the network
def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(b,) -> (b, dim): [cos, sin] of t over dim / 2 wavelengths from 2 pi to 20,000 pi [SD]."""
    frequencies = torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, 4 * dim)
        self.linear_2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """eps_hat(z_t, t, c_text), where z_t comes with c_image behind it on the channel axis.

    Arguments are the keys of diffusers' `UNet3DConditionModel` config; the defaults are
    ModelScope's, with the paper's 8 input channels. `temporal_dropout` is ours to switch.
    """

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 1024,
        norm_num_groups: int = 32,
        attention_levels: tuple[bool, ...] | None = None,
        temporal_dropout: float = 0.1,
    ):
        super().__init__()
        widths, layers = list(block_out_channels), layers_per_block
        attend = list(attention_levels or [True] * (len(widths) - 1) + [False])
        self.config = spec = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "block_out_channels": widths,
            "layers_per_block": layers,
            "attention_head_dim": attention_head_dim,
            "cross_attention_dim": cross_attention_dim,
            "norm_num_groups": norm_num_groups,
            "attention_levels": attend,
            "temporal_dropout": temporal_dropout,
        }
        for width in widths:
            if width % attention_head_dim or width % norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {width} must be a multiple of attention_head_dim "
                    f"({attention_head_dim}) and of norm_num_groups ({norm_num_groups})"
                )
        temb_dim, last = 4 * widths[0], len(widths) - 1
        self.gradient_checkpointing = False

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.transformer_in = TemporalTransformer(
            widths[0], 8, attention_head_dim, norm_num_groups
        )
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # the widths of what the down path leaves for the up path
        for i, width in enumerate(widths):
            c_in = widths[max(i - 1, 0)]
            self.down_blocks.append(
                DownBlock(c_in, width, layers, temb_dim, spec, attend[i], last=i == last)
            )
            skips += [width] * layers + ([width] if i < last else [])
        self.mid_block = MidBlock(widths[-1], temb_dim, spec)
        self.up_blocks = nn.ModuleList()
        c_in = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            taken = [skips.pop() for _ in range(layers + 1)]
            self.up_blocks.append(
                UpBlock(c_in, width, taken, temb_dim, spec, attend[i], last=i == 0)
            )
            c_in = width
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self.zero_what_is_new()

    def zero_what_is_new(self) -> None:
        """Make the network its 2-D self on every frame: what the paper adds starts at zero.

        Temporal layers pass their input; the condition's input channels are not yet seen.
        [ModelScope's original code; SD inpainting for the channels]
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, TemporalConv):
                    nn.init.zeros_(module.conv4[-1].weight)
                    nn.init.zeros_(module.conv4[-1].bias)
                elif isinstance(module, TemporalTransformer):
                    nn.init.zeros_(module.proj_out.weight)
                    nn.init.zeros_(module.proj_out.bias)
            self.conv_in.weight[:, self.config["out_channels"] :].zero_()

    def temporal_parameters(self) -> list[nn.Parameter]:
        """What an image batch does not reach: their gradients stay None on an image step."""
        return [p for name, p in self.named_parameters() if is_temporal(name)]

    def forward(self, z: Tensor, t: Tensor, c_text: Tensor) -> Tensor:
        """z (b, f, 8, h, w), t (b,) in 0..T-1, c_text (b, l, d) -> (b, f, 4, h, w)."""
        b, f, _, h, w = z.shape
        stride = 2 ** (len(self.down_blocks) - 1)
        if h % stride or w % stride:
            raise ValueError(f"latents of {h}x{w} do not divide by {stride}, the UNet's stride")
        temb = self.time_embedding(timestep_embedding(t, self.conv_in.out_channels).to(z.dtype))
        temb = temb.repeat_interleave(f, dim=0)  # b d -> (b f) d

        x = self.conv_in(z.flatten(0, 1))  # b f c h w -> (b f) c h w
        if f > 1:
            x = self.transformer_in(x, f)
        skips = [x]
        for block in self.down_blocks:
            for j in range(len(block.resnets)):
                x = self.run(block, j, x, temb, c_text, f)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, temb, c_text, f)
        for block in self.up_blocks:
            for j in range(len(block.resnets)):
                x = self.run(block, j, torch.cat([x, skips.pop()], dim=1), temb, c_text, f)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x.unflatten(0, (b, f))

    def run(self, block: Block, j: int, *args) -> Tensor:
        """Layer j of a block; with gradient checkpointing, computed again in the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block.layer, j, *args, use_reentrant=False)
        return block.layer(j, *args)

    # ---------------------------------------------------------------------------- on disk
    @classmethod
    def from_folder(cls, path) -> "UNet":
        """Read SD 2.1's `unet/` (temporal layers at their identity), ModelScope's, or our own."""
        unet = cls(**from_diffusers_config(read_config(path)))
        unet.load(load_weights(path))
        return unet

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take a checkpoint's tensors, by our names or LDM's; an image model lacks temporal ones.

        Raises ValueError listing what does not fit.
        """
        tensors = unet_from_ldm(tensors)
        if (weight := tensors.get("conv_in.weight")) is not None:
            missing = self.config["in_channels"] - weight.shape[1]
            if missing > 0:  # a 4-channel file: the channels of c_image are new, and zero
                tensors["conv_in.weight"] = F.pad(weight, (0, 0, 0, 0, 0, missing))
        is_2d = not any(is_temporal(name) for name in tensors)
        load_into(self, tensors, may_lack=lambda name: is_2d and is_temporal(name))

    def save(self, path, dtype: torch.dtype | None = None, spatial: bool = False) -> None:
        """Write the folder. spatial: as an image model, which has SD 2.1's form: neither the
        temporal layers nor the channels of c_image."""
        write_config(path, to_diffusers_config(self.config, spatial))
        tensors = {k: v.to(dtype or v.dtype) for k, v in self.state_dict().items()}
        if spatial:
            tensors = {k: v for k, v in tensors.items() if not is_temporal(k)}
            own = tensors["conv_in.weight"][:, : self.config["out_channels"]]
            tensors["conv_in.weight"] = own.contiguous()
        save_safetensors(tensors, f"{path}/diffusion_pytorch_model.safetensors")


def is_temporal(name: str) -> bool:
    return "temp_convs" in name or "temp_attentions" in name or name.startswith("transformer_in")
