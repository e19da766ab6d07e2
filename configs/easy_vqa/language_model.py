"""easy-VQA, run 2: a small OPT reads questions and answers without pictures."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("language_model")
    common.set_easy_vqa(config)
    config.steps = 300
    config.data.templates = ("vqa:train",)  # of which {} alone is one
    config.optimizer.peak_lr = 8e-3
    return config
