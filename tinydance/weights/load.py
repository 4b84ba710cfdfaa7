"""From a path to tensors, from tensors into a module, and back to a folder: strictly, because a
wrong file must be an error, not a bad picture. Not here: how a training run resumes."""

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from tinydance.weights.files import read_json, write_json
from tinydance.weights.safetensors import load_safetensors, save_safetensors

# What a folder's weights may be called, the first choice first: full precision before half.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = ".safetensors .safetensors.index.json .fp16.safetensors .safetensors.index.fp16.json"
ENDINGS += " .bin .bin.index.json .fp16.bin"


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
        shards = sorted(set(index.values())) if isinstance(index, dict) else []
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError(f"{path}: weight_map must name files of this folder, not {shards}")
        return {k: x for shard in shards for k, x in load_weights(path.with_name(shard)).items()}
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes()[:8] == b"version ":
        raise ValueError(f"{path}: a git-lfs pointer, not the weights: run `git lfs pull`")
    tensors = load_safetensors(path) if path.suffix == ".safetensors" else load_pickled(path)
    # torch.compile and DDP put their wrappers' names before the module's
    return {k.replace("_orig_mod.", "").removeprefix("module."): x for k, x in tensors.items()}


def load_pickled(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch file; a Lightning checkpoint has them under `state_dict`."""
    try:
        is_zip = zipfile.is_zipfile(path)  # since PyTorch 1.6; only a zip can be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        content = content.get("state_dict", content)
        return {str(name): x for name, x in content.items() if torch.is_tensor(x)}
    except pickle.UnpicklingError as error:
        reason = "damaged, or it holds pickled code beside its tensors; if you trust it, convert it"
        raise ValueError(f"{path}: refused: {reason} to .safetensors") from error
    except Exception as error:  # damaged bytes raise anything; what is no dict, AttributeError
        raise ValueError(f"{path}: cannot read as a PyTorch file: {error!r}") from error


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
