"""BLIP fine-tuned for captions of COCO; `:large` behind the path for ViT-L."""

import finetuning


def get_config(arg=""):
    config = finetuning.finetuning(
        "blip_caption",
        arg,
        peak_lr={"base": 1e-5, "large": 2e-6},
        epochs=5,
        examples=finetuning.COCO_CAPTIONS,
    )
    config.loss.label_smoothing = 0.1  # models/med.py
    config.data.prompt = "a picture of "  # paper §4.2
    config.data.max_text_tokens = 40  # models/blip.py
    config.eval.num_beams = 3  # caption_coco.yaml
    # caption_coco.yaml has lengths of 5 to 20, which count the prompt and [DEC], of 4 tokens.
    config.eval.min_new_tokens, config.eval.max_new_tokens = 1, 16
    return config
