"""BLIP-2 fine-tuned for COCO captions, ViT-g and OPT-6.7B (table 7)."""

import finetuning
import sizes


def get_config(arg=""):
    return finetuning.caption(
        arg, vision=sizes.EVA_VIT_G, language_model=sizes.OPT_6_7B, layer_decay=0.95
    )
