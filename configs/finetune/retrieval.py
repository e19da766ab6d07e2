"""Images by text and text by image on one's own pairs, from a BLIP-2 of stage 1 (table 9)."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("stage1")
    common.set_schedule(config)
    config.frozen = ()  # table 9: the image encoder trains
    config.optimizer.layer_decay.vision = 0.95  # table 9
    config.data.image_size_px = 364  # table 9
    config.data.max_text_tokens = 35  # LAVIS retrieval_coco_ft.yaml
    config.eval.rerank_top_k = 128  # §4.4
    return config
