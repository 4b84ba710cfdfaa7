"""The referee: does a clip of the toy world do what its caption says?

It reads colour, shape, background and motion back from the pixels, by rules and without a network:
objects are saturated and landscapes are not, a shape's corners are a Fourier coefficient of its
angles, and a motion is the table's curve nearest to the track. So a model can be measured on a
laptop. The tests show how far the referee can be trusted, also after a blur and noise.
[ours; the paper measures FVD and CLIPSIM]
"""

from dataclasses import dataclass

import numpy as np

from tinydance.toy import world


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


def referee(frames: np.ndarray) -> Reading:
    """Read a clip from its pixels alone. frames: (f, 3, H, W) in 0..255, integer or float."""
    frames = np.asarray(frames, np.float32)
    pixels_per_unit = frames.shape[-1] / world.UNITS

    alpha, votes = find_object(frames)  # f h w and f k
    area, x, y, harmonics, look = measure_shape(alpha)
    visible = area > 3
    track = np.where(visible[:, None], np.stack([x, y], 1) * pixels_per_unit, np.nan)
    radius = np.sqrt(area / np.pi)
    background = read_background(frames, alpha)
    if not visible.any():
        return Reading("none", "none", background, "none", track, radius)

    # An object that changes its colour halfway is another object: only the first one is read.
    half = (len(frames) + 1) // 2
    first, second = votes[:half].sum(0).argmax(), votes[-half:].sum(0).argmax()
    same = slice(None) if first == second else slice(half)
    colour = list(world.COLOURS)[first]
    mean = np.average(look[same], axis=0, weights=area[same])  # the larger, the better seen
    shape = min(world.SHAPES, key=lambda shape: np.abs(mean - LOOKS[shape]).sum())

    motion = "none"
    if visible.all() and first == second:
        angle = read_angle(harmonics, shape)
        motion = read_motion(x, y, radius, angle)
    return Reading(colour, shape, background, motion, track, radius * pixels_per_unit)


def compare(reading: Reading, caption: str) -> dict[str, bool]:
    """attribute -> is it as the caption says? For all that the caption mentions."""
    return {name: getattr(reading, name) == word for name, word in world.parse(caption).items()}


def judge(frames: np.ndarray, caption: str) -> dict[str, bool]:
    """Does a clip do what its caption says? See `compare`."""
    return compare(referee(frames), caption)


def find_object(frames):
    """Objects are saturated, landscapes are not. -> alpha (f, h, w), the object's share of each
    pixel; votes (f, k), how much there is of each colour in each frame."""
    palette = np.array(list(world.COLOURS.values()), np.float32)
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


def measure_shape(alpha):
    """Area, centre x and y (f,), harmonics (f, 3), look (f, 4) of a mask (f, h, w), in units.

    Harmonic n = 3, 4, 5 is the mean of exp(i n phi) about the centre, weighted by rho^2: large for
    a shape of n corners, with n times the angle of a corner as its phase. `look` has the harmonics'
    magnitudes and the mean of pi rho^2 / area, 1/2 for a disk and more for what is less round.
    """
    y, x = world.pixel_grid(alpha.shape[-1])
    total = alpha.sum((1, 2)) + 1e-6
    area = total * (world.UNITS / alpha.shape[-1]) ** 2
    cx, cy = (alpha * x).sum((1, 2)) / total, (alpha * y).sum((1, 2)) / total
    z = (x - cx[:, None, None]) + 1j * (y - cy[:, None, None])
    rho = np.abs(z) + 1e-6
    weight = alpha * rho**2
    spread = weight.sum((1, 2)) + 1e-6
    harmonics = np.stack([(weight * (z / rho) ** n).sum((1, 2)) for n in (3, 4, 5)], axis=1)
    harmonics /= spread[:, None]
    look = np.column_stack([np.abs(harmonics), np.pi * spread / total / area])
    return area, cx, cy, harmonics, look


def measure_look(shape):
    """The `look` of a shape as we render it, with radius 5."""
    y, x = world.pixel_grid(world.UNITS)
    outside = 5 * world.signed_distance(shape, (x - world.MIDDLE) / 5, (y - world.MIDDLE) / 5)
    return measure_shape(np.clip(0.5 - outside, 0, 1))[-1][0]


LOOKS = {shape: measure_look(shape) for shape in world.SHAPES}


def read_background(frames, alpha):
    """The landscape whose painting is nearest, where the object is not."""
    empty = (1 - alpha)[:, None]
    seen = (frames * empty).sum(0) / (empty.sum(0) + 1e-6)
    y, x = world.pixel_grid(frames.shape[-1])
    error = {}
    for background in world.BACKGROUNDS:
        painting = world.paint_background(background, x, y)[0]
        error[background] = (np.abs(seen - painting) * empty.mean(0)).sum()
    return min(error, key=error.get)


def read_angle(harmonics, shape):
    """How far each frame's object is turned (f,), in radians; 0 for shapes without corners."""
    if shape not in world.POLYGONS:
        return np.zeros(len(harmonics))
    corners, _, _, first = world.POLYGONS[shape]
    phase = np.angle(harmonics[:, corners - 3] * np.exp(-1j * corners * first))
    return np.unwrap(phase) / corners


def read_motion(x, y, radius, angle):
    """The motion whose curve is nearest. "still" below some two fifths of a motion's usual extent;
    "none" if that curve is far, as it is for an object that jumps, trembles or turns."""
    scale = np.array([7.75, 7.75, 0.53, 1.26])  # x, y, log radius, angle: curves are about 1 long
    seen = np.stack([x, y, np.log(radius), angle], axis=1) / scale
    seen -= seen.mean(0)
    if (seen**2).mean() < 0.004:
        return "still"
    u = np.linspace(0, 1, len(x))
    error = {}
    for name, motion in world.MOTIONS.items():
        pose = motion(u, 0.5)
        curve = np.broadcast_arrays(pose.dx, pose.dy, np.log(pose.scale), 0.0, u)[:4]
        curve = np.stack(curve, axis=1) / scale
        curve -= curve.mean(0)
        energy = (curve**2).sum() + 1e-6
        gain = np.clip((seen * curve).sum() / energy, 0.6, 1.5)  # it may go less far, or farther
        error[name] = ((seen - gain * curve) ** 2).sum() / (gain**2 * energy)
    best = min(error, key=error.get)
    return best if error[best] < 0.2 else "none"
