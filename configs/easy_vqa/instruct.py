"""easy-VQA, run 3: Q-Former and frozen language model both read the question (`instruct`)."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("instruct")
    common.set_easy_vqa(config)
    config.init.vision = "runs/easy_vqa/vision"
    config.init.language_model = "runs/easy_vqa/language_model"
    config.steps = 900
    config.optimizer.peak_lr = 4e-3
    config.data.max_instruction_tokens = 16
    config.eval.kind = "vqa"
    config.eval.num_beams, config.eval.max_new_tokens, config.eval.min_new_tokens = 1, 2, 1
    return config
