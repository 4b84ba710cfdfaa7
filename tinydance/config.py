"""Every choice of a training, by name, with who made it: one dataclass and one table of presets.

The defaults are the paper's run; what the paper leaves open says so in its help text. `train.py`
turns the fields into `--field value`; a preset sets several at once; the head of a run prints them
all. What Schedule and Settings declare has its default there.
"""

import contextlib
import difflib
import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import torch

from tinydance.clip import TextConfig
from tinydance.model import Settings
from tinydance.schedulers import Schedule
from tinydance.unet import UNetConfig
from tinydance.vae import VAEConfig


def option(default, help: str, low=0, high=math.inf, free=False):
    """A field with its help text; a number may be from low to high."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "free": free})


def free(default, help: str, low=0, high=math.inf):
    """A field that may differ when a run goes on: it tells where and how fast, and not what."""
    return option(default, help, low, high, free=True)


@dataclass(frozen=True)
class Config:
    # where
    preset: str = option("toy", "the column of the table that the other fields start from")
    data: str = option(
        "toyworld",
        "'toyworld', a folder of videos, tar shards or cached latents, a .csv, .tar files; of "
        "several, each with its share behind a colon, as in clips:0.05",
    )
    images: str = option("", "likewise, pictures for image steps; else frames of the clips")
    root: str = free("", "folder in which tables' files and links may lie [default: the data's]")
    held_out: float = option(0.01, "share of the data that is never trained on [ours]", high=0.5)
    init: str = free(
        "",
        "model folder to start from: SD 2.1's, ModelScope's, ours, 'shipped' [ours: paper silent]",
    )
    unet: Literal["init", "toy", "small"] = option(
        "init", "which UNet the image stage trains: --init's, or a new one of this size"
    )
    resume: Literal["auto", "none"] = free("auto", "from the newest checkpoint; none: set it aside")
    out: str = free("runs/toy", "where stages write checkpoints, samples and models")
    seed: int = option(0, "all randomness is a function of it, the step and the sample")

    # the clip
    frames: int = option(Settings.frames, "frames of a clip [paper §4.1]", low=2)
    fps: int = option(Settings.fps, "frames per second of a clip [paper §4.1]", low=1)
    height: int = option(Settings.height, "pixels [paper §4.1]", low=8)
    width: int = option(Settings.width, "pixels [paper §4.1]", low=8)
    crop: Literal["centre", "random"] = option(
        "centre", "which part of a wider picture is taken [ours: paper silent; SD]"
    )
    short: Literal["pad", "reject"] = option(
        "pad", "a video shorter than a clip: repeat its last picture, or take another [ours]"
    )
    starts: Literal["any", "grid"] = option("any", "when clips start; grid: every 1 / fps s [ours]")

    # diffusion
    num_train_timesteps: int = option(Schedule.num_train_timesteps, "T [paper §4.1]", low=1)
    beta_schedule: Literal["scaled_linear", "linear"] = option(
        Schedule.beta_schedule, "[ours: paper silent; SD], or [DDPM]"
    )
    beta_start: float = option(Schedule.beta_start, "[ours: paper silent; SD]")
    beta_end: float = option(Schedule.beta_end, "[ours: paper silent; SD]")
    prediction_type: Literal["epsilon", "v_prediction"] = option(
        Schedule.prediction_type, "what the network learns to answer [paper §4.1]"
    )
    timestep_spacing: Literal["leading", "trailing"] = option(
        Schedule.timestep_spacing, "trailing begins at the purest noise [ours: paper silent; SD]"
    )
    steps: int = free(Settings.steps, "of sampling [ours: paper silent; ModelScope]", low=1)
    sampler: Literal["ddim", "ddpm", "dpm"] = free(Settings.sampler, "[ours: paper silent]")
    guidance: float = free(
        Settings.guidance, "of sampling; 1 is off [ours: paper silent; DynamiCrafter]"
    )
    tau: float = free(Settings.tau, "share of steps that see the last frame [Fig. 7]", high=1)

    # the instructions
    eta: float = option(0.25, "share of last frames dropped in training [paper §1, §3.2]", high=1)
    cond_noise_t: int = option(
        Settings.cond_noise_t, "steps of noise on c_image [paper §4.1]", high=999
    )
    last_frames: int = option(3, "the last frame is one of the clip's last so many [§3.2]", low=1)
    text_drop: float = option(0.1, "share of captions dropped [ours: paper silent; SD]", high=1)
    sketch: bool = option(False, "show last frames as edge drawings [paper §4.5]")
    image_every: int = option(8, "one step of this many is a batch of images [paper §4.1]")

    # optimisation
    batch: int = option(192, "clips a step, over all ranks [paper §4.1]", low=1)
    image_batch: int = option(1536, "images an image step [ours: paper silent; 8 x batch]", low=1)
    micro_batch: int = free(0, "clips at once on a rank, whose gradients add up; 0: all [ours]")
    train: Literal["all", "temporal"] = option(
        "all", "or only what is new: temporal layers and conv_in [Make-Your-Video]"
    )
    lr: float = option(5e-5, "AdamW's learning rate [ours: paper silent; ModelScope]")
    vae_lr: float = option(1e-4, "of the VAE stage [ours]")
    text_lr: float = option(1e-3, "of the text stage [ours]")
    warmup: int = option(1000, "steps from 0 to lr [ours: paper silent]")
    decay: bool = option(False, "let the rate fall along a half cosine [ours: paper silent]")
    weight_decay: float = option(0.01, "[ours: paper silent; VGen]")
    clip_grad: float = option(1.0, "largest norm of the gradient [ours: paper silent; VGen]")
    ema: float = option(0.9999, "decay of averaged weights [ours: paper silent; VGen]", high=1)
    vae_steps: int = free(0, "of the VAE stage; 0: frozen, from --init [paper §4.1]")
    text_steps: int = free(0, "of the text stage; 0: frozen, from --init [paper §4.1]")
    image_steps: int = free(0, "of the image stage; 0: --init's [ours: paper silent]")
    video_steps: int = free(200_000, "of the video stage [paper §4.1]")

    # the machine
    device: Literal["auto", "cuda", "mps", "cpu"] = free("auto", "auto: cuda before mps before cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = free(
        "auto", "of autocast; weights stay float32"
    )
    compile: Literal["auto", "on", "off"] = free("auto", "torch.compile; auto: on with CUDA")
    gradient_checkpointing: bool = free(False, "less memory for a third more time")
    timeout: float = free(30, "minutes that the other ranks wait for one that hangs", high=10**6)
    workers: int = free(-1, "processes that read data, on each rank; -1: 4, for files", low=-1)
    max_bad: float = free(0.05, "share of bad among 1,000 samples that ends a run [ours]", high=1)
    max_skips: int = free(20, "steps in a row without finite gradients that end a run", low=1)
    save_every: int = free(1000, "steps between checkpoints", low=1)
    sample_every: int = free(2000, "steps between film strips", low=1)

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            words = get_args(f.type)
            if words and value not in words:
                raise ValueError(f"{f.name} is {value!r}; use {' or '.join(words)}")
            if f.type in (int, float) and not low <= value <= high:
                upper = "or more" if high == math.inf else f"to {high}"
                raise ValueError(f"{f.name} is {value}; use {low} {upper}")


# What differs from the paper's run. paper-hd goes on from a `paper` run at a higher resolution
# [paper §4.1], of which 320x512 is ours; small, 104M parameters for one consumer GPU with SD 2.1's
# VAE and text tower, and toy, for two cores and three hours, are ours.
COLUMNS = ("paper", "paper-hd", "small", "toy")
TABLE = {
    "out":              ("runs/paper",    "runs/paper-hd",          "runs/small",    "runs/toy"),
    "held_out":         (0.01,            0.01,                     0.01,            0.0),
    "init":             ("",              "runs/paper/video/model", "",              "shipped"),
    "unet":             ("init",          "init",                   "small",         "toy"),
    "height":           (256,             320,                      256,             64),
    "width":            (256,             512,                      256,             64),
    # (1)
    "beta_schedule":    ("scaled_linear", "scaled_linear",          "scaled_linear", "linear"),
    "beta_start":       (0.00085,         0.00085,                  0.00085,         1e-4),
    "beta_end":         (0.012,           0.012,                    0.012,           0.015),
    # (2)
    "prediction_type":  ("epsilon",       "epsilon",                "v_prediction",  "v_prediction"),
    "timestep_spacing": ("leading",       "leading",                "trailing",      "trailing"),
    "steps":            (50,              50,                       50,              16),
    "sampler":          ("ddim",          "ddim",                   "ddim",          "dpm"),
    "guidance":         (7.5,             7.5,                      7.5,             4.0),
    "tau":              (0.5,             0.5,                      0.5,             0.75),  # (3)
    "eta":              (0.25,            0.25,                     0.25,            0.6),  # (4)
    "cond_noise_t":     (100,             100,                      100,             10),  # (5)
    "batch":            (192,             192,                      16,              8),
    "micro_batch":      (0,               0,                        4,               0),
    "image_batch":      (1536,            1536,                     128,             32),
    "lr":               (5e-5,            5e-5,                     1e-4,            1e-3),
    "vae_lr":           (1e-4,            1e-4,                     1e-4,            3e-3),
    "warmup":           (1000,            1000,                     1000,            100),
    "decay":            (False,           False,                    True,            True),
    "ema":              (0.9999,          0.9999,                   0.9999,          0.999),
    "vae_steps":        (0,               0,                        0,               7500),
    "text_steps":       (0,               0,                        0,               800),
    "image_steps":      (0,               0,                        100_000,         20_000),
    "video_steps":      (200_000,         50_000,                   100_000,         9000),
    "save_every":       (1000,            1000,                     1000,            500),
    "sample_every":     (2000,            2000,                     2000,            1000),
}  # fmt: skip
# (1) SD's schedule leaves sqrt(alpha_bar_T) = 0.068 of the signal: over a clip of small latents,
#     enough to read from z_T where things will be, and to learn nothing from first frame and text.
#     Here it is 0.023, and 16 % of the steps are noisier than SD's last: they teach what words mean.
# (2) At high noise, where the network decides where things are, epsilon's loss has hardly a
#     gradient.
# (3) Clips end nearer to their last frame than with half of the steps, and as smoothly.
# (4) The last frame tells how a toy clip ends, so text is needed only where it is dropped.
# (5) Under the paper's noise an 8x8 latent decodes at 26 dB: a picture as small as that says each
#     thing but once, and a first frame could not be kept. These 10 steps leave 37 dB of 38.
PRESETS = {name: {key: row[k] for key, row in TABLE.items()} for k, name in enumerate(COLUMNS)}
# One more says only what differs from another, such as:
# PRESETS["mine"] = PRESETS["toy"] | {"out": "runs/mine", "lr": 1e-4}


def make_config(preset: str = "toy", **given) -> Config:
    """The preset's configuration with some fields changed, as strings or as what they are.

    Raises ValueError naming an unknown preset or field (with the nearest), or a wrong value.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}")
    kinds = {f.name: f.type for f in fields(Config)}
    for name in given:
        if name not in kinds:
            raise ValueError(f"unknown field {name!r}{did_you_mean(name, kinds)}")
    given = {name: convert(name, value, kinds[name]) for name, value in given.items()}
    return Config(**{**PRESETS[preset], "preset": preset, **given})


def convert(name: str, value, kind: type):
    """`value`, maybe a word from the command line, as the field's type."""
    if not isinstance(value, str) or kind not in (int, float, bool):
        return value
    try:
        if kind is bool:
            return {"true": True, "on": True, "false": False, "off": False}[value.lower()]
        return kind(value)
    except (KeyError, ValueError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ValueError(f"{name} is {value!r}; it must be {wanted}") from None


def did_you_mean(word: str, known) -> str:
    near = difflib.get_close_matches(word.strip("-"), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def choose_device(name: str) -> str:
    """The kind of device; for "auto" the best there is. Raises ValueError for one not there."""
    mps = torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    usable = [kind for kind, is_there in there.items() if is_there]
    if name != "auto" and name not in usable:
        raise ValueError(f"device is {name!r}; this machine has {', '.join(usable)}")
    return usable[0] if name == "auto" else name


def choose_dtype(name: str, kind: str) -> torch.dtype:
    """For "auto" bfloat16 where the hardware multiplies it: CUDA from A100 on (a T4 emulates it),
    CPUs with AVX-512 BF16 or AMX. Raises ValueError for any name but auto and the three."""
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {name!r}; use auto or float32 or bfloat16 or float16")
    if name != "auto":
        return getattr(torch, name)
    on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    is_fast = kind == "cpu" and on_cpu()
    is_fast |= kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_fast else torch.float32


def autocast(kind: str, dtype: torch.dtype):
    """Matrix products and convolutions in bfloat16, whose range needs no loss scale."""
    return torch.autocast(kind, dtype) if dtype != torch.float32 else contextlib.nullcontext()


# The shapes of networks that are trained here from nothing; "init" has Stable Diffusion 2.1's and
# ModelScope's, the defaults.
TOY_BLOCKS = {"layers_per_block": 1, "norm_num_groups": 8}
TOY_UNET = {"attention_head_dim": 16, "cross_attention_dim": 64, "temporal_dropout": 0.0}
TOY_UNET |= {"attention_levels": (True,), "block_out_channels": (96,)}
TOY_TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4}
TOY_TEXT |= {"max_position_embeddings": 24}  # of 77, most would be padding
NETWORKS = {
    "init": {},
    "small": {"unet": UNetConfig(block_out_channels=(128, 256, 384, 384), layers_per_block=1)},
    "toy": {
        "unet": UNetConfig(in_channels=16, out_channels=8, **TOY_UNET, **TOY_BLOCKS),
        "vae": VAEConfig(block_out_channels=(16, 32, 64, 96), latent_channels=8, **TOY_BLOCKS),
        "text": TextConfig(hidden_size=64, intermediate_size=256, **TOY_TEXT),
    },
}
