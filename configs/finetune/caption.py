"""Captioning of one's own images by a BLIP-2: Q-Former, norm and projection train.

--config.frozen=language_model trains the image encoder, too, as BLIP-2 does for COCO (table 7).
"""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("stage2")
    common.set_schedule(config)
    config.data.image_size_px = 364  # table 7
    config.data.prompt = "a photo of"  # table 7; it carries no loss
    config.eval.num_beams = 5  # table 7
    config.eval.max_new_tokens, config.eval.min_new_tokens = 30, 8  # LAVIS caption_coco_ft.yaml
    return config
