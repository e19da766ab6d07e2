"""BLIP-2 fine-tuned for COCO captions, ViT-g and FlanT5-XL (table 7)."""

import finetuning
import sizes


def get_config(arg=""):
    return finetuning.caption(
        arg,
        vision=sizes.EVA_VIT_G,
        language_model=sizes.FLAN_T5_XL,
        architecture="t5",
        layer_decay=1.0,
    )
