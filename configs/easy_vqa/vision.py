"""easy-VQA, run 1: the demo's ViT learns to name shape and colour (task `blip_caption`)."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("blip_caption")
    common.set_easy_vqa(config)
    config.init.vision = "runs/demo/vision"
    config.steps = 500
    config.optimizer.peak_lr = 2e-3
    config.loss.label_smoothing = 0.0
    config.data.train.source = "easy_vqa_captions:train"
    config.eval.source = "easy_vqa_captions:test"
    config.data.prompt = ""
    config.data.max_text_tokens = 5
    config.eval.num_beams, config.eval.max_new_tokens, config.eval.min_new_tokens = 1, 3, 1
    config.model.text.update(
        width=128, num_layers=2, num_heads=4, mlp_width=256, max_positions=32,
        hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.05,
    )  # fmt: skip
    return config
