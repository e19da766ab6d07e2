"""BLIP-2 fine-tuned for VQAv2, ViT-g and FlanT5-XL (table 8)."""

import finetuning
import sizes


def get_config(arg=""):
    return finetuning.vqa(
        arg,
        vision=sizes.EVA_VIT_G,
        language_model=sizes.FLAN_T5_XL,
        architecture="t5",
        layer_decay=0.95,
    )
