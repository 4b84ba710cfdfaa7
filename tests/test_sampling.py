"""Guidance, the tau switch of Eq. 2, and the loop: what the network is shown, and how often."""

import pytest
import torch
from reference import difference, tiny_model

from tinydance.noise import draw, generator
from tinydance.sampling import denoise_loop, guided_denoiser, sample_frames, sample_latents
from tinydance.schedulers import Schedule


class Spy(torch.nn.Module):
    """Stands before the UNet and keeps what it saw."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.seen = unet, []
        self.config, self.conv_in = unet.config, unet.conv_in

    def forward(self, z, t, c_text):
        self.seen.append((z.clone(), t.clone(), c_text.clone()))
        return self.unet(z, t, c_text)


@pytest.fixture
def model():
    return tiny_model(timestep_spacing="trailing", prediction_type="v_prediction")


def latent(seed, b=1):
    return torch.randn(b, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_guidance_moves_from_the_empty_prompt_towards_the_prompt():
    """eps_u + w (eps_c - eps_u), with a network that answers with its text."""

    def unet(z, t, c_text):
        return c_text.mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1).expand(len(z), 2, 4, 2, 2)

    z, c = torch.zeros(3, 2, 4, 2, 2), torch.zeros(3, 2, 4, 2, 2)
    c_text = torch.arange(3.0).reshape(3, 1, 1).expand(3, 5, 6)
    c_empty = torch.full((3, 5, 6), 10.0)
    for w in (0.0, 1.0, 7.5):
        out = guided_denoiser(unet, c_text, c_empty, c, c, 0, w)(z, 5, 0)
        for k in range(3):
            assert difference(out[k], torch.full((2, 4, 2, 2), 10 + w * (k - 10.0))) < 1e-5


def test_guidance_one_costs_one_branch_and_others_two_in_one_batch(model):
    for guidance, rows in ((1.0, 2), (3.0, 4)):
        model.unet = Spy(tiny_model().unet)
        sample_latents(model, ["a red circle", "a blue circle"], latent(0, 2), guidance=guidance)
        assert [len(z) for z, _, _ in model.unet.seen] == [rows] * 4


def test_the_last_frame_is_seen_on_the_first_tau_steps_and_by_both_branches(model):
    for tau in (0, 1, 3, 4):
        model.unet = Spy(tiny_model().unet)
        sample_latents(model, ["a red circle"], latent(0), latent(1), tau=tau)
        assert len(model.unet.seen) == 4
        for i, (z, _, _) in enumerate(model.unet.seen):
            c_image = z[:, :, 4:]
            assert torch.equal(c_image[0], c_image[1])  # guidance is on text only
            assert bool((c_image[:, -1] != 0).any()) == (i < tau)
            assert int((c_image[:, 1:-1] != 0).sum()) == 0
            assert bool((c_image[:, 0] != 0).all())


def test_tau_zero_equals_no_last_frame_bit_for_bit(model):
    without = sample_latents(model, ["a red circle"], latent(0), None)
    unseen = sample_latents(model, ["a red circle"], latent(0), latent(1), tau=0)
    assert torch.equal(without, unseen)


def test_tau_at_all_steps_never_drops_the_last_frame(model):
    always = sample_latents(model, ["a red circle"], latent(0), latent(1), tau=4)
    half = sample_latents(model, ["a red circle"], latent(0), latent(1), tau=2)
    assert difference(always, half) > 1e-4
    default = sample_latents(model, ["a red circle"], latent(0), latent(1))
    assert torch.equal(half, default)  # half the steps


def test_the_condition_keeps_one_noise_through_all_steps_at_the_trained_level(model):
    model.unet = Spy(model.unet)
    f_first = latent(0)
    sample_latents(model, ["a red circle"], f_first, None)
    firsts = [z[0, 0, 4:] for z, _, _ in model.unet.seen]
    assert all(torch.equal(firsts[0], other) for other in firsts)
    eps = draw([generator("sample", 0, 0)], 2, 4, 8, 8)[0, 0]
    a = model.schedule.alpha_bar[100]
    assert difference(firsts[0], a.sqrt() * f_first[0] + (1 - a).sqrt() * eps) < 1e-6
    model.unet.seen.clear()
    sample_latents(model, ["a red circle"], f_first, None, cond_noise_t=0)
    assert torch.equal(model.unet.seen[0][0][0, 0, 4:], f_first[0])


def test_text_alone_first_makes_one_frame_and_then_the_clip_from_it(model):
    model.unet = Spy(model.unet)
    z_0 = sample_latents(model, ["a red circle"], cond_noise_t=0)
    lengths = [z.shape[1] for z, _, _ in model.unet.seen]
    assert lengths == [1] * 4 + [4] * 4 and z_0.shape == (1, 4, 4, 8, 8)
    assert all(int((z[:, :, 4:] != 0).sum()) == 0 for z, _, _ in model.unet.seen[:4])
    own_first = model.unet.seen[4][0][0, 0, 4:]
    image = sample_latents(model, ["a red circle"], frames=1)
    assert difference(own_first, image[0, 0]) == 0


def test_the_negative_prompt_replaces_the_empty_one(model):
    model.unet = Spy(model.unet)
    sample_latents(model, ["a red circle"], latent(0), negative="blue")
    _, _, context = model.unet.seen[0]
    assert torch.equal(context[0], model.encode_text(["blue"])[0])
    assert torch.equal(context[1], model.encode_text(["a red circle"])[0])


def test_the_same_seed_gives_the_same_clip_alone_and_in_a_batch(model):
    prompts = ["a red circle", "a blue circle moves left", ""]
    for settings in ({}, {"ddim_eta": 1.0}, {"sampler": "ddpm"}):
        together = sample_latents(model, prompts, seed=3, **settings)
        assert torch.equal(together, sample_latents(model, prompts, seed=3, **settings))
        alone = sample_latents(model, prompts[:1], seed=3, **settings)
        assert difference(together[:1], alone) < 1e-4
        other = sample_latents(model, prompts[:1], seed=4, **settings)
        assert difference(together[:1], other) > 0.1


def test_the_loop_yields_every_z_t():
    z_T = latent(0)[:, None]
    zs = list(denoise_loop(lambda z, t, i: 0.1 * z, z_T, Schedule(), steps=7))
    assert len(zs) == 7 and all(z.shape == z_T.shape for z in zs)


def test_frames_are_pixels_of_the_asked_size(model):
    I_first = torch.rand(1, 3, 16, 16) * 2 - 1
    frames = sample_frames(model, ["a red circle"], I_first, None, frames=3)
    assert frames.shape == (1, 3, 3, 16, 16) and float(frames.abs().max()) <= 1
    larger = sample_frames(model, ["a red circle"], None, None, size=(24, 32))
    assert larger.shape == (1, 4, 3, 24, 32)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps is 0; use 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"tau": -1}, "tau is -1; use 0 to 4"),
        ({"tau": 5}, "tau is 5; use 0 to 4"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"ddim_eta": 1.5}, "ddim_eta is 1.5; use 0 to 1"),
        ({"cond_noise_t": 1000}, "cond_noise_t is 1000; use 0"),
        ({"sampler": "euler"}, "sampler is 'euler'; use ddim or ddpm"),
        ({"frames": 0}, "frames is 0; use 1 or more"),
        ({"size": (16, 18)}, "size is 16x18; both must be multiples of 4"),
    ],
)
def test_settings_out_of_range_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        sample_latents(model, ["a red circle"], latent(0), latent(1), **settings)


def test_generators_differ_by_purpose_and_by_every_part_of_their_key():
    keys = [("sample", 0, 0), ("train", 0, 0), ("sample", 0, 1), ("sample", 1, 0), ("sample", 0)]
    keys.append(("sample", 0, 0, 0))  # numpy alone would take this for the first
    firsts = [float(torch.randn(1, generator=generator(*key))) for key in keys]
    assert len(set(firsts)) == len(firsts)
    assert firsts[0] == float(torch.randn(1, generator=generator(*keys[0])))


def test_a_model_folder_keeps_everything(model, tmp_path):
    from tinydance.model import PixelDance

    model.save(tmp_path)
    again = PixelDance.from_folder(tmp_path)
    assert again.settings == model.settings and again.schedule == model.schedule
    prompts = ["a red circle"]
    assert torch.equal(sample_latents(again, prompts), sample_latents(model, prompts))


def test_stable_diffusions_single_file_becomes_a_model():
    """Names and shapes of the whole file, on the meta device: nothing is missing or left over."""
    import gzip
    import json

    from reference import HERE

    from tinydance.clip import build_vocabulary
    from tinydance.model import PixelDance

    def shapes(name, prefix):
        with gzip.open(HERE / "keys" / f"{name}_keys.txt.gz", "rt") as file:
            pairs = (line.split(" ", 1) for line in file)
            return {prefix + k: torch.empty(json.loads(v), device="meta") for k, v in pairs}

    text = {"token_embedding.weight": (49408, 1024), "positional_embedding": (77, 1024),
            "ln_final.weight": (1024,), "ln_final.bias": (1024,), "logit_scale": ()}  # fmt: skip
    for k in range(24):
        block = f"transformer.resblocks.{k}."
        for name, rows, columns in (
            ("attn.in_proj_", 3072, 1024), ("attn.out_proj.", 1024, 1024),
            ("mlp.c_fc.", 4096, 1024), ("mlp.c_proj.", 1024, 4096),
        ):  # fmt: skip
            text |= {f"{block}{name}weight": (rows, columns), f"{block}{name}bias": (rows,)}
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            text[block + name] = (1024,)
    with torch.device("meta"):
        tensors = {f"cond_stage_model.model.{k}": torch.empty(v) for k, v in text.items()}
        tensors |= shapes("sd21_ldm", "model.diffusion_model.")
        tensors |= shapes("sd_vae_ldm", "first_stage_model.")
        model = PixelDance.from_ldm(tensors, build_vocabulary([]))
    assert sum(p.numel() for p in model.unet.parameters()) == 1_411_245_380
    assert sum(p.numel() for p in model.text_tower.parameters()) == 340_387_840


def test_a_folder_without_parts_says_which(tmp_path):
    from tinydance.model import PixelDance

    with pytest.raises(ValueError, match="is no folder"):
        PixelDance.from_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="config.json"):
        PixelDance.from_folder(tmp_path)
