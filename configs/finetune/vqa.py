"""Answers to questions about one's own images: Q-Former and language model read the question.

--config.frozen=language_model trains the image encoder, too, as BLIP-2 does for VQAv2 (table 8).
"""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("instruct")
    common.set_schedule(config)
    config.data.image_size_px = 490  # table 8
    config.data.prompt = "Question: {} Answer:"  # table 8
    config.data.captions = "sample"  # of an example's answers, each as often as it was given
    config.data.max_words = 50  # LAVIS blip_question: lower case, without punctuation
    config.data.max_instruction_tokens = 32
    config.data.max_text_tokens = 48  # question and answer
    config.data.crop_scale, config.data.flip_probability = (0.5, 1.0), 0.5
    config.eval.num_beams, config.eval.length_penalty = 5, -1.0  # table 8; §4.2
    config.eval.max_new_tokens, config.eval.min_new_tokens = 10, 1  # LAVIS vqav2_zeroshot yamls
    return config
