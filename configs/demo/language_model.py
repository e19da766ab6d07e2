"""Demo, run 2: a small OPT learns the language of the captions (task `language_model`)."""

import common
from jaxblip.config import default_config


def get_config(arg=""):
    config = default_config("language_model")
    common.set_shapes(config)
    config.steps = 600
    # Captions of one image follow each other, so that the model learns to say again, in other
    # words, what stands before: in stage 2 the visual tokens will stand there.
    config.data.captions_per_text = 3
    config.data.max_text_tokens = 36
    config.optimizer.peak_lr = 8e-3
    return config
