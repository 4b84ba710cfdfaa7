"""The evaluation measures what it says: truth scores full marks, each row gives what it names."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import tiny_model

from tinydance.toy import evaluate, measure
from tinydance.toy.evaluate import (
    CEILING,
    CHEAT,
    COLUMNS,
    ROWS,
    SHARES,
    check_rows,
    format_records,
    go_on,
    judge,
    keep_looks,
    spread_motions,
    summarise,
    turn_aside,
)
from tinydance.toy.measure import HIDDEN_SEED, average, sample_hidden
from tinydance.toy.paint import MIDDLE, UNITS
from tinydance.toy.referee import referee
from tinydance.toy.world import MOTIONS, World, describe, make_clip, parse, render
from tinydance.vae import to_pixels

CLIPS, SMALL = 16, World(32)


def find_clip(made, prompt, first, last):
    """Of the true clips the one that agrees with most of what is given."""

    def agree(pair):
        clip, caption = pair
        ends = (pixels for pixels in zip((clip[0], clip[-1]), (first, last)))
        same = [torch.equal(to_pixels(torch.from_numpy(x)), y) for x, y in ends if y is not None]
        return sum(same) + (caption == prompt)

    return max(made, key=agree)[0]


@pytest.fixture
def oracle(monkeypatch):
    """A model without networks: the VAE passes pixels, and the sampler looks the true clip up,
    among all that the evaluation rendered."""
    model, asked, made = tiny_model(), [], []
    model.settings = replace(model.settings, height=32, width=32, frames=16)
    model.vae.encode_video = model.vae.decode_video = lambda x: x

    def remember(scene, *rest):
        made.append((render(scene, *rest), describe(scene)))
        return made[-1][0]

    def sample_frames(model, prompts, first=None, last=None, seed=0, **changes):
        asked.append((prompts, first, last, changes))
        ends = ([None] * len(prompts) if x is None else x for x in (first, last))
        clips = [find_clip(made, *given) for given in zip(prompts, *ends, strict=True)]
        return to_pixels(torch.from_numpy(np.stack(clips)))

    monkeypatch.setattr(evaluate, "render", remember)
    monkeypatch.setattr(measure, "sample_frames", sample_frames)
    return model, asked


def run(model, rows=None, **changes):
    return list(evaluate.evaluate(model, CLIPS, check_rows(model, rows), **changes))


def test_the_truth_scores_full_marks_and_no_error(oracle):
    oracle[0].settings = replace(oracle[0].settings, height=64, width=64)
    rows = average(run(oracle[0]), "instruction")
    assert [name for (name,) in rows] == [CEILING, CHEAT, *ROWS]
    cheat, chain = rows.pop((CHEAT,)), rows.pop(("chain of 8, the last clip",))
    assert cheat["motion"] == 0
    for (name,), row in rows.items():
        if name == "text, first, another last":  # the true clip does not do as the words say
            assert row.pop("motion") < 1
        shares = [row[look] for look in SHARES if look in row]
        assert row["clips"] == CLIPS and min(shares) == 1, (name, row)
        if name != "text":
            assert row["end"] < 0.01 and row["first, dB"] > 60 and 0.3 < row["jump"] < 2, name
    assert chain["clips"] == CLIPS / 8
    for row in (rows["text",], chain):
        assert not {"first, dB", "end", "end looks"} & row.keys()


def test_every_row_gives_its_instructions_and_no_other(oracle):
    model, asked = oracle
    run(model, steps=7)
    given = [
        (all(p == "" for p in prompts), first is not None, last is not None)
        for prompts, first, last, _ in asked
    ]
    assert given == [
        (False, False, False),  # text
        (True, True, False),  # first
        (True, True, True),  # first, last
        (False, True, False),  # text, first
        (False, True, True),  # text, first, last
        (False, True, True),  # text, first, another last
        (False, True, False),  # same first, each motion
        *[(False, True, False)] * 8,  # chain
    ]
    changes = [{"steps": 7}] * 15
    changes[5] = {"steps": 7, "tau": 1.0}  # the other end is seen in every step
    assert [given for *_, given in asked] == changes


def test_an_image_model_is_judged_by_single_frames_from_text(oracle):
    model, asked = oracle
    model.settings = replace(model.settings, frames=1)
    records = run(model)
    assert len(asked) == 1 and len(records) == 2 * CLIPS
    assert not any({"motion", "change", "jump"} & record.keys() for record in records)
    scenes = sample_hidden(0, CLIPS) * 2
    alone = [record for record, scene in zip(records, scenes) if not scene.other]
    assert all(record[look] for record in alone for look in ("colour", "shape"))
    assert all(record.get("background", True) for record in records)
    lines = format_records(records).splitlines()
    assert lines[2].startswith(f"| {CEILING} | {CLIPS} |") and lines[3].startswith("| text | ")
    assert lines[3].endswith(" |" + "  |" * 6)  # no change, motion, end, jump or decibels
    with pytest.raises(ValueError, match="unknown row 'text, first'; known are: text"):
        check_rows(model, ["text, first"])


# The scenes that rows are made of


def test_one_first_frame_is_given_with_every_motion():
    rng, groups = np.random.default_rng(0), {}
    for scene in spread_motions(sample_hidden(0, 40), rng):
        clip = render(scene)
        groups.setdefault(clip[0].tobytes(), []).append(scene.motion)
        assert (scene.mover.x, scene.mover.y) == (MIDDLE, MIDDLE)
        assert referee(clip).motion == scene.motion
    assert [sorted(group) for group in groups.values()] == [sorted(MOTIONS)] * 5


def test_an_end_that_the_words_do_not_say_is_far_from_the_one_they_do():
    rng = np.random.default_rng(0)
    for scene in sample_hidden(0, 100):
        aside = turn_aside(scene, rng)
        assert np.hypot(aside.end.x - scene.end.x, aside.end.y - scene.end.y) > UNITS / 4
        assert 5 <= min(aside.end.x, aside.end.y) and max(aside.end.x, aside.end.y) <= 27
        assert describe(aside) == describe(keep_looks(scene))
        ends = render(aside, SMALL, slice(None, None, 15)), render(keep_looks(scene), SMALL)
        assert np.array_equal(ends[0][0], ends[1][0])
        assert referee(ends[0]).end_colour == scene.mover.colour


def test_a_chain_goes_on_in_a_direction_with_room_and_with_the_same_looks():
    rng = np.random.default_rng(0)
    for scene in sample_hidden(0, 150):
        said = go_on(describe(scene), render(keep_looks(scene), pick=slice(-1, None)), rng)
        was, now = parse(describe(scene)), parse(said)
        motion = now.pop("motion")
        was.pop("motion"), was.pop("change", None)
        assert now == was
        step, room = 14 * np.exp(1j * MOTIONS[motion].angle), UNITS
        x, y = scene.end.x + step.real, scene.end.y + step.imag
        assert -0.2 < x < room + 0.2 and -0.2 < y < room + 0.2, (said, scene.end)
        assert not MOTIONS[motion].hops or scene.end.y > 11.8
    nothing = np.full((1, 3, 32, 32), 128, np.uint8)
    assert parse(go_on("a red circle grows", nothing, rng))["motion"] in MOTIONS


def test_each_clip_of_a_chain_begins_with_the_last_frame_before(oracle):
    model, asked = oracle
    run(model, ["chain of 8, the last clip"])
    truth = [make_clip(HIDDEN_SEED, n, SMALL)[0] for n in range(2)]
    for n, clip in enumerate(truth):
        first, last = to_pixels(torch.from_numpy(clip[[0, -1]]))
        assert torch.equal(asked[0][1][n], first) and torch.equal(asked[1][1][n], last)
    for (before, *_), (after, *_) in zip(asked, asked[1:]):
        looks = [
            [parse(p)[name] for p in prompts for name in ("colour", "shape")]
            for prompts in (before, after)
        ]
        assert looks[0] == looks[1] and "until" not in " ".join(after)


# The numbers


def test_a_clip_is_judged_by_where_it_ends_and_how_abruptly():
    scene = keep_looks(sample_hidden(0, 1)[0])
    clip, caption = render(scene), describe(scene)
    moved = render(replace(scene, end=replace(scene.end, x=scene.end.x + 3.2)))
    assert abs(judge("", moved, caption, clip)["end"] - 10) < 0.5  # percent of the width
    late = np.concatenate([clip[:1].repeat(15, 0), clip[-1:]])
    assert judge("", late, caption, clip)["jump"] > 5 > judge("", clip, caption, clip)["jump"]
    nothing = np.full_like(clip, 128)
    record = judge("", nothing, caption, clip)
    assert record["end"] == 100 and not record["end looks"] and not record["colour"]
    other = render(replace(scene, end=replace(scene.end, colour="yellow")))
    assert not judge("", other, caption, clip)["end looks"]
    other = render(replace(scene, becomes="by the sea"))
    assert not judge("", other, caption, clip)["end looks"]


def test_wrong_captions_score_like_chance():
    clips, captions = zip(*(make_clip(3, n, SMALL) for n in range(80)))
    right = [judge("", clip, caption, None) for clip, caption in zip(clips, captions)]
    others = captions[7:] + captions[:7]
    wrong = [judge("", clip, caption, None) for clip, caption in zip(clips, others)]
    right, wrong = (average(records, "instruction")["",] for records in (right, wrong))
    assert right["motion"] > 0.95 and wrong["motion"] < 0.3
    for name in ("colour", "shape", "background"):
        assert right[name] == 1 and wrong[name] < 0.6


def test_the_mean_leaves_out_what_is_missing_or_unknown():
    records = [{"by": 1, "x": 1.0}, {"by": 1, "x": np.nan}, {"by": 1, "x": 3.0, "y": True}]
    rows = average(records + [{"by": 2, "x": np.nan}], "by")
    assert rows[1,] == {"x": 2.0, "y": 1.0, "clips": 3}
    assert np.isnan(rows[2,]["x"]) and rows[2,]["clips"] == 1


def test_shares_are_in_percent_and_errors_are_medians_each_with_half_its_interval():
    records = [{"motion": k % 4 != 0, "end": 1.0 + 100 * (k == 0)} for k in range(100)]
    figures = summarise(records)
    assert list(figures) == ["motion", "end"]
    share, half = figures["motion"]
    assert share == 75 and abs(half - 1.96 * 100 * (0.75 * 0.25 / 100) ** 0.5) < 1
    assert figures["end"] == (1.0, 0.0)


def test_the_table_is_markdown_and_below_it_each_row_motion_by_motion(oracle):
    records = run(oracle[0], ["text", "text, first"])
    for k, record in enumerate(records):
        record |= {"colour": True, "shape": k % 4 != 0}
    head, line, *rest = format_records(records).splitlines()
    assert head == f"| instruction | clips | {' | '.join(COLUMNS)} |"
    rows, notes = rest[:4], rest[4:]
    assert all(row.count("|") == head.count("|") for row in rows)
    for row, name in zip(rows, (CEILING, CHEAT, "text", "text, first"), strict=True):
        cells = row.split(" | ")
        assert cells[0] == f"| {name}" and cells[1] == str(CLIPS)
        assert cells[2] == "100 +- 0" and cells[3].startswith("75 +- ")
    assert len(notes) == 4 and notes[2].startswith("text, motion by motion: moves to the ")
    assert set(SHARES) < set(COLUMNS) and " 100," in notes[2] and " 100," not in notes[1]
