"""Networks that turn clips and captions into features: files that the user names.

The field's are TorchScript files, so no package is needed: `i3d_torchscript.pt` for FVD and
`c3d_ucf101.pt` for the Inception Score of videos [StyleGAN-V], `inception-2015-12-05.pt` for FID
[StyleGAN3]; CLIP is a folder of the hub. Every figure names its network by a sha256, since two I3Ds
give two FVDs. A TorchScript file holds code: use files that you trust.
Not here: what is computed of features (`distances.py`).
"""

import hashlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydance.clip import ImageConfig, ImageTower, TextConfig, TextTower, Tokenizer
from tinydance.weights import build, load_into, load_weights, read_config, reading

# kind of file -> how its network is called, beside pixels in 0 ... 255: clips (n, 3, f, H, W) or
# pictures (n, 3, H, W)
CALLS = {"i3d": {"rescale": True, "resize": True, "return_features": True}, "c3d": {}}
CALLS |= {"inception": {"return_features": True}}
FEWEST = 10  # frames of a clip: I3D pools over time, and fails for fewer


class Detector:
    """A TorchScript network. kind: a name in CALLS. Raises ValueError for no such file."""

    def __init__(self, kind: str, path: str | Path, device: str = "cpu"):
        self.kind, self.path, self.device = kind, Path(path), device
        try:
            self.sha256 = sha256(path)
            with warnings.catch_warnings():  # torch calls TorchScript old, and has nothing newer
                warnings.simplefilter("ignore", DeprecationWarning)  # for files of others
                self.network = torch.jit.load(path, map_location=device).eval()
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path}: cannot read as TorchScript: {reason}") from None

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """uint8 (n, f, 3, H, W) -> (n, d); "inception" takes every frame for itself: (n f, d).

        In float32, whatever the models that made the clips are sampled in."""
        pixels, f = check_clips(clips).to(self.device), clips.shape[1]
        is_of_frames = self.kind == "inception"
        if not is_of_frames and f < FEWEST:
            raise ValueError(f"clips of {f} frames; {self.kind} needs {FEWEST} or more")
        x = pixels.flatten(0, 1) if is_of_frames else pixels.transpose(1, 2).float()
        with torch.autocast(torch.device(self.device).type, enabled=False):
            return self.network(x, **CALLS[self.kind]).float().cpu()

    def describe(self) -> str:
        return f"{self.kind} {self.path.name}, sha256 {self.sha256[:16]}"


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_clips(clips: Tensor) -> Tensor:
    """Raises ValueError for other than uint8 (n, f, 3, H, W): floats in [-1, 1] or another order of
    axes would give a figure, and a wrong one."""
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[2] != 3:
        raise ValueError(f"{clips.dtype} {[*clips.shape]}: clips must be uint8 (n, f, 3, H, W)")
    return clips


class CLIP(nn.Module):
    """Both towers of CLIP with their projections to one space, from a hub's folder: CLIPSIM takes
    openai/clip-vit-base-patch32. Raises ValueError for what is missing or does not fit."""

    def __init__(self, path: str | Path):
        super().__init__()
        config, file = read_config(path), f"{path}/config.json"
        with reading(file):
            if missing := {"text_config", "vision_config", "projection_dim"} - config.keys():
                raise ValueError(f"no CLIP's: it lacks {', '.join(sorted(missing))}")
        text = build(TextConfig, config["text_config"], file)
        image = build(ImageConfig, config["vision_config"], file)
        self.text_tower, self.image_tower = TextTower(text), ImageTower(image)
        dim = config["projection_dim"]
        self.text_projection = nn.Linear(text.hidden_size, dim, bias=False)
        self.visual_projection = nn.Linear(image.hidden_size, dim, bias=False)
        tensors = load_weights(path)
        # older files hold 0 ... 76 as position_ids; the logit scale belongs to training
        left_out = ("position_ids", "logit_scale")
        own = {"text_model": "text_tower.text_model", "vision_model": "image_tower.vision_model"}
        renamed = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if not name.endswith(left_out):
                renamed[f"{own.get(first, first)}.{rest}"] = tensor
        load_into(self, renamed)
        self.tokenizer, self.path = Tokenizer.from_folder(path), Path(path)
        self.eval().requires_grad_(False)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) in [-1, 1] -> unit vectors (n, d)."""
        tokens = self.image_tower(pixels)
        return F.normalize(self.visual_projection(self.image_tower.summarise(tokens)), dim=-1)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Captions -> unit vectors (n, d), each from its first end token [CLIP]."""
        ids = self.tokenizer(texts).to(self.text_projection.weight.device)
        ends = (ids == self.tokenizer.end_id).int().argmax(dim=1)
        at_end = self.text_tower(ids)[torch.arange(len(ids)), ends]
        return F.normalize(self.text_projection(at_end), dim=-1)

    def describe(self) -> str:
        files = sorted(path for path in self.path.glob("*model*") if path.is_file())
        return f"clip {self.path.name}, {files[0].name}, sha256 {sha256(files[0])[:16]}"
