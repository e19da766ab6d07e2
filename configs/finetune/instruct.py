"""InstructBLIP on one's own instructions: Q-Former and projection train (arXiv 2305.06500)."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("instruct")
    common.set_schedule(config)
    config.data.mixture_exponent = 0.5  # §2.4: several sources by the square root of their size
    return config
