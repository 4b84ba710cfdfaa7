"""The graders: each says what is wrong, takes every right form, and refuses 20 wrong answers.

Wrong answers are made from the solutions, one small change at a time: a constant, an operator, two
arguments, a statement, a function's neighbour. Where that gives too few, some are written by hand.
"""

import ast
import copy
import random
import re
from itertools import cycle

import numpy as np
import pytest
import torch
from the_course import COURSE, checks, run


def read_exercises():
    """(check, function, the solution's source, where it stands) of every exercise."""
    for path in sorted(COURSE.glob("[0-9]*.ipynb")):
        graded = [
            re.fullmatch(r"checks\.(\w+)\((\w+)\)", cell.source).groups()
            for cell in run.read(path).cells
            if "check" in cell.metadata.get("tags", [])
        ]
        yield from ((*pair, s, path) for pair, s in zip(graded, run.solutions(path)))


EXERCISES = {check: (function, s, path) for check, function, s, path in read_exercises()}
each_exercise = pytest.mark.parametrize("name", EXERCISES)


def ask(name: str, monkeypatch) -> tuple:
    """What a check compares with: the library's function, cases and mistakes."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(checks, "compare", lambda yours, *rest: asked.append(rest))
        getattr(checks, name)(None)
    return asked[0]


def verdict(check, answer, capsys) -> str:
    check(answer)
    return capsys.readouterr().out


# ---------------------------------------------------------------------------- wrong answers
SWAPS = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.In: ast.NotIn}
SWAPS |= {ast.NotEq: ast.Eq} | {b: a for a, b in SWAPS.items()} | {ast.Pow: ast.Mult}
NEIGHBOURS = {"cumprod": "cumsum", "round": "floor", "clamp": "remainder", "std": "var"}
NEIGHBOURS |= {"all": "any", "min": "max", "cos": "sin", "ceil": "floor", "log10": "log"}
NEIGHBOURS |= {"mean": "sum", "exp": "sqrt", "zeros": "ones", "zeros_like": "ones_like"}
NEIGHBOURS |= {"cat": "stack", "little": "big", "epsilon": "v_prediction", "int": "float"}


def change(node: ast.AST, inputs: list[str]):
    """What a student may have written instead of a node of the solution."""
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as value):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1), ast.Constant(2 * value))
        case ast.Constant(value=str() as word) if word in NEIGHBOURS:
            yield ast.Constant(NEIGHBOURS[word])
        case ast.BinOp(left=a, op=op, right=b):
            yield from (a, b)
            if not isinstance(op, ast.Add | ast.Mult):
                yield ast.BinOp(b, op, a)
            if type(op) in SWAPS:
                yield ast.BinOp(a, SWAPS[type(op)](), b)
        case ast.UnaryOp(operand=a):
            yield a
        case ast.Compare(left=a, ops=[op], comparators=[b]) if type(op) in SWAPS:
            yield ast.Compare(a, [SWAPS[type(op)]()], [b])
        case ast.IfExp(test=test, body=a, orelse=b):
            yield from (a, b, ast.IfExp(test, b, a))
        case ast.Call(func=function, args=given, keywords=named):
            yield from given
            if isinstance(function, ast.Attribute):
                yield function.value
            for n in range(1, len(given)):
                swapped = [*given[: n - 1], given[n], given[n - 1], *given[n + 1 :]]
                yield ast.Call(function, swapped, named)
        case ast.Attribute(value=value, attr=name) if name in NEIGHBOURS:
            yield ast.Attribute(value, NEIGHBOURS[name], ast.Load())
        case ast.Name(id=name, ctx=ast.Load()):
            words = [NEIGHBOURS.get(name, name), *(inputs if name in inputs else [])]
            yield from (ast.Name(word, ast.Load()) for word in words)
        case ast.Return(value=value):
            yield ast.Return(ast.UnaryOp(ast.USub(), value))
            yield from (ast.Return(ast.Name(name, ast.Load())) for name in inputs)
        case ast.Assign() | ast.Expr():
            yield ast.Pass()


def mutate(source: str) -> list[str]:
    """The solution with one change: every function that it may be, as source."""
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    inputs, found = [a.arg for a in function.args.args], {}
    for parent in list(ast.walk(function)):
        for field, value in ast.iter_fields(parent):
            nodes = value if isinstance(value, list) else [value]
            for place, node in enumerate(nodes):
                for new in change(node, inputs) if isinstance(node, ast.AST) else ():
                    changed = [*nodes[:place], new, *nodes[place + 1 :]]
                    setattr(parent, field, changed if isinstance(value, list) else new)
                    found[ast.unparse(function)] = None
                    setattr(parent, field, value)
    found.pop(ast.unparse(function), None)
    return list(found)


def count_loops(patience: int = 2000):
    """A function that raises when it is called too often: changed loops may have no end."""
    calls = iter(range(patience))

    def tick():
        if next(calls, None) is None:
            raise TimeoutError("no end")

    return tick


def build(source: str, name: str, names: dict):
    """The function `name` of some source, whose endless loops end."""
    tree = ast.parse(source)
    for loop in [node for node in ast.walk(tree) if isinstance(node, ast.While)]:
        loop.body.insert(0, ast.parse("tick()").body[0])
    names = names | {"tick": count_loops()}
    exec(compile(ast.fix_missing_locations(tree), "<changed>", "exec"), names)
    return names[name]


BY_HAND = {  # bodies, where a solution is too short to be changed in 20 ways
    "obeys": """
        any(judge(frames, caption).values())    | not all(judge(frames, caption).values())
        judge(frames, caption)["motion"]        | judge(frames, caption)["colour"]
        judge(frames, caption)["shape"]         | judge(frames, caption)["background"]
        len(judge(frames, caption)) > 0         | sum(judge(frames, caption).values())
        bool(judge(frames, caption))            | all(judge(frames, caption).keys())
        all(list(judge(frames, caption).values())[1:])
        all(list(judge(frames, caption).values())[:-1])
        all(judge(frames[:1], caption).values()) | True | False""",
    "unet_input": """
        torch.cat([c_image, z_t], dim=2)        | torch.cat([z_t, c_image], dim=3)
        torch.cat([z_t, c_image], dim=4)        | torch.cat([z_t, c_image], dim=0)
        torch.stack([z_t, c_image])             | torch.stack([z_t, c_image], dim=2)
        torch.stack([z_t, c_image], 3).flatten(2, 3) | torch.cat([z_t, z_t], dim=2)
        torch.cat([c_image, c_image], dim=2) | z_t + c_image | z_t * c_image | (z_t, c_image)
        torch.cat([z_t, c_image], 2).flatten(0, 1) | torch.cat([z_t, c_image, c_image], dim=2)
        torch.cat([z_t, 0 * c_image], 2)
        torch.cat([z_t[:, :, :2], c_image[:, :, 2:]], 2)""",
    "switch": """
        c_image if i >= tau else c_image_free   | (c_image, c_image_free)[i < tau]
        c_image * (i < tau)
        c_image if tau else c_image_free        | c_image + c_image_free""",
    "end_error": """
        referee(made).track[-1] - referee(truth).track[-1]
        np.linalg.norm(referee(made).track - referee(truth).track)
        abs(referee(made).track[-1] - referee(truth).track[-1]).sum()
        abs(referee(made).track[-1] - referee(truth).track[-1]).max()
        ((referee(made).track[-1] - referee(truth).track[-1]) ** 2).sum()
        np.linalg.norm(referee(made).track[-1]) - np.linalg.norm(referee(truth).track[-1])""",
    "join": """
        torch.cat(clips, 1) | torch.cat(clips, 0) | torch.stack(clips) | clips[0] | clips[-1]
        torch.cat([clip[:, 1:] for clip in clips], 1)
        torch.cat([clip[:, :-1] for clip in clips], 1)
        torch.cat([clips[0], *(clip[:, 1:] for clip in clips)], 1)
        torch.cat([clips[-1], *(clip[:, 1:] for clip in clips[:-1])], 1)
        torch.cat([clips[0], *(clip[1:] for clip in clips[1:])], 1)
        torch.cat([clips[0], *(clip[:, :-1] for clip in clips[1:])], 1)
        torch.cat([clips[0][:, :-1], *(clip[:, 1:] for clip in clips[1:])], 1)
        clips""",
    "way_back": """
        caption | caption[::-1] | " ".join(caption.split()[::-1]) | caption.split() | caption + " "
        caption.replace("right", "left") | caption.replace("left", "right")
        caption.replace("up", "down").replace("down", "up")
        caption.replace("right", "left").replace("up", "down").replace("grows", "shrinks")
        " ".join(OPPOSITES[word] for word in caption.split() if word in OPPOSITES)
        " ".join(word for word in caption.split() if word not in OPPOSITES)
        " ".join(OPPOSITES.get(word, "") for word in caption.split())
        "".join(OPPOSITES.get(word, word) for word in caption.split())
        " ".join(OPPOSITES.get(word, caption) for word in caption.split())
        " ".join(OPPOSITES) | OPPOSITES.get(caption, caption) | caption.upper()""",
}
RIGHT = {  # changed, and right all the same: a piece of the changed line, and why
    "alpha_bar": {"cumprod(-1)": "the only axis is the last one"},
    "c_image": {"f_last.shape": "both frames have one shape"},
    "f_last": {"len(frames_from_end)": "there is one number for each clip"},
    "attention": {
        "transpose(-1, -2)": "of two axes the order does not matter",
        "transpose(2, -1)": "axis 2 of four is axis -2",
        "k.shape[-1]": "queries and keys have one width",
        "v.shape[-1]": "and here the values have it too",
    },
    "time_rows": {"transpose(2, 1)": "of two axes the order does not matter"},
    "learning_rate": {"min((step + 1)": "the smaller of two, in either order"},
    "shares": {"min(count - i": "the smaller of two, in either order"},
    "psnr": {
        "2 * 2": "is 2**2",
        "/ ((x - y)": "a tensor of one number is a number",
        "(y - x)": "the sign goes with the square",
    },
    "header": {"[:7]": "the eighth byte is 0 in every file below 64 PiB"},
    "paired": {
        "(difference.mean(),": "a tensor of one number is a number",
        ", difference.std()": "a tensor of one number is a number",
        "len(b)": "a and b are of one length",
    },
    "end_error": {
        "referee(truth).end - ": "a distance is the same from either end",
        "/ truth.shape[-1]": "both clips have one width",
        "made.shape[-2]": "toy clips are square",
        "else 100 * off": "numpy's number is a number",
    },
    "sample_ids": {"return range(": "it holds the same numbers as the list"},
}


def wrong_answers(name: str):
    function, source, path = EXERCISES[name]
    names = {}
    for block in run.solutions(path):
        exec(block, names)
    head = next(line for line in source.splitlines() if line.startswith("def "))
    bodies = re.split(r"\n| \| ", BY_HAND.get(name, ""))
    by_hand = [f"{head}\n    return {body.strip()}" for body in bodies if body.strip()]
    for changed in dict.fromkeys([*mutate(source), *by_hand]):
        yield changed, build(changed, function, names)


@each_exercise
def test_of_many_wrong_answers_all_are_rejected_and_they_are_at_least_20(name, monkeypatch, capsys):
    random.seed(0)
    torch.manual_seed(0)
    library, cases, _ = ask(name, monkeypatch)
    wanted = cycle([library(*copy.deepcopy(case)) for case in cases])
    rejected = 0
    for source, answer in wrong_answers(name):
        checks.compare(answer, lambda *case: next(wanted), cases)
        if capsys.readouterr().out.startswith("not yet: "):
            rejected += 1
        else:
            assert any(piece in source for piece in RIGHT.get(name, {})), source
    assert rejected >= 20


IN_PLACE = {
    "to_frames": lambda pixels: ((pixels.clamp_(-1, 1) + 1) * 127.5).round().to(torch.uint8),
    "ema": lambda average, weight, decay: average.mul_(decay).add_(weight * (1 - decay)),
    "add_noise": lambda z_0, eps, a: z_0.mul_(a**0.5).add_((1 - a) ** 0.5 * eps),
    "join": lambda clips: torch.cat([clips.pop(0), *(clip[:, 1:] for clip in clips)], 1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_answer_that_changes_its_inputs_is_not_right(name, capsys):
    assert "changes its input number 1" in verdict(getattr(checks, name), IN_PLACE[name], capsys)


def betas(start, end, T):
    return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


OTHER_FORMS = [
    ("alpha_bar", lambda *given: (1 - betas(*given)).cumprod(0)),  # in float64
    ("alpha_bar", lambda *given: (1 - betas(*given)).cumprod(0).numpy()),
    ("alpha_bar", lambda *given: (1 - betas(*given)).cumprod(0).tolist()),
    ("obeys", lambda frames, caption: bool(min(checks.judge(frames.numpy(), caption).values()))),
    ("obeys", lambda frames, caption: np.all([*checks.judge(frames, caption).values()])),
    (
        "end_error",
        lambda a, b: float(
            checks.evaluate.judge("", a.numpy(), "a red circle moves up", b.numpy())["end"]
        ),
    ),
    ("temporal_conv_count", lambda dim: 4.0 * (3 * dim + 3 * dim**2)),
    ("compression", lambda h, w, stride, channels: torch.tensor(3 * stride**2 / channels)),
    ("clips", lambda frames, f: np.ceil((frames - 1) / (f - 1))),
    ("shares", lambda count, micro: np.diff([*range(0, count, micro), count]) / count),
    ("ema", lambda average, weight, decay: np.float32(decay * average + (1 - decay) * weight)),
]


@pytest.mark.parametrize("name, answer", OTHER_FORMS)
def test_a_right_answer_is_right_in_any_form(name, answer, capsys):
    assert verdict(getattr(checks, name), answer, capsys).startswith("right: ")


# -------------------------------------------------------------------------- what checks say
WRONG = [
    (checks.add_noise, lambda z, e, a: a * z + (1 - a) * e, "both square roots are missing"),
    (checks.add_noise, lambda z, e, a: a**0.5 * z - (1 - a) ** 0.5 * e, "added, not taken away"),
    (checks.add_noise, lambda z, e, a: z.sum(), "its shape is ()"),
    (checks.add_noise, lambda z, e, a: undefined, "raises NameError"),  # noqa: F821
    (checks.f_last, lambda z, from_end: z[torch.arange(len(z)), -from_end], "one too late"),
    (checks.unet_input, lambda z, c: torch.cat([z, c], 1), "along the frames"),
    (checks.guidance, lambda u, c, w: c + w * (c - u), "w = 1 is not off"),
    (checks.switch, lambda i, tau, c, free: c if i <= tau else free, "one step too long"),
    (checks.attention, lambda q, k, v: (q @ k.mT).softmax(-1) @ v, "not divided by sqrt(d)"),
    (checks.to_frames, lambda x: ((x + 1) * 127.5).round().clamp(0, 255), "it is torch.float32"),
    (checks.switch, lambda i, tau, c, free: c, "every step sees the last frame"),
    (checks.switch, lambda i, tau, c, free: free, "no step sees the last frame"),
    (checks.switch, lambda i, tau, c, free: c if i < tau - 1 else free, "one step too short"),
    (checks.chain, lambda make, first, n: make(first), "a Tensor of shape (2, 4, 4, 3, 3)"),
    (checks.ema, lambda a, w, d: (1 - d) * a + d * w, "the *old* average"),
]


@pytest.mark.parametrize("check, answer, words", WRONG, ids=[words for *_, words in WRONG])
def test_a_check_names_the_mistake(check, answer, words, capsys):
    shown = verdict(check, answer, capsys)
    assert shown.startswith("not yet: ") and words in shown, shown


@each_exercise
def test_the_library_is_right_and_every_known_mistake_is_named(name, monkeypatch, capsys):
    library, cases, mistakes = ask(name, monkeypatch)
    checks.compare(library, library, cases, mistakes)
    assert capsys.readouterr().out.startswith("right: ")
    for reason, mistake in mistakes.items():
        checks.compare(mistake, library, cases, mistakes)
        assert capsys.readouterr().out == f"not yet: {reason}\n"


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda x: -x, "the sign is wrong"),
        (lambda x: 3 * x, "3 times what it should be"),
        (lambda x: x.sqrt(), "a square root too many"),
        (lambda x: x**2, "a square root is missing"),
        (lambda x: x.T, "another order"),
        (lambda x: x.flip(1), "axis 1 runs backwards"),
        (lambda x: x + torch.eye(3, 4), "of its numbers differ; at (0, 0)"),
        (lambda x: x / 0, "infinite"),
        (lambda x: 1.0, "it answers 1.0, and it should be a Tensor"),
        (lambda x: None, "returns nothing"),
    ],
)
def test_a_check_says_what_differs(answer, words, capsys):
    checks.compare(answer, lambda x: x, [(torch.rand(3, 4) + 0.1,)])
    shown = capsys.readouterr().out
    assert shown.startswith("not yet: ") and words in shown, shown
