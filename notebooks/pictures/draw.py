"""Draw the README's two pictures: how the model works, and what it makes.

    python notebooks/pictures/draw.py

writes `architecture.png` and `hero.gif` beside this file, in a minute on a CPU, with real clips: of
the first three hidden captions, none picked. Lengths are in pixels of a picture 900 pixels wide.
"""

from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.font_manager import findfont
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image, ImageColor, ImageDraw, ImageFont

HERE = Path(__file__).parent
INK, GREY, LIGHT, PALE, WHITE = "#222222", "#595959", "#bbbbbb", "#f0f0f0", "#ffffff"
BLUE, ORANGE, VIOLET = "#0072b2", "#c95000", "#e3dcf3"  # first frame, last frame, what sees time
ENDS = {0: BLUE, 1: ORANGE}  # where a clip begins and ends, as a share of its length


def clips(count=3):
    """[(caption, first, last, frames)], uint8 (H, W, 3) and (f, H, W, 3): all that is sampled."""
    import torch

    from tinydance.model import PixelDance
    from tinydance.sampling import sample_frames
    from tinydance.toy import SHIPPED
    from tinydance.toy.measure import HIDDEN_SEED
    from tinydance.toy.world import make_clip
    from tinydance.vae import to_frames, to_pixels

    true, captions = zip(*(make_clip(HIDDEN_SEED, n) for n in range(count)))
    pixels = to_pixels(torch.from_numpy(np.stack(true)))  # b f 3 H W
    model = PixelDance.from_folder(SHIPPED)
    made = sample_frames(model, list(captions), pixels[:, 0], pixels[:, -1], seed=0)
    pixels, made = (to_frames(x).permute(0, 1, 3, 4, 2).numpy() for x in (pixels, made))
    return [(caption, t[0], t[-1], m) for caption, t, m in zip(captions, pixels, made)]


# -------------------------------------------------------------------------------- architecture.png
def text(x, y, words, size=12, colour=GREY, **style):
    style = {"ha": "center", "va": "center", "linespacing": 1.4} | style
    plt.text(x, y, words, size=size * 0.72, color=colour, **style)  # 0.72 points to a pixel


def box(x, y, width, height, title="", note="", colour=PALE, edge=LIGHT):
    style = "round,pad=0,rounding_size=6"
    plt.gca().add_patch(FancyBboxPatch((x, y), width, height, style, fc=colour, ec=edge, lw=0.8))
    middle = y + height / 2 - 9 * bool(title and note)
    text(x + width / 2, middle, title, 14, INK, weight="bold")
    text(x + width / 2, middle + 19 * bool(title) + 10 * title.count("\n"), note)


def tile(x, y, side, what, edge=LIGHT):
    """A square: a colour or a picture; a large one has a broad frame, if a coloured one."""
    picture = np.uint8([[ImageColor.getrgb(what)]]) if isinstance(what, str) else what
    plt.imshow(picture, extent=(x, x + side, y + side, y), interpolation="nearest")
    width = 2.4 if side > 80 and edge != LIGHT else 0.8
    plt.gca().add_patch(Rectangle((x, y), side, side, fc="none", ec=edge, lw=width))


def arrow(a, b, colour=INK, bend="angle,angleA=0,angleB=90,rad=14"):
    """From a, across, and round a corner to b if that is not straight ahead."""
    bend = "arc3" if a[0] == b[0] or a[1] == b[1] else bend
    look = {"arrowstyle": "-|>,head_length=0.4,head_width=0.2", "connectionstyle": bend, "lw": 1.1}
    plt.annotate("", b, a, arrowprops=look | {"color": colour, "shrinkA": 0, "shrinkB": 0})


def architecture(caption, first, last, frames):
    plt.figure(figsize=(9, 7.52), dpi=200).add_axes((0, 0, 1, 1)).set_axis_off()
    mono = {"family": "DejaVu Sans Mono"}  # of names and shapes, which are the glossary's

    # The three instructions, and the networks.
    box(24, 24, 140, 78, colour=WHITE)
    text(94, 63, fill(f"“{caption}”", 18), 13, INK, style="italic")
    text(94, 117, "text", 13, INK, weight="bold")
    for y, name, picture, colour in ((150, "first", first, BLUE), (284, "last", last, ORANGE)):
        tile(52, y, 84, picture, colour)
        text(94, y + 99, f"{name} frame", 13, colour, weight="bold")
        arrow((138, y + 42), (196, y + 42), colour)
        text(167, y + 29, "b 3 H W", **mono)
        text(330, y + 29, f"f_{name}", 12, colour, **mono)
        text(330, y + 55, "b 4 h w", **mono)
    box(196, 24, 104, 78, "CLIP\ntext tower", "frozen")
    box(196, 150, 104, 218, "VAE\nencoder", "frozen")
    box(706, 150, 170, 264, colour=WHITE, edge=INK)
    text(791, 174, "pseudo-3D UNet", 14, INK, weight="bold")
    layers = "2-D conv", "1-D conv over f", "2-D attention", "attention to text"
    for k, layer in enumerate((*layers, "1-D attention over f")):
        box(718, 194 + 36 * k, 146, 28, "", layer, VIOLET if "1-D" in layer else PALE)
    text(791, 393, "trained")
    box(586, 275, 40, 36, "cat")
    box(731, 454, 120, 36, "DDIM step")
    box(24, 540, 852, 46, "VAE decoder", "frozen")

    # A slot for each frame in c_image and in z_t, and the steps that see the last one.
    for k, word in enumerate(("first", "0", "0", "…", "0", "last")):
        x, colour = 360 + 38 * k, ENDS.get(k / 5, WHITE)
        text(x + 16, 192, word, 12, GREY if colour == WHITE else WHITE)
        if word == "…":
            text(x + 16, 397, word)
        else:
            tile(x, 176, 32, colour, ENDS.get(k / 5, LIGHT))
            tile(x, 381, 32, np.random.default_rng(k).uniform(0.35, 1, (8, 8, 3)))
    arrow((300, 192), (358, 192), BLUE)
    arrow((300, 326), (566, 210), ORANGE)
    text(360, 246, "the last frame is seen\non the first tau steps only", 12, ORANGE, ha="left")
    for k in range(16):  # of 16 steps the toy model's tau, 75 %
        tile(361 + 12 * k, 278, 9, ORANGE if k < 12 else WHITE, ORANGE)

    # What flows between them.
    for a, b in (((164, 63), (196, 63)), ((300, 63), (791, 150)), ((583, 192), (606, 275)),
                 ((583, 397), (606, 311)), ((626, 293), (706, 293)), ((791, 414), (791, 454)),
                 ((731, 472), (471, 416)), ((791, 490), (791, 540))):  # fmt: skip
        arrow(a, b)
    for x, y, words in ((360, 49, "c_text  b l d"), (471, 161, "c_image  b f 4 h w"),
                        (471, 366, "z_t  b f 4 h w"), (666, 279, "b f 8 h w"),
                        (728, 434, "out  b f 4 h w"), (690, 460, "next z_t"),
                        (728, 515, "z_0  b f 4 h w"), (450, 728, "clip  b f 3 H W")):  # fmt: skip
        text(x, y, words, **mono)
    text(776, 49, "by cross-attention", ha="right")
    text(666, 308, "8 channels")
    text(484, 460, "steps", 13, INK, ha="left", weight="bold")
    text(669, 515, "after the last step", ha="right")
    key = "b batch, f frames\nH W pixels, h w latents\nl text tokens, d width"
    text(24, 465, key, ha="left", **mono)
    for k in range(8):  # of the 16 frames
        tile(24 + 108 * k, 612, 96, frames[round(k * 15 / 7)], ENDS.get(k / 7, LIGHT))
        arrow((72 + 108 * k, 586), (72 + 108 * k, 609), GREY)
    plt.axis((0, 900, 752, 0))
    plt.savefig(HERE / "architecture.png")


# ---------------------------------------------------------------------------------------- hero.gif
def page(k, made):
    """Frame k of the moving picture: a column for each clip."""
    large, small = (ImageFont.truetype(findfont("DejaVu Sans"), size) for size in (16, 13))
    image = Image.new("RGB", (900, 500), WHITE)
    pen = ImageDraw.Draw(image)

    def show(x, y, pixels, side, edge):
        pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), edge)
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        image.paste(picture, (x, y))

    for x, (caption, first, last, frames) in zip((22, 322, 622), made):
        pen.text((x + 128, 30), fill(f"“{caption}”", 26), INK, large, "mm", align="center")
        for at, name, still, edge in ((x, "first", first, BLUE), (x + 160, "last", last, ORANGE)):
            pen.text((at + 48, 66), f"{name} frame", edge, small, "mm")
            show(at, 80, still, 96, edge)
        pen.line((x + 128, 140, x + 128, 198), GREY, 2)
        pen.polygon([(x + 122, 195), (x + 134, 195), (x + 128, 203)], GREY)
        show(x, 212, frames[k], 256, ENDS.get(k / 15, LIGHT))
        for j, at in enumerate(range(x + 2, x + 256, 16)):  # how far the clip is
            pen.rectangle((at, 481, at + 11, 486), LIGHT if j > k else ENDS.get(j / 15, GREY))
    return image


if __name__ == "__main__":
    made = clips()
    architecture(*made[2])  # of the three the one that goes farthest
    pages = [page(k, made) for k in range(16)]
    palette = Image.fromarray(np.concatenate(pages)).quantize(250, kmeans=3)
    exact = [ImageColor.getrgb(colour) for colour in (WHITE, LIGHT, GREY, INK, BLUE, ORANGE)]
    palette.putpalette(palette.getpalette()[:750] + list(np.ravel(exact)))
    pages = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in pages]
    pages[0].save(HERE / "hero.gif", append_images=pages[1:], save_all=True, duration=250, loop=0)
