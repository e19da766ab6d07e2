"""What fine-tuning on one's own data has in common; values of BLIP-2's appendix where it has one.

To be named on the command line: config.data.train.source, config.init.all (published weights or
the work directory of a run), and config.eval.source for a score.
"""


def set_schedule(config):
    """Five epochs; their steps, warm-up, evaluations and checkpoints follow from the data."""
    config.steps, config.epochs = 0, 5.0  # tables 7 to 9: five epochs
    config.batch_size = 16  # a step on one accelerator; tables 7 to 9: 128 to 256 over all
    config.log_every_steps = 10
    config.checkpoint.every_steps = config.eval.every_steps = -1
    config.optimizer.peak_lr = 1e-5  # tables 7 to 9
    config.optimizer.warmup_steps = -1
    config.optimizer.warmup_init_lr = 1e-8  # LAVIS caption_coco_ft.yaml
    config.optimizer.min_lr = 0.0  # likewise
    config.optimizer.b2 = 0.999  # tables 7 and 8
    config.optimizer.weight_decay = 0.05  # tables 7 to 9
    config.eval.batch_size = 16
    # Sizes are those of config.init.all, whose patches may need another data.image_size_px.
    config.model.vision.patch_size_px = 14
