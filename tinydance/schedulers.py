"""Noise: how much there is at each diffusion step, how it is put in, and how it is taken out.

Pure functions of tensors around one table, alpha_bar. "We employ DDPM with T = 1000 time steps
for training", epsilon-prediction [paper §4.1]; the betas are Stable Diffusion's [SD]. DDIM with
ddim_eta = 0 is the default sampler [ours: paper silent; ModelScope, VideoCrafter].

Read first. Read after: `conditioning.py`.
Not here: conditions, guidance, networks. A sampler step takes what the network answered.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tinydance.weights.files import read_json, write_json


@dataclass(frozen=True)
class Schedule:
    """What a model was trained with; kept beside its weights as diffusers' scheduler config."""

    num_train_timesteps: int = 1000  # T [paper §4.1]
    beta_start: float = 0.00085  # [SD]
    beta_end: float = 0.012  # [SD]
    beta_schedule: str = "scaled_linear"  # or "linear" [DDPM]
    prediction_type: str = "epsilon"  # [paper §4.1], or "v_prediction"
    timestep_spacing: str = "leading"  # [SD], or "trailing": begins at T - 1, the purest noise
    steps_offset: int = 1  # [SD] with "leading": 981, 961, .. 1 and not 980, 960, .. 0
    set_alpha_to_one: bool = False  # [SD] the last step ends at alpha_bar[0], not at 1
    rescale_betas_zero_snr: bool = False  # step T - 1 is noise and nothing else

    def __post_init__(self):
        for name, allowed in (
            ("beta_schedule", ("scaled_linear", "linear")),
            ("prediction_type", ("epsilon", "v_prediction")),
            ("timestep_spacing", ("leading", "trailing")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {allowed}")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError("rescale_betas_zero_snr needs prediction_type v_prediction: at zero "
                             "signal, epsilon says nothing about the picture")  # fmt: skip

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(T,) float32: the share of the signal's variance that is left at step t."""
        T, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.beta_schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
        else:
            betas = torch.linspace(start, end, T, dtype=torch.float64)
        alpha_bar = (1 - betas).cumprod(0)
        if self.rescale_betas_zero_snr:  # "Common Diffusion Noise Schedules", algorithm 1
            root = alpha_bar.sqrt()
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alpha_bar.float()

    @classmethod
    def from_folder(cls, path) -> "Schedule":
        """Read `scheduler_config.json`. Raises ValueError where it is missing or asks for more."""
        config = read_json(Path(path) / "scheduler_config.json")
        return cls(**{k: config[k] for k in cls.__dataclass_fields__ if k in config})

    def save(self, path) -> None:
        config = {"_class_name": "DDIMScheduler", **asdict(self), "clip_sample": False}
        write_json(Path(path) / "scheduler_config.json", config)

    def timesteps(self, steps: int) -> list[tuple[int, int]]:
        """`steps` pairs (t, t_prev) from the noisiest down; t_prev = -1 is the end.

        Each t is paired with the one that really follows it, at any number of steps.
        Raises ValueError unless 1 <= steps <= T.
        """
        T = self.num_train_timesteps
        if not 1 <= steps <= T:
            raise ValueError(f"steps is {steps}; use 1 to {T}")
        if self.timestep_spacing == "trailing":
            ts = [round(T - k * T / steps) - 1 for k in range(steps)]
        else:
            stride = T // steps
            offset = min(self.steps_offset, T - 1 - (steps - 1) * stride)  # T steps leave no room
            ts = [k * stride + offset for k in reversed(range(steps))]
        return list(zip(ts, [*ts[1:], -1]))

    def at(self, t: int) -> float:
        """alpha_bar_t; beyond the end (t < 0), 1 or alpha_bar[0] as `set_alpha_to_one` says."""
        if t < 0:
            return 1.0 if self.set_alpha_to_one else float(self.alpha_bar[0])
        return float(self.alpha_bar[t])


def add_noise(z_0: Tensor, eps: Tensor, alpha_bar_t: Tensor | float) -> Tensor:
    """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps [DDPM Eq. 4].

    alpha_bar_t is a number, or (b,) for z_0 (b, ...).
    """
    a = torch.as_tensor(alpha_bar_t, device=z_0.device, dtype=z_0.dtype)
    a = a.reshape(a.shape + (1,) * (z_0.ndim - a.ndim))
    return a.sqrt() * z_0 + (1 - a).sqrt() * eps


def target(z_0: Tensor, eps: Tensor, alpha_bar_t: Tensor, prediction_type: str) -> Tensor:
    """What the network learns to answer: eps [paper §4.1], or v = sqrt(ab) eps - sqrt(1 - ab) z_0.

    v is z_0 where noise rules and eps where it does not: the loss has a gradient at high noise,
    where the places of things across frames are decided. [Salimans and Ho 2022]
    """
    if prediction_type == "epsilon":
        return eps
    return add_noise(eps, -z_0, alpha_bar_t)


def split_prediction(
    z_t: Tensor, out: Tensor, alpha_bar_t: float, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(z_0_hat, eps_hat) from the network's answer `out`, which predicts eps or v."""
    a, s = alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5
    if prediction_type == "epsilon":
        return (z_t - s * out) / a, out
    return a * z_t - s * out, a * out + s * z_t


def ddim_step(
    z_t: Tensor,
    out: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    ddim_eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One step of DDIM [Song et al. 2021, Eq. 12 and 16]; `noise` is needed where ddim_eta > 0."""
    a, a_prev = schedule.at(t), schedule.at(t_prev)
    z_0_hat, eps_hat = split_prediction(z_t, out, a, schedule.prediction_type)
    sigma = ddim_eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
    z_prev = a_prev**0.5 * z_0_hat + math.sqrt(1 - a_prev - sigma**2) * eps_hat
    return z_prev + sigma * noise if sigma > 0 else z_prev


def ddpm_posterior(z_t: Tensor, out: Tensor, t: int, t_prev: int, schedule: Schedule):
    """Mean (like z_t) and standard deviation (a float) of q(z_prev | z_t, z_0_hat) [DDPM Eq. 7].

    With t_prev < t - 1 the formula is that of the strided chain; the end has alpha_bar 1.
    """
    a, a_prev = schedule.at(t), (schedule.at(t_prev) if t_prev >= 0 else 1.0)
    alpha = a / a_prev  # of the (possibly strided) step
    z_0_hat, _ = split_prediction(z_t, out, a, schedule.prediction_type)
    mean = (
        a_prev**0.5 * (1 - alpha) / (1 - a) * z_0_hat
        + alpha**0.5 * (1 - a_prev) / (1 - a) * z_t
    )
    return mean, math.sqrt((1 - a_prev) / (1 - a) * (1 - alpha))


def ddpm_step(
    z_t: Tensor,
    out: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    noise: Tensor | None = None,
) -> Tensor:
    """One step of ancestral sampling [DDPM algorithm 2]; the last step adds no noise."""
    mean, sigma = ddpm_posterior(z_t, out, t, t_prev, schedule)
    return mean + sigma * noise if t_prev >= 0 else mean
