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

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tinydance.weights.files import read_json
from tinydance.weights.safetensors import _refuse_pointer, load_safetensors

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # first choice first; so the endings


ENDINGS = (".safetensors", ".safetensors.index.json", ".fp16.safetensors",
           ".safetensors.index.fp16.json", ".bin", ".bin.index.json", ".fp16.bin")


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """{name: tensor} of a .safetensors, .ckpt, .pt, .pth or .bin file, or of a folder of the hub's.

    The wrappers' prefixes `module.` (DDP) and `_orig_mod.` (torch.compile) are cut off. ValueError:
    no weights, a damaged file, or a pickle of more than tensors, which is refused unexecuted."""
    path = Path(path)
    if path.is_dir():
        names = [stem + ending for ending in ENDINGS for stem in STEMS]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: no weights here, such as {names[0]} or {names[1]}")
        return load_weights(found[0])
    if path.suffix == ".json":  # a large model in parts: the index says which names are in which
        index = read_json(path).get("weight_map")
        shards = sorted(set(index.values())) if isinstance(index, dict) else []
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError(f"{path}: weight_map must name files of this folder, not {shards}")
        parts = [load_weights(path.with_name(shard)) for shard in shards]
        return {name: tensor for part in parts for name, tensor in part.items()}
    tensors = load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled(path)
    return {name.replace("_orig_mod.", "").removeprefix("module."): tensor
            for name, tensor in tensors.items()}


def _load_pickled(path):
    """The tensors of a PyTorch file, which are under `state_dict` in a Lightning checkpoint."""
    try:
        with open(path, "rb") as file:
            _refuse_pointer(file)
        content = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))  # before PyTorch 1.6 it was no zip
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused: damaged, or it holds pickled code beside its tensors; "
                         "if you trust it, convert it to .safetensors") from error
    except Exception as error:  # damaged bytes can raise anything from within the unpickler
        raise ValueError(f"{path}: cannot read as a PyTorch file: {error!r}") from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a dict of tensors but a {type(content).__name__}")
    return {str(name): tensor for name, tensor in content.items() if torch.is_tensor(tensor)}


def load_into(module: nn.Module, tensors: dict[str, Tensor], *,
              may_lack: Callable[[str], bool] = lambda name: False) -> None:
    """Copies {name: tensor} into the module, whose own dtypes and device stay [ours].

    `may_lack(name)`: which names keep their initialisation where the tensors lack them, such as
    the temporal layers of a video model that starts from an image model. ValueError: any misfit."""
    own = module.state_dict()
    misfits = {
        "missing": [name for name in own if name not in tensors and not may_lack(name)],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [f"{name}: {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
                             for name in own
                             if name in tensors and tensors[name].shape != own[name].shape]}
    told = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in misfits.items() if names]
    if told:
        raise ValueError(f"the weights do not fit this {type(module).__name__}: {'; '.join(told)}")
    module.load_state_dict(tensors, strict=False)
