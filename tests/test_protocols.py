"""The paper's protocols, on tiny models, videos and networks."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import Means, tiny_model

from tinydance.metrics import protocols
from tinydance.run.cli import run_main
from tinydance.toy.measure import sample_hidden
from tinydance.toy.world import render
from tinydance.video.write import save_video
from tinydance.weights.files import read_json

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Classes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x.float().flatten(2).mean(2) / 16, dim=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, an image model, two networks, and real videos of three classes."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.settings = replace(model.settings, frames=10, height=16, width=16, steps=2)
    model.save("model")
    torch.jit.script(Means()).save("features.pt")
    torch.jit.script(Classes()).save("classes.pt")
    for k, scene in enumerate(sample_hidden(0, 6)):
        name = ("Archery", "Biking", "YoYo")[k % 3]
        save_video(torch.from_numpy(render(scene)), f"real/{name}/v{k}.mp4")
        save_video(torch.from_numpy(render(scene)), f"real/video{k}.mp4")
    sentences = [{"video_id": f"video{k // 2}", "caption": f"caption {k}"} for k in range(12)]
    (tmp_path / "captions.json").write_text(json.dumps({"sentences": sentences}))
    monkeypatch.setattr(protocols, "BLOCK", 4)
    return tmp_path


def run(monkeypatch, *arguments, rank=0, world_size=1):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(sys, "argv", ["protocols", *arguments])
    run_main(protocols.main)


UCF = ["ucf101", "--videos", "real", "--model", "model", "--t2i", "model", "--count", "12"]
UCF += ["--i3d", "features.pt", "--inception", "features.pt", "--c3d", "classes.pt"]


def test_ucf101_is_measured_resumed_and_shared_among_ranks(folder, monkeypatch, capsys):
    (folder / "real" / "video0.mp4").parent.joinpath("x").mkdir()
    for stray in folder.glob("real/*.mp4"):
        stray.unlink()
    run(monkeypatch, *UCF, "--out", "one")
    told = capsys.readouterr().out
    assert "| FVD |" in told and "i3d features.pt, sha256" in told
    figures = read_json("one/figures.json")["figures"]
    assert set(figures) == {"FVD", "FID", "IS", "IS, deviation of 10 splits"}
    assert figures["FVD"] > 0 and 1 <= figures["IS"] <= 3
    (folder / "one" / "made_000004.safetensors").unlink()  # as if it had been stopped
    run(monkeypatch, *UCF, "--out", "one")
    assert read_json("one/figures.json")["figures"] == pytest.approx(figures, rel=1e-6)
    run(monkeypatch, *UCF, "--out", "two", rank=1, world_size=2)
    assert "3 of 6 blocks are not made yet" in capsys.readouterr().out
    run(monkeypatch, *UCF, "--out", "two", rank=0, world_size=2)
    assert read_json("two/figures.json")["figures"] == pytest.approx(figures, rel=1e-6)
    with pytest.raises(SystemExit):
        run(monkeypatch, *UCF, "--out", "one", "--seed", "1")
    assert "another seed" in capsys.readouterr().err


def test_msrvtt_takes_one_caption_a_video(folder, monkeypatch, capsys):
    args = ["msrvtt", "--videos", "real", "--model", "model", "--i3d", "features.pt"]
    run(monkeypatch, *args, "--captions", "captions.json", "--out", "m")
    assert read_json("m/about.json")["videos"] == 6 and "| FVD |" in capsys.readouterr().out
    for wrong, words in (([], "needs --captions"), (["--captions", "m/about.json"], "sentences")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *args, *wrong, "--out", "n")
        assert words in capsys.readouterr().err


def test_every_class_of_ucf101_has_a_prompt_of_its_own():
    lines = protocols.PROMPTS.read_text("utf-8").splitlines()
    names, prompts = zip(*(line.split(": ", 1) for line in lines))
    assert len({*names}) == len({*prompts}) == 101


def test_an_unknown_class_is_named(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *UCF, "--out", "one")  # videos beside the classes' folders
    assert "'' is no class of UCF-101" in capsys.readouterr().err
    assert np.array_equal(list(folder.glob("one")), [])
