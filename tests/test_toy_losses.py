"""How the toy world's VAE, tokenizer and text tower are made: the objectives and their helpers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import HERE, TINY, difference, fill, golden

from tinydance.clip import TextTower, Tokenizer
from tinydance.model import Batch
from tinydance.noise import draw, generator
from tinydance.toy.losses import (
    ContrastiveLoss,
    ReconstructionLoss,
    build_vocabulary,
    init_clip,
    whiten,
)
from tinydance.vae import VAE, VAEConfig, to_pixels
from tinydance.weights import pick

WORDS = "a red reddish redder circle circles bounces naïve banana blue".split()


def golden_vae():
    config, _, _ = golden("vae")
    return fill(VAE(VAEConfig(**pick(config, VAEConfig)))).requires_grad_(True)


def small_tower(tokenizer):
    torch.manual_seed(0)
    return TextTower(replace(TINY["text"], vocab_size=len(tokenizer.vocab)))


def make_batch(b, f, size=8, sample_ids=None, captions=None):
    """A batch of noise as a data source gives it."""
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (b, f, 3, size, size), dtype=torch.uint8, generator=g)
    ids = sample_ids or list(range(b))
    return Batch(0, frames, captions or [""] * b, ids, [""] * b)


# ---- the VAE -------------------------------------------------------------------------------------


@torch.no_grad()
def test_whitened_latents_are_even_and_give_the_same_pictures(tmp_path):
    vae = golden_vae()
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = vae.decode_video(vae.encode_video(x[None]))
    whiten(vae, x)
    assert vae.config.scaling_factor == 1
    z = vae.encode_video(x[None])[0].transpose(0, 1).flatten(1).double()
    assert difference(z.cov(), torch.eye(4)) < 1e-3 and z.mean(1).abs().max() < 1e-3
    assert difference(vae.decode_video(vae.encode_video(x[None])), before) < 1e-4
    assert vae.encode(x)[1].exp().max() < 1e-12
    vae.save(tmp_path)
    again = VAE.from_folder(tmp_path)
    assert difference(again.decode_video(again.encode_video(x[None])), before) < 1e-4


def test_the_reconstruction_loss_is_its_formula():
    vae, batch = golden_vae(), make_batch(2, 1)
    loss = ReconstructionLoss(vae, seed=3)
    numbers = loss(batch)
    assert [name for name, number in numbers.items() if number.requires_grad] == ["loss"]
    x = to_pixels(batch.frames[:, 0])
    with torch.no_grad():
        mean, logvar = vae.encode(x)
        eps = draw([generator("vae", 3, n) for n in batch.sample_ids], *mean.shape[1:])
        y = vae.decode(mean + (0.5 * logvar).exp() * eps)
    square = float((y - x).square().mean())
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    assert abs(float(numbers["kl"]) - float(kl.mean())) < 1e-4
    assert abs(float(numbers["loss"].detach()) - square - loss.KL_WEIGHT * float(kl.mean())) < 1e-6
    loss.KL_WEIGHT = 1.0
    assert abs(float(loss(batch)["loss"].detach()) - square - float(kl.mean())) < 1e-4


def test_the_reconstruction_loss_is_a_function_of_the_samples_numbers():
    loss = ReconstructionLoss(golden_vae(), seed=0)
    first = loss(make_batch(2, 1, sample_ids=[5, 6]))["loss"]
    assert torch.equal(first, loss(make_batch(2, 1, sample_ids=[5, 6]))["loss"])
    assert not torch.equal(first, loss(make_batch(2, 1, sample_ids=[5, 7]))["loss"])


# ---- the text tower ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_tower_starts_with_answers_of_ordinary_size():
    tower = small_tower(build_vocabulary(WORDS))
    init_clip(tower)
    c_text = tower(torch.randint(50, (4, 12)))
    assert math.isclose(c_text.std().item(), 1.0, abs_tol=0.1)
    weights = dict(tower.named_parameters())
    for name, std in (  # CLIP's own standard deviations, for a width of 16 and one layer
        ("embeddings.token_embedding", 0.02),
        ("embeddings.position_embedding", 0.01),
        ("encoder.layers.0.self_attn.q_proj", 16**-0.5),
        ("encoder.layers.0.self_attn.out_proj", 32**-0.5),
        ("encoder.layers.0.mlp.fc1", 32**-0.5),
        ("encoder.layers.0.mlp.fc2", 32**-0.5),
    ):
        assert float(weights[f"text_model.{name}.weight"].std()) == pytest.approx(std, rel=0.15)
    assert all(int(p.count_nonzero()) == 0 for k, p in weights.items() if "_proj.bias" in k)


@torch.no_grad()
def test_the_contrastive_loss_is_cross_entropy_of_cosines_in_which_equal_captions_are_right():
    """Pair by pair, in both directions, with the text's vector taken at its end token."""
    tokenizer = build_vocabulary(WORDS, length=8)
    loss = ContrastiveLoss(small_tower(tokenizer), tokenizer, width=8)
    captions = ["a red circle", "blue", "a red circle"]
    batch = make_batch(3, 5, captions=captions)
    numbers = loss(batch)
    video, text = [], []
    for k, caption in enumerate(captions):
        four = to_pixels(batch.frames[k, [0, 1, 2, 4]]).flatten(0, 1)  # linspace(0, 4, 4), whole
        video.append(loss.video_tower(four[None])[0])
        ids = tokenizer([caption])
        end = ids[0].tolist().index(tokenizer.end_id)
        text.append(loss.projection(loss.tower(ids)[0, end]))
    scores = torch.tensor([[float(F.cosine_similarity(v, w, dim=0)) for w in text] for v in video])
    scores = scores / 0.07  # CLIP's first temperature
    slow, hits = 0.0, 0
    for k in range(3):
        right = [n for n in range(3) if captions[n] == captions[k]]
        for row in (scores[k], scores[:, k]):
            slow -= float(sum(row.log_softmax(0)[n] for n in right)) / len(right) / 6
        hits += int(scores[k].argmax()) in right
    assert abs(float(numbers["loss"].detach()) - slow) < 1e-4
    assert float(numbers["accuracy"]) == pytest.approx(hits / 3)


# ---- the tokenizer -------------------------------------------------------------------------------


def test_a_built_vocabulary_has_each_word_as_one_token(tmp_path):
    built = build_vocabulary(WORDS)
    ids = built([" ".join(WORDS)])[0].tolist()
    assert ids[1 : 1 + len(WORDS)] == [built.vocab[word_symbol(word)] for word in WORDS]
    assert ids[1 + len(WORDS)] == built.end_id == len(built.vocab) - 1
    built.save(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    assert (loaded.vocab, loaded.merges) == (built.vocab, built.merges)


def word_symbol(word):
    return word.replace("ï", "Ã¯") + "</w>"  # the two bytes of the letter, as symbols


def test_a_built_vocabulary_spells_other_words_and_has_clips_order():
    tokenizer = Tokenizer.from_folder(HERE / "golden" / "tokenizer")
    built = build_vocabulary(WORDS)
    assert [built.vocab[s] for s in ("!", "!</w>", "a</w>")] == [0, 256, 320]
    assert all(built.vocab[s] == i for s, i in tokenizer.vocab.items() if i < 512)
    assert built(["zq"])[0, 1:4].tolist() == [built.vocab["z"], built.vocab["q</w>"], built.end_id]


def test_no_two_texts_of_a_built_vocabulary_share_their_ids():
    built = build_vocabulary(WORDS)
    texts = WORDS + ["red circle", "redcircle", "re d", "blues", "日本", "é"]
    assert len({tuple(row) for row in built(texts).tolist()}) == len(texts)


def test_a_vocabulary_may_be_for_shorter_texts(tmp_path):
    short = build_vocabulary(WORDS, length=8)
    ids = short(["a b c d e f g h"])
    assert ids.shape == (1, 8) and ids[0, -1] == short.end_id
    assert short.dropped_words("a b c d e f g h") == "g h"
    short.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.length == 8 and torch.equal(again(["a b"]), short(["a b"]))
