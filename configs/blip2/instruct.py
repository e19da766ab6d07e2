"""InstructBLIP's instruction tuning (arXiv 2305.06500, §2.6), over a BLIP-2 of stage 2.

Its training was never released. What the paper does not say is that of X-InstructBLIP, by the same
group (lavis/projects/xinstruct_blip/train/vicuna7b/image_train.yaml). All values are the defaults
of the task; they are repeated here to be seen.
"""

from jaxblip.config import default_config
from jaxblip.errors import UserError

import sizes


def instructblip(arg, architecture, *, batch_size, language_model, **data):
    """The recipe for one language model.

    Args:
      arg: what stands behind the path of the config; there are no variants.
      batch_size: paper §2.6, by the size of the language model.
      data: fields of config.data.
    """
    if arg:
        raise UserError(f"InstructBLIP has one recipe, and none is called {arg!r}: leave it out.")
    config = default_config("instruct", language_model=architecture)
    config.model.vision.update(sizes.EVA_VIT_G)
    config.model.language_model.update(language_model)

    # To be named by the user: config.init.all, a BLIP-2 with the same language model, such as
    # hf:Salesforce/blip2-flan-t5-xl or the work directory of stage 2. The text side of the
    # Q-Former, which stage 2 drops, comes with config.init.qformer, the work directory of stage 1
    # (then the queries are those of stage 1, as in X-InstructBLIP), or starts at random.
    # config.data.train.source is the path of a JSONL file with an instruction in each line, of
    # templates of the user's choice.

    config.batch_size = batch_size
    config.steps = 60_000  # §2.6: at most
    config.optimizer.warmup_init_lr = 1e-8  # §2.6
    config.optimizer.peak_lr = 1e-5  # §2.6
    config.optimizer.min_lr = 0.0  # §2.6
    config.optimizer.warmup_steps = 1000  # §2.6
    config.optimizer.b2 = 0.999  # §2.6
    config.optimizer.weight_decay = 0.05  # §2.6
    config.data.image_size_px = 224  # §2.6
    config.data.crop_scale = (0.9, 1.0)  # LAVIS clip_image_train
    config.data.flip_probability = 0.0  # likewise
    config.data.qformer_tokenizer = "bert-base-uncased"  # [DEC] is added, as in LAVIS
    config.data.max_instruction_tokens = 128  # LAVIS: max_txt_len
    config.data.update(data)
    return config
