"""BLIP fine-tuned for visual question answering on VQAv2."""

import finetuning

# Questions of the training and the validation split; the reference adds those of Visual Genome.
VQA_V2_QUESTIONS = 443_757 + 214_354


def get_config(arg=""):
    config = finetuning.finetuning(
        "blip_vqa", arg, peak_lr={"base": 2e-5}, epochs=10, examples=VQA_V2_QUESTIONS
    )
    config.loss.label_smoothing = 0.1  # models/med.py
    config.data.image_size_px = 480  # Table 14
    # An answer is drawn by how often it was given, which in the mean weighs it as the reference
    # does. The reference drops paths of the image encoder, too (0.1).
    config.data.max_instruction_tokens = 35  # models/blip_vqa.py: of a question
    config.data.max_text_tokens = 16  # of an answer; no limit there
    # models/blip_vqa.py, by generation; its numbers in the paper are by ranking 3,128 answers.
    config.eval.num_beams = 3
    config.eval.min_new_tokens, config.eval.max_new_tokens = 1, 9
    return config
