"""What CLIP's recipes have in common (arXiv 2103.00020).

"from memory" marks a value of the published tables that has not been looked up again.
"""

from jaxblip.config import default_config

PAIRS = 400_000_000  # §2.2
EPOCHS = 32  # §2.5


def clip(*, vision, text, embed_dim, peak_lr, tokenizer):
    """A CLIP with a ViT; `vision` and `text` are what differs between the sizes."""
    config = default_config("clip")
    config.model.vision.update(
        activation="quick_gelu", layer_norm_epsilon=1e-5, pre_norm=True, patch_bias=False, **vision
    )
    config.model.text.update(text)
    config.model.text.vocab_size = 49408  # §2.4: byte-pair encoding, lower case
    config.model.embed_dim = embed_dim

    config.batch_size = 32_768  # §2.5
    config.steps = EPOCHS * PAIRS // config.batch_size
    config.optimizer.peak_lr = peak_lr
    config.optimizer.min_lr = 0.0  # a plain cosine
    config.optimizer.warmup_init_lr = 0.0
    config.optimizer.warmup_steps = 2000
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-6  # from memory
    config.optimizer.weight_decay = 0.2  # not on gains and biases

    # config.data.train.source is the path of a JSONL file that the user names.
    config.data.tokenizer = tokenizer
    config.data.max_text_tokens = 77  # context length, start and end included
    config.data.max_words = 77  # the context alone cuts a text
    # §2.3: a random square crop is the only augmentation. Open_clip's scale, from memory: the
    # whole height or width of an image that is no square cannot be drawn at random.
    config.data.crop_scale = (0.9, 1.0)
    config.data.crop_aspect = (1.0, 1.0)
    config.data.flip_probability = 0.0
    return config
