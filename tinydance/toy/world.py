"""A procedural world of captioned clips, and a referee that reads them back from their pixels.

The paper trains on WebVid-10M (section 4.1). On a laptop, or in a test, this world stands in for
it: endless, captioned, and small enough that minutes of training show. One object moves before a
quiet landscape. What will happen is in the caption only, and how far it goes in the last frame
only, so that each of PixelDance's three conditions has something of its own to say. The referee
tells whether a clip does what its caption says, by rules and without any network.
Every choice in this file is [ours: paper silent].

Read before: `data.py`, which feeds these clips to training. Read after: `video.py`, which writes
them to files. Not here: real videos, batches, latents (`data.py`), the tokenizer (`clip.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

# --------------------------------------------------------------------------------------------------
# The world in tables. Lengths are in units, of which the picture has 32 whatever its number of
# pixels: a scene can be rendered at any size. x points right, y down, and angles turn clockwise.

UNITS, MIDDLE = 32, 16


COLOURS = {
    "red": (226, 54, 52),
    "green": (38, 166, 78),
    "blue": (48, 92, 232),
    "yellow": (250, 206, 46),
}


RICH_COLOURS = COLOURS | {"cyan": (24, 196, 206), "purple": (158, 48, 204)}


# The shapes with corners: (how many, radius of a corner, radius halfway to the next one, and the
# angle of the first, which stands the shape upright). A star has four rays.
POLYGONS = {
    "triangle": (3, 1.42, 1.42 * np.cos(np.pi / 3), -np.pi / 2),
    "star": (4, 1.6, 0.62, -np.pi / 2),
    "square": (4, 1.27, 1.27 * np.cos(np.pi / 4), np.pi / 4),
}


SHAPES = ("circle", "triangle", "star")  # far apart in latents too: a square is almost a circle


RICH_SHAPES = SHAPES + ("square", "ring")


# phrase -> the colours of the sky's top, the sky at the horizon, the ground at the horizon and the
# picture's bottom; and the height of the hills. Muted, so that every object stands out on each.
BACKGROUNDS = {
    "at night": ((16, 18, 46), (66, 60, 104), (40, 46, 58), (24, 28, 38), 1.3),
    "at dawn": ((128, 134, 176), (242, 200, 182), (142, 112, 120), (104, 82, 98), 1.5),
    "by the sea": ((170, 198, 212), (226, 232, 226), (96, 140, 150), (126, 164, 166), 0.4),
    "on snow": ((158, 172, 192), (208, 214, 224), (244, 246, 250), (224, 230, 238), 1.1),
}


def _far(e):
    return 5.5 + 3.0 * e


def _hops(u, e):
    """Two hops: the flight of a thrown ball, twice, while u goes from 0 to 1."""
    v = 2 * u % 1.0
    return -(4.5 + 2.0 * e) * 4 * v * (1 - v)


# phrase -> what changes with the time u in [0, 1]; e in [0, 1] tells how far this one clip goes.
MOTIONS = {
    "moves to the right": lambda u, e: dict(dx=_far(e) * u),
    "moves to the left": lambda u, e: dict(dx=-_far(e) * u),
    "moves up": lambda u, e: dict(dy=-_far(e) * u),
    "moves down": lambda u, e: dict(dy=_far(e) * u),
    "grows": lambda u, e: dict(scale=(1.45 + 0.3 * e) ** u),
    "shrinks": lambda u, e: dict(scale=(0.68 - 0.18 * e) ** u),
    "bounces to the right": lambda u, e: dict(dx=_far(e) * u, dy=_hops(u, e)),
    "bounces to the left": lambda u, e: dict(dx=-_far(e) * u, dy=_hops(u, e)),
}


def _orbit(u, e):
    radius, turn = 3.2 + 0.8 * e, 2 * np.pi * u
    return dict(dx=radius * np.sin(turn), dy=radius * (np.cos(turn) - 1))


def _zigzag(u, e):
    return 3.0 * (2 * np.abs((3 * u + 0.25) % 1.0 * 2 - 1) - 1)


# The camera moves instead of the object: `pan` is where it looks, `zoom` how large it shows things.
CHANGES, CUTS = "changes to", "then cut to"  # followed by what the second half of the clip shows


RICH_MOTIONS = MOTIONS | {
    "turns clockwise": lambda u, e: dict(angle=np.radians(60 + 25 * e) * u),
    "circles around": _orbit,
    "zigzags to the right": lambda u, e: dict(dx=_far(e) * u, dy=_zigzag(u, e)),
    "zigzags to the left": lambda u, e: dict(dx=-_far(e) * u, dy=_zigzag(u, e)),
    "stands still while the camera pans to the right": lambda u, e: dict(pan=_far(e) * u),
    "stands still while the camera pans to the left": lambda u, e: dict(pan=-_far(e) * u),
    "stands still while the camera zooms in": lambda u, e: dict(zoom=(1.5 + 0.2 * e) ** u),
    "stands still while the camera zooms out": lambda u, e: dict(zoom=(0.67 - 0.1 * e) ** u),
    CHANGES: lambda u, e: {},
    CUTS: lambda u, e: {},
}


REST = dict(dx=0.0, dy=0.0, scale=1.0, angle=0.0, pan=0.0, zoom=1.0)


@dataclass(frozen=True)
class World:
    """size x size pixels, `frames` frames at 4 fps. Rich: more of everything, camera and cuts."""

    size: int = 32
    frames: int = 16
    rich: bool = False

    shapes = property(lambda self: RICH_SHAPES if self.rich else SHAPES)
    colours = property(lambda self: RICH_COLOURS if self.rich else COLOURS)
    motions = property(lambda self: RICH_MOTIONS if self.rich else MOTIONS)


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
    then: Scene | None = None  # rich: the second half of the clip shows this scene instead


def sample_scene(rng: np.random.Generator, world: World = World()) -> Scene:
    """Draw a scene. Place, size and landscape do not depend on the motion, and the motion only on
    whether the shape can be seen to turn: the first frame tells nothing of what will happen."""
    shape = str(rng.choice(world.shapes))
    colour = str(rng.choice(list(world.colours)))
    background = str(rng.choice(list(BACKGROUNDS)))
    says_background = bool(rng.random() < 0.75)
    x, y = rng.uniform(13.5, 18.5, 2)
    radius = rng.uniform(5.0, 6.5)
    horizon, hills, light = rng.uniform(19, 23), rng.uniform(0, 2 * np.pi), rng.uniform(0.93, 1.05)
    motion = str(rng.choice([m for m in world.motions if is_seen(m, shape)]))
    scene = Scene(shape, colour, background, motion, says_background, x, y, radius,
                  rng.random(), horizon, hills, light)
    if motion not in (CHANGES, CUTS):
        return scene
    then = replace(scene, colour=str(rng.choice([c for c in world.colours if c != colour])))
    if motion == CUTS:
        x, y = rng.uniform(10, 22, 2)
        others = [s for s in world.shapes if s != shape]
        then = replace(then, shape=str(rng.choice(others)), x=x, y=y)
    return replace(scene, then=then)


def is_seen(motion: str, shape: str) -> bool:
    """A shape without corners is not seen to turn."""
    return shape in POLYGONS or not motion.startswith("turns")


# --------------------------------------------------------------------------------------------------
# Rendering: a signed distance gives every pixel its share of the object, hence smooth edges.


def signed_distance(shape, x, y, angle=0.0):
    """Distance of (x, y) from the outline of a shape of radius 1 at the origin; negative inside."""
    rho = np.hypot(x, y)
    if shape == "circle":
        return rho - 1.0
    if shape == "ring":
        return np.abs(rho - 0.8) - 0.28
    corners, tip, dent, first = POLYGONS[shape]
    # Fold the plane onto one half of one edge, a line from the corner (tip, 0) to (end_x, end_y).
    half = np.pi / corners
    phi = np.abs((np.arctan2(y, x) - first - angle + half) % (2 * half) - half)
    end_x, end_y = dent * np.cos(half), dent * np.sin(half)
    cross = end_y * (rho * np.cos(phi) - tip) - (end_x - tip) * rho * np.sin(phi)
    return cross / np.hypot(end_x - tip, end_y)


def paint_background(scene: Scene, x, y):
    """Sky over rolling ground. x, y (f, h, w) in units -> (f, 3, h, w) in 0..255, not rounded."""
    *palette, height = BACKGROUNDS[scene.background]
    top, high, low, bottom = (np.array(c, float)[:, None, None] for c in palette)
    hills = height * (np.sin(x * 0.28 + scene.hills) + 0.4 * np.sin(x * 0.61 + 2 * scene.hills))
    below = (y - scene.horizon)[:, None]
    # The colours run straight down; only the line between sky and ground follows the hills.
    sky = high + (top - high) * np.clip(-below / 20, 0, 1)
    ground = low + (bottom - low) * np.clip(below / 10, 0, 1)
    is_ground = np.clip(below - hills[:, None] + 0.5, 0, 1)
    return scene.light * (sky + (ground - sky) * is_ground)


def render(scene: Scene, world: World = World()) -> np.ndarray:
    """The clip of a scene: uint8 (f, 3, H, W)."""
    if scene.then is not None:  # a splice of two clips
        half = world.frames // 2
        before, after = render(replace(scene, then=None), world), render(scene.then, world)
        return np.concatenate([before[:half], after[half:]])

    u = np.linspace(0, 1, world.frames)
    change = REST | RICH_MOTIONS[scene.motion](u, scene.extent)
    dx, dy, scale, angle, pan, zoom = (np.reshape(v, (-1, 1, 1)) for v in change.values())  # f or 1
    y, x = _pixel_grid(world.size)
    x, y = (x - MIDDLE) / zoom + MIDDLE + pan, (y - MIDDLE) / zoom + MIDDLE  # what the camera sees
    back = paint_background(scene, x, y)

    radius = scene.radius * scale
    px, py = (x - scene.x - dx) / radius, (y - scene.y - dy) / radius
    pixels = radius * zoom * world.size / UNITS
    cover = np.clip(0.5 - signed_distance(scene.shape, px, py, angle) * pixels, 0, 1)[:, None]
    shade = 1 - 0.16 * np.clip(px + py, -1.4, 1.4)[:, None]  # lit from the top left
    gleam = 50 * np.exp(-((px + 0.35) ** 2 + (py + 0.35) ** 2) / 0.12)[:, None]
    colour = np.array(RICH_COLOURS[scene.colour], float)[:, None, None]
    clip = back + (np.minimum(colour * shade + gleam, 255) - back) * cover
    clip = np.rint(np.clip(clip, 0, 255)).astype(np.uint8)
    return np.array(np.broadcast_to(clip, (world.frames, *clip.shape[1:])))


def _pixel_grid(size):
    """y and x of the pixels' centres in units, each (1, h, w)."""
    centres = (np.arange(size) + 0.5) * UNITS / size
    return np.meshgrid([0.0], centres, centres, indexing="ij")[1:]


# --------------------------------------------------------------------------------------------------
# Captions


def caption_of(scene: Scene) -> str:
    """The scene in words, such as "a red circle bounces to the right at night"."""
    words = ["a", scene.colour, scene.shape, scene.motion]
    if scene.motion == CHANGES:
        words += [scene.then.colour]
    if scene.motion == CUTS:
        words += ["a", scene.then.colour, scene.then.shape]
    return " ".join(words + [scene.background] * scene.says_background)


def make_clip(seed: int, index: int, world: World = World()) -> tuple[np.ndarray, str]:
    """Clip `index` of the endless data set `seed`: uint8 (f, 3, H, W), and its caption."""
    scene = sample_scene(np.random.default_rng([seed, index]), world)
    return render(scene, world), caption_of(scene)


def captions(world: World = World(), background: bool = True) -> list[str]:
    """Every distinct caption; without `background`, only those that do not mention it."""
    found = []
    for colour, shape, motion in product(world.colours, world.shapes, world.motions):
        others = [c for c in world.colours if c != colour]
        ends = [""]
        if motion == CHANGES:
            ends = [f" {c}" for c in others]
        if motion == CUTS:
            ends = [f" a {c} {s}" for c, s in product(others, world.shapes) if s != shape]
        if is_seen(motion, shape):
            found += [f"a {colour} {shape} {motion}{end}" for end in ends]
    places = ["", *(f" {phrase}" for phrase in BACKGROUNDS)] if background else [""]
    return [caption + place for caption, place in product(found, places)]


def vocabulary(world: World = World()) -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = [*world.colours, *world.shapes, *world.motions, *BACKGROUNDS, "a"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _any_of(attribute, phrases):
    return f"(?P<{attribute}>{'|'.join(phrases)})"


_GRAMMAR = re.compile(
    f"a( {_any_of('colour', RICH_COLOURS)})?( {_any_of('shape', RICH_SHAPES)})?"
    f"( {_any_of('motion', RICH_MOTIONS)})?"
    f"((?<=to)( a)? {_any_of('next_colour', RICH_COLOURS)}"  # after "changes to" and "then cut to"
    f"( {_any_of('next_shape', RICH_SHAPES)})?)?( {_any_of('background', BACKGROUNDS)})?"
)


def parse(caption: str) -> dict[str, str]:
    """What a caption mentions: attribute -> word, named as in `Reading`. Any part after the first
    "a" may be missing. ValueError for an unknown word, or for words in another order."""
    known = vocabulary(World(rich=True))
    for word in caption.split():
        if word not in known:
            raise ValueError(f"the toy world has no word {word!r}; it has: {' '.join(known)}")
    match = _GRAMMAR.fullmatch(" ".join(caption.split()))
    if match is None:
        raise ValueError(f"cannot read {caption!r}; say it like {captions()[0]!r}")
    return {name: word for name, word in match.groupdict().items() if word is not None}
