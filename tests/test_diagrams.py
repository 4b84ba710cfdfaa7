"""The course's diagrams draw what the library does; its player shows every frame of a clip."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from the_course import COURSE, course

from tinydance.conditioning import make_conditions
from tinydance.sampling import guided_denoiser
from tinydance.schedulers import Schedule
from tinydance.unet import UNetConfig, is_temporal

sys.path.insert(0, str(COURSE / "pictures"))
import diagrams


# -------------------------------------------------------------------------------------- diagrams
@pytest.fixture(scope="module")
def passed():
    return diagrams.trace_layers(UNetConfig(), 16, 32, 32)


def test_the_u_has_the_layers_of_the_code_in_its_order(passed):
    both = ["resnets", "temp_convs", "attentions", "temp_attentions"]
    assert diagrams.read_block(passed, "down_blocks.0") == (both, 2, "320 32 32")
    assert diagrams.read_block(passed, "down_blocks.3") == (both[:2], 2, "1280 4 4")
    assert diagrams.read_block(passed, "mid_block") == (both + both[:2], 1, "1280 4 4")
    assert diagrams.read_block(passed, "up_blocks.0") == (both[:2], 3, "1280 4 4")
    assert diagrams.read_block(passed, "up_blocks.2") == (both, 3, "640 16 16")
    assert passed[-1] == ("conv_out", "conv_out", (4, 32, 32))


def test_what_is_drawn_as_temporal_is_what_an_image_does_not_pass(passed):
    image = diagrams.trace_layers(UNetConfig(), 1, 32, 32)
    left = [layer for layer in passed if layer.kind not in diagrams.IN_TIME]
    assert [layer[:2] for layer in image] == [layer[:2] for layer in left]
    for layer in passed:
        names = f"{layer.kind}.weight", f"{layer.block}.{layer.kind}.0.weight"
        assert any(map(is_temporal, names)) == (layer.kind in diagrams.IN_TIME)


def test_slots_are_those_of_make_conditions():
    first, last, image = (diagrams.fill_slots(g, 16 if g else 1) for g in diagrams.CASES.values())
    assert first == ["first", *["0"] * 14, "last"]
    assert last == ["first", *["0"] * 15] and image == ["0"]
    f = torch.ones(1, 4, 1, 1)
    eps, never = torch.ones(1, 2, 4, 1, 1), torch.tensor([False])
    dropped = make_conditions({"first": f, "last": f}, 16, eps, 0.5, never)["c_image"]
    assert [bool(slot.any()) for slot in dropped[0]] == [slot != "0" for slot in last]


def test_the_signal_at_each_step_is_the_schedules():
    curve = diagrams.tau_curve(50, 25)
    assert [t for _, t, _, _ in curve] == list(range(981, 0, -20))
    alpha_bar = Schedule().alpha_bar
    for i, t, signal, seen in curve:
        assert signal == pytest.approx(float(alpha_bar[t].sqrt())) and seen == (i < 25)


def test_the_guided_vectors_are_those_of_the_denoiser():
    u, c = (torch.tensor(x).view(1, 1, 2, 1, 1) for x in (diagrams.EPS_U, diagrams.EPS_C))
    c_empty, c_text = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)

    def network(z, t, text):
        return torch.where(text[:, :, :, None, None] > 0, c, u)

    for w in diagrams.WEIGHTS:
        denoise = guided_denoiser(network, c_text, c_empty, {"c": u}, {"c": u}, 1, w)
        got = denoise(u, 0, 0).flatten().numpy()
        assert got == pytest.approx(diagrams.guide(diagrams.EPS_U, diagrams.EPS_C, w))


def test_a_chain_of_n_clips_has_1_plus_15_n_frames():
    for clips in (1, 2, 3):
        shown = diagrams.chain_frames(clips, 16)
        assert sum(shown, []) == list(range(1 + 15 * clips)) and len(shown) == clips


@pytest.mark.parametrize("name", ["unet", "c_image", "tau_steps", "guidance", "chain"])
def test_a_diagram_is_small_and_as_wide_as_a_page(name, monkeypatch, tmp_path):
    monkeypatch.setattr(diagrams, "HERE", tmp_path)
    with course.plt.rc_context():
        course.plt.rcdefaults()  # `course` sets its own
        getattr(diagrams, {"tau_steps": "draw_tau"}.get(name, f"draw_{name}"))()
    for file in (tmp_path / f"{name}.png", COURSE / "pictures" / f"{name}.png"):
        assert Image.open(file).width == 900 and file.stat().st_size < 60_000


# -------------------------------------------------------------------------------------- the player
def clip(frames: int, seed: int = 0) -> torch.Tensor:
    """Few colours, so that none is lost; the second frame is the first again."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (9, 3))
    frames = colours[rng.integers(0, 9, (frames, 5, 7))].astype(np.uint8)
    frames[1] = frames[0]
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def read_tags(html: str) -> list[tuple[str, dict]]:
    tags, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, given: tags.append((tag, dict(given)))
    parser.feed(html)
    return tags


def test_a_clip_is_shown_in_three_forms_with_its_words_escaped():
    words = 'a "red" circle & <script>alert(1)</script>'
    shown, about = course.play(clip(6), alt=words)._repr_mimebundle_()
    assert set(shown) == {"text/html", "image/png", "text/plain"} and shown["text/plain"] == words
    assert about["image/png"] == {"width": 14, "alt": words}
    [(tag, given)] = read_tags(shown["text/html"])
    assert tag == "img" and given["alt"] == words and given["width"] == "14"
    assert given["src"] == f"data:image/png;base64,{shown['image/png']}"
    assert given["onload"] == f"({course.PLAYER})(this, 4)" and "http" not in course.PLAYER


def test_players_on_one_page_share_nothing():
    htmls = [course.play(clip(6, seed)).html for seed in range(3)]
    tags = read_tags("".join(htmls))
    assert [tag for tag, _ in tags] == ["img"] * 3 and len({given["src"] for _, given in tags}) == 3
    assert not any("id" in given or "name" in given for _, given in tags)
    assert "getElementById" not in course.PLAYER and "querySelector" not in course.PLAYER


def test_without_scripts_every_frame_moves_at_its_time():
    first, second = clip(6), clip(6, seed=1)
    picture = Image.open(BytesIO(course.play(first, second, fps=8).png))
    assert picture.n_frames == 6 and picture.size == (7 + 2 + 7, 5)
    for k in range(6):
        picture.seek(k)
        frame = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(frame[..., :7], first[k]) and torch.equal(frame[..., 9:], second[k])
        assert picture.info["duration"] == 125


PAGE = """
const element = () => ({ style: {}, append() {}, isConnected: true, getContext: () => ({
  createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }),
  putImageData: (pixels) => shown.push([...pixels.data]) }) });
const shown = [], made = [], ticks = [];
globalThis.document = { createElement: (kind) => (made.push(element()), made.at(-1)) };
globalThis.matchMedia = () => ({ matches: false });
globalThis.setInterval = (tick, wait) => ticks.push([tick, wait]);
const image = { src: SRC, alt: "words", width: 28, replaceWith() {
  const [canvas, button, slider, label] = made;
  for (let k = 1; k < slider.max + 2; k++) ticks[0][0]();   // once round
  button.onclick(); ticks[0][0]();                          // paused
  slider.value = "2"; slider.oninput();
  console.log(JSON.stringify({ shown, words: [canvas.ariaLabel, button.textContent,
    label.textContent], wait: ticks[0][1] }));
} };
(PLAYER)(image, 4);
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not there")
def test_the_player_shows_the_clips_own_pixels_and_names_frame_and_second():
    frames = clip(6)
    player = course.play(frames)
    src = read_tags(player.html)[0][1]["src"]
    page = PAGE.replace("SRC", json.dumps(src)).replace("PLAYER", course.PLAYER)
    done = subprocess.run(["node", "-e", page], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    wanted = [frame.permute(1, 2, 0).reshape(-1, 3).tolist() for frame in frames]
    wanted = [sum(([*pixel, 255] for pixel in frame), []) for frame in wanted]
    assert seen["shown"] == [*wanted, wanted[0], wanted[2]] and seen["wait"] == 250
    assert seen["words"] == ["words", "play", " frame 3 of 6, 0.50 s"]


def test_a_strip_has_its_captions_for_words():
    shown = course.strip([clip(6)] * 2, ["one", "two"])
    _, about = shown._repr_mimebundle_()
    assert about["image/png"]["alt"] == "a film strip: one; two"
    assert course.strip([clip(6)], alt="a star").alt == "a star"
