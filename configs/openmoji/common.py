"""What the OpenMoji runs have in common: one's own data, from a JSONL, on two CPU cores."""


def set_openmoji(config):
    """Data, sizes and schedule."""
    config.compute_dtype = "float32"  # CPUs emulate bfloat16
    config.batch_size = 128
    config.log_every_steps = 50
    config.checkpoint.every_steps = 500
    config.optimizer.name = "muon"
    config.optimizer.peak_lr = 4e-3
    config.optimizer.min_lr = 0.0
    config.optimizer.warmup_steps = 100

    config.data.train.source = "datasets/openmoji/train.jsonl"
    config.eval.source = "datasets/openmoji/heldout.jsonl"
    config.data.image_size_px = 64
    config.data.max_text_tokens = 20
    config.data.crop_scale = (0.7, 1.0)
    config.data.flip_probability = 0.0  # some names speak of left and right
    config.data.num_workers = 0

    if "vision" in config.model:
        config.model.vision.update(
            patch_size_px=16, width=128, num_layers=4, num_heads=4, mlp_width=512,
            initializer_range=0.05, position_init="sincos2d",
        )  # fmt: skip
    if "qformer" in config.model:
        config.model.qformer.update(
            num_query_tokens=8, width=128, num_layers=3, num_heads=4, mlp_width=512,
            cross_attention_frequency=1, initializer_range=0.05,
        )  # fmt: skip
