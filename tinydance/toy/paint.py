"""How the toy world looks: colours, shapes and landscapes, painted into pixels. [ours]

Not here: what happens (`world.py`).
"""

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
    "star": (4, 1.6, 0.72, -np.pi / 2),
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


def ground_depth(size: int, horizon: float) -> np.ndarray:
    """How near a landscape is: (1, 1, h, w), -1 for the sky, 0 at the picture's bottom."""
    y, _ = pixel_grid(size)
    return np.clip((y - horizon) / (UNITS - horizon), 0, 1)[None] - 1


def cover_thing(frames, shape, cx, cy, radius):
    """What an object covers of frames (n, c, h, w): a view of the rows and columns that it can
    touch alone, its share of each of their pixels (n, 1, h, w), and how far these are from its
    centre, x and y in radii (n, h, w). centre and radius in units, one or n."""
    size, reach, spans = frames.shape[-1], np.max(1.7 * radius + 1), []
    for centre in (cy, cx):
        low, high = np.min(centre) - reach, np.max(centre) + reach
        low, high = np.clip(np.array([low, high]) * size / UNITS, 0, size - 1).astype(int)
        spans.append(slice(low, high + 1))
    y, x = (grid[:, *spans] for grid in pixel_grid(size))
    cx, cy, radius = (np.reshape(part, (-1, 1, 1)) for part in (cx, cy, radius))
    px, py = (x - cx) / radius, (y - cy) / radius
    cover = np.clip(0.5 - signed_distance(shape, px, py) * radius * size / UNITS, 0, 1)
    return frames[:, :, *spans], cover[:, None], px, py


def paint_thing(frames, shape, colour, *place) -> None:
    """Draw an object into frames (n, 3, h, w). colour (3,) or (n, 3); place: as in `cover_thing`."""
    part, cover, px, py = cover_thing(frames, shape, *place)
    shade = 1 - 0.16 * np.clip(px + py, -1.4, 1.4)[:, None]  # lit from the top left
    gleam = 50 * np.exp(-((px + 0.35) ** 2 + (py + 0.35) ** 2) / 0.12)[:, None]
    lit = np.minimum(np.reshape(colour, (-1, 3, 1, 1)) * shade + gleam, 255)
    part += (lit - part) * cover


def paint_depth(depth, nearness: float, shape, colour, *place) -> None:
    """Draw how near an object is into depth (n, 1, h, w)."""
    part, cover, *_ = cover_thing(depth, shape, *place)
    part += (nearness - part) * cover
