"""OpenMoji, run 3: stage 2. A Q-Former learns to speak to a frozen SmolLM2-135M about drawings."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("stage2", language_model="llama")
    common.set_openmoji(config)
    config.init.vision = "runs/openmoji/vision"
    config.init.language_model = "runs/smollm2"  # by `jaxblip convert`, see docs/checkpoints.md
    config.batch_size = 16
    config.steps = 300
    config.log_every_steps = 10
    config.optimizer.name = "adamw"  # at so few steps ahead of Muon, which runs 1 and 2 have
    config.optimizer.peak_lr = 1e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.clip_norm = 1.0
    config.eval.num_beams = 1
    config.eval.max_new_tokens = 20
    config.eval.max_images = 64
    return config
