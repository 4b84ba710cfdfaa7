"""Noise in and noise out, against the reference libraries' trajectories and slow formulas."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from reference import difference, golden

from tinydance.model import read_schedule, write_schedule
from tinydance.schedulers import (
    SAMPLERS,
    Schedule,
    add_noise,
    ddim_step,
    ddpm_posterior,
    split_prediction,
    target,
)

CONFIG, _, GOLDEN = golden("schedulers")
DPM = golden("dpm")[2]  # {prediction, steps, how it ends: z_0}


def stand_in(x, t):
    """The network of the golden trajectories (config.note)."""
    return 0.3 * x + 0.1 * torch.sin(3 * x + t / 1000)


def denoise(z_t, t, i):
    return stand_in(z_t, t)


def test_alpha_bar_is_stable_diffusions():
    assert difference(Schedule().alpha_bar, GOLDEN["alphas_cumprod"]) < 1e-6


def test_linear_betas_are_ddpms():
    betas, product = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 1.0
    slow = []
    for beta in betas.tolist():
        product *= 1 - beta
        slow.append(product)
    fast = Schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).alpha_bar
    assert difference(fast, torch.tensor(slow)) < 1e-6


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step():
    plain = Schedule(prediction_type="v_prediction").alpha_bar
    zero = Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True).alpha_bar
    assert float(zero[-1]) == 0 and abs(float(zero[0] - plain[0])) < 1e-6
    assert (zero[1:] < zero[:-1]).all()


def test_noise_is_added_as_in_the_reference():
    alpha_bar_t = Schedule().alpha_bar[GOLDEN["t"]]
    z_t = add_noise(GOLDEN["x0"], GOLDEN["noise"], alpha_bar_t)
    assert difference(z_t, GOLDEN["noised"]) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [4, 25, 50])
def test_ddim_trajectories_are_the_references(prediction, steps):
    schedule, z = Schedule(prediction_type=prediction), GOLDEN["noise"]
    pairs = schedule.timesteps(steps)
    assert [t for t, _ in pairs] == GOLDEN[f"ddim_{prediction}_{steps}_timesteps"].tolist()
    for t, t_prev in pairs:
        z = ddim_step(z, stand_in(z, t), t, t_prev, schedule)
    assert difference(z, GOLDEN[f"ddim_{prediction}_{steps}"]) < 1e-4


def test_ddim_with_eta_one_is_the_references():
    schedule, z = Schedule(), GOLDEN["noise"]
    for (t, t_prev), noise in zip(schedule.timesteps(25), GOLDEN["ddim_eta1_zs"]):
        z = ddim_step(z, stand_in(z, t), t, t_prev, schedule, 1.0, noise)
    assert difference(z, GOLDEN["ddim_eta1"]) < 1e-4


def test_ddpm_posterior_mean_is_the_references():
    z = GOLDEN["noise"]
    for t, mean in zip(GOLDEN["ddpm_posterior_t"].tolist(), GOLDEN["ddpm_posterior_mean"]):
        ours, _ = ddpm_posterior(z, stand_in(z, t), t, t - 1, Schedule())
        assert difference(ours, mean) < 1e-4


def test_ddpm_posterior_is_bayes_rule():
    """q(z_s | z_t, z_0) from two Gaussians multiplied by hand, in float64 (DDPM Eq. 6 and 7)."""
    schedule, t, s = Schedule(), 600, 560
    a_t, a_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
    alpha = a_t / a_s
    z_0, z_t = torch.tensor([0.7], dtype=torch.float64), torch.tensor([-0.4], dtype=torch.float64)
    precision = 1 / (1 - a_s) + alpha / (1 - alpha)
    mean = (math.sqrt(a_s) * z_0 / (1 - a_s) + math.sqrt(alpha) * z_t / (1 - alpha)) / precision
    out = (z_t - math.sqrt(a_t) * z_0) / math.sqrt(1 - a_t)  # the eps that means this z_0
    ours, sigma = ddpm_posterior(z_t, out, t, s, schedule)
    assert difference(ours, mean) < 1e-9
    assert abs(sigma - math.sqrt(1 / precision)) < 1e-9


def test_ddim_with_eta_one_and_ddpm_are_the_same_chain():
    schedule, (t, s) = Schedule(), (500, 499)
    generator = torch.Generator().manual_seed(0)
    z, out, noise = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    ddim = ddim_step(z, out, t, s, schedule, 1.0, noise)
    mean, sigma = ddpm_posterior(z, out, t, s, schedule)
    assert difference(ddim, mean + sigma * noise) < 1e-9


def test_the_last_ddpm_step_adds_no_noise():
    for schedule in (Schedule(), Schedule(set_alpha_to_one=True)):
        assert ddpm_posterior(GOLDEN["noise"], GOLDEN["noise"], 1, -1, schedule)[1] == 0.0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_training_target_gives_back_what_was_mixed(prediction):
    generator = torch.Generator().manual_seed(1)
    z_0, eps = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for t in (0, 400, 999):
        alpha_bar_t = Schedule().alpha_bar[t].double()
        z_t = add_noise(z_0, eps, alpha_bar_t)
        answer = target(z_0, eps, alpha_bar_t, prediction)
        z_0_hat, eps_hat = split_prediction(z_t, answer, float(alpha_bar_t), prediction)
        assert difference(z_0_hat, z_0) < 1e-9 and difference(eps_hat, eps) < 1e-9


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_number_of_steps_from_1_to_1000_works(spacing):
    schedule = Schedule(timestep_spacing=spacing)
    for steps in range(1, 1001):
        pairs = schedule.timesteps(steps)
        ts = [t for t, _ in pairs]
        assert len(ts) == steps and 0 <= min(ts) and max(ts) <= 999
        assert all(a > b for a, b in zip(ts, ts[1:]))
        assert [t_prev for _, t_prev in pairs] == [*ts[1:], -1]


def test_trailing_begins_at_the_purest_noise():
    assert Schedule(timestep_spacing="trailing").timesteps(50)[0][0] == 999


@pytest.mark.parametrize("at_one", [True, False])
def test_zero_terminal_snr_samples_to_the_end(at_one):
    fields = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    schedule = Schedule(prediction_type="v_prediction", set_alpha_to_one=at_one, **fields)
    settings, zeros = SimpleNamespace(steps=10, ddim_eta=0.5), torch.zeros_like(GOLDEN["noise"])
    for sampler in SAMPLERS.values():
        zs = list(sampler(denoise, GOLDEN["noise"], schedule, settings, lambda: zeros))
        assert len(zs) == 10 and all(torch.isfinite(z_t).all() for z_t in zs)


@pytest.mark.parametrize("name", DPM)
def test_dpm_trajectories_are_the_references(name):
    prediction, steps, end = re.fullmatch(r"(.*)_(\d+)_(sigma_min|zero)", name).groups()
    schedule = Schedule(prediction_type=prediction, set_alpha_to_one=end == "zero")
    settings = SimpleNamespace(steps=int(steps))
    *_, z_0 = SAMPLERS["dpm"](denoise, GOLDEN["noise"], schedule, settings, None)
    assert difference(z_0, DPM[name]) < 1e-4


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpm", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(name, order):
    """z_0 ~ N(0, 0.25) has the best network, and the true path from z_T, in closed form."""
    schedule, z_T = Schedule(timestep_spacing="trailing"), torch.ones(1, dtype=torch.float64)
    ab = schedule.alpha_bar.double()
    deviation = (0.25 * ab + 1 - ab).sqrt()  # of z_t: on the true path z_t / deviation stays

    def best(z_t, t, i):
        return (1 - ab[t]).sqrt() / deviation[t] ** 2 * z_t  # E[eps | z_t]

    def error(steps):
        for z_t, (_, t) in zip(
            SAMPLERS[name](best, z_T, schedule, SimpleNamespace(steps=steps, ddim_eta=0), None),
            schedule.timesteps(steps),
        ):
            if t == 499:  # far from the last step, which is of first order
                return abs(float(z_t - deviation[t] / deviation[-1]))

    slopes = [math.log2(error(n) / error(2 * n)) for n in (20, 50)]
    assert all(abs(slope - order) < 0.25 for slope in slopes), slopes


def test_a_perfect_network_leads_ddim_back_to_the_clip():
    schedule, z_0 = Schedule(set_alpha_to_one=True), GOLDEN["x0"]
    z = GOLDEN["noise"]
    for t, t_prev in schedule.timesteps(20):
        a = schedule.alpha_bar_at(t)
        z = ddim_step(z, (z - a**0.5 * z_0) / (1 - a) ** 0.5, t, t_prev, schedule)
    assert difference(z, z_0) < 1e-4


def test_a_schedule_survives_its_folder(tmp_path):
    schedule = Schedule(beta_schedule="linear", prediction_type="v_prediction")
    write_schedule(schedule, tmp_path)
    assert read_schedule(tmp_path) == schedule


@pytest.mark.parametrize(
    "name, ddim_eta, draws", [("ddim", 0.0, 0), ("ddim", 1.0, 7), ("ddpm", 0.0, 7)]
)
def test_a_sampler_yields_every_z_t_and_draws_only_the_noise_that_it_needs(name, ddim_eta, draws):
    schedule, z = Schedule(), GOLDEN["noise"]
    noises = torch.randn(7, *z.shape, generator=torch.Generator().manual_seed(0))
    left, settings = iter(noises), SimpleNamespace(steps=7, ddim_eta=ddim_eta)

    zs = list(SAMPLERS[name](denoise, z, schedule, settings, lambda: next(left)))
    assert len(zs) == 7 and len(list(left)) == 7 - draws
    for z_t, (t, t_prev), noise in zip(zs, schedule.timesteps(7), noises, strict=True):
        given = z, stand_in(z, t), t, t_prev, schedule
        mean, sigma = ddpm_posterior(*given)
        z = ddim_step(*given, ddim_eta, noise) if name == "ddim" else mean + sigma * noise
        assert torch.equal(z_t, z)


def test_a_sampler_tells_the_denoiser_the_diffusion_time_and_the_step_counted_from_noise():
    for sampler in SAMPLERS.values():
        asked, settings = [], SimpleNamespace(steps=5, ddim_eta=0.0)
        z_T = torch.zeros(1, 4)

        def denoise(z_t, t, i):
            asked.append((t, i))
            return z_t

        list(sampler(denoise, z_T, Schedule(), settings, lambda: z_T))
        assert asked == [(t, i) for i, (t, _) in enumerate(Schedule().timesteps(5))]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; use 1 to 1000"):
        Schedule().timesteps(steps)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="beta_schedule is 'cosine'"):
        Schedule(beta_schedule="cosine")
    with pytest.raises(ValueError, match="needs prediction_type v_prediction"):
        Schedule(rescale_betas_zero_snr=True)


def test_steps_that_do_not_divide_the_schedule_begin_at_its_noisy_end():
    for steps in (600, 30, 7, 999):
        ts = [t for t, _ in Schedule().timesteps(steps)]  # "leading"
        assert ts[0] >= 999 - 1000 // steps - 1 and ts[-1] == 1 and len({*ts}) == steps
