"""BLIP-2 stage 2, CLIP ViT-L and OPT-2.7B; `:lavis` gives the repository's recipe."""

import recipes
import sizes


def get_config(arg=""):
    return recipes.stage2_opt(arg, vision=sizes.CLIP_VIT_L, language_model=sizes.OPT_2_7B)
