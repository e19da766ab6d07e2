"""BLIP-2 stage 1 with EVA-CLIP ViT-g; `:lavis` behind the path gives the repository's recipe."""

import recipes
import sizes


def get_config(arg=""):
    return recipes.stage1(arg, batch_size=1680, vision=sizes.EVA_VIT_G)  # batch: paper §3.4
