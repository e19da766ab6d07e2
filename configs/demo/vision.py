"""Demo, run 1: a small ViT learns by contrast with captions (task `clip`), on the `shapes` set."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("clip")
    common.set_shapes(config)
    config.steps = 370
    config.optimizer.peak_lr = 4e-3
    config.batch_size = 128
    config.model.embed_dim = 64
    config.model.text.update(
        width=128, num_layers=2, num_heads=4, mlp_width=256, max_positions=32,
        initializer_range=0.05,
    )  # fmt: skip
    return config
