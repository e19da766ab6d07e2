"""Questions about shapes and their colours (task `blip_vqa`), from nothing, on two CPU cores."""

from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("blip_vqa")
    config.compute_dtype = "float32"  # CPUs emulate bfloat16
    config.batch_size = 64
    config.steps = 600
    config.log_every_steps = 50
    config.checkpoint.every_steps = 200
    config.loss.label_smoothing = 0.0
    config.optimizer.name = "muon"
    config.optimizer.peak_lr = 4e-3
    config.optimizer.min_lr = 0.0
    config.optimizer.warmup_steps = 50

    config.data.train.source = "easy_vqa:train"  # or what `jaxblip data prepare` wrote of it
    config.data.image_size_px = 64  # as they are
    config.data.max_instruction_tokens = 16
    config.data.max_text_tokens = 4  # an answer is one word
    config.data.crop_scale = config.data.crop_aspect = (1.0, 1.0)  # a shape may lie at the edge
    config.data.num_workers = 0
    config.eval.source = "easy_vqa:test"
    config.eval.batch_size = 256
    config.eval.num_beams, config.eval.max_new_tokens = 1, 2

    config.model.vision.update(
        patch_size_px=8, width=128, num_layers=2, num_heads=4, mlp_width=256,
        initializer_range=0.05, position_init="sincos2d",
    )  # fmt: skip
    config.model.text.update(
        width=128, num_layers=2, num_heads=4, mlp_width=256, max_positions=32,
        hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.05,
    )  # fmt: skip
    return config
