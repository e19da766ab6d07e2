"""Demo, run 4: stage 2. The Q-Former learns to speak to the frozen language model."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("stage2")
    common.set_shapes(config)
    config.init.vision = "runs/demo/vision"
    config.init.language_model = "runs/demo/language_model"
    config.init.qformer = "runs/demo/stage1"
    config.steps = 1800
    config.optimizer.peak_lr = 4e-3
    config.optimizer.warmup_steps = 100
    config.eval.num_beams = 1
    config.eval.max_new_tokens = 12
    return config
