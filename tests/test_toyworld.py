"""The toy world's promises: what a clip may give away, and how far its referee can be trusted."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tinydance.toy.referee import judge, referee
from tinydance.toy.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    World,
    captions,
    describe,
    make_clip,
    parse,
    render,
    reverse_motion,
    sample_scene,
    vocabulary,
)


@pytest.fixture(scope="module")
def clips():
    return [make_clip(1, i) for i in range(1000)]


def agreement(clips):
    """attribute -> in which share of the clips the referee agrees with the caption."""
    right, asked = Counter(), Counter()
    for frames, caption in clips:
        verdicts = judge(frames, caption)
        right.update(verdicts)  # True counts 1
        asked.update(verdicts.keys())
    return {name: right[name] / asked[name] for name in asked}


def degraded(frames, rng):
    """About what a small autoencoder does: half of the fine detail lost, a blur, and noise."""
    frames = frames.astype(float)
    f, c, h, w = frames.shape
    small = frames.reshape(f, c, h // 2, 2, w // 2, 2).mean((3, 5))
    frames = 0.5 * frames + 0.5 * small.repeat(2, -1).repeat(2, -2)
    for axis in (-1, -2):
        frames = 0.6 * frames + 0.2 * np.roll(frames, 1, axis) + 0.2 * np.roll(frames, -1, axis)
    return np.clip(frames + rng.normal(0, 3, frames.shape), 0, 255)


# The clips


def test_a_clip_is_a_function_of_seed_and_index():
    frames, caption = make_clip(3, 5)
    again, same_caption = make_clip(3, 5)
    assert frames.shape == (16, 3, 32, 32) and frames.dtype == np.uint8
    assert np.array_equal(frames, again) and caption == same_caption
    assert not np.array_equal(frames, make_clip(3, 6)[0])
    assert not np.array_equal(frames, make_clip(4, 5)[0])


def test_the_world_stays_what_the_shipped_models_know():
    """Clips (0, 0), (0, 1) and (0, 2), by their captions and mean grey levels."""
    known = [
        ("a blue star moves up by the sea", 176.59),
        ("a yellow triangle grows", 205.95),
        ("a red star moves down at dawn", 142.76),
    ]
    for i, (caption, mean) in enumerate(known):
        frames, drawn = make_clip(0, i)
        assert drawn == caption and abs(frames.mean() - mean) < 0.01


def test_the_first_frame_is_the_same_whatever_the_motion():
    scene = sample_scene(np.random.default_rng(0))
    firsts = [
        render(replace(scene, motion=motion, extent=extent))[0]
        for motion in MOTIONS
        for extent in (0.1, 0.9)
    ]
    assert all(np.array_equal(first, firsts[0]) for first in firsts)


def test_place_size_and_landscape_do_not_depend_on_the_motion():
    scenes = [sample_scene(np.random.default_rng([0, i])) for i in range(3000)]
    for name in ("x", "y", "radius", "extent", "horizon", "hills", "light", "says_background"):
        values = np.array([getattr(scene, name) for scene in scenes], float)
        values = (values - values.mean()) / values.std()
        for motion in MOTIONS:
            group = values[[scene.motion == motion for scene in scenes]]
            assert abs(group.mean()) * len(group) ** 0.5 < 4, (name, motion)  # standard errors


def test_the_caption_does_not_tell_how_far_it_goes_but_the_last_frame_does():
    scene = sample_scene(np.random.default_rng(0))
    for motion in MOTIONS:
        near, far = (replace(scene, shape="star", motion=motion, extent=e) for e in (0.0, 1.0))
        assert describe(near) == describe(far)
        assert np.abs(render(near)[-1].astype(int) - render(far)[-1]).max() > 30, motion


def test_every_attribute_occurs_about_equally_often_and_a_quarter_leave_out_the_background(clips):
    found = Counter(word for _, caption in clips for word in parse(caption).values())
    for words in (COLOURS, SHAPES, BACKGROUNDS):
        expected = len(clips) / len(words) * (0.75 if words is BACKGROUNDS else 1)
        assert all(0.8 < found[word] / expected < 1.2 for word in words), found
    assert set(MOTIONS) <= set(found)


def test_a_larger_picture_shows_the_same_scene():
    small, large = make_clip(0, 7)[0], make_clip(0, 7, World(size=64))[0]
    halved = large.reshape(16, 3, 32, 2, 32, 2).mean((3, 5))
    assert large.shape == (16, 3, 64, 64) and np.abs(halved - small).mean() < 2


def test_a_world_of_one_frame_is_an_image():
    frames, caption = make_clip(0, 0, World(frames=1))
    assert np.array_equal(frames, make_clip(0, 0)[0][:1])
    verdicts = judge(frames, caption)
    assert not verdicts.pop("motion") and all(verdicts.values())


# The captions


def test_captions_are_distinct_and_read_back_and_their_words_are_the_vocabulary():
    every = captions()
    assert len(every) == len(set(every)) == 4 * 3 * 8 * 5
    assert {word for caption in every for word in caption.split()} == set(vocabulary())
    for i in range(300):
        scene = sample_scene(np.random.default_rng([0, i]))
        mentioned = parse(describe(scene))
        assert describe(scene) in every
        assert mentioned["motion"] == scene.motion and mentioned["colour"] == scene.colour
        assert mentioned["shape"] == scene.shape
        background = scene.background if scene.says_background else None
        assert mentioned.get("background") == background


def test_every_motion_has_an_opposite_and_only_the_motion_is_reversed():
    for caption in captions():
        back, motion = reverse_motion(caption), parse(caption)["motion"]
        opposite = parse(back)["motion"]
        assert opposite != motion and caption.replace(motion, opposite) == back
        assert reverse_motion(back) == caption


def test_a_caption_may_leave_parts_out():
    assert parse("a red circle") == {"colour": "red", "shape": "circle"}
    assert parse("a star at dawn") == {"shape": "star", "background": "at dawn"}


def test_an_unknown_word_or_order_raises():
    for caption in (
        "a red giraffe moves up",
        "circle red a moves up",
        "a red circle moves up blue",
    ):
        with pytest.raises(ValueError, match=f"'{caption}' is no caption .* moves night on"):
            parse(caption)


# The referee


def test_the_referee_agrees_with_the_captions(clips):
    found = agreement(clips)
    assert min(found.values()) >= 0.99, found


def test_the_referee_agrees_after_blur_and_noise(clips):
    rng = np.random.default_rng(0)
    found = agreement([(degraded(frames, rng), caption) for frames, caption in clips])
    assert min(found.values()) >= 0.97, found


@pytest.mark.parametrize("world", [World(size=64), World(frames=8)], ids=["large", "short"])
def test_the_referee_agrees_in_other_worlds_too(world):
    rng = np.random.default_rng(0)
    clips = [make_clip(1, i, world) for i in range(60)]
    clean = agreement(clips)
    worse = agreement([(degraded(frames, rng), caption) for frames, caption in clips])
    assert min(clean.values()) >= 0.97 and min(worse.values()) >= 0.97, (clean, worse)


def test_other_captions_fare_no_better_than_chance(clips):
    found = agreement([(frames, clips[i - 1][1]) for i, (frames, _) in enumerate(clips)])
    assert found["motion"] < 0.15 and found["colour"] < 0.3, found
    assert found["shape"] < 0.42 and found["background"] < 0.32, found


def test_a_frozen_clip_is_still(clips):
    for frames, caption in clips[:100]:
        assert referee(frames[:1].repeat(16, 0)).motion == "still", caption


def test_a_clip_run_backwards_or_with_its_frames_shuffled_shows_another_motion(clips):
    rng = np.random.default_rng(0)
    for frames, caption in clips[:100]:
        assert not judge(frames[::-1], caption)["motion"], caption
        assert not judge(frames[rng.permutation(16)], caption)["motion"], caption


def test_an_object_that_jumps_to_its_end_has_no_known_motion(clips):
    for frames, caption in clips[:100]:
        jump = np.concatenate([frames[:1].repeat(8, 0), frames[-1:].repeat(8, 0)])
        assert referee(jump).motion == "none", caption


def test_an_object_that_trembles_has_no_known_motion(clips):
    rng = np.random.default_rng(0)
    for frames, caption in clips[:100]:
        shifts = rng.integers(-3, 4, (16, 2))
        trembling = [np.roll(frame, shift, (1, 2)) for frame, shift in zip(frames, shifts)]
        assert not judge(np.stack(trembling), caption)["motion"], caption


def test_an_object_that_changes_its_colour_halfway_or_turns_has_no_known_motion(clips):
    for frames, caption in clips[:100]:
        recoloured = np.concatenate([frames[:8], frames[8:, [1, 2, 0]]])
        assert referee(recoloured).motion == "none", caption
    scene = replace(sample_scene(np.random.default_rng(0)), shape="triangle", motion="moves up")
    clip = render(scene)
    turning = np.stack(
        [np.rot90(frame, k // 4, (1, 2)) for k, frame in enumerate(clip[:1].repeat(16, 0))]
    )
    assert referee(turning).motion == "none" and referee(clip).motion == "moves up"


def test_the_track_and_the_radius_are_those_of_the_scene():
    scene = sample_scene(np.random.default_rng(1))
    for size in (32, 64):
        pixels = size / 32
        circle = replace(scene, shape="circle", motion="moves to the right", extent=1.0)
        seen = referee(render(circle, World(size)))
        x = scene.x + 8.5 * np.linspace(0, 1, 16)
        assert np.abs(seen.track - np.stack([x, 0 * x + scene.y], 1) * pixels).max() < 0.4 * pixels
        assert np.abs(seen.radius - scene.radius * pixels).max() < 0.4 * pixels


def test_where_there_is_no_object_nothing_is_read():
    grey = np.full((16, 3, 32, 32), 128, np.uint8)
    seen = referee(grey)
    assert (seen.colour, seen.shape, seen.motion) == ("none", "none", "none")
    frames, caption = make_clip(0, 0)
    frames[6] = 128
    assert referee(frames).motion == "none" and np.isnan(referee(frames).track[6]).all()
    assert judge(frames, caption)["shape"]
