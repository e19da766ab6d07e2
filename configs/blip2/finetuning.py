"""BLIP-2's three fine-tuning recipes (arXiv 2301.12597, appendix, tables 7 to 9).

Behind the path of a config, ":lavis" gives what the authors' repository does where that differs:
it configures a layer-wise decay of the learning rate and never applies it (lavis/common/optims.py
sets every group's rate anew), and its AdamW has beta 2 = 0.999 throughout.
"""

from jaxblip.config import default_config
from jaxblip.errors import UserError

COCO_CAPTIONS = 566_747  # of Karpathy's training split
VQA_V2_QUESTIONS = 443_757 + 214_354  # of the training and the validation split
VISUAL_GENOME_QUESTIONS = 1_440_069
EPOCHS = 5  # tables 7 to 9


def caption(recipe, *, vision, language_model, architecture="opt", layer_decay):
    """COCO captions: Q-Former and image encoder train, from a BLIP-2 of stage 2 (table 7)."""
    config = default_config("stage2", language_model=architecture)
    config.model.language_model.update(language_model)
    _set_common(config, recipe, vision, layer_decay=layer_decay)
    config.batch_size = 256  # table 7
    config.steps = EPOCHS * COCO_CAPTIONS // config.batch_size
    config.frozen = ("language_model",)
    config.data.image_size_px = 364  # table 7
    config.data.prompt = "a photo of"  # table 7
    config.eval.num_beams = 5  # table 7
    config.eval.max_new_tokens, config.eval.min_new_tokens = 30, 8  # LAVIS caption_coco_ft.yaml
    if architecture == "opt":
        config.data.stop_token = "\n"  # LAVIS blip2_opt.py: a caption ends with a newline
    return config


def vqa(recipe, *, vision, language_model, architecture="opt", layer_decay):
    """VQAv2: the Q-Former reads the question, too (table 8; §4.3).

    From a BLIP-2 of stage 2, whose Q-Former gets its text side from stage 1 by config.init.qformer
    or learns it anew. LAVIS ships no recipe of it.
    """
    if recipe == "lavis":
        raise UserError("LAVIS has no recipe of VQA with BLIP-2: use 'paper' (the default).")
    config = default_config("instruct", language_model=architecture)
    config.model.language_model.update(language_model)
    _set_common(config, recipe, vision, layer_decay=layer_decay)
    config.batch_size = 128  # table 8
    examples = VQA_V2_QUESTIONS + VISUAL_GENOME_QUESTIONS  # §4.3: with those of Visual Genome
    config.steps = EPOCHS * examples // config.batch_size
    config.frozen = ("language_model",)
    config.data.image_size_px = 490  # table 8
    config.data.prompt = "Question: {} Answer:"  # table 8
    # An answer is drawn by how often it was given, which in the mean weighs it by its share.
    config.data.captions = "sample"
    config.data.max_words = 50  # LAVIS blip_question: lower case, without punctuation
    config.data.qformer_tokenizer = "bert-base-uncased"
    config.data.max_instruction_tokens = 32
    config.data.max_text_tokens = 32 if architecture == "t5" else 48  # with the question before it
    config.data.crop_scale, config.data.flip_probability = (0.5, 1.0), 0.5  # blip2_image_train
    config.eval.num_beams, config.eval.length_penalty = 5, -1.0  # table 8; §4.2
    config.eval.max_new_tokens, config.eval.min_new_tokens = 10, 1  # LAVIS vqav2_zeroshot yamls
    return config


def retrieval(recipe, *, vision, peak_lr, b2):
    """COCO retrieval, from stage 1: all parts train, by ITC, ITM and ITG (table 9)."""
    config = default_config("stage1")
    _set_common(config, recipe, vision, layer_decay=0.95)
    config.batch_size = 224  # table 9
    config.steps = EPOCHS * COCO_CAPTIONS // config.batch_size
    config.optimizer.peak_lr = peak_lr  # table 9
    if recipe != "lavis":
        config.optimizer.b2 = b2  # table 9
    config.frozen = ()
    config.data.tokenizer = "bert-base-uncased"  # LAVIS adds [DEC], as the run does
    config.data.image_size_px = 364  # table 9
    config.data.max_text_tokens = 35  # LAVIS retrieval_coco_ft.yaml
    config.eval.rerank_top_k = 128  # §4.4
    return config


def _set_common(config, recipe, vision, *, layer_decay):
    if recipe not in ("", "paper", "lavis"):
        raise UserError(f"There is no recipe {recipe!r}: use 'paper' (the default) or 'lavis'.")
    config.model.vision.update(vision)
    config.model.vision.remat = "full"  # LAVIS caption_coco_ft.yaml: use_grad_checkpoint

    # To be named by the user: config.init.all, such as hf:Salesforce/blip2-opt-2.7b or the work
    # directory of pre-training, config.data.train.source and config.eval.source.

    config.optimizer.peak_lr = 1e-5  # tables 7 to 9
    config.optimizer.warmup_steps = 1000  # tables 7 to 9
    config.optimizer.warmup_init_lr = 1e-8  # not in the paper; LAVIS caption_coco_ft.yaml
    config.optimizer.min_lr = 0.0  # not in the paper; LAVIS
    config.optimizer.b2 = 0.999  # tables 7 and 8
    config.optimizer.weight_decay = 0.05  # tables 7 to 9
    if recipe != "lavis":
        config.optimizer.layer_decay.vision = layer_decay  # tables 7 to 9
