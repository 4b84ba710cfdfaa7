"""Weights in and out: .safetensors, .ckpt, a folder of the hub; and the rules that rename tensors.

Our modules are named as the hub's checkpoints name theirs, so Stable Diffusion's and ModelScope's
files load with no rule at all. The rules below are for checkpoints in the older LDM layout.

    bytes <-> tensors     load_safetensors, save_safetensors, load_weights
    config.json <-> dict  read_config, write_config
    tensors -> module     load_into: strict, so that a wrong file is an error, not a bad picture
    old names -> ours     unet_from_ldm, vae_from_ldm, vae_attention_names, text_from_openclip

A file from the internet is not trusted: pickled code is refused, and every offset is checked.
Read `clip.py` before this file, `data.py` after it. Not here: downloads; resuming a training run.
"""

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from tinydance.weights.files import whole_file

# ---- files ---------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


LARGEST_HEADER = 100_000_000  # bytes; the safetensors library has the same limit


def save_safetensors(tensors: dict[str, Tensor], path: str | Path,
                     metadata: dict[str, str] | None = None) -> None:
    """Writes {name: tensor}, and metadata (strings to strings), as the library does [hub format].

    Same input, same bytes. ValueError: a dtype the format lacks, or metadata that is no text."""
    # transformers refuses a file whose metadata does not say that it came from PyTorch
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    if not all(isinstance(text, str) for pair in header["__metadata__"].items() for text in pair):
        raise ValueError(f"{path}: metadata must map strings to strings, not {metadata!r}")
    # widest first: then every tensor starts at a multiple of its own width
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{path}: .safetensors cannot hold {name!r} as {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy())


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """{name: tensor} of a .safetensors file, mapped into memory and read when touched [hub format].

    ValueError, with the path and the reason, for a file that is damaged, hostile or not there."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            _refuse_pointer(file)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length).decode(), object_pairs_hook=_without_twins)
        layout = _checked_layout(header, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot read as .safetensors: {error}") from error
    raw = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    tensors = {}
    for begin, end, name, dtype, shape in layout:
        data = raw[begin:end]
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()  # a view needs an aligned start, which the format does not promise
        tensors[name] = data.view(dtype).reshape(shape)
    return tensors


def _refuse_pointer(file):
    if file.read(8) == b"version ":
        raise ValueError("a git-lfs pointer, not the weights: run `git lfs pull`")
    file.seek(0)


def _without_twins(pairs):
    """A JSON object as a dict; a key that comes twice has two readings, so it is refused."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice in the header")
    return dict(pairs)


def _checked_layout(header, n_bytes):
    """[(begin, end, name, dtype, shape)]; ValueError unless these tile the data exactly."""
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    layout = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = entry["data_offsets"]
            numbers = [begin, end, *shape]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name!r} is described by {entry!r:.200}") from error
        # `type`, because True is an int to isinstance; the product with max, because an empty
        # tensor may still have a side too large for PyTorch
        if (any(type(number) is not int or number < 0 for number in numbers)
                or math.prod(max(side, 1) for side in shape) >= 2 ** 60
                or end - begin != math.prod(shape) * dtype.itemsize):
            raise ValueError(f"{name!r} has {shape} of {dtype} in the bytes {begin} to {end}")
        layout.append((begin, end, name, dtype, shape))
    layout.sort(key=lambda entry: entry[:2])
    ends = [0, *(entry[1] for entry in layout)]
    if [*(entry[0] for entry in layout), n_bytes] != ends:
        raise ValueError(f"the tensors overlap, leave a gap or do not fill the {n_bytes} bytes")
    return layout
