"""Solutions of notebook 05, in its order."""

import math


# %% 1
def my_target(z_0, eps, alpha_bar_t, kind):
    if kind == "epsilon":
        return eps
    return alpha_bar_t**0.5 * eps - (1 - alpha_bar_t) ** 0.5 * z_0


# %% 2
def my_ema(average, weight, decay):
    return decay * average + (1 - decay) * weight


# %% 3
def my_learning_rate(step, steps, peak, warmup):
    return peak * min(1, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * step / steps)) / 2


# %% 4
def my_shares(count, micro):
    return [min(micro, count - i) / count for i in range(0, count, micro)]
