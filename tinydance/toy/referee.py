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

from dataclasses import dataclass
from itertools import product

import numpy as np

from tinydance.toy.world import (
    BACKGROUNDS,
    CHANGES,
    CUTS,
    MIDDLE,
    POLYGONS,
    REST,
    RICH_SHAPES,
    UNITS,
    Scene,
    World,
    _pixel_grid,
    paint_background,
    parse,
    signed_distance,
)

# --------------------------------------------------------------------------------------------------
# The referee


@dataclass(frozen=True)
class Reading:
    """What the referee sees in f frames, in the tables' words. `motion` may also be "still", or
    "none": nothing that we know. Where no frame has an object, all but the background is "none"."""

    colour: str
    shape: str
    background: str
    motion: str
    track: np.ndarray  # (f, 2), the object's centre x, y in pixels; nan where there is none
    radius: np.ndarray  # (f,), in pixels, of the circle of equal area
    angle: np.ndarray  # (f,), in radians; 0 for shapes without corners
    next_colour: str | None = None  # of the second half, where it differs from the first
    next_shape: str | None = None


def referee(frames: np.ndarray, world: World = World()) -> Reading:
    """Read a clip from its pixels alone. frames: (f, 3, H, W) in 0..255, integer or float."""
    frames = np.asarray(frames, np.float32)
    pixels_per_unit = frames.shape[-1] / UNITS
    half = (len(frames) + 1) // 2

    alpha, votes = _find_object(frames, world)  # f h w and f k
    area, x, y, harmonics, look = _moments(alpha)
    visible = area > 3
    track = np.where(visible[:, None], np.stack([x, y], 1) * pixels_per_unit, np.nan)
    radius = np.sqrt(area / np.pi)
    background = _read_background(frames, alpha)
    if not visible.any():
        return Reading("none", "none", background, "none", track, radius, 0 * radius)

    # Words for either half of the clip: only a change or a cut makes them differ.
    halves = slice(half), slice(-half, None)
    colour, next_colour = (list(world.colours)[votes[h].sum(0).argmax()] for h in halves)
    if colour == next_colour:
        halves, next_colour = [slice(None)] * 2, None  # one object: its shape is seen all the time
    shape, next_shape = (_nearest_shape(look[h], area[h], world) for h in halves)
    next_shape = next_shape if next_shape != shape else None

    angle = 0 * radius
    if shape in POLYGONS:
        corners, _, _, first = POLYGONS[shape]
        phase = np.angle(harmonics[:, corners - 3] * np.exp(-1j * corners * first))
        angle = np.unwrap(phase) / corners

    if not visible.all():
        motion = "none"
    elif next_colour:
        motion = CUTS if next_shape else CHANGES
    else:
        cameras = _compare_cameras(frames, alpha, world)
        motion = _read_motion(x, y, radius, angle, cameras, world)
    return Reading(colour, shape, background, motion, track, radius * pixels_per_unit, angle,
                   next_colour, next_shape)


def judge(frames: np.ndarray, caption: str, world: World = World()) -> dict[str, bool]:
    """Does a clip do what its caption says? attribute -> verdict, for all that it mentions."""
    reading = referee(frames, world)
    return {name: getattr(reading, name) == word for name, word in parse(caption).items()}


def _find_object(frames, world):
    """Objects are saturated, landscapes are not. -> alpha (f, h, w), the object's share of each
    pixel; votes (f, k), how much there is of each colour in each frame."""
    palette = np.array(list(world.colours.values()), np.float32)
    palette -= palette.mean(1, keepdims=True)  # without the grey, light and shade hardly matter
    length = np.linalg.norm(palette, axis=1)
    chroma = frames - frames.mean(1, keepdims=True)
    along = np.einsum("kc,fchw->fkhw", palette / length[:, None], chroma)
    share = along / length[:, None, None]
    wins = (along == along.max(1, keepdims=True)) & (share > 0.55)
    votes = (share * wins).sum((2, 3))
    # In each frame the object has the colour of most votes. A landscape's share in a colour comes
    # near 0.3; the shaded side of an object has 0.8.
    share = share[np.arange(len(frames)), votes.argmax(1)]
    return np.clip((share - 0.35) / 0.45, 0, 1), votes


def _moments(alpha):
    """Area, centre x and y (f,), harmonics (f, 3), look (f, 4) of a mask (f, h, w), in units.

    Harmonic n = 3, 4, 5 is the mean of exp(i n phi) about the centre, weighted by rho^2: large for
    a shape of n corners, with n times the angle of a corner as its phase. `look` has the harmonics'
    magnitudes and the mean of pi rho^2 / area, 1/2 for a disk and more for a ring.
    """
    y, x = _pixel_grid(alpha.shape[-1])
    total = alpha.sum((1, 2)) + 1e-6
    area = total * (UNITS / alpha.shape[-1]) ** 2
    cx, cy = (alpha * x).sum((1, 2)) / total, (alpha * y).sum((1, 2)) / total
    z = (x - cx[:, None, None]) + 1j * (y - cy[:, None, None])
    rho = np.abs(z) + 1e-6
    weight = alpha * rho**2
    spread = weight.sum((1, 2)) + 1e-6
    harmonics = np.stack([(weight * (z / rho) ** n).sum((1, 2)) for n in (3, 4, 5)], axis=1)
    harmonics /= spread[:, None]
    look = np.column_stack([np.abs(harmonics), np.pi * spread / total / area])
    return area, cx, cy, harmonics, look


def _look_of(shape):
    """The `look` of a shape as we render it."""
    y, x = _pixel_grid(UNITS)
    outside = 5 * signed_distance(shape, (x - MIDDLE) / 5, (y - MIDDLE) / 5)
    return _moments(np.clip(0.5 - outside, 0, 1))[-1][0]


_LOOKS = {shape: _look_of(shape) for shape in RICH_SHAPES}


def _nearest_shape(look, area, world):
    mean = np.average(look, axis=0, weights=area)  # the larger, the better seen
    return min(world.shapes, key=lambda shape: np.abs(mean - _LOOKS[shape]).sum())


def _read_background(frames, alpha):
    """The landscape whose painting is nearest, where the object is not."""
    empty = (1 - alpha)[:, None]
    seen = (frames * empty).sum(0) / (empty.sum(0) + 1e-6)
    y, x = _pixel_grid(frames.shape[-1])
    distance = {}
    for background in BACKGROUNDS:
        middling = Scene("", "", background, "", True, x=16, y=16, radius=4.6, extent=0.5,
                         horizon=21, hills=0, light=1)
        painting = paint_background(middling, x, y)[0]
        distance[background] = (np.abs(seen - painting) * empty.mean(0)).sum()
    return min(distance, key=distance.get)


def _cameras(motion):
    """Where the camera looks at the end of a motion: (pan, zoom), for three extents."""
    return [(end["pan"], end["zoom"]) for end in (REST | motion(1.0, e) for e in (0, 0.5, 1))]


def _compare_cameras(frames, alpha, world):
    """(pan, zoom) -> how far the first frame's landscape, seen so, is from the last frame's, as a
    share of how far it is without moving."""
    size = frames.shape[-1]
    empty = np.ones((2, size, size), bool)  # away from the object and from its soft edge
    for shift in product((-1, 0, 1), repeat=2):
        empty &= np.roll(alpha[[0, -1]], shift, axis=(1, 2)) == 0
    y, x = (grid[0] for grid in _pixel_grid(size))
    errors = {(0.0, 1.0): 0.8}  # not 1: a camera that moves has to do clearly better
    for pan, zoom in {camera for motion in world.motions.values() for camera in _cameras(motion)}:
        column = ((x - MIDDLE) / zoom + MIDDLE + pan) * size / UNITS
        row = ((y - MIDDLE) / zoom + MIDDLE) * size / UNITS
        known = (column >= 0) & (column < size) & (row >= 0) & (row < size) & empty.all(0)
        row, column = row[known].astype(int), column[known].astype(int)
        last, usable = frames[-1][:, known], empty[0, row, column]
        moved = ((frames[0][:, row, column] - last) ** 2 * usable).sum()
        stayed = ((frames[0][:, known] - last) ** 2 * usable).sum()
        errors.setdefault((pan, zoom), (moved + 1) / (stayed + 1))
    return errors


def _read_motion(x, y, radius, angle, cameras, world):
    """The motion whose curve and camera are nearest. "still" below some two fifths of a motion's
    usual extent; "none" if that curve is far, as it is for an object that jumps or trembles."""
    scale = np.array([7.75, 7.75, 0.53, 1.26])  # x, y, log radius, angle: curves are about 1 long
    seen = np.stack([x, y, np.log(radius), angle], axis=1) / scale
    seen -= seen.mean(0)
    if (seen**2).mean() < 0.004:
        return "still"
    u = np.linspace(0, 1, len(x))
    far, total = {}, {}
    for name, motion in world.motions.items():
        dx, dy, growth, turn, pan, zoom = (REST | motion(u, 0.5)).values()
        at_x, at_y = (x[0] - MIDDLE - pan) * zoom + dx, (y[0] - MIDDLE) * zoom + dy
        curve = np.broadcast_arrays(at_x, at_y, np.log(growth * zoom), turn, u)[:4]
        curve = np.stack(curve, axis=1) / scale
        curve -= curve.mean(0)
        energy = (curve**2).sum() + 1e-6
        gain = np.clip((seen * curve).sum() / energy, 0.6, 1.5)  # it may go less far, or farther
        far[name] = ((seen - gain * curve) ** 2).sum() / (gain**2 * energy)
        total[name] = far[name] + min(cameras[camera] for camera in _cameras(motion))
    best = min(total, key=total.get)
    return best if far[best] < 0.2 else "none"
