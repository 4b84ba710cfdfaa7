"""The .safetensors container: bytes <-> {name: tensor} [hub format].

Its parts: the header's length, 8 bytes, little-endian; the header, JSON: {name: {"dtype", "shape",
"data_offsets": [begin, end]}, "__metadata__": ...}; the tensors' bytes, row by row, from where
offsets count. A file from the internet is not trusted: all is checked before a tensor is made."""

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from tinydance.weights.files import whole_file
from tinydance.weights.untrusted import MAX_TEXT, open_file, parse_json, reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_safetensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write {name: tensor}: equal tensors as equal bytes. ValueError: a dtype the format lacks."""
    # transformers refuses a file whose metadata does not say that it came from PyTorch
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # widest dtype first, so that every tensor starts at a multiple of its own width
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{path}: .safetensors cannot hold {name!r} as {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [begin, end]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Map a file into memory as {name: tensor}; the disk is read when a tensor is used. Raises
    ValueError, with the path and the reason, where the file is missing, damaged or hostile."""
    with reading(path), open_file(path) as file:
        size, length = os.path.getsize(path), int.from_bytes(file.read(8), "little")
        if length > min(MAX_TEXT, size - 8):
            raise ValueError(f"damaged: a header of {length} bytes in a file of {size}")
        layout = check_layout(parse_json(file.read(length).decode()), size - 8 - length)
        raw = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for begin, end, name, dtype, shape in layout:
        data = raw[8 + length + begin : 8 + length + end]
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()  # a view needs an aligned start, which the format does not promise
        tensors[name] = data.view(dtype).reshape(shape)
    return tensors


def check_layout(header: dict, data_size: int) -> list[tuple]:
    """Return [(begin, end, name, dtype, shape)] in the data's order. Raises ValueError unless the
    tensors tile the `data_size` bytes exactly: no gap, no overlap."""
    layout, notes = [], header.pop("__metadata__", {})
    if not isinstance(notes, dict) or any(type(note) is not str for note in notes.values()):
        raise ValueError(f"__metadata__ is {notes!r:.100}; it must be texts by name")
    for name, entry in header.items():
        try:
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = entry["data_offsets"]
            if any(type(x) is not int or x < 0 for x in (begin, end, *shape)):  # True is no length
                raise ValueError
            # an empty tensor too may have a side that is too large for PyTorch
            is_huge = math.prod(max(side, 1) for side in shape) >= 2**60
            if is_huge or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name!r} is described by {entry!r:.200}") from error
        layout.append((begin, end, name, dtype, shape))
    layout.sort()
    if [*(row[0] for row in layout), data_size] != [0, *(row[1] for row in layout)]:
        raise ValueError(f"the tensors overlap, leave a gap or do not fill the {data_size} bytes")
    return layout
