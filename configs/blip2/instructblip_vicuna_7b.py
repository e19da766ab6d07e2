"""InstructBLIP, EVA-CLIP ViT-g and Vicuna-7B v1.1."""

import instruct


def get_config(arg=""):
    # The sizes of the language model are the defaults; its tokenizer is that of the weights.
    return instruct.instructblip(
        arg,
        "llama",
        batch_size=128,
        language_model={"vocab_size": 32000},
        max_text_tokens=128 + 256,
    )
