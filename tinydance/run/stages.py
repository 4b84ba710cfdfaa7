"""The stages of a training: those of the real pipeline, made small for the toy world.

"vae" turns pictures to latents and "text" captions to c_text (the paper takes both trained and
frozen); "image" trains the spatial layers on single frames; "video" is the paper: everything, on
clips with an image step every 8th. Each is a `Stage` for `fit`, and leaves a folder for the next.
Not here: the loop (`fit.py`), the losses (`training.py`, `toy/losses.py`).
"""

import math
import os
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from tinydance.clip import TextTower, Tokenizer
from tinydance.config import NETWORKS, Config
from tinydance.data import batches, open_source, write_cache
from tinydance.data.cache import check_vae, find_caches
from tinydance.data.open import Source
from tinydance.data.order import collect_words, describe_source, format_counts
from tinydance.model import PixelDance, Settings, read_schedule
from tinydance.run.benchmark import benchmark
from tinydance.run.checkpoints import set_aside
from tinydance.run.cli import Progress, progress
from tinydance.run.fit import fit, note_signals, tell
from tinydance.run.inspect import inspect
from tinydance.run.memory import describe_memory
from tinydance.schedulers import Schedule
from tinydance.toy import SHIPPED_IMAGE, losses
from tinydance.toy.source import HELD_OUT, ToyWorld
from tinydance.training import DiffusionLoss, Machine, Stage
from tinydance.unet import UNet, is_temporal
from tinydance.vae import VAE, to_frames, to_pixels
from tinydance.video.strips import film_strip, psnr, show_clips, show_images
from tinydance.weights import pick
from tinydance.weights.files import check_folder, hold

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # t / T of the validation loss: the middles of five fifths
VALIDATED = 32  # clips at least, of which it is the mean; a short run takes one batch a step
TRAINED_BY = {"vae": "vae", "text_encoder": "text", "tokenizer": "text", "unet": "image"}


def train(config: Config, stage: str = "all") -> None:
    """Run one stage, or every stage that is not there yet, each from what the ones before left."""
    machine = make_machine(config)
    tell(machine, f"tinydance on {machine.world_size} x {machine.device}, {machine.dtype}")
    rows = ((f.name, str(getattr(config, f.name)), f.metadata["help"]) for f in fields(config))
    tell(machine, "\n".join(f"  {name:<24}{value:<15} {help}" for name, value, help in rows))
    open_data = partial(open_source, config, partial(progress, shown=machine.rank == 0))
    try:  # the first rank saves an index of the shards, and the others read it
        source = open_data() if machine.rank == 0 else None
    finally:
        machine.wait()
    source = source or open_data()
    if config.workers < 0:  # what the toy world draws is there sooner than a worker could send it
        workers = 0 if isinstance(source, ToyWorld) else min(4, os.cpu_count() or 1)
        config = replace(config, workers=workers)
    tell(machine, "\n".join(describe_source(source)))
    if stage in ("benchmark", "inspect"):
        OTHERS[stage](config, machine, source)
    else:
        alone = hold(config.out) if machine.rank == 0 else nullcontext()
        with alone, note_signals() as signals:
            work = write_latents if stage == "latents" else run_stages
            work(config, machine, source, STAGES if stage == "all" else [stage], signals)
    machine.close()


def make_machine(config: Config) -> Machine:
    """Raises ValueError where torchrun could not start a rank again, and tries the compiler."""
    # torchrun keeps one store of addresses over all restarts [torch 2.13]: a rank that starts
    # again finds the address of a dead one there, and fails, or waits for hours.
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        needs = "--max-restarts needs --rdzv_backend=c10d (on one machine --standalone)"
        raise ValueError(f"{needs} and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun")
    machine = Machine(config)
    try:
        if machine.compile:
            torch.compile(lambda x: x + x)(torch.ones(2, device=machine.device))
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines()[0]
        print(f"note: torch.compile does not work here ({reason}): going on without", flush=True)
        machine.compile = False
    return machine


def run_stages(config: Config, machine: Machine, source: Source, names, signals) -> None:
    held_out = source.hold_out()
    for kind in ("clip", "first") if held_out else ():
        held_out.sample(0, kind)  # if none can be read, it raises now and not hours later
    for name in names:
        if len(names) > 1 and getattr(config, f"{name}_steps") == 0:
            continue  # --init brings it
        if find_caches(source) and (name in ("vae", "text") or config.sketch):
            what = "--sketch draws" if config.sketch else f"stage {name} learns"
            raise ValueError(f"{what} from pixels, and {config.data} holds latents")
        if config.resume == "none" and machine.rank == 0:
            set_aside(Path(config.out) / name)  # before the stage looks for what it starts from
        machine.wait()
        try:
            fit(STAGES[name](config, machine, source, held_out), config, machine, signals)
            if name in ("image", "video"):
                model = Path(config.out) / name / "model"
                tell(machine, f"to see what it can do: python sample.py PROMPT --model {model}")
            if any(machine.mean(len(signals))):  # one came while the last step was saved
                raise InterruptedError(f"stopped after stage {name}")
        except InterruptedError as message:
            tell(machine, f"{message}: the same command goes on from there")
            break
        except torch.OutOfMemoryError:
            cures = "--micro_batch 1, --gradient_checkpointing true, or more ranks"
            raise ValueError(f"too little memory for stage {name}: try {cures}") from None
        machine.wait()


def share(config: Config, machine: Machine, source: Source, **options) -> Callable:
    """This rank's batches of the steps (first, last), see `batches`."""
    options |= {"rank": machine.rank, "world_size": machine.world_size}
    return partial(batches, source, workers=max(0, config.workers), **options)


# ---------------------------------------------------------------------------------- the four stages
def vae_stage(config: Config, machine: Machine, source: Source, held_out: Source | None) -> Stage:
    """The autoencoder, on single frames."""
    torch.manual_seed(config.seed)
    vae, folder = VAE(NETWORKS["toy"]["vae"]), Path(config.out) / "vae" / "model"

    def read_pixels(count: int) -> Tensor:
        frames = [(held_out or source).sample(n, "any").frames for n in range(count)]
        return to_pixels(torch.stack(frames))  # n 1 3 H W

    def publish(ema: VAE) -> None:
        losses.whiten(ema, read_pixels(256).flatten(0, 1))  # on the host: MPS lacks float64
        ema.save(folder / "vae")

    def show(ema: VAE):
        x = read_pixels(16).to(machine.device)
        y = ema.decode_video(ema.encode_video(x)).clamp(-1, 1)
        titles = ["frames", f"through the VAE, {psnr(x, y):.1f} dB"]
        return film_strip([to_frames(x[:, 0]), to_frames(y[:, 0])], titles)

    objective = losses.ReconstructionLoss(vae, config.seed)
    options = {"batch": config.batch, "image_every": 1, "image_kind": "any"}
    stream = share(config, machine, source, **options)
    return Stage("vae", objective, vae, config.vae_steps, config.vae_lr, stream, publish, show)


def text_stage(config: Config, machine: Machine, source: Source, held_out: Source | None) -> Stage:
    """The tokenizer's vocabulary from the captions' words; the tower against clips, as CLIP's."""
    torch.manual_seed(config.seed)
    shape, folder = NETWORKS["toy"]["text"], Path(config.out) / "text" / "model"
    tokenizer = losses.build_vocabulary(collect_words(source), length=shape.max_position_embeddings)
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id}
    ids |= {"pad_token_id": tokenizer.pad_id, "vocab_size": len(tokenizer.vocab)}
    tower = TextTower(replace(shape, **ids))
    losses.init_clip(tower)
    # CLIP's words start 0.02 apart, and 400 million pairs part them. Here words that matter in few
    # pairs, such as circle and square, would stay alike: so they start far apart. [ours]
    nn.init.normal_(tower.text_model["embeddings"]["token_embedding"].weight, std=0.5)

    def publish(ema: TextTower) -> None:
        tokenizer.save(folder / "tokenizer")
        ema.save(folder / "text_encoder")

    objective = losses.ContrastiveLoss(tower, tokenizer)
    stream = share(config, machine, source, batch=config.image_batch)
    stage = Stage("text", objective, tower, config.text_steps, config.text_lr, stream, publish)
    return replace(stage, divisible=False)  # each clip is compared with the captions of all


def unet_stage(
    name, config: Config, machine: Machine, source: Source, held_out: Source | None, convert=None
) -> Stage:
    """The UNet: as text-to-image on single frames, or on clips with images every so often.
    convert: what a variant makes of it before it is trained."""
    torch.manual_seed(config.seed)
    is_image, folder = name == "image", Path(config.out) / name / "model"
    is_new = is_image and config.unet != "init"
    unet = UNet(NETWORKS[config.unet]["unet"]) if is_new else load_unet(name, config)
    if config.train == "temporal":  # what the paper adds to an image model [Make-Your-Video]
        for key, parameter in unet.named_parameters():
            parameter.requires_grad_(is_temporal(key) or key.startswith("conv_in"))
    unet = convert(unet) if convert else unet
    unet.set_gradient_checkpointing(config.gradient_checkpointing)
    vae, tower = load_frozen(VAE, "vae", config), load_frozen(TextTower, "text_encoder", config)
    check_vae(source, vae)
    tokenizer = Tokenizer.from_folder(find_part("tokenizer", config))
    schedule = Schedule(**pick(vars(config), Schedule))
    settings = Settings(**pick(vars(config), Settings))
    settings = replace(settings, frames=1 if is_image else config.frames)
    model = PixelDance(unet, vae, tower, tokenizer, schedule, settings).to(machine.device)
    settings.check(model)  # raises before anything is trained
    tell(machine, f"stage {name}: {describe_memory(model, config, machine)}")

    def publish(ema: UNet) -> None:
        replace(model, unet=ema).save(folder, spatial=is_image)

    def show(ema: UNet):
        draw, kind, count = (show_images, "first", 6) if is_image else (show_clips, "clip", 3)
        samples = [(held_out or source).sample(n, kind) for n in range(count)]
        with machine.autocast():
            return draw(replace(model, unet=ema), samples, config.seed)

    def validate(ema: UNet) -> dict[str, float]:
        every = int(is_image)  # all batches are of images, or none
        stream = share(config, machine, held_out, batch=config.batch, image_every=every)
        clips = stream(0, min(steps, math.ceil(VALIDATED / config.batch)))
        return validation_loss(replace(model, unet=ema), config, machine, clips)

    objective = DiffusionLoss(model, config)
    steps = config.image_steps if is_image else config.video_steps
    every = config.image_every if config.train == "all" else 0  # images train no temporal layer
    sizes = {"batch": config.batch, "image_batch": config.image_batch}
    stream = share(config, machine, source, image_every=1 if is_image else every, **sizes)
    stage = Stage(name, objective, unet, steps, config.lr, stream, publish, show)
    return replace(stage, validate=validate) if held_out else stage


def validation_loss(model: PixelDance, config: Config, machine: Machine, clips) -> dict[str, float]:
    """The loss of batches of held-out clips (or images) at LEVELS of noise, and its mean over them.

    Clip by clip, each with its own noise and drops for ever: only other weights change the figure,
    and the mean over the ranks is that of one. The mean over t is what the training loss estimates.
    """
    config, T = replace(config, seed=config.seed + HELD_OUT), model.schedule.num_train_timesteps
    losses = {int(level * T): DiffusionLoss(model, config, int(level * T)) for level in LEVELS}
    values = {t: [] for t in losses}
    for batch in clips:
        for k in range(len(batch.captions)):
            clip = batch.part(slice(k, k + 1), machine.device)
            with torch.no_grad(), machine.autocast():
                for t, loss in losses.items():
                    values[t].append(loss(clip)["loss"].item())
    numbers = {f"validation_t{t}": fmean(values[t]) for t in losses}
    return {"validation": fmean(numbers.values())} | numbers


STAGES: dict[str, Callable[..., Stage]] = {"vae": vae_stage, "text": text_stage}
STAGES |= {name: partial(unet_stage, name) for name in ("image", "video")}


# ------------------------------------------------------------------------- what a stage starts from
def find_part(part: str, config: Config, asking: str = "") -> Path:
    """The folder of a part for a stage, but not its own. ValueError says how to get one."""
    stage, out = TRAINED_BY[part], Path(config.out)
    folder, is_shipped = out / stage / "model" / part, config.init == "shipped"
    if folder.exists() and stage != asking:
        return folder
    if is_shipped and (out / "vae" / "model").exists():
        own = f"{out} has a VAE of its own, whose latents the shipped image model does not know"
        raise ValueError(f"{own}: add --from-scratch")
    if config.init:
        folder = (SHIPPED_IMAGE if is_shipped else check_folder(config.init)) / part
    if not folder.exists():
        cure = f"run --stage {stage} first, or give --init FOLDER, such as Stable Diffusion 2.1's"
        raise ValueError(f"{folder} is missing: {cure}")
    return folder


def load_frozen(kind: type[nn.Module], part: str, config: Config) -> nn.Module:
    """A part that is not trained by this stage."""
    return kind.from_folder(find_part(part, config)).requires_grad_(False).eval()


def load_unet(name: str, config: Config) -> UNet:
    """The UNet to start from. Raises ValueError where it learned to predict something else."""
    folder, now = find_part("unet", config, name), config.prediction_type
    scheduler = folder.parent / "scheduler"
    before = read_schedule(scheduler).prediction_type if scheduler.exists() else now
    if before != now:
        cure = f"give --prediction_type {before}, or start elsewhere"
        raise ValueError(f"the UNet in {folder} learned to predict {before}, not {now}: {cure}")
    return UNet.from_folder(folder)


# ------------------------------------------------------------------------------- beside the stages
def write_latents(config: Config, machine: Machine, source: Source, names, signals) -> None:
    """Write the data's latents to --out, by the VAE of --init; see `data/cache.py`."""
    vae = load_frozen(VAE, "vae", config).to(machine.device)
    options = machine.rank, machine.world_size, config.workers, config.max_bad, machine.autocast
    writing = write_cache(source, vae, config.out, config.data, *options)
    now = next(writing)
    bar = Progress("latents", now.total, "video", now.done, leave=True, shown=machine.rank == 0)
    with closing(writing), bar:
        for now in writing:
            bar.update(now.done - bar.n, bad=format_counts(now.counts) or "none")
            if signals:
                return tell(machine, "stopped: the same command goes on from there")
    tell(machine, f"{config.out} is written: --data {config.out} trains on it")


OTHERS = {"benchmark": benchmark, "inspect": inspect, "latents": write_latents}
