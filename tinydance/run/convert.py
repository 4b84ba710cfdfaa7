"""Say what a checkpoint is, a file or a folder, and make a model folder of it.

    python -m tinydance.weights sd21
    python -m tinydance.weights v2-1_768.ckpt --to sd21 --tokenizer clip --prediction v_prediction

A file has no config.json: widths in it tell Stable Diffusion 1.x from 2.x and ModelScope, and what
is of none of them does not fit. [ours] The manual is `tinydance/weights/README.md`.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from tinydance.clip import TextConfig, TextTower, Tokenizer
from tinydance.model import SD2_TEXT, read_schedule, write_schedule
from tinydance.run.cli import Parser
from tinydance.schedulers import Schedule
from tinydance.unet import UNet, UNetConfig
from tinydance.vae import VAE, VAEConfig
from tinydance.weights import build, diffusers, ldm, load_weights, read_config, reading
from tinydance.weights.files import check_folder, read_json, write_json
from tinydance.weights.load import STEMS, save_weights

# A part's network and its shape; how its names begin in a file of several, and are known in others.
PARTS = {
    "unet": (UNet, UNetConfig, "model.diffusion_model.", "time_embed"),
    "vae": (VAE, VAEConfig, "first_stage_model.", "decoder.conv_in."),
    "text_encoder": (TextTower, TextConfig, "cond_stage_model.", "token_embedding."),
}
TOLD = ("_class_name", "in_channels", "latent_channels", "cross_attention_dim", "hidden_size")
TEXT_KEYS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
SD1_UNET = {"cross_attention_dim": 768, "attention_head_dim": 40, "num_attention_heads": 8}
SD1_TEXT = TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
PREDICTIONS = {"epsilon": 64, "v_prediction": 96}  # the side of latents that goes with each [SD]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("path", type=Path, help="a file, a model folder, or a folder of one part")
    parser.add_argument("--to", type=Path, help="model folder to write; others of its parts stay")
    parser.add_argument("--tokenizer", help="a folder, or bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--prediction", choices=PREDICTIONS, help="the UNet's, where no file says")
    args = parser.parse_args()
    rows = dict.fromkeys((*PARTS, "tokenizer", "scheduler"), "missing")
    parts, left_out = open_parts(args.path)
    misfits = {name: misfit for name in parts if (misfit := find_misfit(name, *parts[name]))}
    rows |= {name: misfits.get(name) or describe(*parts[name]) for name in parts}
    tokenizer = find_tokenizer(args.path / "tokenizer", args.tokenizer, parts)
    if tokenizer:
        rows["tokenizer"] = f"{len(tokenizer.vocab):,} symbols"
    if schedule := find_schedule(args.path / "scheduler", args.prediction, parts):
        rows["scheduler"] = f"the UNet predicts {schedule.prediction_type}"
    if left_out:
        rows["left out"] = f"{len(left_out)} tensors: {', '.join(left_out[:5])}, ..."
    is_whole = args.path.is_dir() and "missing" not in rows.values()
    takers = "sample.py --model and --t2i, train.py --init"
    rows["loads in"] = takers if is_whole else f"--to FOLDER, and that folder in {takers}"
    print(*(f"{name:<13}{row}" for name, row in rows.items()), sep="\n")
    if misfits:
        raise ValueError(f"{args.path}: {' and '.join(misfits)}: not to be loaded, as said above")
    if args.to:
        write_folder(args.to, parts, schedule, tokenizer)
        if (settings := args.path / "pixeldance.json").is_file():  # ours
            write_json(args.to / settings.name, read_json(settings))
        print(f"{args.to} is written")


def open_parts(path: Path) -> tuple[dict[str, tuple], list[str]]:
    """Return {part: (config.json, {name: tensor})}, and the names in a file that are of no part,
    averages say. Raises ValueError where there is no part."""
    if found := [part for part in PARTS if (path / part).is_dir()]:
        return {part: (read_config(path / part), load_weights(path / part)) for part in found}, []
    tensors, parts, used = load_weights(path if path.exists() else check_folder(path)), {}, set()
    with reading(path):
        for part, (_, _, prefix, mark) in PARTS.items():
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if own or any(mark in name for name in tensors):
                own = own or tensors
                parts[part] = (read_config(path), own) if path.is_dir() else guess_config(part, own)
                used |= own.keys()
        if not parts:
            raise ValueError(f"no UNet, VAE or text tower; tensors are {[*tensors][:3]}, ...")
    return parts, [name for name in tensors if name not in used]


def guess_config(part: str, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """What the hub's folder of a file's part would have: config.json, and the tensors so named."""
    if part == "vae":
        return diffusers.write_vae_config(asdict(VAEConfig())), ldm.vae_from_ldm(tensors)
    if part == "text_encoder":
        width = next(x for name, x in tensors.items() if "token_embedding." in name).shape[1]
        shape = SD1_TEXT if width == SD1_TEXT.hidden_size else SD2_TEXT
        renamed = ldm.text_from_any(tensors, shape.num_hidden_layers)
        return diffusers.write_text_config(asdict(shape)), renamed
    renamed = ldm.unet_from_ldm(tensors)
    is_2d = not any(map(diffusers.is_temporal, renamed))
    is_sd1 = renamed[TEXT_KEYS].shape[1] == SD1_UNET["cross_attention_dim"]
    config = diffusers.write_unet_config(asdict(UNetConfig(**SD1_UNET if is_sd1 else {})), is_2d)
    config |= {"in_channels": renamed["conv_in.weight"].shape[1]}
    return config | ({} if is_2d else {"sample_size": 32}), renamed


def find_misfit(part: str, config: dict, tensors: dict[str, Tensor]) -> str:
    """Why a part does not load, or "". It is tried on the meta device, without its numbers."""
    kind, shape, *_ = PARTS[part]
    try:
        with reading(part), torch.device("meta"):
            fields = diffusers.read_unet_config(config) if part == "unet" else config
            kind(build(shape, fields, part)).load({k: x.to("meta") for k, x in tensors.items()})
    except ValueError as error:
        return str(error)
    return ""


def describe(config: dict, tensors: dict[str, Tensor]) -> str:
    dtypes = ", ".join(sorted({f"{x.dtype}".removeprefix("torch.") for x in tensors.values()}))
    told = ", ".join(f"{name} {config[name]}" for name in TOLD if name in config)
    count = sum(x.numel() for x in tensors.values())
    return f"{len(tensors)} tensors, {count:,} numbers, {dtypes}; {told}"


def find_schedule(folder: Path, prediction: str | None, parts: dict) -> Schedule | None:
    """The folder's, or that of SD 1.x and ModelScope, which predict epsilon; None: nobody says."""
    config, schedule = parts.get("unet", [{}])[0], Schedule()
    if folder.is_dir():
        schedule = read_schedule(folder)
    width = config.get("cross_attention_dim")
    is_video = width == SD2_TEXT.hidden_size and "3D" in config["_class_name"]
    is_known = folder.is_dir() or is_video or width == SD1_UNET["cross_attention_dim"]
    if prediction:
        return replace(schedule, prediction_type=prediction)
    return schedule if is_known else None


def find_tokenizer(folder: Path, given: str | None, parts: dict) -> Tokenizer | None:
    """The folder's, or the given one, padding as the text tower knows it: OpenCLIP's with id 0."""
    if not given:
        return Tokenizer.from_folder(folder) if folder.is_dir() else None
    tokenizer = Tokenizer.from_folder(given)
    is_openclip = "text_encoder" in parts and parts["text_encoder"][0].get("hidden_act") == "gelu"
    tokenizer.pad_id = 0 if is_openclip else tokenizer.end_id
    return tokenizer


def write_folder(folder: Path, parts: dict, schedule, tokenizer) -> None:
    """Write what there is, numbers as they are. Raises ValueError before anything is written."""
    if there := [part for part in parts if (folder / part).exists()]:
        raise ValueError(f"{folder / there[0]} is there already")
    if "unet" in parts:
        if not schedule:
            sizes = "epsilon for 512 pixels (base), v_prediction for 768"
            raise ValueError(f"no file says what the UNet predicts; give --prediction: {sizes}")
        config, _ = parts["unet"]
        config.setdefault("sample_size", PREDICTIONS[schedule.prediction_type])
        write_schedule(schedule, folder / "scheduler")
        index = diffusers.write_model_index("2D" in config["_class_name"])
        write_json(folder / "model_index.json", index)
    for part, (config, tensors) in parts.items():
        save_weights(folder / part, config, tensors, name=STEMS[part == "text_encoder"])
    if tokenizer:
        tokenizer.save(folder / "tokenizer")
