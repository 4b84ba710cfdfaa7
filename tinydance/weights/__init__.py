"""Weights of other projects in and out; nothing here imports the rest of tinydance.

Read `load.py` first: from a path to tensors, and from tensors into a module. What other projects
call things is in `diffusers.py`, `ldm.py` and `tokenizer.py`.
"""

from tinydance.weights.files import pick, read_config, read_json, write_json
from tinydance.weights.load import load_into, load_weights, save_weights

__all__ = ["load_into", "load_weights", "save_weights", "pick", "read_config"]
__all__ += ["read_json", "write_json"]
