"""BLIP fine-tuned for retrieval on COCO, without momentum; `:large` behind the path for ViT-L."""

import finetuning


def get_config(arg=""):
    config = finetuning.finetuning(
        "blip_retrieval",
        arg,
        peak_lr={"base": 1e-5, "large": 5e-6},
        epochs=6,
        examples=finetuning.COCO_CAPTIONS,
    )
    config.data.max_text_tokens = 35  # models/blip_retrieval.py
    config.eval.rerank_top_k = 256  # Table 14; 128 for Flickr30K
    return config
