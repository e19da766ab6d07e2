"""Demo, run 2: a small OPT learns the language of the captions (task `language_model`)."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("language_model")
    common.set_shapes(config)
    config.steps = 150
    config.optimizer.peak_lr = 2e-3
    return config
