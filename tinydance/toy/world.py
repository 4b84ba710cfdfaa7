"""A procedural world of captioned clips, in which minutes of training on a laptop show.

It stands in for the paper's WebVid-10M (section 4.1): endless, and small. An object moves before a
quiet landscape, sometimes past another one. Each of PixelDance's three instructions says what the
others cannot: the first frame how everything looks, the caption what happens, the last frame where
the object ends and what has become of it. No caption says that.

Every choice in this file is [ours: paper silent]. The shipped models were trained on these very
clips: whoever changes the world must train them again.
"""

import re
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from tinydance.toy.paint import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    ground_depth,
    paint_background,
    paint_depth,
    paint_thing,
    pixel_grid,
)

# How a clip may end. What changes, and what comes behind a cut, only the last frame tells.
NIGHT, CHANGE, CUT = CHANGES = "until night falls", "until something changes", "until a cut"


class Motion(NamedTuple):
    """What a caption says of a path. Where it ends is free: up to 38 degrees off `angle`, near or
    far; anywhere where the angle is None."""

    angle: float | None = None  # in radians, 0 to the right, clockwise
    hops: bool = False  # twice
    growth: int = 0  # 1 larger, -1 smaller


MOTIONS = {
    "moves to the right": Motion(0.0),
    "moves to the left": Motion(np.pi),
    "moves up": Motion(-np.pi / 2),
    "moves down": Motion(np.pi / 2),
    "grows": Motion(growth=1),
    "shrinks": Motion(growth=-1),
    "bounces to the right": Motion(0.0, hops=True),
    "bounces to the left": Motion(np.pi, hops=True),
}
SPREAD = np.radians(38)
# A chain of clips goes there and back, or the object would leave the picture.
OPPOSITES = {"right": "left", "up": "down", "grows": "shrinks"}
OPPOSITES |= {back: there for there, back in OPPOSITES.items()}


@dataclass(frozen=True)
class World:
    """size x size pixels, `frames` frames a clip."""

    size: int = 64
    frames: int = 16


@dataclass(frozen=True)
class Thing:
    """An object: keys of the tables above, its centre and radius in units."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    def parts(self) -> tuple:
        """What `paint_thing` takes."""
        return self.shape, np.array(COLOURS[self.colour]), self.x, self.y, self.radius


@dataclass(frozen=True)
class Land:
    background: str
    horizon: float  # its height, y
    hills: float  # their phase, radians
    light: float  # a factor on the brightness


@dataclass(frozen=True)
class Scene:
    """All that a clip is made from."""

    mover: Thing  # as it begins
    motion: str
    end: Thing  # the mover as it ends; the colour changes halfway
    hop: float  # how high it hops, in units
    other: Thing | None  # stands still
    other_in_front: bool
    land: Land  # as it begins
    becomes: str  # the landscape that fades in, a key of BACKGROUNDS; mostly land's own
    change: str  # of CHANGES, as the caption says it, or ""
    cut: float  # share of the clip behind which `after` is on screen
    after: tuple[Thing, Land] | None
    says_background: bool  # does the caption?


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene. The order of the draws is part of the data set: keep it."""
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    land, motion = sample_land(rng), str(rng.choice(list(MOTIONS)))
    u = rng.random(6)
    begin, end = sample_path(rng, MOTIONS[motion])
    growth = {0: 1.0, 1: 1.5 + 0.3 * u[2], -1: 0.58 + 0.12 * u[2]}[MOTIONS[motion].growth]
    mover, turned, becomes = Thing(shape, colour, *begin, 2.8 + 0.4 * u[0]), colour, land.background
    change = ("", NIGHT, CHANGE, CUT)[np.searchsorted((0.66, 0.78, 0.92), u[3])]
    if change == NIGHT and becomes == "at night":  # it has fallen already
        change = ""
    elif change == NIGHT:
        becomes = "at night"
    elif change == CHANGE and u[4] < 0.5:
        turned = str(rng.choice([name for name in COLOURS if name != colour]))
    elif change == CHANGE:
        becomes = str(rng.choice([name for name in BACKGROUNDS if name != becomes]))
    return Scene(
        mover=mover,
        motion=motion,
        end=Thing(shape, turned, *end, mover.radius * growth),
        hop=4 + 2 * u[1] if MOTIONS[motion].hops else 0.0,
        other=sample_other(rng, mover, end, {colour, turned}) if u[5] < 0.35 else None,
        other_in_front=bool(rng.random() < 0.5),
        land=land,
        becomes=becomes,
        change=change,
        cut=rng.uniform(0.5, 0.7) if change == CUT else 1.0,
        after=(sample_thing(rng), sample_land(rng, land.background)) if change == CUT else None,
        says_background=bool(rng.random() < 0.75),
    )


def sample_land(rng, but: str = "") -> Land:
    background = str(rng.choice([name for name in BACKGROUNDS if name != but]))
    return Land(background, rng.uniform(19, 23), rng.uniform(0, 2 * np.pi), rng.uniform(0.93, 1.05))


def sample_thing(rng, taken=()) -> Thing:
    shape, colour = rng.choice(SHAPES), rng.choice([c for c in COLOURS if c not in taken])
    return Thing(str(shape), str(colour), *rng.uniform(6, 26, 2), rng.uniform(2.8, 3.2))


def sample_path(rng, motion: Motion, begin=None) -> tuple[np.ndarray, np.ndarray]:
    """Where a path begins (if that is open) and ends: (x, y) each, in the picture with its hops."""
    low, given = np.array([4.5, 10.5 if motion.hops else 4.5]), begin
    while True:
        begin = rng.uniform(low, 27.5) if given is None else given
        angle = rng.uniform(-np.pi, np.pi)
        if motion.angle is not None:
            angle = motion.angle + angle / np.pi * SPREAD
        far = rng.uniform(4, 11) if motion.growth else rng.uniform(6, 20)
        end = begin + far * np.array([np.cos(angle), np.sin(angle)])
        if (end > low).all() and (end < 27.5).all():
            return begin, end


def sample_other(rng, mover: Thing, end, taken) -> Thing | None:
    """A second object, as often as not in the way; clear of where the path begins and ends."""
    begin = np.array([mover.x, mover.y])
    for _ in range(20):
        thing = sample_thing(rng, taken)
        if rng.random() < 0.5:
            x, y = begin + (end - begin) * rng.uniform(0.35, 0.65) + rng.uniform(-1.5, 1.5, 2)
            thing = replace(thing, x=float(x), y=float(y))
        place = np.array([thing.x, thing.y])
        if min(np.linalg.norm(place - begin), np.linalg.norm(place - end)) > 8:
            return thing
    return None


def arrange(scene: Scene, u: np.ndarray) -> list[tuple]:
    """What `paint_thing` takes of each object, the one in front last. u (n,): times, 0 at the
    begin, 1 at the end or at the last frame before the cut."""
    begin, end, v = scene.mover, scene.end, 2 * u % 1.0
    cx = begin.x + (end.x - begin.x) * u
    cy = begin.y + (end.y - begin.y) * u - scene.hop * 4 * v * (1 - v)
    radius = begin.radius * (end.radius / begin.radius) ** u
    colour = np.where(u[:, None] < 0.5, COLOURS[begin.colour], COLOURS[end.colour])
    things = [(begin.shape, colour, cx, cy, radius)]
    things += [scene.other.parts()] if scene.other else []
    return things if scene.other_in_front else things[::-1]


def render(scene: Scene, world: World = World(), pick: slice = slice(None)) -> np.ndarray:
    """The clip of a scene, or those of its frames that are picked: uint8 (f, 3, H, W)."""
    seen, t = round(world.frames * scene.cut), np.arange(world.frames)[pick]
    u = t / max(1, seen - 1)
    y, x = pixel_grid(world.size)  # 1 h w
    frames = np.repeat(paint_background(x=x, y=y, **vars(scene.land)), len(u), axis=0)
    if scene.becomes != scene.land.background:
        other = paint_background(x=x, y=y, **vars(scene.land) | {"background": scene.becomes})
        frames += (other - frames) * u[:, None, None, None]
    for thing in arrange(scene, u):
        paint_thing(frames, *thing)
    if scene.after:
        thing, land = scene.after
        after = paint_background(x=x, y=y, **vars(land))
        paint_thing(after, *thing.parts())
        frames[t >= seen] = after
    return np.rint(np.clip(frames, 0, 255)).astype(np.uint8)


def render_depth(scene: Scene, world: World = World()) -> np.ndarray:
    """How near everything is, as depth estimators say it: float32 (f, 1, H, W), from -1 for the
    sky over 0 where the ground leaves the picture to 1 for the object in front."""
    seen, t = round(world.frames * scene.cut), np.arange(world.frames)
    depth = np.repeat(ground_depth(world.size, scene.land.horizon), len(t), axis=0)
    things = arrange(scene, t / max(1, seen - 1))
    for nearness, thing in zip((0.6, 1.0)[-len(things) :], things):
        paint_depth(depth, nearness, *thing)
    if scene.after:
        thing, land = scene.after
        after = ground_depth(world.size, land.horizon)
        paint_depth(after, 1.0, *thing.parts())
        depth[t >= seen] = after
    return depth.astype(np.float32)


def describe(scene: Scene) -> str:
    """The scene's caption, such as "a red circle grows beside a blue star at dawn until a cut"."""
    words = ["a", scene.mover.colour, scene.mover.shape, scene.motion]
    if scene.other:
        words += ["beside a", scene.other.colour, scene.other.shape]
    words += [scene.land.background] * scene.says_background + [scene.change]
    return " ".join(words).strip()


def make_clip(seed, index, world=World(), pick=slice(None)) -> tuple[np.ndarray, str]:
    """Clip `index` of the endless data set `seed`: uint8 (f, 3, H, W), and its caption."""
    scene = sample_scene(np.random.default_rng([seed, index]))
    return render(scene, world, pick), describe(scene)


def reverse_motion(caption: str) -> str:
    """The caption of the opposite motion."""
    return " ".join(OPPOSITES.get(word, word) for word in caption.split())


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = ["a beside", *COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS, *CHANGES]
    return sorted({word for phrase in phrases for word in phrase.split()})


def any_of(name: str, words, before: str = "") -> str:
    return f"({before} (?P<{name}>{'|'.join(words)}))?"


PAIRS = [" ".join(pair) for pair in product(COLOURS, SHAPES)]
GRAMMAR = "a" + any_of("colour", COLOURS) + any_of("shape", SHAPES) + any_of("motion", MOTIONS)
GRAMMAR += any_of("other", PAIRS, " beside a")
GRAMMAR += any_of("background", BACKGROUNDS) + any_of("change", CHANGES)


def parse(caption: str) -> dict[str, str]:
    """What a caption mentions: attribute -> word, named as in `referee.Reading`. Any part after the
    first "a" may be missing. ValueError for an unknown word, or for words in another order."""
    match = re.fullmatch(GRAMMAR, " ".join(caption.split()))
    if match is None:
        like = f"'a red circle grows beside a blue star at dawn', of {' '.join(vocabulary())}"
        raise ValueError(f"{caption!r} is no caption of the toy world; write it like {like}")
    return {name: word for name, word in match.groupdict().items() if word is not None}
