"""Answers of homework 06."""

import json
import random
import tempfile
from pathlib import Path

import torch
from compare import Trouble, compare

from tinydance.weights.safetensors import load_safetensors, save_safetensors

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def write(tensors):
    header, parts, end = {}, [], 0
    for name, tensor in tensors.items():
        data = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [end, end + len(data)]
        parts, end = [*parts, data], end + len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def read(content):
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            data = torch.tensor(list(content[begin:end]), dtype=torch.uint8)
            tensors[name] = data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def to_parts(tensors):
    """Each tensor as its type and its numbers, so that types count too."""
    if not isinstance(tensors, dict) or any(type(x) is not torch.Tensor for x in tensors.values()):
        raise Trouble("returns no dict of tensors")
    return {name: [str(x.dtype), x.double()] for name, x in tensors.items()}


def load(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        try:
            path.write_bytes(content)
            return to_parts(load_safetensors(path))
        except (TypeError, ValueError) as error:
            reason = str(error).replace(str(path), "the file")
            raise Trouble(f"returns what cannot be loaded: {reason}") from error


def draw():
    size = random.randrange(2, 6)
    return {
        "conv.weight": torch.randn(size, 3),
        "conv.bias": torch.randn(3, size).T,  # its rows do not lie behind each other
        "half": torch.randn(size, 1, 2).bfloat16(),
        "step": torch.tensor(random.randrange(2**40)),
        "bytes": torch.randint(0, 256, (size,), dtype=torch.uint8),
        "nothing": torch.zeros(0, 4),
    }


def check_write(yours):
    def loaded(tensors):
        return load(yours(tensors))

    loaded.__name__ = "write"
    compare(loaded, to_parts, [(draw(),), (draw(),)])


def check_read(yours):
    def parts(content):
        return to_parts(yours(content))

    parts.__name__ = "read"
    cases = [(write(draw()),)]
    with tempfile.TemporaryDirectory() as folder:  # with metadata, and in another order
        save_safetensors(draw(), Path(folder, "x.safetensors"))
        cases.append((Path(folder, "x.safetensors").read_bytes(),))
    compare(parts, lambda content: to_parts(read(content)), cases)
