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
import pickle
import re
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

# ---- files ---------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # first choice first; so the endings
ENDINGS = (".safetensors", ".safetensors.index.json", ".fp16.safetensors",
           ".safetensors.index.fp16.json", ".bin", ".bin.index.json", ".fp16.bin")


@contextmanager
def whole_file(path: str | Path):
    """Yields a binary file that takes the name `path` once all of it is on the disk, or never.

    A run that is killed here, or a full disk, leaves the file that was there as it was [ours]."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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


def read_json(path: str | Path) -> dict:
    """The JSON object in a file, as a dict. ValueError names a file that is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def write_json(path: str | Path, content: dict) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_config(folder: str | Path) -> dict:
    """The dict in `folder`/config.json [hub format]. ValueError as `read_json`."""
    return read_json(Path(folder) / "config.json")


def write_config(folder: str | Path, config: dict) -> None:
    """Writes the dict to `folder`/config.json [hub format]; makes the folder if there is none."""
    write_json(Path(folder) / "config.json", config)


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


# ---- old names to ours ---------------------------------------------------------------------------
# Dict to dict. A name that no rule knows passes unchanged, so that `load_into` reports it; a name
# that is ours already passes unchanged too.

UNET_TOP = {"time_embed.0.": "time_embedding.linear_1.",
            "time_embed.2.": "time_embedding.linear_2.",
            "input_blocks.0.0.": "conv_in.", "input_blocks.0.1.": "transformer_in.",
            "init_attn.0.": "transformer_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out."}
RESNET_PARTS = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
                "out_layers.0": "norm2", "out_layers.3": "conv2",
                "skip_connection": "conv_shortcut"}
VAE_RULES = ((r"\.down\.(\d)\.", r".down_blocks.\1."),
             (r"\.up\.(\d)\.", lambda match: f".up_blocks.{3 - int(match[1])}."),  # LDM counts back
             (r"_blocks\.(\d)\.block\.", r"_blocks.\1.resnets."),
             (r"\.(down|up)sample\.", r".\1samplers.0."),
             (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
             (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
             (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
             (r"\.nin_shortcut\.", ".conv_shortcut."),
             (r"coder\.norm_out\.", "coder.conv_norm_out."))
VAE_ATTENTION = {  # LDM's names, then those of diffusers before 2023
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
TEXT_TOP = {"token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}
TEXT_PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def _below(tensors, prefix):
    """The tensors whose names start with the prefix, without it; all tensors where none does."""
    below = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return below or tensors


def unet_from_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet of SD 2.x, ModelScope's original, VideoCrafter2 or DynamiCrafter, renamed [SD].

    Also of a whole LDM checkpoint, which has it as `model.diffusion_model.*`. Tensors that our UNet
    has no place for (`fps_embedding.*`, `attn2.to_k_ip`, `attn2.to_v_ip`) stay in the dict."""
    renamed = {}
    for name, tensor in _below(tensors, "model.diffusion_model.").items():
        if name.endswith(("proj_in.weight", "proj_out.weight")) and tensor.ndim == 3:
            tensor = tensor.squeeze(-1)  # a Conv1d of width 1 there, a Linear here
        renamed[_unet_name(name)] = tensor
    return renamed


def _unet_name(name):
    for old, new in UNET_TOP.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    match = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)\.(?:(\d+)\.)?(.+)", name)
    if match is None:
        return name
    stack, i, kind, rest = match[1], int(match[2]), match[3], match[4]
    part = next((old for old in RESNET_PARTS if rest.startswith(old + ".")), None)
    temporal_conv = rest.startswith("temopral_conv.")  # the published spelling
    if stack == "input":  # 0 is conv_in; then three places a block, the third for the downsampler
        block, layer = f"down_blocks.{(i - 1) // 3}", (i - 1) % 3
    elif stack == "output":
        block, layer = f"up_blocks.{i // 3}", i % 3
    else:  # a resnet, an attention, where it is a video's a temporal attention, a resnet
        block, layer, kind = "mid_block", int(i > 0 and bool(part or temporal_conv)), match[2]
    if part:
        return f"{block}.resnets.{layer}.{RESNET_PARTS[part]}{rest.removeprefix(part)}"
    if temporal_conv:
        return f"{block}.temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}"
    if rest.startswith("op."):
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{block}.upsamplers.0.{rest}"
    return f"{block}.{'temp_attentions' if kind == '2' else 'attentions'}.{layer}.{rest}"


def vae_from_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder of an LDM checkpoint, whole or cut out, under our names [SD]."""
    renamed = {}
    for name, tensor in _below(tensors, "first_stage_model.").items():
        if ".mid.attn_1." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # 1x1 convs there, Linear here
        for old, new in VAE_RULES:
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return vae_attention_names(renamed)


def vae_attention_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's attention as diffusers names it today; SD's files on the hub still have
    query, key, value and proj_attn [hub format]."""
    def today(match):
        return f".attentions.0.{VAE_ATTENTION.get(match[1], match[1])}.{match[2]}"
    return {re.sub(r"\.attentions\.0\.(\w+)\.(weight|bias)$", today, name): t
            for name, t in tensors.items()}


def text_from_openclip(tensors: dict[str, Tensor], layers: int = 23) -> dict[str, Tensor]:
    """The first `layers` blocks of OpenCLIP's text tower under the hub's names [SD].

    SD 2.x takes c_text after block 23 of 24, so the hub's files, and ours, lack the last.
    A whole LDM checkpoint has the tower as `cond_stage_model.model.*`. The image side, projections
    and logit_scale are dropped."""
    renamed = {}
    for name, tensor in _below(tensors, "cond_stage_model.model.").items():
        if name in TEXT_TOP:
            renamed[f"text_model.{TEXT_TOP[name]}"] = tensor
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if match is None or int(match[1]) >= layers:
            continue
        block, part, kind = f"text_model.encoder.layers.{match[1]}", match[2], match[3]
        if part == "attn.in_proj":  # queries, keys and values, one above the other
            for letter, third in zip("qkv", tensor.chunk(3)):
                renamed[f"{block}.self_attn.{letter}_proj.{kind}"] = third
        else:
            renamed[f"{block}.{TEXT_PARTS.get(part, part)}.{kind}"] = tensor
    return renamed
