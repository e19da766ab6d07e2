"""BLIP-2 stage 2, EVA-CLIP ViT-g and FlanT5-XXL, as in the paper; LAVIS has no recipe of it."""

import recipes
import sizes


def get_config(arg=""):
    return recipes.stage2_flan_t5(arg, vision=sizes.EVA_VIT_G, language_model=sizes.FLAN_T5_XXL)
