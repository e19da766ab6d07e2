"""OpenMoji, run 2: stage 1 on the frozen ViT of run 1."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("stage1")
    common.set_openmoji(config)
    config.init.vision = "runs/openmoji/vision"
    config.batch_size = 64
    config.steps = 800
    config.model.embed_dim = 128
    config.eval.rerank_top_k = 16
    return config
