"""CLIP ViT-B/16 trained as in arXiv 2103.00020.

"from memory" marks a value of the published tables that has not been looked up again.
"""

from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("clip")
    # The defaults of the text tower are CLIP ViT-B's: 12 layers of width 512, 8 heads.
    config.model.vision.update(
        patch_size_px=16, width=768, num_layers=12, num_heads=12, mlp_width=3072,
        activation="quick_gelu", layer_norm_epsilon=1e-5, pre_norm=True, patch_bias=False,
    )  # fmt: skip
    config.model.text.vocab_size = 49408  # §2.4: byte-pair encoding, lower case
    config.model.embed_dim = 512

    config.batch_size = 32_768  # §2.5
    config.steps = 32 * 400_000_000 // config.batch_size  # §2.5: 32 epochs of 400 M pairs
    config.optimizer.peak_lr = 5e-4  # from memory
    config.optimizer.min_lr = 0.0  # a plain cosine
    config.optimizer.warmup_init_lr = 0.0
    config.optimizer.warmup_steps = 2000
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-6  # from memory
    config.optimizer.weight_decay = 0.2  # not on gains and biases

    # config.data.train.source is the path of a JSONL file that the user names.
    config.data.tokenizer = "openai/clip-vit-base-patch16"
    config.data.max_text_tokens = 77  # context length, start and end included
    config.data.max_words = 77  # the context alone cuts a text
    # §2.3: a random square crop is the only augmentation. Open_clip's scale, from memory: the
    # whole height or width of an image that is no square cannot be drawn at random.
    config.data.crop_scale = (0.9, 1.0)
    config.data.crop_aspect = (1.0, 1.0)
    config.data.flip_probability = 0.0
    return config
