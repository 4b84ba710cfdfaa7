"""The stages of a training: those of the real pipeline, made small for the toy world.

    vae    pictures to latents          (the paper takes Stable Diffusion's, frozen)
    text   captions to c_text           (the paper takes CLIP's, frozen)
    image  the spatial layers as text-to-image on single frames (the paper: Stable Diffusion's UNet)
    video  everything, clips with an image step every 8th       (this is the paper)

Each is a `Stage` for `training.fit`, and leaves a folder that the next one starts from. Beside
them: `benchmark` (how fast), `inspect` (what the data are), `latents` (the VAE's work, done once).

Read before: `training.py`. Read after: `train.py`, then `vae.py` and `clip.py`.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tinydance.clip import TextTower, Tokenizer
from tinydance.config import NETWORKS, Config
from tinydance.data.batches import batches
from tinydance.data.cache import caches, check_vae, write_cache
from tinydance.data.open import Source, open_source
from tinydance.model import ClipSettings, PixelDance
from tinydance.run.cli import describe
from tinydance.run.fit import fit
from tinydance.run.inspect import inspect
from tinydance.run.log import Interrupted, StopSignal
from tinydance.schedulers import Schedule
from tinydance.toy import SHIPPED_IMAGE
from tinydance.toy.losses import ContrastiveLoss, ReconstructionLoss, build_vocabulary
from tinydance.training import DiffusionLoss, Machine, Stage
from tinydance.unet import UNet, is_temporal
from tinydance.vae import VAE, to_frames, to_pixels
from tinydance.video.strips import film_strip, psnr, show_clips, show_images

STAGES = ("vae", "text", "image", "video")


HELD_OUT = 1_000_003  # added to the seed of the clips that are shown and never trained on


def train(config: Config, stage: str = "all") -> None:
    """Run one stage, or every stage that is not there yet, each from what the ones before left."""
    machine = Machine(config)
    if machine.rank == 0:
        print(f"tinydance on {machine.world_size} x {machine.device}, {machine.dtype}")
        print(describe(config), flush=True)
    if stage == "benchmark":
        from tinydance.run.benchmark import (
            benchmark,  # what it measures with is not on every system
        )

        print(benchmark(config, machine), flush=True)
        return machine.close()
    size = config.height, config.width
    source = open_source(
        config.data, config.frames, config.fps, size, config.seed, config.rich, config.images,
        config.short, config.crop, config.starts,
    )  # fmt: skip
    if stage in ("latents", "inspect"):
        {"latents": write_latents, "inspect": inspect_data}[stage](config, machine, source)
        return machine.close()
    held_out = source.reseeded(config.seed + HELD_OUT)
    if machine.rank == 0:
        print("\n".join(source.about()), flush=True)
    for name in STAGES if stage == "all" else [stage]:
        if stage == "all" and getattr(config, f"{name}_steps") == 0:
            continue  # --init brings it
        if caches(source) and (name in ("vae", "text") or config.sketch):
            what = "--sketch draws" if config.sketch else f"stage {name} learns"
            raise ValueError(f"{what} from pixels, not from latents: give --data another than "
                             f"{config.data}")  # fmt: skip
        if config.resume == "none" and machine.rank == 0:
            set_aside(Path(config.out) / name)
        machine.wait()
        try:
            fit(BUILD[name](config, machine, source, held_out), config, machine)
        except Interrupted as message:
            if machine.rank == 0:
                print(f"{message}: the same command goes on from there")
            break
        except torch.OutOfMemoryError:
            raise ValueError(f"{machine.device} has too little memory for stage {name}: try a "
                             "--micro_batch of 1, --gradient_checkpointing true, or on more ranks "
                             "--zero true") from None  # fmt: skip
        machine.wait()
    machine.close()


def write_latents(config: Config, machine: Machine, source: Source) -> None:
    """The data's latents into --out, by the VAE of --init; see `latents.py`."""
    if not config.init:
        raise ValueError("--stage latents needs a VAE: give --init FOLDER, with vae/ in it")
    vae = VAE.from_folder(part_folder(config, "vae")).requires_grad_(False).eval()
    stop = StopSignal()
    done = write_cache(
        source, vae.to(machine.device), config.out, config.data, machine.rank, machine.world_size,
        config.workers, config.max_bad, machine.autocast, lambda: stop.asked,
    )  # fmt: skip
    stop.restore()
    if machine.rank == 0:
        print(f"{config.out} is written: --data {config.out} trains on it" if done else
              "stopped: the same command goes on from there", flush=True)  # fmt: skip


def inspect_data(config: Config, machine: Machine, source: Source) -> None:
    """What a training would see, in words, and on a sheet in --out."""
    if machine.rank > 0:
        return
    text, sheet = inspect(source)
    print(text, flush=True)
    if sheet:
        path = Path(config.out) / "inspect.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        print(f"the sheet is {path}", flush=True)


def part_folder(config: Config, part: str) -> Path:
    """The folder of a part that an earlier stage of this run trained, or else of --init."""
    stage = {"vae": "vae", "text_encoder": "text", "tokenizer": "text", "unet": "image"}[part]
    folder = Path(config.out) / stage / "model" / part
    if folder.exists():
        return folder
    if config.init:
        init = SHIPPED_IMAGE if config.init == "shipped" else Path(config.init)
        if config.init == "shipped" and (Path(config.out) / "vae" / "model").exists():
            raise ValueError(f"{config.out} has a VAE of its own, whose latents the shipped image "
                             "model does not know: add --from-scratch")  # fmt: skip
        folder = init / part
    elif getattr(config, f"{stage}_steps") == 0:
        raise ValueError(f"preset {config.preset} starts from a trained {part}: give --init "
                         "FOLDER, a model folder such as Stable Diffusion 2.1's")  # fmt: skip
    if not folder.exists():
        raise ValueError(f"{folder} is missing: run --stage {stage} first, or no --stage for all")
    return folder


def set_aside(folder: Path) -> None:
    """Rename what another run left, so that a new one starts from nothing and nothing is lost."""
    n = 1
    while (other := folder.with_name(f"{folder.name}_{n}")).exists():
        n += 1
    if folder.exists():
        folder.rename(other)
        print(f"{folder} is now {other}", flush=True)


def inventory(model: PixelDance) -> str:
    """How large the parts are, and the memory that training takes before any activation."""
    count = sum(p.numel() for p in model.unet.parameters())
    trained = sum(p.numel() for p in model.unet.parameters() if p.requires_grad)
    frozen = sum(p.numel() for part in (model.vae, model.text_tower) for p in part.parameters())
    # float32: the weights and their averages, and for what is trained gradients and two moments
    size = (4 * (2 * count + frozen) + 12 * trained) / 2**30
    return (f"a UNet of {count:,} parameters, {trained:,} of them trained; {frozen:,} frozen in "
            f"VAE and text tower; {size:.1f} GiB for all that, activations apart")  # fmt: skip


def read_schedule(folder: Path) -> Schedule | None:
    """The schedule that a model folder was trained under, where it says."""
    there = (folder / "scheduler" / "scheduler_config.json").is_file()
    return Schedule.from_folder(folder / "scheduler") if there else None


def vae_stage(config: Config, machine: Machine, source: Source, held_out: Source) -> Stage:
    """The autoencoder, on single frames."""
    torch.manual_seed(config.seed)
    vae = VAE(**NETWORKS["toy"]["vae"])
    folder = Path(config.out) / "vae"

    def stream(first: int, last: int):
        return batches(source, first, last, config.batch, machine.rank, machine.world_size,
                       config.workers, single=lambda step: True, any_frame=True)  # fmt: skip

    def pixels(count: int) -> Tensor:
        frames = [held_out.any_frame(n).frames for n in range(count)]
        return to_pixels(torch.stack(frames)).to(machine.device)  # n 1 3 H W

    def publish(ema: VAE) -> None:
        vae = copy.deepcopy(ema)  # training goes on without
        vae.whiten(pixels(256).flatten(0, 1))
        vae.save(folder / "model" / "vae")

    def show(ema: VAE):
        x = pixels(16)
        y = ema.decode_video(ema.encode_video(x))
        rows = [to_frames(v[:, 0].clamp(-1, 1)) for v in (x, y)]
        titles = ["frames", f"through the VAE, {psnr(x, y):.1f} dB"]
        return film_strip(rows, titles)

    objective = ReconstructionLoss(vae, config.seed)
    return Stage("vae", objective, vae, config.vae_steps, config.vae_lr, stream, publish, show)


def text_stage(config: Config, machine: Machine, source: Source, held_out: Source) -> Stage:
    """The tokenizer's vocabulary from the captions' words; the tower against clips, as CLIP's."""
    torch.manual_seed(config.seed)
    tokenizer = build_vocabulary(
        source.words(), length=NETWORKS["toy"]["text"]["max_position_embeddings"]
    )
    tower = TextTower(
        vocab_size=len(tokenizer.vocab), bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id, **NETWORKS["toy"]["text"],
    )  # fmt: skip
    # CLIP's words start 0.02 apart and have 400 million pairs to part them. Here rarely telling
    # pairs, such as circle and square, would stay one word: they start far apart. [ours]
    nn.init.normal_(tower.text_model["embeddings"]["token_embedding"].weight, std=0.5)
    folder = Path(config.out) / "text"

    def stream(first: int, last: int):
        return batches(source, first, last, config.image_batch, machine.rank, machine.world_size,
                       config.workers)  # fmt: skip

    def publish(ema: TextTower) -> None:
        tokenizer.save(folder / "model" / "tokenizer")
        ema.save(folder / "model" / "text_encoder")

    objective = ContrastiveLoss(tower, tokenizer)
    return Stage(
        "text", objective, tower, config.text_steps, config.text_lr, stream, publish,
        divisible=False,
    )  # fmt: skip


def unet_stage(
    name: str, config: Config, machine: Machine, source: Source, held_out: Source
) -> Stage:
    """The UNet: as text-to-image on single frames, or on clips with images every so often."""
    torch.manual_seed(config.seed)
    if name == "image" and config.unet != "init":
        unet = UNet(**NETWORKS[config.unet]["unet"])
    else:
        start = part_folder(config, "unet")
        unet = UNet.from_folder(start)
        before = read_schedule(start.parent)
        if machine.rank == 0 and before and before.prediction_type != config.prediction_type:
            print(f"note: the UNet in {start} learnt to predict {before.prediction_type}, "
                  f"this run {config.prediction_type}")  # fmt: skip
    unet.gradient_checkpointing = config.gradient_checkpointing
    if config.train == "temporal":  # what the paper adds to an image model [Make-Your-Video]
        for parameter_name, parameter in unet.named_parameters():
            is_new = is_temporal(parameter_name) or parameter_name.startswith("conv_in")
            parameter.requires_grad_(is_new)
    fields = Schedule.__dataclass_fields__
    chosen = {name: value for name, value in asdict(config).items() if name in fields}
    model = PixelDance(
        unet=unet,
        vae=VAE.from_folder(part_folder(config, "vae")).requires_grad_(False).eval(),
        text_tower=TextTower.from_folder(part_folder(config, "text_encoder"))
        .requires_grad_(False)
        .eval(),
        tokenizer=Tokenizer.from_folder(part_folder(config, "tokenizer")),
        schedule=Schedule(**chosen),
        settings=ClipSettings(
            frames=config.frames if name == "video" else 1, fps=config.fps, height=config.height,
            width=config.width, cond_noise_t=config.cond_noise_t, steps=config.steps,
            guidance=config.guidance, tau=config.tau,
        ),
    ).to(machine.device)  # fmt: skip
    model.latent_size(config.height, config.width)  # raises before anything is trained
    check_vae(source, model.vae)
    folder = Path(config.out) / name

    def is_image_step(step: int) -> bool:
        every = config.image_every if config.train == "all" else 0  # images train no temporal layer
        return name == "image" or (every > 0 and step % every == every - 1)

    def stream(first: int, last: int):
        return batches(
            source, first, last, config.batch, machine.rank, machine.world_size, config.workers,
            single=is_image_step, image_batch=config.image_batch,
        )  # fmt: skip

    def with_unet(ema: UNet) -> PixelDance:
        parts = vars(model) | {"unet": ema}
        return PixelDance(**parts)

    def publish(ema: UNet) -> None:
        with_unet(ema).save(folder / "model", spatial=name == "image")

    def show(ema: UNet):
        strip = show_images if name == "image" else show_clips
        with machine.autocast():
            return strip(with_unet(ema), held_out, config.seed)

    if machine.rank == 0:
        print(f"stage {name}: {inventory(model)}", flush=True)
    steps = config.image_steps if name == "image" else config.video_steps
    objective = DiffusionLoss(model, config)
    return Stage(name, objective, unet, steps, config.lr, stream, publish, show)


BUILD: dict[str, Callable[..., Stage]] = {
    "vae": vae_stage,
    "text": text_stage,
    "image": partial(unet_stage, "image"),
    "video": partial(unet_stage, "video"),
}
