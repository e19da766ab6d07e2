"""BLIP's fine-tuning (arXiv 2201.12086, appendix, Table 14; configs/ of salesforce/BLIP).

The image encoder is ViT-B/16, or ViT-L/16 with `:large` behind the path. All of it trains, from
weights that the user names in config.init.all, such as hf:Salesforce/blip-image-captioning-base.
"""

from jaxblip.config import default_config
from jaxblip.errors import UserError

COCO_CAPTIONS = 566_747  # of Karpathy's training split
VIT_L = dict(width=1024, num_layers=24, num_heads=16, mlp_width=4096)


def finetuning(task, size, *, peak_lr, epochs, examples):
    """What the tasks have in common.

    Args:
      size: the argument behind the path of the config.
      peak_lr: of the sizes that there is a recipe for, by size.
      examples: of an epoch.
    """
    size = size or "base"
    if size not in peak_lr:
        known = " or ".join(map(repr, peak_lr))
        raise UserError(f"BLIP has no recipe {size!r} of the task {task}: use {known}.")
    config = default_config(task)
    if size == "large":
        config.model.vision.update(VIT_L)
    # The defaults of vision and text are ViT-B/16 and BERT-base (paper §4.1, med_config.json).

    config.batch_size = 256  # Table 14
    config.steps = epochs * examples // config.batch_size  # Table 14: epochs
    config.optimizer.peak_lr = peak_lr[size]  # Table 14
    config.optimizer.min_lr = 0.0  # configs/*.yaml: a cosine to 0; there a step an epoch
    config.optimizer.warmup_steps = 0
    config.optimizer.warmup_init_lr = 0.0
    config.optimizer.b2 = 0.999  # the default of torch's AdamW
    config.optimizer.weight_decay = 0.05  # Table 14; there biases and norms, too

    # config.data.train.source is the path of a JSONL file that the user names.
    config.data.tokenizer = "bert-base-uncased"  # the run adds [DEC] and [ENC]
    config.data.image_size_px = 384  # Table 14
    config.data.max_words = 30  # data/utils.py, of captions and of questions
    config.data.crop_scale = (0.5, 1.0)  # data/__init__.py
    config.data.flip_probability = 0.5
    config.data.randaugment = True
    return config
