"""What the runs on easy-VQA have in common: the data, and sizes that are the demo's."""


def set_easy_vqa(config):
    """Data, sizes and schedule for two CPU cores."""
    config.compute_dtype = "float32"  # CPUs emulate bfloat16
    config.batch_size = 64
    config.log_every_steps = 50
    config.checkpoint.every_steps = 200
    config.optimizer.name = "muon"
    config.optimizer.warmup_steps = 50
    config.optimizer.min_lr = 0.0

    config.data.train.source = "easy_vqa:train"
    config.data.prompt = "{}"  # the question
    config.data.max_text_tokens = 36  # a question of up to 11 in an instruction
    config.data.image_size_px = 72  # where small shapes are as large as those of the demo
    config.data.crop_scale = config.data.crop_aspect = (1.0, 1.0)  # a shape may lie at the edge
    config.data.flip_probability = 0.5  # nothing here speaks of left and right
    config.data.num_workers = 0
    config.eval.source = "easy_vqa:test"
    config.eval.batch_size = 256

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
