"""OpenMoji, run 1: a ViT by contrast with the names of the emoji (task `clip`)."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("clip")
    common.set_openmoji(config)
    config.steps = 700
    config.model.embed_dim = 128
    config.model.text.update(
        width=128, num_layers=2, num_heads=4, mlp_width=512, max_positions=32,
        initializer_range=0.05,
    )  # fmt: skip
    return config
