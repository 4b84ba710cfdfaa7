"""Guidance, the tau switch of Eq. 2, and the loop: what the network is shown, and how often."""

import weakref
from dataclasses import replace

import pytest
import torch
from reference import Spy, difference, tiny_model, tiny_unet

from tinydance.model import PixelDance, tau_in_steps
from tinydance.noise import draw, generator
from tinydance.sampling import (
    chain,
    encode_picture,
    first_frame,
    guided_denoiser,
    sample,
    sample_frames,
    sample_latents,
)
from tinydance.schedulers import Schedule
from tinydance.weights.files import read_config, write_json


@pytest.fixture
def model():
    return tiny_model(timestep_spacing="trailing", prediction_type="v_prediction")


def latent(seed, b=1):
    return torch.randn(b, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def both():
    return {"first": latent(0), "last": latent(1)}


def sample_with(model, prompts, instructions=None, keys=None, **changes):
    """`sample_latents` with some of the model's settings changed."""
    settings = replace(model.settings, **changes)
    return sample_latents(model, prompts, instructions or {}, settings, keys)


def test_guidance_moves_from_the_empty_prompt_towards_the_prompt():
    """eps_u + w (eps_c - eps_u), with a network that answers with its text."""

    def unet(z, t, c_text):
        return c_text.mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1).expand(len(z), 2, 4, 2, 2)

    z, c = torch.zeros(3, 2, 4, 2, 2), {"c_image": torch.zeros(3, 2, 4, 2, 2)}
    c_text = torch.arange(3.0).reshape(3, 1, 1).expand(3, 5, 6)
    c_empty = torch.full((3, 5, 6), 10.0)
    for w in (0.0, 1.0, 7.5):
        out = guided_denoiser(unet, c_text, c_empty, c, c, 0, w)(z, 5, 0)
        for k in range(3):
            assert difference(out[k], torch.full((2, 4, 2, 2), 10 + w * (k - 10.0))) < 1e-5


def test_guidance_one_costs_one_branch_and_others_two_in_one_batch(model):
    for guidance, rows in ((1.0, 2), (3.0, 4)):
        model.unet = Spy(tiny_model().unet)
        sample_with(model, ["a red circle", "a blue"], {"first": latent(0, 2)}, guidance=guidance)
        assert [len(z) for z, _, _ in model.unet.seen] == [rows] * 4


def test_the_last_frame_is_seen_on_the_first_tau_steps_and_by_both_branches(model):
    for tau in (0, 1, 3, 4):
        model.unet = Spy(tiny_model().unet)
        sample_with(model, ["a red circle"], both(), tau=tau)
        assert len(model.unet.seen) == 4
        for i, (z, _, _) in enumerate(model.unet.seen):
            c_image = z[:, :, 4:]
            assert torch.equal(c_image[0], c_image[1])  # guidance is on text only
            assert bool((c_image[:, -1] != 0).any()) == (i < tau)
            assert int((c_image[:, 1:-1] != 0).sum()) == 0
            assert bool((c_image[:, 0] != 0).all())


def test_tau_zero_equals_no_last_frame_bit_for_bit(model):
    without = sample_latents(model, ["a red circle"], {"first": latent(0)})
    assert torch.equal(without, sample_with(model, ["a red circle"], both(), tau=0))


def test_tau_at_all_steps_never_drops_the_last_frame(model):
    always = sample_with(model, ["a red circle"], both(), tau=4)
    half = sample_with(model, ["a red circle"], both(), tau=2)
    assert difference(always, half) > 1e-4
    default = sample_latents(model, ["a red circle"], both())
    assert torch.equal(half, default)  # half the steps


def test_what_the_last_frame_shows_after_step_tau_changes_nothing(model):
    """Bit for bit; a last frame that is swapped while it is still looked at changes the clip."""
    for tau, swapped_at, same in ((2, 2, True), (2, 1, False)):
        seen = []

        def unet(z, t, c_text):
            if len(seen) >= swapped_at:
                z = z.clone()
                z[:, -1, 4:] = torch.where(z[:, -1, 4:] != 0, latent(9), 0.0)
            seen.append(z)
            return real(z, t, c_text)

        real, model.unet.forward = model.unet.forward, unet
        swapped = sample_with(model, ["a red circle"], both(), tau=tau)
        model.unet.forward = real
        plain = sample_with(model, ["a red circle"], both(), tau=tau)
        assert torch.equal(swapped, plain) == same and len(seen) == 4


def test_tau_is_a_count_or_a_share_of_the_steps(model):
    counts = {3: 3, "3": 3, 0.5: 2, "0.75": 3, "50%": 2, "100%": 4, 1: 1, "1.0": 4, 0.0: 0}
    assert {tau: tau_in_steps(tau, 4) for tau in counts} == counts
    assert tau_in_steps(1.0, 4) == 4  # and 1 is one step
    model.unet = Spy(model.unet)
    sample_with(model, ["a red circle"], both(), tau="75%")
    assert [bool((z[:, -1, 4:] != 0).any()) for z, _, _ in model.unet.seen] == [True] * 3 + [False]


def test_the_condition_keeps_one_noise_through_all_steps_at_the_trained_level(model):
    model.unet = Spy(model.unet)
    f_first = latent(0)
    sample_latents(model, ["a red circle"], {"first": f_first})
    firsts = [z[0, 0, 4:] for z, _, _ in model.unet.seen]
    assert all(torch.equal(firsts[0], other) for other in firsts)
    eps = draw([generator("sample", 0, 0)], 2, 4, 8, 8)[0, 0]
    a = model.schedule.alpha_bar[100]
    assert difference(firsts[0], a.sqrt() * f_first[0] + (1 - a).sqrt() * eps) < 1e-6
    model.unet.seen.clear()
    sample_with(model, ["a red circle"], {"first": f_first}, cond_noise_t=0)
    assert torch.equal(model.unet.seen[0][0][0, 0, 4:], f_first[0])


def test_text_alone_first_makes_one_frame_and_then_the_clip_from_it(model):
    model.unet = Spy(model.unet)
    z_0 = sample_with(model, ["a red circle"], cond_noise_t=0)
    lengths = [z.shape[1] for z, _, _ in model.unet.seen]
    assert lengths == [1] * 4 + [4] * 4 and z_0.shape == (1, 4, 4, 8, 8)
    assert all(int((z[:, :, 4:] != 0).sum()) == 0 for z, _, _ in model.unet.seen[:4])
    own_first = model.unet.seen[4][0][0, 0, 4:]
    image = sample_with(model, ["a red circle"], frames=1)
    assert difference(own_first, image[0, 0]) == 0


def test_the_negative_prompt_replaces_the_empty_one(model):
    model.unet = Spy(model.unet)
    sample_with(model, ["a red circle"], {"first": latent(0)}, negative="blue")
    _, _, context = model.unet.seen[0]
    assert torch.equal(context[0], model.encode_text(["blue"])[0])
    assert torch.equal(context[1], model.encode_text(["a red circle"])[0])


def test_the_same_seed_gives_the_same_clip_alone_and_in_a_batch(model):
    prompts = ["a red circle", "a blue circle moves left", ""]
    for changes in ({}, {"ddim_eta": 1.0}, {"sampler": "ddpm"}):
        together = sample_with(model, prompts, seed=3, **changes)
        assert torch.equal(together, sample_with(model, prompts, seed=3, **changes))
        alone = sample_with(model, prompts[:1], seed=3, **changes)
        assert difference(together[:1], alone) < 1e-4
        other = sample_with(model, prompts[:1], seed=4, **changes)
        assert difference(together[:1], other) > 0.1


def test_a_clip_is_the_same_in_a_batch_of_1_3_and_8_and_by_its_key(model):
    prompts = ["a red circle", "a blue circle moves left", "", "red", "a", "blue", "left", "moves"]
    changes = {"seed": 3, "ddim_eta": 1.0}
    eight = sample_with(model, prompts, **changes)
    three = sample_with(model, prompts[:3], **changes)
    assert difference(eight[:3], three) < 1e-4
    for k in (0, 2, 7):
        alone = sample_with(model, [prompts[k]], keys=[(k,)], **changes)
        assert difference(eight[k : k + 1], alone) < 1e-4


def test_every_z_t_of_the_first_frame_and_of_the_clip_is_yielded(model):
    zs = list(sample(model, ["a red circle"]))
    assert [z.shape[1] for z in zs] == [1] * 4 + [4] * 4
    assert torch.equal(zs[-1], sample_latents(model, ["a red circle"]))
    assert len(list(sample(model, ["a red circle"], {"first": latent(0)}))) == 4


def test_frames_are_pixels_of_the_asked_size_which_is_by_default_the_pictures(model):
    I_first = torch.rand(1, 3, 16, 16) * 2 - 1
    frames = sample_frames(model, ["a red circle"], I_first, None, frames=3)
    assert frames.shape == (1, 3, 3, 16, 16) and float(frames.abs().max()) <= 1
    larger = sample_frames(model, ["a red circle"], height=24, width=32)
    assert larger.shape == (1, 4, 3, 24, 32)
    wide = sample_frames(model, ["a red circle"], None, torch.zeros(1, 3, 24, 32))
    assert wide.shape == (1, 4, 3, 24, 32)


def test_frames_are_the_decoded_clip_of_the_encoded_pictures(model):
    pictures = [latent(seed).repeat(1, 1, 2, 2)[:, :3].clamp(-1, 1) for seed in (2, 3)]
    first, last = (encode_picture(model, picture) for picture in pictures)
    assert difference(first, model.vae.encode_video(pictures[0][:, None])[:, 0]) == 0
    z_0 = sample_with(model, ["a red circle"], {"first": first, "last": last}, tau="75%", seed=5)
    frames = sample_frames(model, ["a red circle"], *pictures, tau="75%", seed=5)
    assert torch.equal(frames, model.vae.decode_video(z_0).clamp(-1, 1))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps is 0; use 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"tau": -1}, "tau is -1; use 0 to 4"),
        ({"tau": 5}, "tau is 5; use 0 to 4"),
        ({"tau": 1.5}, "tau is 1.5; use 0 to 4 steps, or a share"),
        ({"tau": "120%"}, "tau is 120%"),
        ({"tau": "-1%"}, "tau is -1%"),
        ({"tau": "half"}, "tau is half; use 0 to 4"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"seed": -1}, "seed is -1; use 0 or more"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"ddim_eta": 1.5}, "ddim_eta is 1.5; use 0 to 1"),
        ({"cond_noise_t": 1000}, "cond_noise_t is 1000; use 0"),
        ({"sampler": "euler"}, "sampler is 'euler'; use ddim or ddpm"),
        ({"frames": 0}, "frames is 0; use 1 or more"),
        ({"height": 16, "width": 18}, "size is 16x18; both must be multiples of 4"),
    ],
)
def test_settings_out_of_range_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        sample_with(model, ["a red circle"], both(), **settings)
    with pytest.raises(ValueError, match=message):
        replace(model.settings, **settings).check(model)


def test_settings_in_range_are_checked_and_returned(model):
    settings = replace(model.settings, tau="50%", sampler="ddpm", negative="blue")
    assert settings.check(model) is settings


def test_without_settings_those_of_the_model_count(model):
    changes = {"steps": 8, "guidance": 1.0, "tau": 0.75, "cond_noise_t": 0, "seed": 2}
    asked = sample_with(model, ["a red circle"], both(), **changes)
    model.settings, model.unet = replace(model.settings, **changes), Spy(model.unet)
    assert torch.equal(sample_latents(model, ["a red circle"], both()), asked)
    seen = [z for z, _, _ in model.unet.seen]
    assert [len(z) for z in seen] == [1] * 8 and torch.equal(seen[0][0, 0, 4:], latent(0)[0])
    assert [bool((z[:, -1, 4:] != 0).any()) for z in seen] == [True] * 6 + [False] * 2


def test_a_chain_goes_on_from_the_last_latent_and_shows_it_once(model):
    model.unet = Spy(model.unet)
    settings = replace(model.settings, guidance=1.0, cond_noise_t=0, tau=4)
    parts = list(chain(model, ["a red circle"], 3, both(), settings))
    assert [z.shape[1] for z in parts] == [4, 3, 3]  # 1 + (f - 1) * clips
    seen = [z[0, :, 4:] for z, _, _ in model.unet.seen]
    for link, f_first in enumerate((latent(0)[0], parts[0][0, -1], parts[1][0, -1])):
        for c_image in seen[4 * link : 4 * link + 4]:
            assert torch.equal(c_image[0], f_first)
            assert bool((c_image[-1] != 0).any()) == (link == 2)  # f_last ends the last clip
    single = sample_latents(model, ["a red circle"], {"first": latent(0)}, settings)
    assert torch.equal(single, parts[0])
    assert difference(model.unet.seen[0][0][:, :, :4], model.unet.seen[4][0][:, :, :4]) > 1  # noise


def test_the_clips_of_a_chain_are_made_by_whom_the_caller_names_under_keys_of_their_own(model):
    calls = []

    def make(model, prompts, instructions, settings, keys):
        calls.append((sorted(instructions), settings, keys))
        return torch.full((2, 4, 4, 8, 8), float(len(calls)))

    settings = replace(model.settings, seed=7)
    prompts, instructions = ["a red circle", "blue"], {"last": latent(1, 2)}
    parts = list(chain(model, prompts, 3, instructions, settings, [(5,), (8, 1)], make))
    assert [(z.shape[1], float(z.mean())) for z in parts] == [(4, 1.0), (3, 2.0), (3, 3.0)]
    assert calls == [
        ([], settings, [(5,), (8, 1)]),
        (["first"], settings, [(5, 1), (8, 1, 1)]),
        (["first", "last"], settings, [(5, 2), (8, 1, 2)]),
    ]


def test_a_long_video_takes_the_memory_of_one_clip(model):
    alive = []
    settings = replace(model.settings, steps=1)
    for z_0 in chain(model, ["a red circle"], 5, {"first": latent(0)}, settings):
        assert sum(ref() is not None for ref in alive) <= 1
        alive.append(weakref.ref(z_0))
        del z_0
    frames = sample_frames(model, ["a red circle"], clips=5, steps=1)
    assert frames.shape == (1, 16, 3, 16, 16)


def test_an_image_model_draws_the_first_frame_by_its_own_words_schedule_and_size(model):
    """Twice as large as the clip, and epsilon-prediction, where the video model predicts v."""
    image_model = tiny_model()
    image_model.settings = replace(image_model.settings, height=32, width=32, steps=3)
    spy = image_model.unet = Spy(tiny_unet())
    f_first = first_frame(image_model, model, ["a red circle"], model.settings)
    assert [tuple(z.shape) for z, _, _ in spy.seen] == [(2, 1, 8, 16, 16)] * 3
    assert [int(t[0]) for _, t, _ in spy.seen] == [t for t, _ in Schedule().timesteps(3)]
    z_0 = sample_with(image_model, ["a red circle"], frames=1)
    picture = image_model.vae.decode_video(z_0)[:, 0].clamp(-1, 1)
    small = picture.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
    assert difference(f_first, model.vae.encode_video(small[:, None])[:, 0]) < 1e-5


def test_an_image_model_takes_seed_key_and_negative_prompt_from_the_clip(model):
    image_model = tiny_model()
    image_model.unet = Spy(image_model.unet)
    settings = replace(model.settings, seed=4, negative="blue")
    f_first = first_frame(image_model, model, ["a red circle"], settings, [(6,)])
    z_0 = sample_with(image_model, ["a red circle"], keys=[(6,)], frames=1, seed=4, negative="blue")
    picture = image_model.vae.decode_video(z_0)[:, 0].clamp(-1, 1)
    assert difference(f_first, model.vae.encode_video(picture[:, None])[:, 0]) < 1e-5


def test_latents_of_another_size_than_asked_for_are_refused(model):
    for name in ("first", "last"):
        with pytest.raises(ValueError, match=rf"f_{name} is \(1, 4, 8, 8\); 2 prompts"):
            sample_latents(model, ["a", "b"], {name: latent(0)})


def test_generators_differ_by_purpose_and_by_every_part_of_their_key():
    keys = [("sample", 0, 0), ("train", 0, 0), ("sample", 0, 1), ("sample", 1, 0), ("sample", 0)]
    keys.append(("sample", 0, 0, 0))  # numpy alone would take this for the first
    firsts = [float(torch.randn(1, generator=generator(*key))) for key in keys]
    assert len(set(firsts)) == len(firsts)
    assert firsts[0] == float(torch.randn(1, generator=generator(*keys[0])))


def test_a_model_folder_keeps_everything_but_the_seed_and_the_negative_prompt(model, tmp_path):
    model.settings = replace(model.settings, tau="50%", sampler="ddpm", fps=8)
    replace(model, settings=replace(model.settings, seed=5, negative="blue")).save(tmp_path)
    again = PixelDance.from_folder(tmp_path)
    assert again.settings == model.settings and again.schedule == model.schedule
    prompts = ["a red circle"]
    assert torch.equal(sample_latents(again, prompts), sample_latents(model, prompts))


def test_a_folder_from_the_hub_says_how_large_its_pictures_are(model, tmp_path):
    model.save(tmp_path)
    (tmp_path / "pixeldance.json").unlink()
    assert PixelDance.from_folder(tmp_path).settings.width == 32 * model.vae.stride
    write_json(
        tmp_path / "unet" / "config.json", read_config(tmp_path / "unet") | {"sample_size": 96}
    )
    assert PixelDance.from_folder(tmp_path).settings.height == 96 * model.vae.stride


def test_a_folder_without_parts_says_which(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        PixelDance.from_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="config.json"):
        PixelDance.from_folder(tmp_path)
