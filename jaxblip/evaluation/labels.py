"""The field's words for the names of tasks and metrics, for pages that people read."""

from __future__ import annotations

import re

TASK_TITLES = {
    "clip": "Image encoder and text encoder, by contrast (CLIP)",
    "language_model": "Language model, on the captions alone",
    "stage1": "Stage 1: Q-Former to image encoder",
    "stage2": "Stage 2: Q-Former to language model",
    "instruct": "Instruction tuning (InstructBLIP)",
    "blip_retrieval": "BLIP: image-text retrieval",
    "blip_caption": "BLIP: captioning",
    "blip_vqa": "BLIP: visual question answering",
}
_METRICS = {
    "itc": "ITC loss",
    "itm": "ITM loss",
    "itg": "ITG loss",
    "lm": "LM loss",
    "itm_accuracy": "ITM accuracy",
    "itg_accuracy": "ITG token accuracy",
    "temperature": "temperature of ITC",
    "logit_scale": "logit scale of ITC",
    "caption_exact": "captions equal to a true one",
    "bleu1": "BLEU-1, of 100",
    "bleu2": "BLEU-2, of 100",
    "bleu3": "BLEU-3, of 100",
    "bleu4": "BLEU-4, of 100",
    "rouge_l": "ROUGE-L, of 100",
    "cider": "CIDEr, of 100",
    "meteor": "METEOR, of 100",
    "spice": "SPICE, of 100",
    "vqa_accuracy": "VQA accuracy",
    "okvqa_accuracy": "OK-VQA accuracy",
    "gqa_accuracy": "GQA accuracy",
    "top1_accuracy": "accuracy at 1",
    "top5_accuracy": "accuracy at 5",
    "images_per_s": "images per second",
    "heldout_images": "held-out images",
    "gallery": "captions for this page",
    "total": "in all",
}
_DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
_RECALL = re.compile(rf"(itc_)?({'|'.join(_DIRECTIONS)})_r(\d+)")


def metric_label(name: str) -> str:
    """Words for a metric, e.g. "text to image, recall@1" for `eval/t2i_r1`."""
    name = name.rpartition("/")[2]
    if recall := recall_of(name):
        return f"{recall[0]}, recall@{recall[1]}"
    return _METRICS.get(name, name.replace("_", " "))


def recall_of(name: str) -> tuple[str, int] | None:
    """What is retrieved, in words, and k, for a metric that is recall at k."""
    match = _RECALL.fullmatch(name.rpartition("/")[2])
    if match is None:
        return None
    return _DIRECTIONS[match[2]] + (" by ITC alone" if match[1] else ""), int(match[3])


def is_share(name: str) -> bool:
    """Whether a metric lies between 0 and 1."""
    return bool(recall_of(name)) or name.endswith(("accuracy", "caption_exact"))
