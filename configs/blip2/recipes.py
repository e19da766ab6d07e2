"""BLIP-2's two pre-training recipes, each as in the paper or as LAVIS ships it.

"paper" (the default) is arXiv 2301.12597, §3.4. "lavis" is the example in the authors' repository
(lavis/projects/blip2/train), which trains on COCO and Visual Genome and differs from the paper.
"""

from jaxblip.config import default_config
from jaxblip.errors import UserError

# COCO's training captions and Visual Genome's region descriptions: one epoch of LAVIS's example.
LAVIS_EPOCH_EXAMPLES = 566_747 + 821_000
LAVIS_EPOCHS = 10


def stage1(recipe, *, batch_size, vision):
    """Stage 1 with the paper's `batch_size`, which depends on the image encoder."""
    config = _common("stage1", recipe, vision)
    config.steps = 250_000  # paper §3.4
    config.batch_size = batch_size
    config.optimizer.warmup_steps = 2000  # paper §3.4
    config.optimizer.min_lr = 1e-5  # not in the paper; its authors' answer in LAVIS#243
    config.data.tokenizer = "bert-base-uncased"  # LAVIS adds [DEC], as the run does
    if recipe == "lavis":
        config.batch_size = 16 * 100  # GPUs x examples
        config.steps = LAVIS_EPOCHS * LAVIS_EPOCH_EXAMPLES // config.batch_size
        config.optimizer.warmup_steps = 5000
        # Ids are lost where COCO is mixed with Visual Genome, which has none (LAVIS#629).
        config.loss.use_image_id = False
    return config


def stage2_opt(recipe, *, vision, language_model):
    """Stage 2 with an OPT language model."""
    config = _stage2(recipe, vision, "opt", language_model)
    config.batch_size = 1920  # paper §3.4, for OPT
    config.data.tokenizer = "facebook/opt-2.7b"  # the same for all sizes of OPT
    config.data.stop_token = "\n"  # LAVIS blip2_opt.py: a caption ends with a newline
    if recipe == "lavis":
        config.batch_size = 16 * 64  # GPUs x examples
        config.steps = LAVIS_EPOCHS * LAVIS_EPOCH_EXAMPLES // config.batch_size
        config.optimizer.min_lr = 1e-5
    return config


def stage2_flan_t5(recipe, *, vision, language_model):
    """Stage 2 with a FlanT5 language model, by prefix language modelling."""
    if recipe == "lavis":
        raise UserError("LAVIS has no recipe of stage 2 with FlanT5: use 'paper' (the default).")
    config = _stage2(recipe, vision, "t5", language_model)
    config.batch_size = 1520  # paper §3.4, for FlanT5
    config.loss.prefix_lm = True  # paper §3.3; where captions are divided is not published
    config.data.tokenizer = "google/flan-t5-xl"  # the same for all sizes of FlanT5
    config.data.max_input_tokens = 32  # LAVIS blip2_t5.py
    return config


def stage2_vicuna(recipe, *, vision, language_model):
    """Stage 2 with Vicuna v1.1, which InstructBLIP starts from (arXiv 2305.06500, §2.6)."""
    if recipe == "lavis":
        raise UserError("LAVIS has no recipe of stage 2 with Vicuna: use 'paper' (the default).")
    config = _stage2(recipe, vision, "llama", language_model)
    config.batch_size = 1920  # not published; of OPT, the other decoder-only model
    return config


def _stage2(recipe, vision, architecture, language_model):
    config = _common("stage2", recipe, vision, language_model=architecture)
    config.model.language_model.update(language_model)
    config.steps = 80_000  # paper §3.4
    config.optimizer.warmup_steps = 2000  # paper §3.4
    config.optimizer.min_lr = 5e-5  # paper §3.4
    # The language model's parameters are split over all devices. Where each has few examples, as on
    # a pod, --config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=2 moves fewer bytes
    # (docs/scaling.md).
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def _common(task, recipe, vision, **default):
    if recipe not in ("", "paper", "lavis"):
        raise UserError(f"There is no recipe {recipe!r}: use 'paper' (the default) or 'lavis'.")
    config = default_config(task, **default)
    config.model.vision.update(vision)
    # The Q-Former keeps the defaults of QFormerConfig, which are BLIP-2's (paper §3.1).

    # To be named by the user: config.init.vision and config.init.language_model are frozen and must
    # have weights; config.init.qformer stays "" in stage 1 for random ones (the paper starts from
    # BERT-base), and is the work directory of stage 1 in stage 2. config.data.train.source is the
    # path of a JSONL file: the paper's 129 million images (§3.4) cannot be downloaded as a set.

    config.optimizer.peak_lr = 1e-4  # paper §3.4
    config.optimizer.warmup_init_lr = 1e-6  # not in the paper; LAVIS
    config.optimizer.b1 = 0.9  # paper §3.4
    config.optimizer.b2 = 0.98  # paper §3.4, printed there as a second beta 1
    config.optimizer.weight_decay = 0.05  # paper §3.4
    config.optimizer.clip_norm = 0.0  # neither the paper nor LAVIS clips
    config.data.image_size_px = 224  # paper §3.4
    config.data.crop_scale = (0.5, 1.0)  # LAVIS blip2_image_train; the paper has no numbers
    config.data.flip_probability = 0.5  # paper §3.4: horizontal flip
    config.data.max_text_tokens = 32  # LAVIS, both stages
    if recipe == "lavis":
        config.optimizer.b2 = 0.999
    return config
