"""Solutions of notebook 03, in its order."""


# %% 1
def my_guidance(eps_u, eps_c, w):
    return eps_u + w * (eps_c - eps_u)


# %% 2
def my_switch(i, tau, c_image, c_image_free):
    return c_image if i < tau else c_image_free


# %% 3
def my_last_time(schedule, steps, tau):
    return schedule.timesteps(steps)[tau - 1][0] if tau > 0 else None


# %% 4
def my_loop(denoise, step, z_T, schedule, steps):
    z_t = z_T
    for i, (t, t_prev) in enumerate(schedule.timesteps(steps)):
        z_t = step(z_t, denoise(z_t, t, i), t, t_prev, schedule)
    return z_t
