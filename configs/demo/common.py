"""What the demo's runs have in common: the data, and the sizes of the parts that they share."""


def set_shapes(config):
    """Data, sizes and schedule for two CPU cores."""
    config.compute_dtype = "float32"  # CPUs emulate bfloat16
    config.batch_size = 64
    config.log_every_steps = 20
    config.checkpoint.every_steps = 200
    config.optimizer.name = "muon"  # gets as far as AdamW in less than half of the steps
    config.optimizer.warmup_steps = 50
    config.optimizer.min_lr = 0.0

    config.data.train.source = "shapes:train"
    config.data.shuffle_block = 4  # alike but for what is where: hard negatives of one another
    config.eval.source = "shapes:heldout"
    config.data.image_size_px = 48
    config.data.max_text_tokens = 12
    config.data.crop_scale = config.data.crop_aspect = (1.0, 1.0)  # whole scenes
    config.data.flip_probability = 0.0  # captions speak of left and right
    config.data.num_workers = 0

    if "vision" in config.model:
        config.model.vision.update(
            patch_size_px=12, width=128, num_layers=4, num_heads=4, mlp_width=256,
            initializer_range=0.05, position_init="sincos2d",
        )  # fmt: skip
    if "qformer" in config.model:
        config.model.qformer.update(
            num_query_tokens=10, width=128, num_layers=3, num_heads=4, mlp_width=256,
            cross_attention_frequency=1,
            hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.05,
        )  # fmt: skip
    if "language_model" in config.model:
        config.model.language_model.update(
            width=128, num_layers=3, num_heads=4, mlp_width=256, max_positions=64,
            initializer_range=0.05,
        )  # fmt: skip
