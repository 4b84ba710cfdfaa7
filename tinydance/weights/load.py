"""From a path to tensors, from tensors into a module, and back to a folder: strictly, because a
wrong file must be an error, not a bad picture. Not here: how a training run resumes."""

import pickle
import pickletools
import zipfile
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinydance.weights.files import read_config, read_json, write_json
from tinydance.weights.safetensors import load_safetensors, save_safetensors
from tinydance.weights.untrusted import open_file, reading

# What a folder's weights may be called, the first choice first: full precision before half.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = ".safetensors .safetensors.index.json .fp16.safetensors .safetensors.index.fp16.json"
ENDINGS += " .bin .bin.index.json .fp16.bin"
MAX_OBJECTS = 2_000_000  # in a pickle


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read {name: tensor} of a .safetensors, .ckpt, .pt, .pth or .bin file, or of a hub's folder.
    Raises ValueError where there are no weights or a file is damaged, and for a pickle that holds
    more than tensors: its code never runs."""
    path = Path(path)
    if path.is_dir():
        names = [stem + ending for ending in ENDINGS.split() for stem in STEMS]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: no weights here, such as {names[0]} or {names[1]}")
        return load_weights(found[0])
    if path.suffix == ".json":  # a large model in parts: the index says which names are in which
        index = read_json(path).get("weight_map")
        shards = [*index.values()] if isinstance(index, dict) else []
        if not shards or any(Path(f"{x}").name != x or x.endswith(".json") for x in shards):
            raise ValueError(f"{path}: weight_map must name files of this folder: {shards!r:.100}")
        parts = map(load_weights, map(path.with_name, sorted(set(shards))))
        return {name: x for tensors in parts for name, x in tensors.items()}
    with reading(path), open_file(path) as file:
        if file.read(8) == b"version ":
            raise ValueError("a git-lfs pointer, not the weights: run `git lfs pull`")
    tensors = load_safetensors(path) if path.suffix == ".safetensors" else load_pickled(path)
    # torch.compile and DDP put their wrappers' names before the module's
    return {k.replace("_orig_mod.", "").removeprefix("module."): x for k, x in tensors.items()}


def load_pickled(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch file; a Lightning checkpoint has them under `state_dict`."""
    try:
        with open_file(path) as file:
            is_zip = zipfile.is_zipfile(file)  # since PyTorch 1.6; only a zip can be mapped
            check_pickle(file, is_zip)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        content = content.get("state_dict", content)
        content = {str(name): x for name, x in content.items() if torch.is_tensor(x)}
        if wide := [k for k, x in content.items() if x.nbytes > x.untyped_storage().nbytes()]:
            raise ValueError(f"{wide[0]} repeats its numbers; save it contiguous")
        return content
    except pickle.UnpicklingError as error:
        reason = "damaged, or it holds pickled code beside its tensors; if you trust it, convert it"
        raise ValueError(f"{path}: refused: {reason} to .safetensors") from error
    except Exception as error:  # damaged bytes raise anything; what is no dict, AttributeError
        raise ValueError(f"{path}: cannot read as a PyTorch file: {error!r:.300}") from error


def check_pickle(file: BinaryIO, is_zip: bool) -> None:
    """Raises ValueError for a small file of many objects: an empty list is one byte there and 64 in
    memory. PyTorch compresses nothing; files of before 1.6 hold five pickles."""
    if is_zip:
        members = zipfile.ZipFile(file).infolist()
        if any(member.compress_type for member in members):
            raise ValueError("its parts are compressed; save it anew")
        file = zipfile.ZipFile(file).open(next(m for m in members if m.filename.endswith(".pkl")))
    file.seek(0)
    operations = chain.from_iterable(pickletools.genops(file) for _ in range(5))
    with suppress(ValueError, StopIteration):  # `torch.load` says what is wrong with a damaged one
        next(islice(operations, MAX_OBJECTS, None))
        raise MemoryError(f"above {MAX_OBJECTS} objects; save the tensors alone")


class WithoutInit(TorchFunctionMode):
    """Embeddings stay uninitialised: on the meta device that would load torch's compiler, 2 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function is nn.init.normal_ else function(*args, **kwargs or {})


def read_part(folder: str | Path, make: Callable[[dict], nn.Module]) -> nn.Module:
    """make(config.json), a network, with the weights of its folder. Raises ValueError, before any
    memory is taken for it, where it is much larger than they are: a config can claim any size."""
    with reading(folder):
        config, tensors = read_config(folder), load_weights(folder)
        with torch.device("meta"), WithoutInit():
            size = sum(x.numel() for x in make(config).parameters())
        held = sum(x.numel() for x in tensors.values())
        if size > 4 * held:  # a video network is 1.7 times its image model
            raise ValueError(f"config.json describes {size:,} numbers; the weights have {held:,}")
        network = make(config)
        network.load(tensors)
        return network


def load_into(module: nn.Module, tensors: dict[str, Tensor], may_lack=lambda name: False) -> None:
    """Copy {name: tensor} into the module, which keeps its own dtypes and device; or copy nothing,
    and raise ValueError that counts and names all misfits [ours]. may_lack(name) -> bool: whether a
    parameter that `tensors` lack may keep its initialisation."""
    own = module.state_dict()
    pairs = {k: (tuple(tensors[k].shape), tuple(x.shape)) for k, x in own.items() if k in tensors}
    misfits = {
        "missing": [name for name in own if name not in tensors and not may_lack(name)],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [f"{k}: {x} for {y}" for k, (x, y) in pairs.items() if x != y],
    }
    kinds = [(kind, names) for kind, names in misfits.items() if names]
    told = [f"{len(x)} {kind} ({', '.join(x[:3])}{', ...' * (len(x) > 3)})" for kind, x in kinds]
    if told:
        raise ValueError(f"the weights do not fit this {type(module).__name__}: {'; '.join(told)}")
    module.load_state_dict(tensors, strict=False)


def save_weights(folder, config: dict, tensors: dict, dtype=None, name: str = STEMS[0]) -> None:
    """Write FOLDER/config.json and NAME.safetensors; dtype (say torch.float16) is that on disk."""
    write_json(Path(folder) / "config.json", config)
    tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in tensors.items()}
    save_safetensors(tensors, Path(folder) / f"{name}.safetensors")
