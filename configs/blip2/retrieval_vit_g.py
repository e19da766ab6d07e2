"""BLIP-2 fine-tuned for COCO retrieval, ViT-g (table 9)."""

import finetuning
import sizes


def get_config(arg=""):
    return finetuning.retrieval(arg, vision=sizes.EVA_VIT_G, peak_lr=1e-5, b2=0.999)
