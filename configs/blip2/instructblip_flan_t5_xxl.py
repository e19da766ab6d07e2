"""InstructBLIP, EVA-CLIP ViT-g and FlanT5-XXL."""

import instruct
import sizes


def get_config(arg=""):
    return instruct.instructblip(
        arg,
        "t5",
        batch_size=64,
        language_model=sizes.FLAN_T5_XXL,
        tokenizer="google/flan-t5-xl",
        max_input_tokens=128,  # of the instruction; LAVIS: max_txt_len
        max_text_tokens=256,  # of the output; LAVIS: max_output_txt_len
    )
