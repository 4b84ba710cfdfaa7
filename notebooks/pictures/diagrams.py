"""Draw the course's diagrams: the UNet, c_image, the tau switch, guidance, a chain of clips.

    python notebooks/pictures/diagrams.py

writes `unet.png`, `c_image.png`, `tau_steps.png`, `guidance.png` and `chain.png` beside this file.
What they show is the library's, with the paper's preset: layers and shapes from a pass through the
network that computes nothing, filled slots from `make_conditions`, the signal from the schedule.
Not here: pictures that need a trained model (`draw.py`, `figures.py`, `learning.py`).
"""

import io
import re
from typing import NamedTuple

import numpy as np
import torch
from draw import BLUE, GREY, HERE, INK, LIGHT, ORANGE, PALE, VIOLET, WHITE, arrow, text
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from tinydance import unet
from tinydance.conditioning import make_conditions, noise_level
from tinydance.config import make_config
from tinydance.model import tau_in_steps
from tinydance.sampling import chain
from tinydance.schedulers import Schedule
from tinydance.weights import pick

MONO = {"family": "DejaVu Sans Mono"}  # of names and shapes, which are the code's
PURPLE = "#6a51a3"  # the edge of what sees time
PAPER = make_config("paper")
SCHEDULE = Schedule(**pick(vars(PAPER), Schedule))
FRAMES = PAPER.frames


def canvas(height: int) -> None:
    """An empty picture 900 pixels wide, measured in pixels from its upper left corner."""
    plt.figure(figsize=(9, height / 100), dpi=100).add_axes((0, 0, 1, 1)).set_axis_off()
    plt.axis((0, 900, height, 0))


def save(name: str) -> None:
    """Write the picture in 64 colours, and close it."""
    file = io.BytesIO()
    plt.savefig(file)
    plt.close()
    picture = Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(HERE / name, optimize=True)


def chip(x, y, width, words, colour=PALE, edge=LIGHT, height=26):
    """A small box with a name of the code in it."""
    style = "round,pad=0,rounding_size=5"
    patch = FancyBboxPatch((x, y), width, height, style, fc=colour, ec=edge, lw=1)
    plt.gca().add_patch(patch)
    text(x + width / 2, y + height / 2, words, 13, INK, va="center_baseline", **MONO)


def slot(x, y, side, colour=WHITE, words="", height=None):
    """A place in a row of frames: white with grey words, or in a colour with white ones."""
    height = height or side
    edge = LIGHT if colour == WHITE else colour
    plt.gca().add_patch(Rectangle((x, y), side, height, fc=colour, ec=edge, lw=1))
    text(x + side / 2, y + height / 2, words, 14, GREY if colour == WHITE else WHITE)


# ---------------------------------------------------------------------------------------- unet.png
NAMES = {
    "resnets": "resnet",
    "temp_convs": "temp_conv",
    "attentions": "attention",
    "temp_attentions": "temp_attention",
}  # as in the docstring of `unet.py`
IN_TIME = ("temp_convs", "temp_attentions", "transformer_in")


class Layer(NamedTuple):
    block: str  # "down_blocks.0", "mid_block", or of a layer that stands alone its name
    kind: str  # "resnets", "temp_convs", and so on
    shape: tuple[int, ...]  # of its result: channels, height, width


def trace_layers(config: unet.UNetConfig, frames: int, h: int, w: int) -> list[Layer]:
    """The layers in the order in which a clip passes them, on torch's device without numbers."""
    with torch.device("meta"):
        network = unet.UNet(config)
        z, t = torch.empty(1, frames, config.in_channels, h, w), torch.zeros(1)
        c_text = torch.empty(1, 77, config.cross_attention_dim)
    passed = []
    for name, module in network.named_modules():
        found = re.fullmatch(r"(down_blocks\.\d|mid_block|up_blocks\.\d)\.(\w+)\.\d", name)
        if found or name in ("conv_in", "transformer_in", "conv_out"):
            block, kind = found.groups() if found else (name, name)
            module.register_forward_hook(
                lambda module, given, out, block=block, kind=kind: passed.append(
                    Layer(block, kind, tuple(out.shape[1:]))
                )
            )
    network(z, t, c_text)
    return passed


def read_block(passed: list[Layer], block: str) -> tuple[list[str], int, str]:
    """Of a block: the kinds of layers, how many times in a row, and where they work: "c h w"."""
    own = [layer for layer in passed if layer.block == block and layer.kind in NAMES]
    kinds = [layer.kind for layer in own]
    for times in (3, 2):
        if kinds == kinds[: len(kinds) // times] * times:
            return kinds[: len(kinds) // times], times, " ".join(map(str, own[0].shape))
    return kinds, 1, " ".join(map(str, own[0].shape))


def row(kinds: list[str], y: float, left: float = 0, right: float = 0) -> tuple[float, float]:
    """Layers beside each other, from `left` on or up to `right`. Returns where they begin, end."""
    names = [NAMES.get(kind, kind) for kind in kinds]
    widths = [8 * len(name) + 8 for name in names]
    x = begin = left or right - sum(widths) - 5 * (len(widths) - 1)
    for kind, name, width in zip(kinds, names, widths):
        chip(x, y, width, name, *((VIOLET, PURPLE) if kind in IN_TIME else ()))
        x += width + 5
    return begin, x - 5


def draw_unet() -> None:
    config, h, w = unet.UNetConfig(), PAPER.height // 8, PAPER.width // 8
    passed, levels = trace_layers(config, FRAMES, h, w), len(config.block_out_channels)
    canvas(748)
    text(24, 28, f"[z_t, c_image]  {config.in_channels} {h} {w}", 14, INK, ha="left", **MONO)
    text(876, 28, f"out  {config.out_channels} {h} {w}", 14, INK, ha="right", **MONO)
    text(450, 28, f"channels height width, of each of the {FRAMES} frames", 14)
    row(["conv_in", "transformer_in"], 48, left=24)
    row(["conv_out"], 48, right=876)
    arrow((60, 78), (60, 98))
    arrow((840, 98), (840, 78))
    for level in range(levels):
        y, inset, ends = 126 + 112 * level, 24 + 14 * level, {}
        sides = {"left": f"down_blocks.{level}", "right": f"up_blocks.{levels - 1 - level}"}
        for side, block in sides.items():
            x = inset if side == "left" else 900 - inset
            kinds, times, shape = read_block(passed, block)
            text(x, y - 16, block, 14, INK, ha=side, weight="bold", **MONO)
            text(x, y + 42, f"{times} times at {shape}", 14, ha=side, **MONO)
            ends[side] = row(kinds, y, **{side: x})
        begin, end = ends["left"][1] + 6, ends["right"][0] - 6
        arrow((begin, y + 13), (end, y + 13), GREY)
        text((begin + end) / 2, y, f"{config.layers_per_block + 1} skips", 14)
        if level < levels - 1:
            arrow((inset + 36, y + 54), (inset + 36, y + 84))
            arrow((864 - inset, y + 84), (864 - inset, y + 54))
    text(158, 194, "half the size", 14)
    text(742, 194, "twice the size", 14)

    y = 590
    kinds, _, shape = read_block(passed, "mid_block")
    begin, end = row(kinds, y, left=212)
    text(450, y - 16, "mid_block", 14, INK, weight="bold", **MONO)
    text(450, y + 42, f"once at {shape}", 14, **MONO)
    arrow((102, y - 62), (begin - 6, y + 13), bend="angle,angleA=90,angleB=0,rad=14")
    arrow((end + 6, y + 13), (798, y - 62))
    y = 682
    chip(24, y, 26, "", VIOLET, PURPLE)
    chip(24, y + 32, 26, "")
    added = "sees time: added for video, skipped for an image"
    for k, words in enumerate((added, "sees one frame: the image model's own layer")):
        text(60, y + 13 + 32 * k, words, 14, INK, ha="left")
    text(876, y + 13, "c_text goes into each attention", 14, ha="right")
    text(876, y + 45, "the time t goes into each resnet", 14, ha="right")
    save("unet.png")


# ------------------------------------------------------------------------------------- c_image.png
CASES = {
    ("first and last", "training; first tau steps"): {"first", "last"},
    ("last dropped", "with chance eta; after tau"): {"first"},
    ("an image", "one frame, no instruction"): set(),
}  # and the names of what is given


def fill_slots(given: set[str], frames: int) -> list[str]:
    """What stands in each slot of c_image: "first", "last", or "0" where it is exactly zero."""
    words = ("0", "first", "last")
    latents = {word: torch.full((1, 4, 1, 1), float(words.index(word))) for word in given}
    eps = torch.zeros(1, 2, 4, 1, 1)
    c_image = make_conditions(latents, frames, eps, alpha_bar_c=1.0)["c_image"]
    return [words[int(value)] for value in c_image[0, :, 0, 0, 0]]


def draw_c_image() -> None:
    side, left, rng = 42, 190, np.random.default_rng(0)
    colours = {"first": BLUE, "last": ORANGE, "0": WHITE}
    canvas(640)
    ends = ((left, "f_first", BLUE, "left"), (left + side * FRAMES, "f_last", ORANGE, "right"))
    signal = noise_level(SCHEDULE, PAPER.cond_noise_t) ** 0.5
    for x, name, colour, ha in ends:
        words = f"{signal:.2f} {name} + {(1 - signal**2) ** 0.5:.2f} eps"
        text(x, 28, words, 14, colour, ha=ha, **MONO)
        inner = x + (side / 2 if ha == "left" else -side / 2)
        arrow((inner, 40), (inner, 72), colour)
    text(left + side * FRAMES / 2, 28, "first the noise, then the zeros", 14, INK)
    for k, ((case, when), given) in enumerate(CASES.items()):
        y = 76 + 62 * k
        text(left - 14, y + 12, case, 15, INK, ha="right")
        text(left - 14, y + 33, when, 13, ha="right")
        slots = fill_slots(given, FRAMES if given else 1)
        for f, word in enumerate(slots):
            slot(left + side * f, y, side, colours[word], word)

    # On the channel axis: z_t above, c_image below.
    top, high = 316, 30
    text(left - 14, top - 22, "frame", 14, ha="right")
    for f in range(FRAMES):
        text(left + side * (f + 0.5), top - 22, str(f), 14)
    for channel in range(8):
        y = top + high * channel + 14 * (channel > 3)
        for f, word in enumerate(fill_slots({"first", "last"}, FRAMES)):
            colour = f"{rng.uniform(0.45, 0.95):.2f}" if channel < 4 else colours[word]
            slot(
                left + side * f, y, side, colour, "0" if (channel > 3 and word == "0") else "", high
            )
    for y, name in ((top + 60, "z_t"), (top + 194, "c_image")):
        text(left - 14, y - 9, name, 15, INK, ha="right", weight="bold", **MONO)
        text(left - 14, y + 12, "4 channels", 14, ha="right")
    words = "one tensor of 8 channels: the input of the UNet (paper, Eq. 1)"
    text(left + side * FRAMES / 2, top + 278, words, 15, INK)
    save("c_image.png")


# ----------------------------------------------------------------------------------- tau_steps.png
def tau_curve(steps: int, tau: int) -> list[tuple[int, int, float, bool]]:
    """(step i, time t, sqrt(alpha_bar_t), whether the last frame is seen) of each sampling step."""
    times = enumerate(SCHEDULE.timesteps(steps))
    return [(i, t, SCHEDULE.alpha_bar_at(t) ** 0.5, i < tau) for i, (t, _) in times]


def draw_tau() -> None:
    steps, tau = PAPER.steps, tau_in_steps(PAPER.tau, PAPER.steps)
    curve = tau_curve(steps, tau)
    figure, axis = plt.subplots(figsize=(9, 4.6), dpi=100, layout="constrained")
    for seen, colour, marker in ((True, ORANGE, "o"), (False, GREY, "s")):
        part = [(i, signal) for i, _, signal, sees in curve if sees == seen]
        axis.plot(*zip(*part), marker, color=colour, ms=6, mfc=colour if seen else WHITE)
    axis.axvspan(-0.5, tau - 0.5, color=ORANGE, alpha=0.09, lw=0)
    axis.axvline(tau - 0.5, color=INK, lw=1.2)
    big = {"size": 12, "ha": "center", "weight": "bold"}
    axis.text(tau / 2 - 0.5, 1.11, "the last frame is seen", color=ORANGE, **big)
    axis.text((tau + steps) / 2 - 0.5, 1.11, "its slot is zero", color=GREY, **big)
    axis.text(tau - 1, 0.92, f"tau = {tau}", color=INK, size=12, ha="right")
    places = {0: (-4, 27, "left"), tau - 1: (-6, 8, "right"), tau: (10, -12, "left")}
    places[steps - 1] = (2, -30, "right")
    for i, (x, y, ha) in places.items():
        _, t, signal, _ = curve[i]
        at = {"xytext": (x, y), "textcoords": "offset points", "ha": ha}
        axis.annotate(f"t = {t}: {signal:.2f}", (i, signal), size=11.5, color=INK, **at)
    axis.set(xlim=(-1, steps), ylim=(0, 1.2), yticks=np.arange(0, 1.1, 0.2))
    axis.set_xlabel("sampling step i, from noise (left) to the clip (right)", size=11.5)
    axis.set_ylabel("signal in z_t: sqrt(alpha_bar)", size=11.5)
    axis.tick_params(labelsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    save("tau_steps.png")


# ------------------------------------------------------------------------------------ guidance.png
EPS_U, EPS_C = np.array([1.3, 2.5]), np.array([2.2, 2.72])
WEIGHTS = (0, 1, 2, PAPER.guidance)


def guide(eps_u: np.ndarray, eps_c: np.ndarray, w: float) -> np.ndarray:
    return eps_u + w * (eps_c - eps_u)


def draw_guidance() -> None:
    canvas(450)

    def place(w: float) -> np.ndarray:
        return np.array([50, 410]) + [92, -80] * guide(EPS_U, EPS_C, w)

    text(450, 32, "eps = eps_u + w (eps_c - eps_u)", 17, INK, weight="bold", **MONO)
    plt.plot(*zip(place(0), place(8)), color=LIGHT, lw=1.5, ls=(0, (4, 3)), zorder=0)
    for w, name in zip(WEIGHTS, ("eps_u\n", "eps_c\n", "", "")):
        x, y = place(w)
        arrow((50, 410), (x, y), GREY if w == 0 else INK, "arc3")
        text(x, y - 12, f"{name}w = {w:g}", 15, INK, va="bottom", weight="bold")
    x, y = place(4.7)
    text(x, y - 40, "one more (eps_c - eps_u) for each 1 of w", 14)
    notes = (
        "w = 0: the prediction with an empty caption",
        "w = 1: with the caption, guidance off",
    )
    notes += (f"w = {WEIGHTS[-1]:g}: far past both [ours: paper silent]",)
    for k, words in enumerate(notes):
        text(490, 330 + 30 * k, words, 15, INK, ha="left")
    save("guidance.png")


# --------------------------------------------------------------------------------------- chain.png
def chain_frames(clips: int, frames: int) -> list[list[int]]:
    """The frames of the video that each clip of a chain adds, by their numbers."""

    def make(model, prompts, given, settings, keys):
        start = given["first"] if given else torch.zeros(1)
        return start[:, None] + torch.arange(frames)  # b f

    return [z_0[0].int().tolist() for z_0 in chain(None, [""], clips, make=make)]


def draw_chain() -> None:
    links, wide, high, left = chain_frames(3, FRAMES), 18, 42, 36
    canvas(462)
    for k, shown in enumerate(links):
        y, total = 44 + 106 * k, shown[-1] + 1
        at = [left + wide * number for number in shown]
        for x in at:
            slot(x, y, wide, height=high)
        count = f"+ {len(shown)} = {total}" if k else f"{total}"
        text(at[0] + 4, y - 16, f"clip {k + 1}: {count} frames", 15, INK, ha="left", weight="bold")
        if k:
            x = at[0] - wide  # the frame before, which is this clip's first
            slot(x, y, wide, BLUE, height=high)
            arrow((x + wide / 2, y - 106 + high / 2), (x + wide / 2, y - 1), BLUE)
            words = f"first frame: the last latent\nof clip {k}, shown only once"
            text(x - 12, y + high / 2, words, 14, BLUE, ha="right")
    slot(left, 44, wide, BLUE, height=high)
    slot(at[-1], y, wide, ORANGE, height=high)
    text(left, 106, "first frame", 14, BLUE, ha="left")
    text(at[-1] + wide, y + high + 20, "last frame, if there is one", 14, ORANGE, ha="right")
    for number in range(0, total, FRAMES - 1):
        x = left + wide * (number + 0.5)
        text(x, 366, f"{number}\n{number / PAPER.fps:g} s", 14)
    text(left - 9, 404, "frame of the video, and its time at 4 frames a second", 14, ha="left")
    words = f"N clips of {FRAMES} frames: 1 + {FRAMES - 1} N frames"
    text(450, 440, words, 16, INK, weight="bold")
    save("chain.png")


if __name__ == "__main__":
    for draw in (draw_unet, draw_c_image, draw_tau, draw_guidance, draw_chain):
        draw()
