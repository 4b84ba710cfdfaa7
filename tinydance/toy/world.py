"""A procedural world of captioned clips, in which minutes of training on a laptop show.

It stands in for the paper's WebVid-10M (section 4.1): endless, and small. One object moves before a
quiet landscape. Each of PixelDance's three conditions says something that the others do not: the
first frame how everything looks, the caption what will happen, the last frame how far it goes.

Every choice in this file is [ours: paper silent]. The shipped models were trained on these very
clips: whoever changes the world must train them again.
"""

import re
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

# Lengths are in units, of which the picture has 32 whatever its number of pixels: a scene can be
# rendered at any size. x points right, y down, and angles turn clockwise.
UNITS, MIDDLE = 32, 16

COLOURS = {"red": (226, 54, 52), "green": (38, 166, 78), "blue": (48, 92, 232)}
COLOURS |= {"yellow": (250, 206, 46)}

# The shapes with corners: (how many, radius of a corner, radius halfway to the next one, and the
# angle of the first, which stands the shape upright). A star has four rays.
POLYGONS = {
    "triangle": (3, 1.42, 1.42 * np.cos(np.pi / 3), -np.pi / 2),
    "star": (4, 1.6, 0.62, -np.pi / 2),
}
SHAPES = ("circle", "triangle", "star")  # far apart in latents too: a square is almost a circle

# phrase -> the colours of the sky's top, the sky at the horizon, the ground at the horizon and the
# picture's bottom; and the height of the hills. Muted, so that every object stands out on each.
BACKGROUNDS = {
    "at night": ((16, 18, 46), (66, 60, 104), (40, 46, 58), (24, 28, 38), 1.3),
    "at dawn": ((128, 134, 176), (242, 200, 182), (142, 112, 120), (104, 82, 98), 1.5),
    "by the sea": ((170, 198, 212), (226, 232, 226), (96, 140, 150), (126, 164, 166), 0.4),
    "on snow": ((158, 172, 192), (208, 214, 224), (244, 246, 250), (224, 230, 238), 1.1),
}


class Pose(NamedTuple):
    """Where an object is, seen from where it began: an offset in units, a factor on its size."""

    dx: float | np.ndarray = 0.0
    dy: float | np.ndarray = 0.0
    scale: float | np.ndarray = 1.0


def travel(e):  # how far an object moves in all, in units
    return 5.5 + 3.0 * e


def hop(u, e):  # how high it hops, up being negative: the flight of a thrown ball, twice
    v = 2 * u % 1.0
    return -(4.5 + 2.0 * e) * 4 * v * (1 - v)


# phrase -> pose at time u in [0, 1], which may be an array; e in [0, 1] is how far this clip goes.
MOTIONS = {
    "moves to the right": lambda u, e: Pose(dx=travel(e) * u),
    "moves to the left": lambda u, e: Pose(dx=-travel(e) * u),
    "moves up": lambda u, e: Pose(dy=-travel(e) * u),
    "moves down": lambda u, e: Pose(dy=travel(e) * u),
    "grows": lambda u, e: Pose(scale=(1.45 + 0.3 * e) ** u),
    "shrinks": lambda u, e: Pose(scale=(0.68 - 0.18 * e) ** u),
    "bounces to the right": lambda u, e: Pose(dx=travel(e) * u, dy=hop(u, e)),
    "bounces to the left": lambda u, e: Pose(dx=-travel(e) * u, dy=hop(u, e)),
}
# A chain of clips goes there and back, or the object would leave the picture.
OPPOSITES = {"right": "left", "up": "down", "grows": "shrinks"}
OPPOSITES |= {back: there for there, back in OPPOSITES.items()}


@dataclass(frozen=True)
class World:
    """size x size pixels, `frames` frames a clip."""

    size: int = 32
    frames: int = 16


@dataclass(frozen=True)
class Scene:
    """All that a clip is made from: keys of the tables above, and numbers in units."""

    shape: str
    colour: str
    background: str
    motion: str
    says_background: bool  # does the caption?
    x: float  # where the object starts
    y: float
    radius: float
    extent: float  # in [0, 1]: how far the motion goes
    horizon: float  # its height, y
    hills: float  # their phase, radians
    light: float  # a factor on the background's brightness


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene. No draw depends on another: the first frame tells nothing of the motion, and
    the caption nothing of the extent. The order of the draws is part of the data set: keep it."""
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        background=str(rng.choice(list(BACKGROUNDS))),
        says_background=bool(rng.random() < 0.75),
        x=rng.uniform(13.5, 18.5),
        y=rng.uniform(13.5, 18.5),
        radius=rng.uniform(5.0, 6.5),
        horizon=rng.uniform(19, 23),
        hills=rng.uniform(0, 2 * np.pi),
        light=rng.uniform(0.93, 1.05),
        motion=str(rng.choice(list(MOTIONS))),
        extent=rng.random(),
    )


# A signed distance gives every pixel its share of the object, hence smooth edges.
def signed_distance(shape, x, y):
    """Distance of (x, y) from the outline of a shape of radius 1 at the origin; negative inside."""
    rho = np.hypot(x, y)
    if shape == "circle":
        return rho - 1.0
    corners, tip, dent, first = POLYGONS[shape]
    # Fold the plane onto one half of one edge, a line from the corner (tip, 0) to (end_x, end_y).
    half = np.pi / corners
    phi = np.abs((np.arctan2(y, x) - first + half) % (2 * half) - half)
    end_x, end_y = dent * np.cos(half), dent * np.sin(half)
    cross = end_y * (rho * np.cos(phi) - tip) - (end_x - tip) * rho * np.sin(phi)
    return cross / np.hypot(end_x - tip, end_y)


def pixel_grid(size: int):
    """y and x of the pixels' centres in units, each (1, h, w)."""
    centres = (np.arange(size) + 0.5) * UNITS / size
    return np.meshgrid([0.0], centres, centres, indexing="ij")[1:]


def paint_background(background: str, x, y, horizon=21.0, hills=0.0, light=1.0) -> np.ndarray:
    """Sky over rolling ground. x, y (1, h, w) in units -> (1, 3, h, w) in 0..255, not rounded."""
    *palette, rise = BACKGROUNDS[background]
    top, high, low, bottom = (np.array(c, float)[:, None, None] for c in palette)
    hills = rise * (np.sin(x * 0.28 + hills) + 0.4 * np.sin(x * 0.61 + 2 * hills))
    below = (y - horizon)[:, None]
    # The colours run straight down; only the line between sky and ground follows the hills.
    sky = high + (top - high) * np.clip(-below / 20, 0, 1)
    ground = low + (bottom - low) * np.clip(below / 10, 0, 1)
    is_ground = np.clip(below - hills[:, None] + 0.5, 0, 1)
    return light * (sky + (ground - sky) * is_ground)


def place(scene: Scene, world: World):
    """Where the object is: x and y from its centre in radii, and its share of each pixel, each
    (f, h, w)."""
    pose = MOTIONS[scene.motion](np.linspace(0, 1, world.frames), scene.extent)
    dx, dy, scale = (np.reshape(part, (-1, 1, 1)) for part in pose)  # f 1 1, or 1 1 1 if constant
    y, x = pixel_grid(world.size)  # 1 h w
    radius = scene.radius * scale
    px, py = (x - scene.x - dx) / radius, (y - scene.y - dy) / radius
    pixels = radius * world.size / UNITS
    return px, py, np.clip(0.5 - signed_distance(scene.shape, px, py) * pixels, 0, 1)


def render(scene: Scene, world: World = World()) -> np.ndarray:
    """The clip of a scene: uint8 (f, 3, H, W)."""
    px, py, cover = (part[:, None] for part in place(scene, world))  # f 1 h w
    y, x = pixel_grid(world.size)  # 1 h w
    back = paint_background(scene.background, x, y, scene.horizon, scene.hills, scene.light)
    shade = 1 - 0.16 * np.clip(px + py, -1.4, 1.4)  # lit from the top left
    gleam = 50 * np.exp(-((px + 0.35) ** 2 + (py + 0.35) ** 2) / 0.12)
    colour = np.array(COLOURS[scene.colour], float)[:, None, None]
    clip = back + (np.minimum(colour * shade + gleam, 255) - back) * cover  # f 3 h w
    return np.rint(np.clip(clip, 0, 255)).astype(np.uint8)


def render_depth(scene: Scene, world: World = World()) -> np.ndarray:
    """How near everything is, as depth estimators tell it: float32 (f, 1, H, W), from -1 for the
    sky over 0 where the ground leaves the picture to 1 for the object."""
    *_, cover = place(scene, world)
    ground = np.clip((pixel_grid(world.size)[0] - scene.horizon) / (UNITS - scene.horizon), 0, 1)
    return (ground - 1 + (2 - ground) * cover).astype(np.float32)[:, None]


def describe(scene: Scene) -> str:
    """The scene's caption, such as "a red circle bounces to the right at night"."""
    words = ["a", scene.colour, scene.shape, scene.motion]
    return " ".join(words + [scene.background] * scene.says_background)


def make_clip(seed: int, index: int, world: World = World()) -> tuple[np.ndarray, str]:
    """Clip `index` of the endless data set `seed`: uint8 (f, 3, H, W), and its caption."""
    scene = sample_scene(np.random.default_rng([seed, index]))
    return render(scene, world), describe(scene)


def reverse_motion(caption: str) -> str:
    """The caption of the opposite motion."""
    return " ".join(OPPOSITES.get(word, word) for word in caption.split())


def captions() -> list[str]:
    """Every distinct caption."""
    places = ["", *(f" {phrase}" for phrase in BACKGROUNDS)]
    parts = product(COLOURS, SHAPES, MOTIONS, places)
    return [f"a {colour} {shape} {motion}{place}" for colour, shape, motion, place in parts]


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = ["a", *COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS]
    return sorted({word for phrase in phrases for word in phrase.split()})


PARTS = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}
PARTS = "".join(f"( (?P<{name}>{'|'.join(words)}))?" for name, words in PARTS.items())


def parse(caption: str) -> dict[str, str]:
    """What a caption mentions: attribute -> word, named as in `Scene`. Any part after the first
    "a" may be missing. ValueError for an unknown word, or for words in another order."""
    match = re.fullmatch("a" + PARTS, " ".join(caption.split()))
    if match is None:
        words = f"{captions()[0]!r}, with some of the words {' '.join(vocabulary())}"
        raise ValueError(f"{caption!r} is no caption of the toy world; write it like {words}")
    return {name: word for name, word in match.groupdict().items() if word is not None}
