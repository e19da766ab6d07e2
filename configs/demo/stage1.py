"""Demo, run 3: stage 1. The Q-Former learns to read the frozen ViT by ITC, ITM and ITG."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("stage1")
    common.set_shapes(config)
    config.init.vision = "runs/demo/vision"
    config.steps = 560
    config.optimizer.peak_lr = 6e-3
    config.loss.itg_weight = 2.0  # words take longest to learn which of two objects is where
    config.model.embed_dim = 64
    config.eval.rerank_top_k = 5
    return config
