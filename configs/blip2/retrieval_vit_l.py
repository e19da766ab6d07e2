"""BLIP-2 fine-tuned for COCO retrieval, CLIP ViT-L (table 9)."""

import finetuning
import sizes


def get_config(arg=""):
    return finetuning.retrieval(arg, vision=sizes.CLIP_VIT_L, peak_lr=5e-6, b2=0.98)
