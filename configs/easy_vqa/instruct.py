"""easy-VQA, run 3: Q-Former and frozen language model both read the question (`instruct`).

`:templates` behind the path puts each question into one of several instructions, and asks those of
the evaluation in others, which were never seen.
"""

import common
from jaxblip.config import default_config
from jaxblip.errors import UserError


def get_config(arg=""):
    if arg not in ("", "templates"):
        raise UserError(f"configs/easy_vqa/instruct.py has no variant {arg!r}: use templates.")
    config = default_config("instruct")
    common.set_easy_vqa(config)
    config.init.vision = "runs/easy_vqa/vision"
    config.init.language_model = "runs/easy_vqa/language_model"
    config.steps = 900
    config.optimizer.peak_lr = 4e-3
    config.data.max_instruction_tokens = 28
    if arg == "templates":
        config.steps = 1200
        config.data.templates, config.eval.templates = ("vqa:train",), ("vqa:heldout",)
    config.eval.kind = "vqa"
    config.eval.num_beams, config.eval.max_new_tokens, config.eval.min_new_tokens = 1, 2, 1
    return config
