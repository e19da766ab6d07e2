"""InstructBLIP, EVA-CLIP ViT-g and Vicuna-13B v1.1."""

import instruct
import sizes


def get_config(arg=""):
    # Its tokenizer is that of the weights.
    return instruct.instructblip(
        arg,
        "llama",
        batch_size=64,
        language_model=sizes.VICUNA_13B,
        max_text_tokens=128 + 256,
    )
