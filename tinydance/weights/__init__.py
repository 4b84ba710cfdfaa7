"""Weights of other projects in and out; nothing here imports the rest of tinydance.

Read `load.py` first: from a path to tensors, and from tensors into a module. What other projects
call things is in `diffusers.py`, `ldm.py` and `tokenizer.py`.
"""

from tinydance.weights.files import build, pick, read_config
from tinydance.weights.load import load_into, load_weights, read_part, save_weights
from tinydance.weights.untrusted import reading

__all__ = ["build", "load_into", "load_weights", "pick", "read_config", "read_part", "reading"]
__all__ += ["save_weights"]
