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

# FlanT5 (arXiv 2210.11416, §2; sizes of T5 v1.1). The vocabulary is the rows of the released
# embedding, a few more than the tokenizer's 32,100 entries. FlanT5 was trained with the tanh form
# of GELU; LAVIS runs it with the exact one.
_FLAN_T5 = dict(
    vocab_size=32128, num_layers=24, num_decoder_layers=24, head_width=64, gated=True,
    activation="gelu", tied_head=False, start_token_id=0,
)  # fmt: skip
FLAN_T5_XL = dict(width=2048, num_heads=32, mlp_width=5120, **_FLAN_T5)
FLAN_T5_XXL = dict(width=4096, num_heads=64, mlp_width=10240, **_FLAN_T5)

# Vicuna v1.1, in the sizes of LLaMA (arXiv 2302.13971, table 2). The vocabulary is that of its
# tokenizer: LAVIS adds a row for padding, which nothing says.
VICUNA_7B = dict(vocab_size=32000, width=4096, num_layers=32, num_heads=32, mlp_width=11008)
VICUNA_13B = dict(vocab_size=32000, width=5120, num_layers=40, num_heads=40, mlp_width=13824)
