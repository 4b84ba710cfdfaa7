"""Right or not yet: a function's answers against those of a reference, in one line of words.

What differs is found by making the usual mistakes: where every answer is that of a mistake, the
mistake is named. The form of an answer is free (a numpy array or a list for a tensor, float64 for
float32); its values, its shape and whole-number types are not.
Not here: what is compared (`checks.py`, `homework/answers/`), who may answer (`grade.py`).
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CLOSE = 1e-4  # relative to the size of the answer: float32, and the order of sums is yours


class Trouble(Exception):
    """There is no answer to compare, and this is why."""


def compare(
    yours: Callable, library: Callable, cases: list[tuple], mistakes: dict[str, Callable] = {}
) -> None:
    """Print whether `yours` answers every case (its arguments) as `library` does.

    mistakes: what to say -> a function that makes the mistake.
    """
    answers, trouble = [], None
    try:
        for case in cases:
            answers.append(answer(yours, case))
    except Trouble as error:
        trouble = error
    wanted = [library(*copy.deepcopy(case)) for case in cases]
    wrong = [(got, want) for got, want in zip(answers, wanted) if not same(got, want)]
    if not wrong and trouble:
        return print(f"not yet: {yours.__name__} {trouble}")
    if not wrong:
        return print(f"right: {yours.__name__} agrees on {len(cases)} fresh inputs")
    if all(got is None for got in answers):
        return print(f"not yet: {yours.__name__} returns nothing; write it, return its result")
    for reason, mistake in mistakes.items():
        if all(same(got, mistake(*copy.deepcopy(case))) for got, case in zip(answers, cases)):
            return print(f"not yet: {reason}")
    print(f"not yet: {what_differs(*wrong[0])}")


def answer(yours: Callable, case: tuple):
    """What `yours` returns for a case. Raises Trouble where it raises, or changes its inputs."""
    given = copy.deepcopy(case)
    try:
        got = yours(*given)
    except Trouble:
        raise
    except Exception as error:  # whatever a first try raises
        raise Trouble(f"raises {type(error).__name__}: {error}") from error
    for number, (before, after) in enumerate(zip(case, given), 1):
        if isinstance(before, (Tensor, list, dict)) and not same(after, before):
            raise Trouble(f"changes its input number {number} in place; work on a copy")
    return got


def same(got, want) -> bool:
    """Equal in value; numbers and tensors up to rounding, lists whatever holds their items."""
    if isinstance(want, Tensor):
        got = to_tensor(got)
        if got is None or got.shape != want.shape:
            return False
        if not want.is_floating_point():
            return got.dtype == want.dtype and torch.equal(got, want)
        size = float(want.abs().max()) if want.numel() else 0.0
        return torch.allclose(got.double(), want.double(), rtol=CLOSE, atol=CLOSE * size)
    if isinstance(want, (tuple, list)):
        if not isinstance(got, (tuple, list, range, np.ndarray, Tensor)):
            return False
        return (
            getattr(got, "ndim", 1) > 0
            and len(got) == len(want)
            and all(same(g, w) for g, w in zip(got, want))
        )
    if isinstance(want, dict):
        return (
            isinstance(got, dict)
            and got.keys() == want.keys()
            and all(isinstance(got[k], type(w)) and same(got[k], w) for k, w in want.items())
        )
    if isinstance(got, (Tensor, np.ndarray, np.generic)) and math.prod(got.shape) == 1:
        got = got.item()
    if isinstance(want, (int, float)) and not isinstance(want, bool):
        if not isinstance(got, (int, float)) or isinstance(got, bool):
            return False
        return got == want or (isinstance(want, float) and math.isclose(got, want, rel_tol=CLOSE))
    return type(got) is type(want) and got == want


def to_tensor(got) -> Tensor | None:
    """A tensor of what may stand for one; None where nothing does."""
    if isinstance(got, Tensor):
        return None if got.is_complex() or got.layout != torch.strided else got.detach()
    if not isinstance(got, (np.ndarray, np.generic, list, tuple)):
        return None
    try:
        return torch.tensor(np.asarray(got))
    except (TypeError, ValueError, RuntimeError):  # of objects, or of rows that differ in length
        return None


def what_differs(got, want) -> str:
    """Of two answers that are not the same, the most telling difference in words."""
    if isinstance(want, (tuple, list)) and isinstance(got, (tuple, list)):
        if len(got) != len(want):
            return f"{len(got)} things come back, and it should be {len(want)}"
        pairs = list(enumerate(zip(got, want), 1))
        number, (got, want) = next((n, pair) for n, pair in pairs if not same(*pair))
        return f"number {number} of what comes back: {what_differs(got, want)}"
    tensor = to_tensor(got)
    if not isinstance(want, Tensor) or tensor is None:
        return f"it answers {describe(got)}, and it should be {describe(want)}"
    got = tensor
    if got.shape != want.shape:
        turned = sorted(got.shape) == sorted(want.shape)
        return (
            f"its shape is {tuple(got.shape)}, and it should be {tuple(want.shape)}"
            f"{': the axes stand in another order' if turned else ''}"
        )
    if got.dtype != want.dtype and not want.is_floating_point():
        return f"it is {got.dtype}, and it should be {want.dtype}"
    got, want = got.double(), want.double()
    if not got.isfinite().all():
        return "some of its numbers are infinite or no numbers"
    if same(got, -want):
        return "the sign is wrong"
    if same(got**2, want.abs()):
        return "a square root too many"
    if same(got, want**2):
        return "a square root is missing"
    factor = float((got * want).sum() / (want * want).sum())
    if same(got, factor * want):
        return f"it is {factor:.4g} times what it should be"
    for axis in range(want.ndim):
        if same(got, want.flip(axis)):
            return f"axis {axis} runs backwards"
    wrong = ~torch.isclose(got, want, rtol=CLOSE, atol=CLOSE * float(want.abs().max()))
    place = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{wrong.float().mean():.0%} of its numbers differ; at {place} it has "
        f"{got[place]:.4g}, and it should be {want[place]:.4g}"
    )


def describe(x) -> str:
    """An answer in a few words: a tensor by its shape, anything else as Python writes it."""
    if isinstance(x, (Tensor, np.ndarray)):
        return f"a {type(x).__name__} of shape {tuple(x.shape)}"
    if isinstance(x, (tuple, list)) and any(isinstance(item, Tensor) for item in x):
        return f"a {type(x).__name__} of {len(x)} tensors"
    words = repr(x)
    return words if len(words) <= 100 else f"{words[:97]}..."
