"""BLIP-2 stage 1 with CLIP ViT-L; `:lavis` behind the path gives the repository's recipe."""

import recipes
import sizes


def get_config(arg=""):
    return recipes.stage1(arg, batch_size=2320, vision=sizes.CLIP_VIT_L)  # batch: paper §3.4
