"""A training small enough for tests: `python tiny_training.py STAGE field=value ...`, or imported.

Also what torchrun starts, which a test cannot patch from outside.
"""

import sys

import torch

from tinydance import config as config_module
from tinydance.config import make_config
from tinydance.run.stages import train

torch.set_num_threads(1)

NETWORKS = {
    "unet": {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "attention_levels": (False, True),
        "temporal_dropout": 0.1,
    },
    "vae": {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "text": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
    },
}
FIELDS = {
    "init": "", "height": 16, "width": 16, "frames": 4,
    "batch": 4, "image_batch": 8, "image_every": 3,
    "vae_steps": 4, "text_steps": 3, "image_steps": 4, "video_steps": 8, "save_every": 4,
    "sample_every": 1000, "warmup": 2, "dtype": "float32", "device": "cpu",
}  # fmt: skip


def tiny_train(stage: str = "all", dropout: float = 0.1, **changes) -> None:
    config_module.NETWORKS["toy"].update(NETWORKS)
    config_module.NETWORKS["toy"]["unet"]["temporal_dropout"] = dropout
    train(make_config("toy", **(FIELDS | changes)), stage)


if __name__ == "__main__":
    stage, *pairs = sys.argv[1:]
    changes = dict(pair.split("=") for pair in pairs)
    tiny_train(stage, dropout=0.0, **changes)
