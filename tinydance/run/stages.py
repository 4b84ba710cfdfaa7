"""The stages of a training: those of the real pipeline, made small for the toy world.

    vae    pictures to latents          (the paper takes one that is pre-trained, frozen)
    text   captions to c_text           (the paper takes CLIP's, frozen)
    image  the spatial layers as text-to-image on single frames
    video  everything, clips with an image step every 8th       (this is the paper)

Each is a `Stage` for `fit`, and leaves a folder that the next one starts from. The paper takes "the
widely used 2D UNet" (§3.1) and does not say which weights it starts from; Stable Diffusion 2.1 is
what it makes first frames with (§4.2.1). To start from an image model, Stable Diffusion's at full
scale and the image stage's in the toy world, is [ours: paper silent].
Not here: the loop (`fit.py`), the losses (`training.py`, `toy/losses.py`).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tinydance.clip import TextTower, Tokenizer
from tinydance.config import NETWORKS, Config
from tinydance.data import batches, open_source, write_cache
from tinydance.data.cache import check_vae, find_caches
from tinydance.data.open import Source
from tinydance.data.order import collect_words, describe_source, format_counts
from tinydance.model import PixelDance, Settings, read_schedule
from tinydance.run.benchmark import benchmark, describe_memory
from tinydance.run.checkpoints import set_aside
from tinydance.run.cli import Progress, describe_config, progress
from tinydance.run.fit import fit
from tinydance.run.inspect import inspect
from tinydance.run.log import Interrupted, StopSignal
from tinydance.schedulers import Schedule
from tinydance.toy import SHIPPED_IMAGE, losses
from tinydance.training import DiffusionLoss, Machine, Stage
from tinydance.unet import UNet, is_temporal
from tinydance.vae import VAE, to_frames, to_pixels
from tinydance.video.strips import film_strip, psnr, show_clips, show_images
from tinydance.weights import pick

HELD_OUT = 1_000_003  # added to the seed of the clips that are shown and never trained on


def train(config: Config, stage: str = "all") -> None:
    """Run one stage, or every stage that is not there yet, each from what the ones before left."""
    machine = Machine(config)
    machine.compile = machine.compile and compiler_works(machine.device)
    tell(machine, f"tinydance on {machine.world_size} x {machine.device}, {machine.dtype}")
    tell(machine, describe_config(config))
    if stage in OTHERS:
        OTHERS[stage](config, machine)
    else:
        run_stages(config, machine, STAGES if stage == "all" else [stage])
    machine.close()


def tell(machine: Machine, text: object) -> None:
    """Print on the first rank."""
    if machine.rank == 0:
        print(text, flush=True)


def open_data(config: Config, machine: Machine) -> Source:
    """The run's source, with a bar while it is indexed."""
    return open_source(config, partial(progress, shown=machine.rank == 0))


def run_stages(config: Config, machine: Machine, names) -> None:
    source = open_data(config, machine)
    held_out = replace(source, seed=config.seed + HELD_OUT)
    tell(machine, "\n".join(describe_source(source)))
    for name in names:
        if len(names) > 1 and getattr(config, f"{name}_steps") == 0:
            continue  # --init brings it
        if find_caches(source) and (name in ("vae", "text") or config.sketch):
            what = "--sketch draws" if config.sketch else f"stage {name} learns"
            raise ValueError(
                f"{what} from pixels, not from latents: give --data another than {config.data}"
            )
        if config.resume == "none" and machine.rank == 0:
            set_aside(Path(config.out) / name)
        machine.wait()
        try:
            fit(STAGES[name](config, machine, source, held_out), config, machine)
        except Interrupted as message:
            tell(machine, f"{message}: the same command goes on from there")
            break
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{machine.device} has too little memory for stage {name}: try a --micro_batch of "
                "1, --gradient_checkpointing true, or on more ranks --zero true"
            ) from None
        machine.wait()


# ---------------------------------------------------------------------------------- the four stages
def vae_stage(config: Config, machine: Machine, source: Source, held_out: Source) -> Stage:
    """The autoencoder, on single frames."""
    torch.manual_seed(config.seed)
    vae, folder = VAE(NETWORKS["toy"]["vae"]), Path(config.out) / "vae" / "model"

    def read_pixels(count: int) -> Tensor:
        frames = [held_out.sample(n, "any").frames for n in range(count)]
        return to_pixels(torch.stack(frames)).to(machine.device)  # n 1 3 H W

    def publish(ema: VAE) -> None:
        vae = copy.deepcopy(ema)  # training goes on with the one that is not whitened
        losses.whiten(vae, read_pixels(256).flatten(0, 1))
        vae.save(folder / "vae")

    def show(ema: VAE):
        x = read_pixels(16)
        y = ema.decode_video(ema.encode_video(x)).clamp(-1, 1)
        titles = ["frames", f"through the VAE, {psnr(x, y):.1f} dB"]
        return film_strip([to_frames(x[:, 0]), to_frames(y[:, 0])], titles)

    objective = losses.ReconstructionLoss(vae, config.seed)
    options = {"batch": config.batch, "is_image_step": lambda step: True, "image_kind": "any"}
    stream = partial(batches, source, **options, **rank_options(config, machine))
    return Stage("vae", objective, vae, config.vae_steps, config.vae_lr, stream, publish, show)


def text_stage(config: Config, machine: Machine, source: Source, held_out: Source) -> Stage:
    """The tokenizer's vocabulary from the captions' words; the tower against clips, as CLIP's."""
    torch.manual_seed(config.seed)
    shape, folder = NETWORKS["toy"]["text"], Path(config.out) / "text" / "model"
    tokenizer = losses.build_vocabulary(collect_words(source), length=shape.max_position_embeddings)
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id}
    ids |= {"pad_token_id": tokenizer.pad_id, "vocab_size": len(tokenizer.vocab)}
    tower = TextTower(replace(shape, **ids))
    losses.init_clip(tower)
    # CLIP's words start 0.02 apart, and 400 million pairs teach it to tell them apart. Here words
    # that matter in few pairs, such as circle and square, would stay alike: so they start far
    # apart. [ours]
    nn.init.normal_(tower.text_model["embeddings"]["token_embedding"].weight, std=0.5)

    def publish(ema: TextTower) -> None:
        tokenizer.save(folder / "tokenizer")
        ema.save(folder / "text_encoder")

    objective = losses.ContrastiveLoss(tower, tokenizer)
    stream = partial(batches, source, batch=config.image_batch, **rank_options(config, machine))
    stage = Stage("text", objective, tower, config.text_steps, config.text_lr, stream, publish)
    return replace(stage, divisible=False)  # each clip is compared with the captions of all


def unet_stage(
    name: str, config: Config, machine: Machine, source: Source, held_out: Source
) -> Stage:
    """The UNet: as text-to-image on single frames, or on clips with images every so often."""
    torch.manual_seed(config.seed)
    is_new = name == "image" and config.unet != "init"
    unet = UNet(NETWORKS[config.unet]["unet"]) if is_new else load_unet(config, machine)
    unet.set_gradient_checkpointing(config.gradient_checkpointing)
    if config.train == "temporal":  # what the paper adds to an image model [Make-Your-Video]
        for parameter_name, parameter in unet.named_parameters():
            is_added = is_temporal(parameter_name) or parameter_name.startswith("conv_in")
            parameter.requires_grad_(is_added)
    vae, tower = load_frozen(VAE, "vae", config), load_frozen(TextTower, "text_encoder", config)
    check_vae(source, vae)
    tokenizer = Tokenizer.from_folder(find_part("tokenizer", config))
    schedule = Schedule(**pick(vars(config), Schedule))
    settings = Settings(**pick(vars(config), Settings))
    settings = replace(settings, frames=config.frames if name == "video" else 1)
    model = PixelDance(unet, vae, tower, tokenizer, schedule, settings).to(machine.device)
    model.latent_size(config.height, config.width)  # raises before anything is trained
    tell(machine, f"stage {name}: {describe_memory(model)}")
    folder = Path(config.out) / name / "model"

    def is_image_step(step: int) -> bool:
        every = config.image_every if config.train == "all" else 0  # images train no temporal layer
        return name == "image" or (every > 0 and step % every == every - 1)

    def publish(ema: UNet) -> None:
        replace(model, unet=ema).save(folder, spatial=name == "image")

    def show(ema: UNet):
        is_image = name == "image"
        draw, kind, count = (show_images, "first", 6) if is_image else (show_clips, "clip", 3)
        samples = [held_out.sample(n, kind) for n in range(count)]
        with machine.autocast():
            return draw(replace(model, unet=ema), samples, config.seed)

    objective = DiffusionLoss(model, config)
    steps = config.image_steps if name == "image" else config.video_steps
    options = {"batch": config.batch, "image_batch": config.image_batch}
    options |= {"is_image_step": is_image_step} | rank_options(config, machine)
    return Stage(
        name, objective, unet, steps, config.lr, partial(batches, source, **options), publish, show
    )


STAGES: dict[str, Callable[..., Stage]] = {
    "vae": vae_stage,
    "text": text_stage,
    "image": partial(unet_stage, "image"),
    "video": partial(unet_stage, "video"),
}


def rank_options(config: Config, machine: Machine) -> dict:
    """Which share of the data is this rank's, and who reads it."""
    return {"rank": machine.rank, "world_size": machine.world_size, "workers": config.workers}


# ------------------------------------------------------------------------- what a stage starts from
TRAINED_BY = {"vae": "vae", "text_encoder": "text", "tokenizer": "text", "unet": "image"}


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


def compiler_works(device: torch.device) -> bool:
    """Try torch.compile on a sum; where it fails, one line says so."""
    try:
        torch.compile(lambda x: x + x)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines()[0]
        print(f"note: torch.compile does not work here ({reason}): going on without", flush=True)
        return False
    return True


# ------------------------------------------------------------------------------- beside the stages
def inspect_data(config: Config, machine: Machine) -> None:
    if machine.rank == 0:
        inspect(open_data(config, machine), Path(config.out) / "inspect.png")


def write_latents(config: Config, machine: Machine) -> None:
    """Write the data's latents to --out, by the VAE of --init; see `data/cache.py`."""
    if not config.init:
        raise ValueError("--stage latents needs a VAE: give --init FOLDER, with vae/ in it")
    vae = load_frozen(VAE, "vae", config).to(machine.device)
    source, ranks = open_data(config, machine), rank_options(config, machine)
    checks = {"max_bad": config.max_bad, "autocast": machine.autocast}
    share = write_cache(source, vae, config.out, config.data, **checks, **ranks)
    written, is_first = next(share), machine.rank == 0
    bar = Progress("latents", written.total, "video", written.done, leave=True, shown=is_first)
    with StopSignal() as stop, bar:
        for written in share:
            bar.update(written.done - bar.n, bad=format_counts(written.counts) or "none")
            if stop.asked:
                break
    is_done, goes_on = written.done == written.total, "stopped: the same command goes on from there"
    tell(
        machine,
        f"{config.out} is written: --data {config.out} trains on it" if is_done else goes_on,
    )


OTHERS = {"benchmark": benchmark, "inspect": inspect_data, "latents": write_latents}
