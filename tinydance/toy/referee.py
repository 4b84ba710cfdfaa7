"""The referee: does a clip of the toy world do what its caption says?

It reads looks and motion back from the pixels, by rules and without a network: objects are
saturated and landscapes are not, a shape's corners are a Fourier coefficient of its angles, and a
motion is a line with hops and growth fitted to the track. So a model can be measured on a laptop.
The tests show how far the referee can be trusted, also after a blur and noise, and on cheats.
[ours; the paper measures FVD and CLIPSIM]
"""

from dataclasses import dataclass

import numpy as np

from tinydance.toy import paint, world

SMALL = 4.0  # square units: less of a colour is no object


@dataclass(frozen=True)
class Reading:
    """What the referee sees in f frames, in the tables' words; "none" is what it cannot tell.

    What a caption says: colour, shape and landscape as the clip begins, motion ("still" for none),
    the other object, and the change. What no caption says: how it ends, and where."""

    colour: str
    shape: str
    background: str
    motion: str
    other: str  # such as "blue star"; "" where there is one object
    change: str  # one of world.CHANGES, or "" for none
    end_colour: str
    end_background: str
    end: np.ndarray  # (2,), the centre x, y of the object on the last frame, in pixels; or nan
    track: np.ndarray  # (f, 2), the moving object's centre in pixels; nan where there is none


@dataclass
class Blob:
    """One object in n frames: its colour's mask, and what was measured of it, in units."""

    colours: list[str]
    area: np.ndarray  # (n,)
    xy: np.ndarray  # (n, 2), nan where it is not seen
    look: np.ndarray  # (n, 4), see `measure_shape`

    def travel(self) -> float:
        """How far it comes, and how much it grows, as a length."""
        seen = np.flatnonzero(self.area > SMALL / 2)
        if len(seen) < 2:
            return 0.0
        a, b = seen[0], seen[-1]
        grown = abs(np.log(self.area[b] / self.area[a]))
        return float(np.linalg.norm(self.xy[b] - self.xy[a]) + 4 * grown)


def referee(frames: np.ndarray) -> Reading:
    """Read a clip from its pixels alone. frames: (f, 3, H, W) in 0..255, integer or float."""
    frames = np.asarray(frames, np.float32)
    unit = frames.shape[-1] / paint.UNITS  # pixels
    masks = find_colours(frames)  # k f h w
    cover = masks.sum(0)
    n = find_cut(frames, cover)
    begins, ends = (
        read_background(frames[part], cover[part]) for part in (slice(min(n, 2)), slice(-2, None))
    )
    change = world.CUT if n < len(frames) else ""
    if begins != ends and not change:
        change = world.NIGHT if ends == "at night" else world.CHANGE
    after = masks[:, n:] if n < len(frames) else masks
    last = max(find_blobs(after[:, -1:]), key=lambda blob: blob.area[-1], default=None)
    blobs = find_blobs(masks[:, :n])
    nothing = np.full((len(frames), 2), np.nan)
    if not blobs:
        return Reading(
            "none", "none", begins, "none", "", change, "none", ends, nothing[0], nothing
        )
    mover, *others = sorted(blobs, key=Blob.travel, reverse=True)
    other = others[0] if others else None
    clear = mover.area > SMALL / 2
    if other:
        apart = np.linalg.norm(mover.xy - np.nanmedian(other.xy, 0), axis=1)
        reach = np.sqrt(np.maximum(mover.area, 0) / np.pi) + np.sqrt(np.median(other.area) / np.pi)
        hidden = ~clear | (apart < 1.15 * reach)
    else:
        hidden = ~clear
    name = f"{other.colours[0]} {read_shape(other, ~hidden)}" if other else ""
    if mover.colours[0] != mover.colours[1] and not change:
        change = world.CHANGE
    shape = read_shape(mover, ~hidden)
    motion = read_motion(mover, shape, ~hidden, other)
    if n in (1, len(frames) - 1) or find_cut(frames[n:], cover[n:]) < len(frames) - n:
        motion = "none"  # a frame alone is no shot, and no caption has two cuts
    track = nothing.copy()
    track[:n] = mover.xy * unit
    if change == world.CUT:
        end, colour = (last.xy[-1] * unit, last.colours[0]) if last else (nothing[0], "none")
    else:
        end, colour = track[-1], mover.colours[-1]
    return Reading(mover.colours[0], shape, begins, motion, name, change, colour, ends, end, track)


def compare(reading: Reading, caption: str) -> dict[str, bool]:
    """attribute -> is it as the caption says? For all that it mentions, and for the change: there
    is none where the caption mentions none."""
    said = {"change": ""} | world.parse(caption)
    verdict = {name: getattr(reading, name) == word for name, word in said.items()}
    if said["change"] == world.CHANGE:  # the words do not say what changes
        verdict["change"] = reading.change in (world.NIGHT, world.CHANGE)
    if reading.change == world.CUT != said["change"]:
        verdict["motion"] = False  # no motion goes on behind a cut that nobody asked for
    return verdict


def judge(frames: np.ndarray, caption: str) -> dict[str, bool]:
    """Does a clip do what its caption says? See `compare`."""
    return compare(referee(frames), caption)


def find_colours(frames):
    """Objects are saturated, landscapes are not. -> each colour's share of each pixel,
    (k, f, h, w); a pixel has one colour at most."""
    palette = np.array(list(paint.COLOURS.values()), np.float32)
    palette -= palette.mean(1, keepdims=True)  # without the grey, light and shade hardly matter
    length = np.linalg.norm(palette, axis=1)
    chroma = smooth(frames - frames.mean(1, keepdims=True))
    along = np.einsum("kc,fchw->kfhw", palette / length[:, None], chroma)
    share = np.clip((along / length[:, None, None, None] - 0.35) / 0.45, 0, 1)
    return share * (along == along.max(0))


def smooth(x):
    """A blur by (1, 2, 1) / 4 along both sides, against noise."""
    for axis in (-2, -1):
        wide = np.concatenate([x.take([0], axis), x, x.take([-1], axis)], axis)
        n = x.shape[axis]
        x = sum(k * wide.take(range(i, i + n), axis) for i, k in enumerate((0.25, 0.5, 0.25)))
    return x


def find_cut(frames, cover) -> int:
    """The first frame behind a cut, or f: most of the landscape changes at once."""
    step = np.abs(smooth(smooth(np.diff(frames, axis=0)))).mean(1)
    jumps = [np.median(step[t][(cover[t] + cover[t + 1]) < 0.1]) for t in range(len(step))]
    if not jumps or max(jumps) < 5 + 3 * np.median(jumps):
        return len(frames)
    return int(np.argmax(jumps)) + 1


def find_blobs(masks) -> list[Blob]:
    """The one or two objects of some frames, without a cut, from masks (k, n, h, w). An object may
    change its colour halfway."""
    names = list(paint.COLOURS)
    unit = (paint.UNITS / masks.shape[-1]) ** 2
    areas = masks.sum((2, 3)) * unit  # k n
    half = (areas.shape[1] + 1) // 2
    early, late = (
        {k for k in np.argsort(part.mean(1))[-2:] if part.mean(1)[k] > SMALL}
        for part in (areas[:, :half], areas[:, -half:])
    )
    pairs = [(k, k) for k in early & late]
    gone, come = sorted(early - late), sorted(late - early)
    pairs += list(zip(gone, come)) if len(gone) == len(come) else [(k, k) for k in gone + come]
    blobs = []
    for k, m in pairs:
        mask = np.concatenate([masks[k, :half], masks[m, half:]])
        if k != m:  # the very frame of the change
            turn = np.arange(len(mask))[:, None, None]
            mask = np.where((areas[k] >= areas[m])[:, None, None] & (turn >= 0), masks[k], masks[m])
        area, x, y, look = measure_shape(mask)
        xy = np.where((area > SMALL / 4)[:, None], np.stack([x, y], 1), np.nan)
        blobs.append(Blob([names[k], names[m]], area, xy, look))
    return blobs


def measure_shape(alpha):
    """Area, centre x and y (n,), look (n, 4) of a mask (n, h, w), in units.

    Harmonic 3, 4, 5 is the mean of exp(i n phi) about the centre, weighted by rho^2: large for a
    shape of n corners. `look` has their magnitudes and the mean of pi rho^2 / area, 1/2 for a disk
    and more for what is less round.
    """
    y, x = paint.pixel_grid(alpha.shape[-1])
    total = alpha.sum((1, 2)) + 1e-6
    area = total * (paint.UNITS / alpha.shape[-1]) ** 2
    cx, cy = (alpha * x).sum((1, 2)) / total, (alpha * y).sum((1, 2)) / total
    z = (x - cx[:, None, None]) + 1j * (y - cy[:, None, None])
    rho = np.abs(z) + 1e-6
    weight = alpha * rho**2
    spread = weight.sum((1, 2)) + 1e-6
    harmonics = np.stack([(weight * (z / rho) ** n).sum((1, 2)) for n in (3, 4, 5)], axis=1)
    look = np.column_stack([np.abs(harmonics) / spread[:, None], np.pi * spread / total / area])
    return area, cx, cy, look


def measure_look(shape):
    """The `look` of a small and soft object of this shape, such as a VAE gives back."""
    y, x = paint.pixel_grid(64)
    px, py = (x - paint.MIDDLE) / 2.5, (y - paint.MIDDLE) / 2.5
    alpha = np.clip(0.5 - 5 * paint.signed_distance(shape, px, py), 0, 1)
    for _ in range(4):
        alpha = smooth(alpha)
    return measure_shape(np.clip((alpha - 0.35) / 0.45, 0, 1))[-1][0]


LOOKS = {shape: measure_look(shape) for shape in paint.SHAPES}


def read_shape(blob: Blob, clear) -> str:
    """The shape whose look is nearest, in the frames in which nothing else is near."""
    chosen = clear if clear.any() else blob.area > 0
    mean = np.average(blob.look[chosen], axis=0, weights=blob.area[chosen] + 1e-6)
    return min(paint.SHAPES, key=lambda shape: np.abs(mean - LOOKS[shape]).sum())


def read_background(frames, cover):
    """The landscape whose painting is nearest, where no object is."""
    empty = (1 - np.clip(cover, 0, 1))[:, None]
    seen = (frames * empty).sum(0) / (empty.sum(0) + 1e-6)
    y, x = paint.pixel_grid(frames.shape[-1])
    error = {}
    for background in paint.BACKGROUNDS:
        painting = paint.paint_background(background, x, y)[0]
        error[background] = (np.abs(seen - painting) * empty.mean(0)).sum()
    return min(error, key=error.get)


def read_motion(blob: Blob, shape: str, clear, other: Blob | None) -> str:
    """A line with hops, and growth, fitted to the track. "still" for an object that stays; "none"
    where it jumps (also into the last frame alone), trembles, fades, or is not there."""
    n = len(blob.area)
    gone = blob.area < SMALL / 2
    if clear.sum() < max(4, n // 3) or gone[0] or gone[-1] or (gone.any() and not other):
        return "none"
    u, hops = np.linspace(0, 1, n), 2 * np.linspace(0, 1, n) % 1.0
    basis = np.stack([np.ones(n), u, -4 * hops * (1 - hops)], 1)
    size = 0.5 * np.log(blob.area + 1e-6)
    found, growth, miss = fit(basis, blob.xy, size, clear)
    _, (dx, dy), (drift, hop) = found
    before_last = clear & (np.arange(n) < n - 1)
    ahead = fit(basis, blob.xy, size, before_last)[-1][-1] if clear[-1] else 0.0
    if gone.any():  # it may hide behind the other object, and nowhere else
        apart = np.linalg.norm(basis @ found - np.nanmedian(other.xy, 0), axis=1)
        if apart[gone].max() > 5:
            return "none"
    strange = np.abs(blob.look - LOOKS[shape]).sum(1)[clear].max()
    if np.sqrt((miss[clear] ** 2).mean()) > 0.8 or miss[clear].max() > 2:
        return "none"
    if ahead > 1 or strange > 1.3 or abs(drift) > 2:
        return "none"
    if abs(growth) > 0.22:
        return "none" if abs(hop) > 2 else "grows" if growth > 0 else "shrinks"
    if hop < 2 and np.hypot(dx, dy) < 3:
        return "still"
    side = "to the right" if dx > 0 else "to the left"
    if hop > 2:
        return f"bounces {side}" if abs(dx) > 2 else "none"
    if abs(dx) > abs(dy):
        return f"moves {side}"
    return "moves up" if dy < 0 else "moves down"


def fit(basis, xy, size, chosen):
    """-> the basis's coefficients for the track (3, 2), the slope of the size, and how far the
    track is off the fit (n,), all by the chosen frames."""
    found = np.linalg.lstsq(basis[chosen], xy[chosen], rcond=None)[0]
    slope = np.polyfit(basis[chosen, 1], size[chosen], 1)[0]
    return found, slope, np.linalg.norm(xy - basis @ found, axis=1)
