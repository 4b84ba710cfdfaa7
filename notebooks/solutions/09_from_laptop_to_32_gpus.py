"""Solutions of notebook 09, in its order."""


# %% 1
def my_state(trained, ranks):
    return trained * (4 + 4 + (4 + 8) / ranks) / 2**30


# %% 2
def my_hours(flops, batch, steps, gpus, peak, share):
    return 3 * flops * batch * steps / (gpus * peak * share) / 3600


# %% 3
def my_sample_ids(step, rank, ranks, batch):
    own = batch // ranks
    start = step * batch + rank * own
    return list(range(start, start + own))
