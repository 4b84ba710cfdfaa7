"""The pseudo-3D UNet: a 2-D UNet with a temporal layer behind every spatial one.

"1D convolution layer along temporal dimension after 2D convolution layer, and 1D attention layer
along temporal dimension following 2D attention layer ... disabled for image input" [paper §3.1].
The paper does not say more. The arrangement is ModelScope's, the only public one that fits this
sentence and the size (1,411,245,380 parameters with 8 input channels) [ours: paper silent].

    conv_in, transformer_in                        shapes of SD 2.1 at 256x256, c x h x w
    down   resnet, temp_conv, attention, temp_attention   x2   320x32x32, 640x16x16, 1280x8x8
           resnet, temp_conv                              x2   1280x4x4
    mid    resnet, temp_conv, attention, temp_attention, resnet, temp_conv    1280x4x4
    up     the down path mirrored, x3 a level; each layer takes one skip
    conv_norm_out, conv_out

Module names are checkpoint names: SD 2.1's 686 spatial tensors and ModelScope's 1,480 load with no
key map. That is why some names look odd (`to_out.0`, `net.2`).

Not here: file formats (`weights/diffusers.py`); what other papers add to this network.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinydance.weights import build, diffusers, load_into, read_part, save_weights
from tinydance.weights.diffusers import is_temporal
from tinydance.weights.ldm import unet_from_ldm

MAX_ATTENTION_BATCH = 65_535  # CUDA's fused attention kernels launch one block row per batch entry


@dataclass(frozen=True)
class UNetConfig:
    """In the words of diffusers' `UNet3DConditionModel`; the defaults are ModelScope's, with 8."""

    in_channels: int = 8  # [z_t, c_image] [paper Eq. 1]
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int = 64
    num_attention_heads: int = 0  # if above 0, at every width; SD 1.x has 8
    cross_attention_dim: int = 1024
    norm_num_groups: int = 32
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # the smallest map has none [SD]
    temporal_dropout: float = 0.1  # [ModelScope]

    def __post_init__(self):
        heads, groups = self.num_attention_heads or self.attention_head_dim, self.norm_num_groups
        for width in self.block_out_channels:
            if width % heads or width % groups:
                both = f"attention_head_dim ({heads}) and of norm_num_groups ({groups})"
                raise ValueError(f"block_out_channels: {width} must be a multiple of {both}")
        if len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError("attention_levels and block_out_channels differ in length")


# ------------------------------------------------------------------------------------ attention
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, over (n, heads, l, d).

    On a CPU the three products are written out: there, the backward pass of torch's fused kernel
    takes more than half of a bfloat16 training step [ours: measured].
    """
    if q.device.type == "cpu":
        # scaling q equals scaling the scores, and is the smaller tensor wherever l > d
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
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])  # a list, for the name `to_out.0`

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # n l (heads d) -> n heads l d

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.split_heads(self.to_q(x))
        k = self.split_heads(self.to_k(context))
        v = self.split_heads(self.to_v(context))
        y = attention(q, k, v).transpose(1, 2).flatten(2)  # n heads l d -> n l (heads d)
        return self.to_out[0](y)


class GEGLU(nn.Module):
    """One linear layer gives both a value and its gate: value * gelu(gate) [Shazeer 2020]."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # Identity stands where the checkpoints have a dropout, so that the last is named `net.2`.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each behind a norm and added to its input.

    A temporal block has no context: there `attn2` is a second self-attention [ModelScope].
    """

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
            # x has a row per frame and context a row per clip. To the text, the frames of a clip
            # are one long row of queries: keys and values are computed once per clip, not f times.
            y = self.norm2(x).reshape(len(context), -1, x.shape[-1])  # (b f) hw d -> b (f hw) d
            x = x + self.attn2(y, context).reshape(x.shape)
        return x + self.ff(self.norm3(x))


# ----------------------------------------------------------------------- the spatial layers [SD]
class ResBlock(nn.Module):
    """ResnetBlock2D: two convolutions; between them the diffusion time is added to every pixel."""

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
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]  # n c -> n c 1 1
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h


class SpatialTransformer(nn.Module):
    """Transformer2DModel: the pixels of each frame attend to each other and to the text."""

    def __init__(self, dim: int, head_dim: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)  # 1e-6 here, 1e-5 in the resnets [SD]
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
    """n c h w -> n c h/2 w/2."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """n c h w -> n c 2h 2w."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# --------------------------------------------------------------- the temporal layers [ModelScope]
def to_time_rows(x: Tensor, f: int) -> Tensor:
    """(b f) c h w -> b c f (h w): a picture whose rows are the frames.

    With x in channels_last memory this is a view, no copy: both are the bytes of b f h w c.
    """
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n // f, f, h * w, c).permute(0, 3, 1, 2)


def from_time_rows(rows: Tensor, like: Tensor) -> Tensor:
    """b c f (h w) -> (b f) c h w, the shape of `like`."""
    n, c, h, w = like.shape
    return rows.permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)


class TimeConv(nn.Module):
    """A convolution over three neighbouring frames: nn.Conv3d(dim, dim, (3, 1, 1)) by its weights.

    Over time rows it is a 2-D convolution of kernel (3, 1), which needs no transposed copy and is
    several times faster on a CPU [ours: measured].
    """

    def __init__(self, dim: int):
        super().__init__()
        conv = nn.Conv3d(dim, dim, (3, 1, 1))  # for its initialisation, and the checkpoint's shapes
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, rows: Tensor) -> Tensor:
        return F.conv2d(rows, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class TemporalConv(nn.Module):
    """TemporalConvLayer: four convolutions along time, added to x; the last one starts at zero.

    There is no positional encoding of time: the zero padding at both ends of a clip is the only
    sense that the network has of which frame is which. The norms take their statistics over all
    frames of a clip together.
    """

    def __init__(self, dim: int, groups: int, dropout: float):
        super().__init__()

        def layer(*before_conv: nn.Module) -> nn.Sequential:
            return nn.Sequential(nn.GroupNorm(groups, dim), nn.SiLU(), *before_conv, TimeConv(dim))

        self.conv1 = layer()
        # The dropouts are why the convolution is `conv1.2`, but `conv2.3` to `conv4.3`.
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
        tokens = self.proj_in(h.flatten(0, 1))  # (b hw) f c: one row of f tokens for each place
        tokens = self.proj_out(self.transformer_blocks[0](tokens))
        return from_time_rows(rows + tokens.reshape(h.shape).permute(0, 3, 2, 1), x)


# ------------------------------------------------------------------------------------ the blocks
class Layers(nn.Module):
    """What the levels of the UNet share: resnet, temp_conv and, on most levels, two transformers.

    Four lists beside each other, as the checkpoints have them; layer j is the j-th of each.
    channels: (in, out) of each layer. attend: how many layers have transformers.
    """

    def __init__(self, channels: list[tuple[int, int]], config: UNetConfig, attend: int):
        super().__init__()
        groups, heads = config.norm_num_groups, config.num_attention_heads
        head_dim = channels[0][1] // heads if heads else config.attention_head_dim
        temb_dim, text_dim = 4 * config.block_out_channels[0], config.cross_attention_dim
        widths, dropout = [c_out for _, c_out in channels], config.temporal_dropout
        self.gradient_checkpointing = False
        self.resnets = nn.ModuleList(ResBlock(*pair, temb_dim, groups) for pair in channels)
        self.temp_convs = nn.ModuleList(TemporalConv(c, groups, dropout) for c in widths)
        self.attentions = nn.ModuleList(
            SpatialTransformer(c, head_dim, text_dim, groups) for c in widths[:attend]
        )
        self.temp_attentions = nn.ModuleList(
            TemporalTransformer(c, c // head_dim, head_dim, groups) for c in widths[:attend]
        )

    def layer(self, j: int, x: Tensor, temb: Tensor, c_text: Tensor, f: int) -> Tensor:
        """x (b f) c_in h w, temb (b f) d, c_text b l d -> (b f) c_out h w."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run_layer, j, x, temb, c_text, f, use_reentrant=False)
        return self.run_layer(j, x, temb, c_text, f)

    def run_layer(self, j: int, x: Tensor, temb: Tensor, c_text: Tensor, f: int) -> Tensor:
        x = self.resnets[j](x, temb)
        if f > 1:  # an image passes no temporal layer: "disabled for image input" [paper §3.1]
            x = self.temp_convs[j](x, f)
        if j < len(self.attentions):
            x = self.attentions[j](x, c_text)
            if f > 1:
                x = self.temp_attentions[j](x, f)
        return x


class DownBlock(Layers):
    """Some layers, then half the height and width; leaves a skip after each."""

    def __init__(
        self, channels: list[tuple[int, int]], config: UNetConfig, attend: int, last: bool
    ):
        super().__init__(channels, config, attend)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels[-1][1])])

    def forward(self, x: Tensor, skips: list[Tensor], *context) -> Tensor:
        """context: temb, c_text and f, as in `layer`."""
        for j in range(len(self.resnets)):
            x = self.layer(j, x, *context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class UpBlock(Layers):
    """Some layers, each of which takes the newest skip beside its input; then twice the size."""

    def __init__(
        self, channels: list[tuple[int, int]], config: UNetConfig, attend: int, last: bool
    ):
        super().__init__(channels, config, attend)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels[-1][1])])

    def forward(self, x: Tensor, skips: list[Tensor], *context) -> Tensor:
        for j in range(len(self.resnets)):
            x = torch.cat([x, skips.pop()], dim=1)  # the skip's channels behind those of x
            x = self.layer(j, x, *context)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MidBlock(Layers):
    """Two layers at the smallest size, of which the first has transformers."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__([(dim, dim), (dim, dim)], config, attend=1)

    def forward(self, x: Tensor, *context) -> Tensor:
        return self.layer(1, self.layer(0, x, *context), *context)


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
    """eps_hat(z_t, t, c_text), where z_t comes with c_image behind it on the channel axis."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths, attend = config.block_out_channels, config.attention_levels
        first, last, layers = widths[0], len(widths) - 1, config.layers_per_block

        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first)
        # 8 heads whatever the width [ModelScope]; everywhere else the number follows the width.
        self.transformer_in = TemporalTransformer(
            first, 8, config.attention_head_dim, config.norm_num_groups
        )
        # The down path leaves a skip after conv_in, every layer and every downsampler. Of SD's
        # widths: 320 320 320 320, 640 640 640, 1280 1280 1280, 1280 1280. The up path takes them
        # from the end, layers + 1 on each level: hence its one layer more.
        skips, c_in = [first], first
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            channels = [(c_in, width)] + [(width, width)] * (layers - 1)
            self.down_blocks.append(DownBlock(channels, config, layers * attend[i], i == last))
            skips += [width] * (layers + (i < last))
            c_in = width
        self.mid_block = MidBlock(widths[-1], config)
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            channels = []
            for _ in range(layers + 1):
                channels.append((c_in + skips.pop(), width))
                c_in = width
            self.up_blocks.append(UpBlock(channels, config, (layers + 1) * attend[i], i == 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, eps=1e-5)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)
        self.zero_init_new_layers()

    @torch.no_grad()
    def zero_init_new_layers(self) -> None:
        """Make the network its 2-D self on every frame: what the paper adds starts at zero.

        So loaded from an image model it is that image model, until training moves it.
        [ModelScope's original code; SD inpainting for the channels]
        """
        for module in self.modules():
            if isinstance(module, TemporalConv):
                nn.init.zeros_(module.conv4[-1].weight)
                nn.init.zeros_(module.conv4[-1].bias)
            elif isinstance(module, TemporalTransformer):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        self.conv_in.weight[:, self.config.out_channels :].zero_()  # the channels of c_image

    def forward(self, z: Tensor, t: Tensor, c_text: Tensor) -> Tensor:
        """z (b, f, 8, h, w), t (b,) in 0..T-1, c_text (b, l, d) -> (b, f, 4, h, w)."""
        b, f, _, h, w = z.shape
        stride = 2 ** (len(self.down_blocks) - 1)
        if h % stride or w % stride:
            raise ValueError(f"latents of {h}x{w} do not divide by {stride}, the UNet's stride")
        temb = self.time_embedding(timestep_embedding(t, self.conv_in.out_channels).to(z.dtype))
        temb = temb.repeat_interleave(f, dim=0)  # b 4c -> (b f) 4c: the frames share their t

        x = self.conv_in(z.flatten(0, 1))  # b f 8 h w -> (b f) c h w; for SD 2.1 320x32x32
        if f > 1:
            x = self.transformer_in(x, f)
        skips = [x]
        context = temb, c_text, f
        for block in self.down_blocks:  # 320x16x16, 640x8x8, 1280x4x4, 1280x4x4
            x = block(x, skips, *context)
        x = self.mid_block(x, *context)
        for block in self.up_blocks:  # 1280x8x8, 1280x16x16, 640x32x32, 320x32x32
            x = block(x, skips, *context)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (b f) c h w -> (b f) 4 h w
        return x.unflatten(0, (b, f))  # b f 4 h w

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep no activations inside layers; compute them again in the backward pass."""
        for module in self.modules():
            if isinstance(module, Layers):
                module.gradient_checkpointing = on

    # ------------------------------------------------------------------------------ on disk
    @classmethod
    def from_folder(cls, path, **changes) -> "UNet":
        """Read SD's `unet/`, ModelScope's or our own. changes: other fields of `UNetConfig`."""

        def make(config: dict) -> "UNet":
            config = diffusers.read_unet_config(config)
            return cls(replace(build(UNetConfig, config, f"{path}/config.json"), **changes))

        return read_part(path, make)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take a checkpoint's tensors, by our names or LDM's. What an image model lacks is new: its
        temporal layers and input channels start at zero. Raises ValueError for what does not fit.
        """
        tensors = diffusers.widen_conv_in(unet_from_ldm(tensors), self.config.in_channels)
        is_2d = not any(is_temporal(name) for name in tensors)
        load_into(self, tensors, may_lack=lambda name: is_2d and is_temporal(name))

    def save(self, path, dtype: torch.dtype | None = None, spatial: bool = False) -> None:
        """Write the folder. spatial: in SD 2.1's form, without temporal layers and c_image."""
        config, tensors = asdict(self.config), self.state_dict()
        if spatial:
            tensors = diffusers.spatial_only(tensors, self.config.out_channels)
        save_weights(path, diffusers.write_unet_config(config, spatial), tensors, dtype)
