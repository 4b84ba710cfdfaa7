"""A training small enough for tests: `python tiny_training.py STAGE field=value ...`, or imported.

Also what torchrun starts, which a test cannot patch from outside.
"""

import sys
from dataclasses import replace
from unittest.mock import patch

import torch
from reference import TINY

from tinydance.config import NETWORKS, make_config
from tinydance.run import stages
from tinydance.run.cli import run_main
from tinydance.vae import VAEConfig

torch.set_num_threads(1)

FIELDS = {"init": "", "height": 16, "width": 16, "frames": 4, "dtype": "float32", "device": "cpu"}
FIELDS |= {"batch": 4, "image_batch": 8, "image_every": 3, "warmup": 2}
FIELDS |= {"vae_steps": 4, "text_steps": 3, "image_steps": 4, "video_steps": 8}
FIELDS |= {"save_every": 4, "sample_every": 1000, "steps": 2, "workers": 0}


def tiny_train(stage: str = "all", dropout: float = 0.1, validated: int = 4, **changes) -> None:
    unet = replace(TINY["unet"], attention_levels=(False, True), temporal_dropout=dropout)
    vae = replace(TINY["vae"], scaling_factor=VAEConfig.scaling_factor)
    NETWORKS["toy"].update(TINY | {"unet": unet, "vae": vae})
    with patch.multiple(stages, VALIDATED=validated, LEVELS=(0.1, 0.9)):
        stages.train(make_config("toy", **(FIELDS | changes)), stage)


def command(monkeypatch, script, *words):
    """Run a script, or a room's command, as if it were typed."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    monkeypatch.setitem(stages.STAGES, "video", stages.STAGES["video"])  # back afterwards
    run_main(script.main)


if __name__ == "__main__":
    stage, *pairs = sys.argv[1:]
    changes = dict(pair.split("=") for pair in pairs)
    tiny_train(stage, dropout=0.0, **changes)
