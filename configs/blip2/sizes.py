"""Sizes of the parts that BLIP-2 joins (paper §3.4; widths as in the released weights)."""

# EVA-CLIP ViT-g/14 without its last block (paper: the output of the one before is better) and
# without final norm; LAVIS eva_vit.py. EVA's keys have no bias.
EVA_VIT_G = dict(
    patch_size_px=14, width=1408, num_layers=39, num_heads=16, mlp_width=6144,
    activation="gelu", layer_norm_epsilon=1e-6, key_bias=False,
)  # fmt: skip

# CLIP ViT-L/14 without its last block, likewise; LAVIS clip_vit.py.
CLIP_VIT_L = dict(
    patch_size_px=14, width=1024, num_layers=23, num_heads=16, mlp_width=4096,
    activation="quick_gelu", layer_norm_epsilon=1e-5, pre_norm=True, patch_bias=False,
)  # fmt: skip

# OPT (arXiv 2205.01068, table 1). The vocabulary is the rows of the released embedding, a few more
# than the tokenizer's 50,265 entries.
OPT_2_7B = dict(
    vocab_size=50272, width=2560, num_layers=32, num_heads=32, mlp_width=10240, max_positions=2048
)
OPT_6_7B = dict(
    vocab_size=50272, width=4096, num_layers=32, num_heads=32, mlp_width=16384, max_positions=2048
)
