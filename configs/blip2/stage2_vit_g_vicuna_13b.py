"""BLIP-2 stage 2, EVA-CLIP ViT-g and Vicuna-13B v1.1, from which InstructBLIP starts."""

import recipes
import sizes


def get_config(arg=""):
    return recipes.stage2_vicuna(arg, vision=sizes.EVA_VIT_G, language_model=sizes.VICUNA_13B)
