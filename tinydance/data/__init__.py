"""Data to train on: the user's videos and pictures, in any order, on any number of machines.

`open_source(config)` opens what `--data` and `--images` name, and `batches` makes a stream of it.
Read `order.py` first: which sample comes when. README.md is the manual.
Not here: the toy world (`toy/`), decoding (`video/read.py`).
"""

from tinydance.data.batches import batches
from tinydance.data.cache import write_cache
from tinydance.data.index import Folder, Shards, Table
from tinydance.data.open import open_source
from tinydance.data.order import Files, Mixture

__all__ = ["Files", "Folder", "Mixture", "Shards", "Table", "batches", "open_source", "write_cache"]
