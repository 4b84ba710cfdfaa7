"""c_image = [f_first, PADs, f_last] (Eq. 1), and what section 3.2 does to it."""

import pytest
import torch
from reference import difference

from tinydance.conditioning import (
    ask,
    make_c_image,
    make_conditions,
    noise_level,
    pick_instructions,
    sketch,
)
from tinydance.schedulers import Schedule, add_noise
from tinydance.toy.referee import referee
from tinydance.toy.world import make_clip
from tinydance.vae import to_pixels

ALPHA_BAR = float(Schedule().alpha_bar[100])


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(b=2, f=5):
    f_first, f_last = latents(b, 4, 3, 2, seed=1), latents(b, 4, 3, 2, seed=2)
    return f_first, f_last, f, latents(b, 2, 4, 3, 2, seed=3)


def test_first_and_last_stand_in_their_slots_and_pads_are_exactly_zero():
    f_first, f_last, f, eps = given()
    c_image = make_c_image(f_first, f_last, f, eps, ALPHA_BAR)
    assert c_image.shape == (2, 5, 4, 3, 2)
    assert difference(c_image[:, 0], add_noise(f_first, eps[:, 0], ALPHA_BAR)) == 0
    assert difference(c_image[:, 4], add_noise(f_last, eps[:, 1], ALPHA_BAR)) == 0
    assert int((c_image[:, 1:4] != 0).sum()) == 0


def test_the_noise_is_that_of_100_diffusion_steps():
    f_first, f_last, f, eps = given()
    c_image = make_c_image(f_first, f_last, f, eps, ALPHA_BAR)
    assert difference(c_image[:, 0], 0.94563 * f_first + 0.32523 * eps[:, 0]) < 1e-4


def test_the_noise_level_of_no_steps_is_none_at_all():
    assert noise_level(Schedule(), 100) == ALPHA_BAR
    assert noise_level(Schedule(), 0) == 1.0 > float(Schedule().alpha_bar[0])


def test_alpha_bar_one_leaves_the_instructions_clean():
    f_first, f_last, f, eps = given()
    c_image = make_c_image(f_first, f_last, f, eps, 1.0)
    assert difference(c_image[:, 0], f_first) == 0 and difference(c_image[:, -1], f_last) == 0


def test_a_dropped_last_frame_is_exactly_zero_after_the_noise():
    f_first, f_last, f, eps = given()
    keep = torch.tensor([True, False])
    c_image = make_c_image(f_first, f_last, f, eps, ALPHA_BAR, keep)
    assert c_image[0, -1].abs().min() > 0 and int((c_image[1, -1] != 0).sum()) == 0
    assert c_image[1, 0].abs().min() > 0  # the first frame is never dropped


def test_a_dropped_last_frame_has_no_gradient():
    f_first, f_last, f, eps = given()
    f_last.requires_grad_()
    make_c_image(f_first, f_last, f, eps, ALPHA_BAR, torch.tensor([True, False])).sum().backward()
    assert f_last.grad[0].abs().min() > 0 and int((f_last.grad[1] != 0).sum()) == 0


def test_no_last_frame_equals_one_that_is_dropped():
    f_first, f_last, f, eps = given()
    dropped = make_c_image(f_first, f_last, f, eps, ALPHA_BAR, torch.tensor([False, False]))
    assert torch.equal(dropped, make_c_image(f_first, None, f, eps, ALPHA_BAR))


def test_an_image_has_no_instruction():
    f_first, f_last, _, eps = given()
    assert int((make_c_image(f_first, f_last, 1, eps, ALPHA_BAR) != 0).sum()) == 0


def test_the_conditions_are_c_image_and_then_every_further_instruction_by_its_name():
    f_first, f_last, f, eps = given()
    depth, mask = latents(2, f, 1, 3, 2, seed=5), latents(2, f, 3, 3, 2, seed=6)
    instructions = {"depth": depth, "last": f_last, "first": f_first, "mask": mask}
    conditions = make_conditions(instructions, f, eps, ALPHA_BAR, torch.tensor([True, False]))
    assert list(conditions) == ["c_image", "depth", "mask"]
    c_image = make_c_image(f_first, f_last, f, eps, ALPHA_BAR, torch.tensor([True, False]))
    assert torch.equal(conditions["c_image"], c_image)
    assert torch.equal(conditions["depth"], depth) and torch.equal(conditions["mask"], mask)
    of_an_image = make_conditions(instructions, 1, eps, ALPHA_BAR)
    assert int((of_an_image["c_image"] != 0).sum()) == 0
    assert torch.equal(of_an_image["depth"], depth[:, :1])
    nothing = make_conditions({}, f, eps, ALPHA_BAR)["c_image"]
    assert nothing.shape == (2, f, 4, 3, 2) and int((nothing != 0).sum()) == 0
    assert len(instructions) == 4  # the caller's dict is left as it was


def test_the_network_is_asked_with_the_conditions_behind_z_t():
    z_t, t, c_text = latents(2, 3, 4, 2, 2), torch.tensor([5, 6]), latents(2, 7, 16, seed=1)
    c_image, depth = latents(2, 3, 4, 2, 2, seed=2), latents(2, 3, 1, 2, 2, seed=3)

    def unet(z, times, text):
        assert torch.equal(z, torch.cat([z_t, c_image, depth], dim=2))
        assert times is t and text is c_text
        return z[:, :, :4] + 1

    out = ask(unet, z_t, t, c_text, {"c_image": c_image, "depth": depth})
    assert torch.equal(out, z_t + 1)


@pytest.mark.parametrize("f", [3, 4, 16])
def test_the_last_instruction_is_one_of_the_clips_last_three(f):
    z_0 = torch.arange(f).float().reshape(1, f, 1, 1, 1).expand(3, f, 4, 2, 2)
    f_first, f_last = pick_instructions(z_0, torch.tensor([0, 1, 2]))
    assert f_first.unique().tolist() == [0]
    assert [float(x.unique()) for x in f_last] == [f - 1, f - 2, f - 3]


def test_a_clip_shorter_than_three_frames_stays_inside_itself():
    z_0 = latents(1, 2, 4, 2, 2)
    assert torch.equal(pick_instructions(z_0, torch.tensor([2]))[1], z_0[:, 0])


def test_a_sketch_is_black_where_some_channel_is_steep_pixel_by_pixel():
    """Sobel's two sums and the comparison, written out for every pixel."""
    x = latents(2, 3, 6, 5, seed=4) * 0.3
    drawn = sketch(x, threshold=0.2)
    assert drawn.shape == x.shape and drawn.unique().tolist() == [-1, 1]
    for n in range(2):
        for row in range(6):
            for column in range(5):
                steepest = 0.0
                for channel in x[n]:

                    def at(dy, dx):
                        y, x_ = min(max(row + dy, 0), 5), min(max(column + dx, 0), 4)
                        return float(channel[y, x_])

                    right, below = (
                        sum(w * (at(*side) - at(*other)) for w, side, other in weights) / 8
                        for weights in (
                            [(1, (-1, 1), (-1, -1)), (2, (0, 1), (0, -1)), (1, (1, 1), (1, -1))],
                            [(1, (1, -1), (-1, -1)), (2, (1, 0), (-1, 0)), (1, (1, 1), (-1, 1))],
                        )
                    )
                    steepest = max(steepest, (right**2 + below**2) ** 0.5)
                assert drawn[n, :, row, column].tolist() == [-1.0 if steepest > 0.2 else 1.0] * 3


def test_a_sketch_of_the_toy_world_shows_the_object_and_hardly_the_landscape():
    frame = make_clip(0, 8)[0][-1]  # a circle alone, on snow
    x, y = referee(frame[None]).track[0]
    lines = sketch(to_pixels(torch.from_numpy(frame)))[0] < 0
    rows, columns = torch.nonzero(lines, as_tuple=True)
    assert abs(float(columns.float().mean()) - x) < 2 and abs(float(rows.float().mean()) - y) < 2
    assert 0.01 < float(lines.float().mean()) < 0.05
    assert bool((sketch(torch.zeros(3, 8, 8)) == 1).all())  # of nothing, nothing
