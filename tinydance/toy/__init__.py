"""The toy world: everything that makes PixelDance learnable and measurable on a laptop.

A procedural world of captioned clips stands in for WebVid-10M, a rule-based referee for FVD and
CLIPSIM, small networks of our own training for Stable Diffusion's. Read `world.py` first, then
`referee.py`. README.md is the manual and the lab report; `model/` and `image_model/` are shipped.
"""

from pathlib import Path

from tinydance.toy.source import ToyWorld
from tinydance.toy.world import World

# What comes with the package: the toy model, and the image model that its training starts from.
SHIPPED, SHIPPED_IMAGE = (Path(__file__).parent / name for name in ("model", "image_model"))

__all__ = ["SHIPPED", "SHIPPED_IMAGE", "ToyWorld", "World"]
