"""Measures: equal to public implementations on the same features, and clear about traps.

`golden/metrics.npz` has features, with the answers of pytorch-fid 0.3.0 and torch-fidelity 0.4.0;
`golden/clip_image.npz` what transformers' CLIPModel answers, its weights a formula of their names.
"""

import json

import numpy as np
import pytest
import torch
from reference import HERE, Means, difference, formula_weight, golden

from tinydance.clip import ImageConfig, Tokenizer
from tinydance.metrics import CLIP, Detector, clip_similarity, frechet_distance, inception_score
from tinydance.toy.measure import bootstrap
from tinydance.weights.files import write_json
from tinydance.weights.safetensors import save_safetensors

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
KNOWN = np.load(HERE / "golden" / "metrics.npz")
X, Y, P = (torch.from_numpy(KNOWN[name]) for name in "xyp")


def test_distances_equal_those_of_public_implementations():
    assert frechet_distance(X, Y) == pytest.approx(float(KNOWN["fid"]), abs=1e-6)
    assert frechet_distance(Y, X) == pytest.approx(float(KNOWN["fid"]), abs=1e-6)
    assert inception_score(P) == pytest.approx(KNOWN["isc"].tolist(), abs=1e-9)


def test_a_frechet_distance_is_what_gaussians_say():
    assert frechet_distance(X, X) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(X, X + 2) == pytest.approx(6 * 4, rel=1e-9)  # 6 numbers, each 2 off
    spread = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = spread - spread.mean(0)
    # variances v and 9 v: v + 9 v - 2 sqrt(9 v^2) = 4 v
    expected = 4 * float(spread.T.cov().trace())
    assert frechet_distance(spread, 3 * spread) == pytest.approx(expected, rel=1e-9)


def test_a_flat_covariance_is_no_nan():
    flat = X.clone()
    flat[:, 0] = 1.0
    assert 0 < frechet_distance(flat, X) < 100


def test_an_inception_score_goes_from_one_to_the_number_of_classes():
    clear = torch.eye(4).repeat(5, 1)
    assert inception_score(clear, 1)[0] == pytest.approx(4)
    assert inception_score(torch.full((20, 4), 0.25))[0] == pytest.approx(1)
    assert inception_score(clear[:1].repeat(20, 1))[0] == pytest.approx(1)


def test_clip_similarity_is_the_mean_cosine():
    frames = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [0, 1]]])  # n f d
    assert clip_similarity(frames, torch.tensor([[1.0, 0], [0, 1]])) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="not one text a clip"):
        clip_similarity(frames, torch.eye(3)[:, :2])


@pytest.mark.parametrize(
    "compute, words",
    [
        (lambda: frechet_distance(X[:6], Y), "6 samples for features of 6 numbers"),
        (lambda: frechet_distance(X, Y[:, :5]), "of 6 and 5 numbers: two detectors"),
        (lambda: frechet_distance(X / 0, Y), "finite"),
        (lambda: frechet_distance(X[None], Y), r"\(n, d\)"),
        (lambda: inception_score(P.log()), "use a softmax"),
        (lambda: inception_score(P[:9]), "9 samples for 10 splits"),
    ],
)
def test_traps_are_errors(compute, words):
    with pytest.raises(ValueError, match=words):
        compute()


def test_a_bootstrap_interval_holds_the_mean():
    values = np.random.default_rng(0).normal(5, 1, 400)
    low, high = bootstrap(values)
    assert low < values.mean() < high and 0.15 < high - low < 0.25  # 2 x 1.96 / sqrt(400)
    assert bootstrap(values) == (low, high)


# ---------------------------------------------------------------------------------- the networks
@pytest.fixture
def detector_file(tmp_path):
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    return tmp_path / "means.pt"


def test_a_detector_is_called_as_its_kind_wants(detector_file):
    clips = torch.randint(0, 256, (2, 16, 3, 8, 8), dtype=torch.uint8)
    means = clips.float().mean((1, 3, 4))
    assert difference(Detector("i3d", detector_file)(clips), means / 127.5 - 1) < 1e-5
    assert difference(Detector("c3d", detector_file)(clips), means) < 1e-3
    frames = Detector("inception", detector_file)(clips)
    assert difference(frames, clips.float().mean((3, 4)).flatten(0, 1)) < 1e-3
    assert "i3d means.pt, sha256 " in Detector("i3d", detector_file).describe()


def test_what_would_give_a_wrong_figure_is_refused(detector_file, tmp_path):
    detector = Detector("i3d", detector_file)
    with pytest.raises(ValueError, match="must be uint8"):
        detector(torch.rand(2, 16, 3, 8, 8))  # floats in [0, 1]
    with pytest.raises(ValueError, match="must be uint8"):
        detector(torch.zeros(2, 3, 16, 8, 8, dtype=torch.uint8))  # channels before frames
    with pytest.raises(ValueError, match="clips of 6 frames; i3d needs 10"):
        detector(torch.zeros(2, 6, 3, 8, 8, dtype=torch.uint8))
    (tmp_path / "no.pt").write_bytes(b"no network")
    for path in (tmp_path / "no.pt", tmp_path / "nowhere.pt"):
        with pytest.raises(ValueError, match=f"{path.name}: cannot read as TorchScript"):
            Detector("i3d", path)


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """The golden file's CLIP in a folder of the hub's layout, and the file's arrays."""
    config, keys, arrays = golden("clip_image")
    tensors = {k: torch.from_numpy(np.asarray(formula_weight(k, s))) for k, s in keys.items()}
    tensors |= {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_safetensors(tensors, tmp_path / "model.safetensors")
    names = {"text_config": config["text"], "vision_config": config["vision"]}
    write_json(tmp_path / "config.json", names | {"projection_dim": config["projection_dim"]})
    members = {"end_id": 98, "__call__": lambda self, texts: arrays["ids"]}
    monkeypatch.setattr(Tokenizer, "from_folder", lambda path: type("Stub", (), members)())
    return CLIP(tmp_path), arrays


def test_both_towers_give_what_the_reference_gives(clip):
    clip, known = clip
    pixels = torch.as_tensor(known["pixels"])
    tokens = clip.image_tower(pixels)
    assert difference(tokens, known["last_hidden_state"]) < 1e-4
    assert difference(clip.image_tower.summarise(tokens), known["pooler_output"]) < 1e-4
    assert difference(clip.encode_images(pixels), known["image_embeds"]) < 1e-4
    assert difference(clip.encode_texts(["a", "b"]), known["text_embeds"]) < 1e-4


def test_pictures_of_any_size_are_resized_for_the_image_tower(clip):
    clip, known = clip
    pixels = torch.as_tensor(known["pixels"])
    large = torch.nn.functional.interpolate(pixels, scale_factor=4, mode="nearest")
    assert clip.encode_images(large).shape == (2, 24)


def test_an_activation_that_is_none_is_named():
    with pytest.raises(ValueError, match="hidden_act"):
        ImageConfig(hidden_act="sine")


def test_a_folder_that_is_no_clip_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match="no CLIP's: it lacks"):
        CLIP(tmp_path)
