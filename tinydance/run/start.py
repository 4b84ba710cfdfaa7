"""What a stage starts from: the parts that it finds, and what is checked before the first step.

A part (`vae/`, `unet/`, ...) comes from an earlier stage of the same run, or else from `--init`.
What `--init` has at full scale, Stable Diffusion 2.1, is [ours: paper silent].

Not here: the stages themselves (`stages.py`); going on from a checkpoint (`checkpoints.py`).
"""

from pathlib import Path

import torch
from torch import nn

from tinydance.config import Config
from tinydance.model import PixelDance, read_schedule
from tinydance.toy import SHIPPED_IMAGE
from tinydance.training import Machine
from tinydance.unet import UNet

TRAINED_BY = {"vae": "vae", "text_encoder": "text", "tokenizer": "text", "unet": "image"}


def tell(machine: Machine, text: object) -> None:
    """Print on the first rank."""
    if machine.rank == 0:
        print(text, flush=True)


def find_part(part: str, config: Config) -> Path:
    """The folder of a part. Raises ValueError that says how to get one."""
    stage, out = TRAINED_BY[part], Path(config.out)
    folder = out / stage / "model" / part
    if folder.exists():
        return folder
    if config.init == "shipped":
        if (out / "vae" / "model").exists():
            raise ValueError(
                f"{out} has a VAE of its own, whose latents the shipped image model does not "
                "know: add --from-scratch"
            )
        folder = SHIPPED_IMAGE / part
    elif config.init:
        folder = Path(config.init) / part
    elif getattr(config, f"{stage}_steps") == 0:
        raise ValueError(
            f"preset {config.preset} starts from a trained {part}: give --init FOLDER, a model "
            "folder such as Stable Diffusion 2.1's"
        )
    if not folder.exists():
        raise ValueError(f"{folder} is missing: run --stage {stage} first, or no --stage for all")
    return folder


def load_frozen(kind: type[nn.Module], part: str, config: Config) -> nn.Module:
    """A part that is not trained by this stage."""
    return kind.from_folder(find_part(part, config)).requires_grad_(False).eval()


def load_unet(config: Config, machine: Machine) -> UNet:
    """The UNet to start from; a line is printed where it was trained to predict something else."""
    folder = find_part("unet", config)
    scheduler = folder.parent / "scheduler"
    if (scheduler / "scheduler_config.json").is_file():
        before, now = read_schedule(scheduler).prediction_type, config.prediction_type
        if before != now:
            tell(machine, f"note: the UNet in {folder} learned to predict {before}, this run {now}")
    return UNet.from_folder(folder)


def set_aside(folder: Path) -> None:
    """Rename what another run left, so that a new one starts from nothing and nothing is lost."""
    n = 1
    while (other := folder.with_name(f"{folder.name}_{n}")).exists():
        n += 1
    if folder.exists():
        folder.rename(other)
        print(f"{folder} is now {other}", flush=True)


def compiler_works(device: torch.device) -> bool:
    """Try torch.compile on a sum; where it fails, one line says so."""
    try:
        torch.compile(lambda x: x + x)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines()[0]
        print(f"note: torch.compile does not work here ({reason}): going on without", flush=True)
        return False
    return True


def describe_memory(model: PixelDance) -> str:
    """How large the parts are, and the memory that training takes before any activation."""
    count = sum(p.numel() for p in model.unet.parameters())
    trained = sum(p.numel() for p in model.unet.parameters() if p.requires_grad)
    frozen = sum(p.numel() for part in (model.vae, model.text_tower) for p in part.parameters())
    # float32: the weights and their averages, and for what is trained gradients and two moments
    size = (4 * (2 * count + frozen) + 12 * trained) / 2**30
    return (
        f"a UNet of {count:,} parameters, {trained:,} of them trained; {frozen:,} frozen in "
        f"VAE and text tower; {size:.1f} GiB for all that, without activations"
    )
