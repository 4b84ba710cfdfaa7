"""Noise: how much there is at each diffusion step, how it is put in, and how it is taken out.

Pure functions of tensors around one table, alpha_bar. "We employ DDPM with T = 1000 time steps
for training" and epsilon-prediction [paper §4.1]. The betas are Stable Diffusion's, and DDIM with
ddim_eta = 0 is the default sampler [ours: paper silent].

    training    z_0, eps -- add_noise --> z_t -- network --> out, compared with `target`
    sampling    z_T -- denoise --> out -- a step --> z_prev -- denoise --> ... --> z_0

Not here: conditions, guidance, networks. A sampler calls a function of (z_t, t, i), and knows no
more of it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, int, int], Tensor]  # (z_t, diffusion time t, number of the step i)


@dataclass(frozen=True)
class Schedule:
    """What a model was trained with; kept beside its weights as diffusers' scheduler config."""

    num_train_timesteps: int = 1000  # T [paper §4.1]
    beta_start: float = 0.00085  # [SD]
    beta_end: float = 0.012  # [SD]
    beta_schedule: str = "scaled_linear"  # [SD], or "linear" [DDPM]
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
            # At zero signal, epsilon says nothing about the picture.
            raise ValueError("rescale_betas_zero_snr needs prediction_type v_prediction")

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(T,) float32: the share of the signal's variance that is left at step t [DDPM Eq. 4]."""
        T, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        # float64, because alpha_bar is a product of up to 1,000 factors.
        if self.beta_schedule == "scaled_linear":
            # SD interpolates sqrt(beta), not beta: the first steps add less noise.
            betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
        else:
            betas = torch.linspace(start, end, T, dtype=torch.float64)
        # alpha_bar_t = (1 - beta_0) (1 - beta_1) ... (1 - beta_t)
        alpha_bar = (1 - betas).cumprod(0)
        if self.rescale_betas_zero_snr:  # [Lin et al. 2023, algorithm 1]
            # Shift sqrt(alpha_bar) so that the last one is 0; scale so that the first one stays:
            # root_t <- (root_t - root_T) root_0 / (root_0 - root_T)
            root = alpha_bar.sqrt()
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alpha_bar.float()

    def timesteps(self, steps: int) -> list[tuple[int, int]]:
        """`steps` pairs (t, t_prev) from the noisiest down; t_prev = -1 is the end.

        For T = 1000 and 50 steps:  leading, offset 1:  981, 961, ... 21, 1   never the noisiest
                                    trailing:           999, 979, ... 39, 19
        Each t is paired with the one that really follows it, at any number of steps.
        Raises ValueError unless 1 <= steps <= T.
        """
        T = self.num_train_timesteps
        if not 1 <= steps <= T:
            raise ValueError(f"steps is {steps}; use 1 to {T}")
        if self.timestep_spacing == "trailing":
            ts = [round(T - k * T / steps) - 1 for k in range(steps)]
        else:
            ts = [k * T // steps for k in reversed(range(steps))]  # SD's, whose steps divide T
            offset = min(self.steps_offset, T - 1 - ts[0])  # T steps leave no room
            ts = [t + offset for t in ts]
        return list(zip(ts, [*ts[1:], -1]))

    def alpha_bar_at(self, t: int) -> float:
        """alpha_bar_t; beyond the end (t < 0), 1 or alpha_bar[0] as `set_alpha_to_one` says."""
        if t < 0:
            return 1.0 if self.set_alpha_to_one else float(self.alpha_bar[0])
        return float(self.alpha_bar[t])


# In the formulas below: ab = alpha_bar_t, and ab_prev is alpha_bar at the step that follows.


def add_noise(z_0: Tensor, eps: Tensor, alpha_bar_t: Tensor | float) -> Tensor:
    """z_t = sqrt(ab) z_0 + sqrt(1 - ab) eps [DDPM Eq. 4]; ab is a number, or (b,) for z_0 (b, ...).

    One jump from z_0 to any t: that is why training needs no walk through the steps before.
    """
    ab = torch.as_tensor(alpha_bar_t, device=z_0.device, dtype=z_0.dtype)
    ab = ab.reshape(ab.shape + (1,) * (z_0.ndim - ab.ndim))  # b -> b 1 1 1 1
    return ab.sqrt() * z_0 + (1 - ab).sqrt() * eps


def target(z_0: Tensor, eps: Tensor, alpha_bar_t: Tensor, prediction_type: str) -> Tensor:
    """What the network learns to answer.

    eps [paper §4.1], or v = sqrt(ab) eps - sqrt(1 - ab) z_0 [Salimans and Ho 2022].

    At high noise (ab near 0), z_t is almost eps itself: to predict eps is to copy the input, and
    the loss has hardly a gradient. There v is -z_0, so the network must decide where things are.
    """
    if prediction_type == "epsilon":
        return eps
    # v is the noised picture with its two parts exchanged: sqrt(ab) eps + sqrt(1 - ab) (-z_0)
    return add_noise(eps, -z_0, alpha_bar_t)


def split_prediction(
    z_t: Tensor, out: Tensor, alpha_bar_t: float, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(z_0_hat, eps_hat) from the network's answer `out`: two unknowns, two equations.

    z_t = sqrt(ab) z_0 + sqrt(1 - ab) eps    and    out = eps, or out = v as in `target`
    """
    root_signal, root_noise = alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5
    if prediction_type == "epsilon":
        return (z_t - root_noise * out) / root_signal, out
    return root_signal * z_t - root_noise * out, root_signal * out + root_noise * z_t


def ddim_step(
    z_t: Tensor,
    out: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    ddim_eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One step of DDIM [Song et al. 2021, Eq. 12]: go to z_0_hat, come back with less noise.

        z_prev = sqrt(ab_prev) z_0_hat + sqrt(1 - ab_prev - sigma^2) eps_hat + sigma noise
        sigma  = ddim_eta sqrt((1 - ab_prev) / (1 - ab) (1 - ab / ab_prev))       [Eq. 16]

    ddim_eta = 0 adds no noise: the same z_T gives the same clip. ddim_eta = 1 has the variance of
    DDPM. `noise` is needed where ddim_eta > 0.
    """
    ab, ab_prev = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t_prev)
    z_0_hat, eps_hat = split_prediction(z_t, out, ab, schedule.prediction_type)
    sigma = ddim_eta * math.sqrt((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev))
    z_prev = ab_prev**0.5 * z_0_hat + math.sqrt(1 - ab_prev - sigma**2) * eps_hat
    return z_prev + sigma * noise if sigma > 0 else z_prev


def ddpm_posterior(
    z_t: Tensor, out: Tensor, t: int, t_prev: int, schedule: Schedule
) -> tuple[Tensor, float]:
    """Mean (like z_t) and standard deviation of q(z_prev | z_t, z_0_hat) [DDPM Eq. 7]: what a step
    of ancestral sampling draws from [DDPM algorithm 2].

        alpha = ab / ab_prev        of this step, which may be a stride of many
        mean  = (sqrt(ab_prev) (1 - alpha) z_0_hat + sqrt(alpha) (1 - ab_prev) z_t) / (1 - ab)
        var   = (1 - ab_prev) / (1 - ab) (1 - alpha)

    The end has alpha_bar 1, because DDPM's chain ends at the clean picture. DDIM ends where Stable
    Diffusion's does, at alpha_bar[0]: see `alpha_bar_at`.
    """
    ab, ab_prev = schedule.alpha_bar_at(t), (schedule.alpha_bar_at(t_prev) if t_prev >= 0 else 1.0)
    alpha = ab / ab_prev
    z_0_hat, _ = split_prediction(z_t, out, ab, schedule.prediction_type)
    mean = (
        ab_prev**0.5 * (1 - alpha) / (1 - ab) * z_0_hat
        + alpha**0.5 * (1 - ab_prev) / (1 - ab) * z_t
    )
    return mean, math.sqrt((1 - ab_prev) / (1 - ab) * (1 - alpha))


# A sampler makes z_0 of z_T, and yields z_t after every step. settings: `steps`, and what is the
# sampler's own (`model.Settings`). noise() draws a standard normal like z_t.


def ddim(denoise: Denoiser, z_T: Tensor, schedule: Schedule, settings, noise) -> Iterator[Tensor]:
    z_t = z_T
    for i, (t, t_prev) in enumerate(schedule.timesteps(settings.steps)):
        fresh = noise() if settings.ddim_eta > 0 else None
        z_t = ddim_step(z_t, denoise(z_t, t, i), t, t_prev, schedule, settings.ddim_eta, fresh)
        yield z_t


def ddpm(denoise: Denoiser, z_T: Tensor, schedule: Schedule, settings, noise) -> Iterator[Tensor]:
    z_t = z_T
    for i, (t, t_prev) in enumerate(schedule.timesteps(settings.steps)):
        mean, sigma = ddpm_posterior(z_t, denoise(z_t, t, i), t, t_prev, schedule)
        z_t = mean + sigma * noise()  # sigma is 0 in the last step
        yield z_t


def dpm(denoise: Denoiser, z_T: Tensor, schedule: Schedule, settings, noise) -> Iterator[Tensor]:
    """DPM-Solver++ of second order, "2M" [Lu et al. 2022b, algorithm 2]: a step of DDIM towards
    where z_0_hat is heading, judged by its change since the step before. The last is DDIM's own.

        goal   = z_0_hat + h / (2 h_before) (z_0_hat - z_0_before)
        h      = lambda_prev - lambda_t,    lambda = log sqrt(ab / (1 - ab))
        z_prev = sqrt(ab_prev) goal + sqrt(1 - ab_prev) (z_t - sqrt(ab) goal) / sqrt(1 - ab)
    """
    z_t, z_0_before, h_before = z_T, z_T, 1.0
    twice_lambda = schedule.alpha_bar.double().logit()
    for i, (t, t_prev) in enumerate(schedule.timesteps(settings.steps)):
        ab, ab_prev = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t_prev)
        z_0_hat, _ = split_prediction(z_t, denoise(z_t, t, i), ab, schedule.prediction_type)
        h = float(twice_lambda[t_prev] - twice_lambda[t]) if t_prev >= 0 else 0.0
        goal = z_0_hat + (h / (2 * h_before) if i > 0 else 0.0) * (z_0_hat - z_0_before)
        z_t = ab_prev**0.5 * goal + ((1 - ab_prev) / (1 - ab)) ** 0.5 * (z_t - ab**0.5 * goal)
        z_0_before, h_before = z_0_hat, h
        yield z_t


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm": dpm}
