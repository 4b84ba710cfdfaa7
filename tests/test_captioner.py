"""The captioner: its questions, that it reads from left to right, and what its command writes."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from reference import difference, tiny_model
from tiny_training import command

from tinydance.toy import captioner
from tinydance.toy.captioner import ASKED, LENGTH, WORDS, Captioner, CaptionerConfig, answer_all
from tinydance.toy.world import describe, sample_scene
from tinydance.video.write import save_video
from tinydance.weights import save_weights

TINY = CaptionerConfig(frames=2, prefix=3, width=16, channels=4, places=64)


def draw_scenes(count):
    return [sample_scene(np.random.default_rng([7, n])) for n in range(count)]


def test_questions_and_answers_are_of_known_words_and_fit():
    for scene in draw_scenes(300):
        known = answer_all(scene)
        assert known.keys() == {*ASKED}
        for question, answer in known.items():
            words = f"{question} {answer}".split()
            assert {*words} <= {*WORDS} and len(words) < LENGTH
        assert known["describe it"] == describe(replace(scene, says_background=True))
        assert known["what moves"] == f"a {known['which colour']} {known['which shape']}"


def test_a_word_depends_on_the_clip_and_on_the_words_before_it_alone():
    torch.manual_seed(0)
    network = Captioner(TINY).eval()
    z, ids = torch.randn(2, 2, 4, 8, 8), torch.randint(1, len(WORDS), (2, 9))
    logits, other = network(z, ids), ids.clone()
    assert logits.shape == (2, 9, len(WORDS))
    other[:, 5] = 0
    moved = (network(z, other) - logits).abs().amax((0, 2))
    assert moved[:5].max() < 1e-5 < moved[5:].min()
    assert difference(network(z.flip(1), ids), logits) > 1e-4  # the order of the frames counts


def test_an_answer_ends_where_it_says_so_and_strange_words_are_refused(monkeypatch):
    network, told = Captioner(TINY).eval(), [*map(WORDS.index, "a red circle".split()), 0, 5]

    def forward(z, ids):
        return torch.eye(len(WORDS))[[told[ids.shape[1] - 2]]].expand(len(z), 1, -1)

    monkeypatch.setattr(network, "forward", forward)
    assert network.answer(torch.zeros(2, 2, 4, 8, 8), "what moves") == ["a red circle"] * 2
    with pytest.raises(ValueError, match="'who' is no word of a question"):
        network.answer(torch.zeros(1, 2, 4, 8, 8), "who moves")


def test_it_learns_and_the_tower_does_so_only_where_it_is_asked_to(monkeypatch):
    vae = tiny_model().vae.requires_grad_(False)
    scene = replace(draw_scenes(1)[0], other=None)
    monkeypatch.setattr(captioner, "sample_scene", lambda rng: scene)  # one clip, by heart
    monkeypatch.setattr(captioner, "LR", 1e-2)
    config = replace(TINY, width=32, places=32 * 32)
    network, same = captioner.train(vae, config, steps=60, size=8)
    z = captioner.see(vae, [scene], 2)
    answers = {question: network.answer(z, question)[0] for question in ASKED}
    assert sum(answers[q] == answer_all(scene)[q] for q in ASKED) >= 6, answers
    _, moved = captioner.train(vae, config, steps=1, frozen=False, size=2)
    weights = [[*part.encoder.parameters()] for part in (vae, same, moved)]
    assert all(map(torch.equal, *weights[:2])) and not any(
        p.requires_grad for p in vae.parameters()
    )
    assert not all(map(torch.equal, weights[0], weights[2]))


def test_captions_are_written_beside_videos_that_have_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save("model")
    config = replace(TINY, places=model.latent_size(16, 16)[0] ** 2)
    save_weights("captioner", asdict(config), Captioner(config).state_dict())
    for name in ("a", "b/c"):
        save_video(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), f"clips/{name}.mp4", fps=4)
    (tmp_path / "clips/a.txt").write_text("mine")
    (tmp_path / "clips/d.mp4").write_text("no video")
    words = "clips", "--model", "model", "--captioner", "captioner"
    command(monkeypatch, captioner, *words, "--ask", "where to")
    assert not (tmp_path / "clips/b/c.txt").exists()
    command(monkeypatch, captioner, *words)
    assert (tmp_path / "clips/a.txt").read_text() == "mine"
    assert {*(tmp_path / "clips/b/c.txt").read_text().split()} <= {*WORDS}
    shown = capsys.readouterr().out
    assert "clips/a.mp4: " in shown and "clips/d.mp4: not_a_video" in shown
    with pytest.raises(SystemExit):
        command(monkeypatch, captioner)
    assert "give a FOLDER of videos, or --train STEPS" in capsys.readouterr().err
