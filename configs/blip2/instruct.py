"""InstructBLIP's instruction tuning (arXiv 2305.06500, §2.6), over a BLIP-2 of stage 2.

Its training was never released. What the paper does not say is that of X-InstructBLIP, by the same
group (lavis/projects/xinstruct_blip/train/vicuna7b/image_train.yaml). The values of the task's
defaults are repeated here to be seen.

Behind the path of a config stands what it trains on: nothing for one source that the user names,
":paper" for the 13 held-in sets of the paper, ":lavis" for the 11 of X-InstructBLIP, or names of
sets, as ":coco_caption,vqav2,okvqa". Each is a section of config.data.mixture, whose file the user
names: --config.data.mixture.vqav2.train.source=questions.json,annotations.json.
"""

from ml_collections import ConfigDict

from jaxblip.config import default_config
from jaxblip.data.choices import COLUMNS
from jaxblip.errors import UserError

import sizes

# The family of each set's templates; those of LLaVA are instructions already (paper, appendix).
PAPER_SETS = {
    "coco_caption": "caption",
    "capfilt": "caption",
    "textcaps": "caption",
    "vqav2": "vqa",
    "okvqa": "vqa",
    "aokvqa": "vqa",
    "ocrvqa": "vqa",
    "vqg_vqav2": "vqg",
    "vqg_okvqa": "vqg",
    "vqg_aokvqa": "vqg",
    "llava_detail": "",
    "llava_reasoning": "",
    "llava_conversation": "",
}
LAVIS_SETS = {
    "cc12m": "caption",
    "coco_caption": "caption",
    "capfilt": "caption",
    "vg_caption": "caption",
    "sbu": "caption",
    "vg_vqa": "vqa",
    "vqav2": "vqa",
    "ocrvqa": "vqa",
    "okvqa": "vqa",
    "aokvqa": "vqa",
    "llava_dialogue": "",
}
# A question is asked for the answer that is given.
_VQG_COLUMNS = {"instruction": "answer", "output": "question"}


def instructblip(arg, architecture, *, batch_size, language_model, **data):
    """The recipe for one language model.

    Args:
      arg: what stands behind the path of the config, see above.
      batch_size: paper §2.6, by the size of the language model.
      data: fields of config.data.
    """
    config = default_config("instruct", language_model=architecture)
    config.model.vision.update(sizes.EVA_VIT_G)
    config.model.language_model.update(language_model)

    # To be named by the user: config.init.all, a BLIP-2 with the same language model, such as
    # hf:Salesforce/blip2-flan-t5-xl or the work directory of stage 2. The text side of the
    # Q-Former, which stage 2 drops, comes with config.init.qformer, the work directory of stage 1
    # (then the queries are those of stage 1, as in X-InstructBLIP), or starts at random. Without
    # ":paper" and the like config.data.train.source is a file with an instruction in each line, or
    # with questions, for which --config.data.templates=vqa has templates.

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
    # §2.4: shares by the square root of the sizes. Then the paper lowers that of A-OKVQA and raises
    # that of OK-VQA by hand, by factors that it does not give; X-InstructBLIP does neither. Set
    # config.data.mixture.okvqa.weight and the like.
    config.data.mixture_exponent = 0.5
    for name, family in _sets(arg).items():
        config.data.mixture[name] = _section(family)
    return config


def _sets(arg):
    """The sets that an argument names, each with its family of templates."""
    named = {"": {}, "paper": PAPER_SETS, "lavis": LAVIS_SETS}
    if arg in named:
        return named[arg]
    known = PAPER_SETS | LAVIS_SETS
    names = arg.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"InstructBLIP has no set {unknown[0]!r}: use 'paper', 'lavis', or some of "
            f"{', '.join(known)}."
        )
    return {name: known[name] for name in names}


def _section(family):
    """Of config.data.mixture; the source is the user's to name."""
    section = ConfigDict({"train": {"source": ""}, "weight": 1.0})
    section.templates = (family,) if family else ()
    columns = _VQG_COLUMNS if family == "vqg" else {}
    section.fields = ConfigDict(dict.fromkeys(COLUMNS, "") | columns)
    return section
