"""CLIP ViT-B/32 trained as in arXiv 2103.00020."""

import common


def get_config(arg=""):
    return common.clip(
        vision=dict(patch_size_px=32, width=768, num_layers=12, num_heads=12, mlp_width=3072),
        text={},  # the defaults of the text tower are ViT-B's: 12 layers of width 512, 8 heads
        embed_dim=512,
        peak_lr=5e-4,  # from memory
        tokenizer="openai/clip-vit-base-patch32",
    )
