"""Solutions of notebook 01, in its order."""

import torch


# %% 1
def my_add_noise(z_0, eps, alpha_bar_t):
    return alpha_bar_t**0.5 * z_0 + (1 - alpha_bar_t) ** 0.5 * eps


# %% 2
def my_alpha_bar(beta_start, beta_end, T):
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    return (1 - betas).cumprod(0)


# %% 3
def my_z_0_hat(z_t, eps_hat, alpha_bar_t):
    return (z_t - (1 - alpha_bar_t) ** 0.5 * eps_hat) / alpha_bar_t**0.5


# %% 4
def my_ddim_step(z_t, eps_hat, a, a_prev):
    z_0_hat = (z_t - (1 - a) ** 0.5 * eps_hat) / a**0.5
    return a_prev**0.5 * z_0_hat + (1 - a_prev) ** 0.5 * eps_hat
