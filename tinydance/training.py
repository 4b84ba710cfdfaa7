"""Training: the diffusion loss under PixelDance's three instructions, and the loop that lowers it.

`DiffusionLoss.forward` is section 3.2 of the paper in one straight line. `fit` is the loop of every
stage; `train` chains the stages, which are those of the real pipeline made small:

    vae    pictures to latents          (the paper takes Stable Diffusion's, frozen)
    text   captions to c_text           (the paper takes CLIP's, frozen)
    image  the spatial layers as text-to-image on single frames (the paper: Stable Diffusion's UNet)
    video  everything, clips with an image step every 8th       (this is the paper)

Read before: `unet.py`. Read after: `train.py`, then `vae.py` and `clip.py`.
Not here: gradient accumulation, sharded optimizers, latents cached on disk.
"""

import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tinydance.clip import ContrastiveLoss, TextTower, Tokenizer, build_vocabulary
from tinydance.conditioning import LAST_FRAMES, instructions_of, make_c_image
from tinydance.config import (
    NETWORKS,
    Config,
    autocast,
    choose_device,
    choose_dtype,
    describe,
)
from tinydance.data import Source, batches, open_source
from tinydance.model import SHIPPED_IMAGE, ClipSettings, PixelDance
from tinydance.noise import draw, generator
from tinydance.sampling import sample_frames
from tinydance.schedulers import Schedule, add_noise, target
from tinydance.unet import UNet
from tinydance.vae import VAE, ReconstructionLoss
from tinydance.video import film_strip, to_frames, to_pixels

STAGES = ("vae", "text", "image", "video")
HELD_OUT = 1_000_003  # added to the seed of the clips that are shown and never trained on
KEPT_CHECKPOINTS = 2


# ------------------------------------------------------------------------------------- the loss
class DiffusionLoss(nn.Module):
    """The mean square error of the UNet's answer for one batch of clips, or of images (f = 1)."""

    def __init__(self, model: PixelDance, config: Config):
        super().__init__()
        self.unet = model.unet
        self.model, self.config = model, config  # a dataclass: the frozen parts stay unregistered
        self.alpha_bar = model.schedule.alpha_bar

    def forward(self, pixels: Tensor, captions: list[str], numbers: list[int]) -> Tensor:
        """pixels (b, f, 3, H, W); numbers: the samples', from which all their randomness comes."""
        f, device, config = pixels.shape[1], pixels.device, self.config
        h, w = self.model.latent_size(*pixels.shape[-2:])
        c = self.model.vae.config["latent_channels"]
        generators = [generator("train", config.seed, n) for n in numbers]
        u = torch.stack([torch.rand(4, generator=g) for g in generators])  # b 4, uniform
        t = (u[:, 0] * config.num_train_timesteps).long()
        keep_last = u[:, 1] >= config.eta
        keep_text = u[:, 2] >= config.text_drop
        back = (u[:, 3] * LAST_FRAMES).long()

        # The borrowed organs are frozen: "the weights of pre-trained text encoder and VAE model
        # are frozen during training" [paper §4.1].
        z_0 = self.model.vae.encode_video(pixels, draw(generators, f, c, h, w, device=device))
        texts = [caption if keep else "" for caption, keep in zip(captions, keep_text.tolist())]
        c_text = self.model.encode_text(texts)

        f_first, f_last = instructions_of(z_0, back.to(device))
        eps_c = draw(generators, 2, c, h, w, device=device)  # "different noises" [paper Fig. 3]
        alpha_bar_c = float(self.alpha_bar[config.cond_noise_t]) if config.cond_noise_t else 1.0
        c_image = make_c_image(f_first, f_last, f, eps_c, alpha_bar_c, keep_last.to(device))

        eps = draw(generators, f, c, h, w, device=device)
        alpha_bar_t = self.alpha_bar[t].to(device)
        z_t = add_noise(z_0, eps, alpha_bar_t)
        out = self.unet(torch.cat([z_t, c_image], dim=2), t.to(device), c_text)
        return F.mse_loss(out.float(), target(z_0, eps, alpha_bar_t, config.prediction_type))


# ------------------------------------------------------------------------------------ the machine
class Machine:
    """Which device this process computes on, how exactly, and as which of how many processes."""

    def __init__(self, config: Config):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        kind = choose_device(config.device)
        if kind == "cuda":
            torch.cuda.set_device(local_rank)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        self.dtype = choose_dtype(config.dtype, kind)
        self.compile = config.compile == "on" or (config.compile == "auto" and kind == "cuda")
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    def autocast(self):
        return autocast(self.device.type, self.dtype)

    def mean(self, *values: float) -> list[float]:
        """The mean over all ranks of each value."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.world_size).tolist()

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write folder/step_N/state.pt whole or not at all, then drop the oldest.

    A crash leaves an unfinished folder of another name, which nobody reads.
    """
    final, unfinished = folder / f"step_{step:08d}", folder / f"unfinished_{step:08d}"
    if final.exists():
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with open(unfinished / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, final)
    for old in checkpoints(folder)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints there are, the oldest first."""
    return sorted(folder.glob("step_*"))


# Fields that may differ when a run goes on: where and how fast, not what.
FREE = {"out", "init", "steps", "guidance", "device", "dtype", "compile",
        "gradient_checkpointing", "workers", "save_every", "sample_every", "vae_steps",
        "text_steps", "image_steps", "video_steps"}  # fmt: skip


def check_same(config: Config, saved: dict, path: Path) -> None:
    now = asdict(config)
    changed = [
        f"{name} was {saved[name]} and is {now[name]}"
        for name in now
        if name not in FREE and name in saved and saved[name] != now[name]
    ]
    if changed:
        raise ValueError(
            f"{path} was trained with other choices: {'; '.join(changed)}. "
            "Use those, or another --out"
        )


# ----------------------------------------------------------------------------------------- the loop
def learning_rate(step: int, steps: int, peak: float, config: Config) -> float:
    """A function of the step: nothing to save."""
    rate = peak * min(1.0, (step + 1) / (config.warmup + 1))
    if config.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weights, in float32; the first steps weigh more."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)


@dataclass
class Stage:
    """What one stage trains, on what, and what it leaves."""

    name: str
    objective: nn.Module  # (pixels, captions, numbers) -> loss
    trained: nn.Module  # the part of it that is kept
    steps: int
    lr: float
    stream: Callable[[int, int], object]  # (first, last) -> this rank's batches of these steps
    publish: Callable[[nn.Module], None]  # write the model folder from the averaged weights
    show: Callable[[nn.Module], object] = lambda ema: None  # a picture of what they can do


def fit(stage: Stage, config: Config, machine: Machine) -> nn.Module:
    """Train a stage to its end, from the newest checkpoint if there is one; -> the EMA weights.

    A run that stopped and goes on equals a straight one: every random number is a function of
    (seed, step, sample), so a step needs no more than the weights, their averages and Adam's state.
    Raises Interrupted after SIGTERM, SIGUSR1 or Ctrl-C, saved at the current step.
    """
    objective, trained, steps = stage.objective, stage.trained, stage.steps
    folder = Path(config.out) / stage.name
    objective.to(machine.device).train()
    ema = copy.deepcopy(trained).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in objective.parameters() if p.requires_grad],
        lr=stage.lr, weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    start = 0
    if saved := checkpoints(folder / "checkpoints"):
        state = torch.load(saved[-1] / "state.pt", map_location="cpu", weights_only=True)
        check_same(config, state["config"], saved[-1])
        objective.load_state_dict(state["objective"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if start >= steps:
        return ema

    # --- scale: the same step, compiled, on many devices
    if machine.compile:
        trained.compile()  # in place: names keep no prefix; `ema` stays uncompiled
    step_loss = objective
    if machine.world_size > 1:
        # An image step does not reach the temporal layers: without the search for unused
        # parameters the ranks would part in silence; with it those gradients stay None. On the
        # first clip step torch warns once that it found none: harmless.
        step_loss = DistributedDataParallel(
            objective, find_unused_parameters=stage.name in ("image", "video")
        )

    stop = StopSignal()
    log = Log(stage.name, folder, start, steps) if machine.rank == 0 else None
    for step, frames, captions, numbers in stage.stream(start, steps):
        dropout = generator("dropout", config.seed, step, machine.rank)
        torch.manual_seed(dropout.initial_seed())
        rate = learning_rate(step, steps, stage.lr, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels = to_pixels(frames.to(machine.device, non_blocking=True))
        # ------------------------------------------------------------------ the step
        with machine.autocast():
            loss = step_loss(pixels, captions, numbers)
        optimizer.zero_grad(set_to_none=True)  # None, not 0: AdamW leaves what has no gradient
        loss.backward()
        norm = nn.utils.clip_grad_norm_(objective.parameters(), config.clip_grad)
        if torch.isfinite(norm):  # the same on all ranks: the gradients are
            optimizer.step()
        update_ema(ema, trained, step, config.ema)
        # ---------------------------------------------------------------------------
        mean_loss, stopping = machine.mean(loss.item(), float(stop.asked))
        done = step + 1
        last = done == steps or stopping > 0
        if log:
            log.step(done, mean_loss, float(norm), rate, images=frames.shape[1] == 1)
        if done % config.save_every == 0 or last:
            if machine.rank == 0:
                state = {
                    "step": done, "config": asdict(config), "objective": objective.state_dict(),
                    "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                }  # fmt: skip
                save_checkpoint(folder / "checkpoints", done, state)
                stage.publish(ema)
            machine.wait()
        if done % config.sample_every == 0 or last:
            if machine.rank == 0 and (picture := stage.show(ema)):
                (folder / "samples").mkdir(exist_ok=True)
                picture.save(folder / "samples" / f"step_{done:08d}.png")
            machine.wait()
        if stopping:
            break
    if log:
        log.close()
    stop.restore()
    if stopping and done < steps:
        raise Interrupted(f"stopped at step {done} of {steps} of stage {stage.name}, and saved")
    return ema


class Interrupted(Exception):
    """The run was asked to stop, and has saved."""


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C; the loop looks at it once a step. A second one kills."""

    def __init__(self):
        self.asked = False
        names = [n for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n)]
        self.before = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in names}
        for number in self.before:
            signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """log.jsonl, a line a step, and the progress bar (plain lines where there is no terminal)."""

    EVERY = 20.0  # seconds between plain lines

    def __init__(self, stage: str, folder: Path, start: int, steps: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = []
        if path.exists():  # steps after the checkpoint will be taken again
            lines = path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self.file, self.stage, self.start, self.steps = path.open("a"), stage, start, steps
        self.bar = tqdm(
            total=steps, initial=start, desc=stage, disable=not sys.stderr.isatty(), unit="step",
        )  # fmt: skip
        self.begun = self.shown = time.time()
        self.smooth = None

    def step(self, done: int, loss: float, norm: float, rate: float, images: bool) -> None:
        kind, seconds = "image" if images else "clip", time.time() - self.begun
        record = {"step": done, "loss": loss, "grad_norm": norm, "lr": rate, "kind": kind}
        record |= {"seconds": seconds, "skipped": not math.isfinite(norm)}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        self.bar.set_postfix(loss=f"{self.smooth:.4f}", lr=f"{rate:.1e}", refresh=False)
        self.bar.update()
        now = time.time()
        if self.bar.disable and (now - self.shown > self.EVERY or done == self.steps):
            self.shown = now
            pace = (done - self.start) / (now - self.begun)
            left = (self.steps - done) / pace / 60
            print(f"{self.stage} {done}/{self.steps}  loss {self.smooth:.4f}  lr {rate:.1e}  "
                  f"{pace:.2f} steps/s  {left:.1f} min left", flush=True)  # fmt: skip

    def close(self) -> None:
        self.bar.close()
        self.file.close()


# --------------------------------------------------------------------------------------- the stages
def train(config: Config, stage: str = "all") -> None:
    """Run one stage, or every stage that is not there yet, each from what the ones before left."""
    machine = Machine(config)
    if machine.rank == 0:
        print(f"tinydance on {machine.world_size} x {machine.device}, {machine.dtype}")
        print(describe(config), flush=True)
    size = config.height, config.width
    source, held_out = (
        open_source(config.data, config.frames, config.fps, size, seed, config.rich)
        for seed in (config.seed, config.seed + HELD_OUT)
    )
    if stage == "all":
        # With --init, everything before the video stage is there already.
        chosen = ["video"] if config.init else [n for n in STAGES if getattr(config, f"{n}_steps")]
    else:
        chosen = [stage]
    for name in chosen:
        try:
            fit(BUILD[name](config, machine, source, held_out), config, machine)
        except Interrupted as message:
            if machine.rank == 0:
                print(f"{message}: the same command goes on from there")
            break
        machine.wait()
    machine.close()


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
                       config.workers, single=lambda step: True)  # fmt: skip

    def pixels(count: int) -> Tensor:
        frames = [held_out.frame(n).frames for n in range(count)]
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
    return Stage("text", objective, tower, config.text_steps, config.text_lr, stream, publish)


def unet_stage(
    name: str, config: Config, machine: Machine, source: Source, held_out: Source
) -> Stage:
    """The UNet: as text-to-image on single frames, or on clips with images every so often."""
    torch.manual_seed(config.seed)
    if name == "image" and not config.init:
        unet = UNet(**NETWORKS["toy"]["unet"])
    else:
        folder = part_folder(config, "unet")
        unet = UNet.from_folder(folder)
        before = read_schedule(folder.parent)
        if machine.rank == 0 and before and before.prediction_type != config.prediction_type:
            print(f"note: the UNet in {folder} learnt to predict {before.prediction_type}, "
                  f"this run {config.prediction_type}")  # fmt: skip
    unet.gradient_checkpointing = config.gradient_checkpointing
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
            guidance=config.guidance,
        ),
    ).to(machine.device)  # fmt: skip
    model.latent_size(config.height, config.width)  # raises before anything is trained
    folder = Path(config.out) / name

    def is_image_step(step: int) -> bool:
        every = config.image_every
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
        count = sum(p.numel() for p in unet.parameters())
        print(f"stage {name}: a UNet of {count:,} parameters", flush=True)
    steps = config.image_steps if name == "image" else config.video_steps
    objective = DiffusionLoss(model, config)
    return Stage(name, objective, unet, steps, config.lr, stream, publish, show)


BUILD: dict[str, Callable[..., Stage]] = {
    "vae": vae_stage,
    "text": text_stage,
    "image": partial(unet_stage, "image"),
    "video": partial(unet_stage, "video"),
}


# ------------------------------------------------------------------------------------- the pictures
def show_images(model: PixelDance, held_out: Source, seed: int):
    """A sheet of single frames: a row of eight seeds for each of six held-out captions."""
    captions = [held_out.clip(n).caption for n in range(6)]
    frames = to_frames(sample_frames(model, captions * 8, frames=1, seed=seed))
    rows = frames.unflatten(0, (8, 6)).transpose(0, 1).flatten(1, 2)  # (8 6) 1 -> 6 8
    return film_strip(list(rows), captions)


def show_clips(model: PixelDance, held_out: Source, seed: int, count: int = 3, **settings):
    """Held-out captions, each from text alone, with the first frame, with the last one as well."""
    clips = [held_out.clip(n) for n in range(count)]
    captions = [clip.caption for clip in clips]
    pixels = to_pixels(torch.stack([clip.frames for clip in clips])).to(model.device)
    first, last = pixels[:, 0], pixels[:, -1]
    given = {"text": (None, None), "text, first": (first, None), "text, first, last": (first, last)}
    rows, titles, firsts, lasts = [], [], [], []
    made = {
        name: to_frames(sample_frames(model, captions, *frames, seed=seed, **settings))
        for name, frames in given.items()
    }
    for n, caption in enumerate(captions):
        for name, (I_first, I_last) in given.items():
            rows.append(made[name][n])
            titles.append(f"{caption} ({name})")
            firsts.append(None if I_first is None else clips[n].frames[0])
            lasts.append(None if I_last is None else clips[n].frames[-1])
    return film_strip(rows, titles, first=firsts, last=lasts)


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / F.mse_loss(y.clamp(-1, 1), x)))
