"""Answers of homework 09."""

import random

from compare import compare


def flops(layers):
    total = 0
    for kind, *sizes in layers:
        if kind == "linear":
            tokens, d_in, d_out = sizes
            total += 2 * tokens * d_in * d_out
        elif kind == "conv":
            c_in, c_out, k, h, w = sizes
            total += 2 * c_in * c_out * k * k * h * w
        else:
            queries, keys, d = sizes
            total += 2 * 2 * queries * keys * d
    return total


def bytes_of(sizes, ranks, rank):
    ordered = sorted(sizes, key=lambda name: (sizes[name], name))
    own = sum(sizes[name] for name in ordered[rank::ranks])
    return 8 * sum(sizes.values()) + 12 * own


def run_seconds(steps, step, save_every, save, restart, kills):
    now, done, saved, kills = 0, 0, 0, list(kills)

    def spend(seconds):
        nonlocal now
        killed = bool(kills) and kills[0] < now + seconds
        now = kills.pop(0) + restart if killed else now + seconds
        return not killed

    while done < steps:
        if not spend(step):
            done = saved
            continue
        done += 1
        if done % save_every == 0 and done < steps:
            if spend(save):
                saved = done
            else:
                done = saved
    return now


def check_flops(yours):
    linear = ("linear", random.randrange(10, 99), 320, 1280)
    conv = ("conv", 4, random.randrange(10, 99), 3, 32, 16)
    attention = ("attention", random.randrange(10, 99), 77, 64)
    compare(
        yours, flops, [([linear],), ([conv],), ([attention],), ([linear, conv, attention],), ([],)]
    )


def check_bytes_of(yours):
    sizes = {f"layer{n}": random.randrange(1, 10**6) for n in range(11)} | {"a": 64, "b": 64}
    compare(yours, bytes_of, [(sizes, 4, 0), (sizes, 4, 3), (sizes, 1, 0), (sizes, 20, 19)])


def check_run_seconds(yours):
    cases = [(100, 3, 10, 5, 60, kills) for kills in ([], [0.5, 250.5], [40.5, 80.5, 120.5, 400.5])]
    for _ in range(4):
        kills = sorted(random.sample(range(1000), 5))
        cases.append((100, 3, random.randrange(7, 20), 5, 60, [kill + 0.5 for kill in kills]))
    compare(yours, run_seconds, cases)
