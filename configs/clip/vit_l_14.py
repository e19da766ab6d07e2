"""CLIP ViT-L/14 trained as in arXiv 2103.00020; `:336` is its further epoch at 336 px (§2.5)."""

import common
from jaxblip.errors import UserError


def get_config(arg=""):
    if arg not in ("", "336"):
        raise UserError(f"CLIP ViT-L/14 has no recipe {arg!r}: use '336', or leave it out.")
    config = common.clip(
        vision=dict(patch_size_px=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096),
        text=dict(width=768, num_heads=12, mlp_width=3072),
        embed_dim=768,
        peak_lr=4e-4,  # from memory
        tokenizer="openai/clip-vit-large-patch14",
    )
    if arg == "336":  # config.init.all is the work directory of the first run
        config.steps = common.PAIRS // config.batch_size
        config.optimizer.peak_lr = 2e-5  # from memory
        config.data.image_size_px = 336
    return config
