"""Experiment configs: the fields with their defaults, and loading them from a file.

A config file defines `get_config(arg="")`, which starts from `default_config(task)`, or from
`default_config(task, language_model="t5")`, and sets what differs. It is data: importing it
downloads nothing and touches no device.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxblip.data.choices import COLUMNS
from jaxblip.data.eval_sections import KINDS
from jaxblip.errors import UserError
from jaxblip.models.clip import ClipTextConfig
from jaxblip.models.connectors import QFORMER, PerceiverConfig
from jaxblip.models.language_models import config_class
from jaxblip.models.med import MedConfig
from jaxblip.models.qformer import QFormerConfig
from jaxblip.models.vit import VitConfig
from jaxblip.overrides import apply_overrides
from jaxblip.tasks import BLIP_TASKS, FROM_FEATURES, STAGE2_TASKS, TASKS
from jaxblip.tasks.base import PIXEL_MEAN, PIXEL_STD
from jaxblip.tasks.parts import language_model_config, language_model_section, model_fields

# Fields that may differ when a run goes on in its work directory. They change no result but for
# the batch size, with which it goes on behind the same example.
MAY_CHANGE_ON_RESUME = (
    "attention",
    "batch_size",
    "mesh",
    *(f"model.{part}.remat" for part in ("vision", "text", "qformer", "language_model")),
    "loss.vocab_chunk",
    "data.num_workers",
    "data.max_bad_share",
    "log_every_steps",
    "warn_at_chance_steps",
    "max_skipped_in_a_row",
    "checkpoint",
    "eval",
)


def default_config(task: str, *, language_model: str = "opt") -> ConfigDict:
    """All fields of a run of `task`, with BLIP-2's values where the paper gives one.

    Args:
      language_model: where the task has one, its architecture: opt, llama or t5.
    """
    if task not in TASKS:
        raise UserError(f"There is no task {task!r}: the tasks are {', '.join(TASKS)}.")
    is_encoder_decoder = (
        task in ("language_model", *STAGE2_TASKS)
        and config_class(language_model).is_encoder_decoder
    )
    config = ConfigDict()
    config.task = task  # what is optimised, by its name in `tasks.TASKS`
    config.seed = 42  # of initial parameters, data order, augmentation, dropout, negatives
    config.steps = 250_000  # optimizer steps of the whole run; 0 = as many as `epochs` have
    config.epochs = 0.0  # passes over the training data, where steps = 0
    config.batch_size = 1680  # examples a step, over all devices
    config.compute_dtype = "bfloat16"  # of activations; parameters that train are float32
    config.frozen_dtype = "bfloat16"  # of parameters that do not train
    # Kernel of attention: "auto", the best that the platform has, "xla", "cudnn" (NVIDIA), or
    # "pallas" (TPU); XLA takes what the kernel cannot
    config.attention = "auto"
    config.frozen = TASKS[task].frozen  # path prefixes of the parameters that do not train
    # Longer prefixes of what trains nevertheless, such as qformer/query_tokens of a frozen qformer
    config.trainable = ()
    # updates with a non-finite loss, after which the run stops at its next line of metrics
    config.max_skipped_in_a_row = 10
    config.log_every_steps = 50  # steps between two lines of metrics
    if "retrieval" in KINDS[task]:
        # steps after which a line says which losses are still where guessing leaves them; 0 = never
        config.warn_at_chance_steps = 1000

    config.model = _model(task, language_model)
    config.lora = _lora(task)
    config.loss = _loss(task, is_encoder_decoder)
    config.init = _init(task)

    config.optimizer = optimizer = ConfigDict()
    # "adamw", as in all papers of the family, or "muon": orthogonalised momentum for the matrices
    # of linear maps, AdamW for the rest; it takes the same learning rates and more
    optimizer.name = "adamw"
    optimizer.peak_lr = 1e-4  # learning rate after the warm-up
    optimizer.min_lr = 1e-5  # learning rate at the last step
    optimizer.warmup_init_lr = 1e-6  # learning rate at step 0
    optimizer.warmup_steps = 2000  # steps of linear warm-up; -1 = by the length of the run
    optimizer.b1 = 0.9  # AdamW: decay of the first moment
    optimizer.b2 = 0.98  # AdamW: decay of the second moment
    optimizer.momentum = 0.95  # Muon: decay of the momentum
    optimizer.eps = 1e-8  # AdamW: added to the root of the second moment
    optimizer.weight_decay = 0.05  # AdamW; biases, norms and scalars are not decayed
    # For each part of the model that has layers: the learning rate of a layer over that of the next
    # one (BEiT's layer-wise decay); 1 = all alike. BLIP-2 fine-tunes its encoder with 0.9 to 1
    optimizer.layer_decay = ConfigDict(dict.fromkeys(_parts_with_layers(task, config.model), 1.0))
    optimizer.clip_norm = 0.0  # largest global gradient norm; 0 = off, as in the paper
    optimizer.accumulation_steps = 1  # micro-batches a step; contrast sees one micro-batch

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices that hold copies of the parameters; -1 = the rest
    mesh.fsdp = 1  # devices that each hold a share of the parameters
    mesh.tensor = 1  # devices that share the work of each layer

    config.data = data = ConfigDict()
    data.train = ConfigDict()
    data.train.source = ""  # shapes:train, a file or a folder, see docs/data.md
    data.image_folder = ""  # that the paths in a source are relative to; "" = the source's own
    # The column of each example field, where it has another name than in docs/data.md
    data.fields = ConfigDict(dict.fromkeys(COLUMNS, ""))
    if task in FROM_FEATURES:
        # folder that `jaxblip data cache-features` wrote: the image encoder's output for the images
        # of the source, which are not read then; "" = images
        data.features = ""
    # Several sources: name -> a section with its own fields of config.data, and a weight if not 1,
    # such as --config.data.mixture.coco.train.source=coco.json; see docs/data.md
    data.mixture = ConfigDict()
    # Share of a source ~ weight * size ** exponent: 1 = by size, 0.5 = by its square root
    # (InstructBLIP), 1 / T for temperature T, 0 = by the weights alone
    data.mixture_exponent = 1.0
    # Which of an image's captions, or of an instruction's answers, are shown: "sample" draws one
    # each time, "all" makes an example of each, so that an epoch has every pair once
    data.captions = "sample"
    data.shuffle_block = 1  # consecutive examples that keep together: hard negatives in one batch
    # Hugging Face name or folder; "" = that of what init.language_model (stage 1: init.qformer)
    # names, or else a WordPiece trained on the captions
    data.tokenizer = ""
    if task == "instruct":
        # of the instruction that the Q-Former reads: Hugging Face name or folder; "" = that of what
        # init.qformer or init.all names, or else a WordPiece trained on the instructions
        data.qformer_tokenizer = ""
    data.vocab_size = 2048  # largest vocabulary of a tokenizer that is trained here, tokens
    data.stop_token = ""  # ends a text of the language model ("\n" for OPT); "" = the end token
    data.max_text_tokens = 32  # text length, tokens, special ones included
    if is_encoder_decoder:
        # of what the language model's encoder reads of prompt and caption, end token included
        data.max_input_tokens = 32
    if task == "blip_vqa":
        data.max_instruction_tokens = 35  # length of a question, tokens, special ones included
    if task == "instruct":
        # length of an instruction in tokens of the Q-Former, special ones included, and in tokens
        # of a decoder-only language model, in whose text it stands; of more the last ones are kept
        data.max_instruction_tokens = 128
    # words kept of a caption or an instruction, which are lower-cased and lose some punctuation;
    # 0 = both stay as they are written
    data.max_words = 50
    if task == "language_model":
        data.captions_per_text = 1  # captions of one image in a text, each with begin and end token
        # Whether max_text_tokens is the length of a row that holds several texts, none of which
        # sees another; every caption is a text of its own, as with data.captions="all"
        data.packing = False
    # stands before every caption, and {} in it for the example's instruction or question; in stage
    # 2 its tokens carry no loss. An encoder reads it, and the Q-Former of InstructBLIP
    data.prompt = ""
    if task != "blip_vqa":
        # Prompts of which one is drawn for each training example, as in "'a photo of','Q: {} A:'",
        # or a family of data/templates.py: caption, vqa, vqg, classification, also as vqa:train
        # without those of vqa:heldout; () = always data.prompt, which generation keeps
        data.templates = ()
    data.image_size_px = 224  # side of the square images, pixels
    if task in STAGE2_TASKS:
        # images of an example, evenly spaced ones of its list, whose visual tokens follow each
        # other: InstructBLIP reads 4 frames of a video; 1 = one image, of a list the middle one
        data.frames = 1
    # How an image without augmentation becomes a square: "squash" stretches it, "shortest_edge"
    # resizes its shorter side and takes the centre, as CLIP does
    data.resize = "shortest_edge" if task == "clip" else "squash"
    data.interpolation = "bicubic"  # filter of resizing: bicubic, bilinear or lanczos
    data.pixel_mean = PIXEL_MEAN  # of red, green, blue between 0 and 1; SigLIP: 0.5,0.5,0.5
    data.pixel_std = PIXEL_STD  # what they are divided by, less the mean; SigLIP: 0.5,0.5,0.5
    data.crop_scale = (0.5, 1.0)  # share of the image's area that a random crop keeps
    data.crop_aspect = (3 / 4, 4 / 3)  # width over height of a random crop
    data.flip_probability = 0.5  # share of images that are mirrored
    data.randaugment = False  # BLIP's RandAugment after the flip
    data.num_workers = 4  # worker processes that prepare batches; 0 = threads of this process
    data.max_bad_share = 0.05  # share of bad examples above which the run stops
    data.max_image_pixels = 100_000_000  # an image with more is a bad example

    config.checkpoint = checkpoint = ConfigDict()
    # steps between two checkpoints; the last step has one too; -1 = by the length of the run
    checkpoint.every_steps = 5000
    checkpoint.keep_last = 2  # newest checkpoints that are kept
    checkpoint.keep_best = 1  # best checkpoints that are kept beside them
    checkpoint.best_metric = ""  # evaluation metric that "best" is about; "" = none
    checkpoint.best_mode = "max"  # "max" or "min"

    config.eval = evaluation = ConfigDict()
    # What is measured, one of `data.eval_sections.KINDS`; "" = the first of the task's
    evaluation.kind = ""
    evaluation.source = ""  # evaluation source, as data.train.source; "" = no evaluation
    # Last examples of data.train.source that are kept from training and evaluated where there is no
    # evaluation source; 0 = none
    evaluation.heldout_examples = 0
    # Several evaluations: name -> a section with its own fields of config.eval, and perhaps prompt,
    # such as --config.eval.set.nocaps.source=nocaps.json; see docs/evaluation.md
    evaluation.set = ConfigDict()
    evaluation.image_folder = ""  # as data.image_folder; "" = that one
    # As data.fields; where all are "", those count
    evaluation.fields = ConfigDict(dict.fromkeys(COLUMNS, ""))
    # steps between two evaluations; 0 = only at the end; -1 = by the length of the run
    evaluation.every_steps = 0
    evaluation.batch_size = 64  # images or pairs at a time, over all devices
    evaluation.max_images = 0  # first images of the source that are used; 0 = all
    if "retrieval" in KINDS[task]:
        evaluation.folds = 1  # galleries that the set is divided into; COCO 1K: 5
        evaluation.captions_per_image = 0  # first captions of an image that count; 0 = all
        # Classification and linear probe: file with the name of a class a line
        evaluation.classes = ""
        evaluation.probe_source = ""  # linear probe: source of the images that it is fitted to
        evaluation.probe_l2 = 0.01  # linear probe: weight of the penalty on squared weights
        # Classification: prompts of which a class has the mean, as in "'a photo of {}','a {}'";
        # () = the names alone
        evaluation.templates = ()
    if "vqa" in KINDS[task]:
        # file with an answer a line, of which the most probable is chosen; "" = they are generated
        evaluation.answers = ""
    if task in ("stage1", "blip_retrieval"):
        evaluation.rerank_top_k = 128  # candidates re-scored by ITM, facts of COCO retrieval
    if task in STAGE2_TASKS:
        # Prompts as data.templates, of which each entry has one, the same every time; vqa:heldout
        # has those that vqa:train has not; () = data.prompt
        evaluation.templates = ()
        evaluation.num_beams = 5  # beams of beam search; 1 = greedy
        evaluation.length_penalty = 0.0  # exponent: score / length ** penalty
        evaluation.max_new_tokens = 30  # longest generated text, tokens
        evaluation.min_new_tokens = 0  # shortest generated text, tokens
    if task in ("blip_caption", "blip_vqa"):
        evaluation.num_beams = 3  # beams of beam search; 1 = greedy
        evaluation.length_penalty = 1.0  # exponent: score / length ** penalty
        # longest generated text, tokens, without the prompt
        evaluation.max_new_tokens = 20 if task == "blip_caption" else 10
        evaluation.min_new_tokens = 1  # shortest generated text, tokens
    if task == "instruct":
        _set_instructblip(config, is_encoder_decoder)
    return config


def _set_instructblip(config: ConfigDict, is_encoder_decoder: bool) -> None:
    """InstructBLIP's values (arXiv 2305.06500 §2.6) where they are not BLIP-2's.

    Its training was never released: what the paper leaves out is that of X-InstructBLIP in LAVIS.
    """
    config.steps, config.batch_size = 60_000, 128  # the paper's for 7B; 3B: 192, 11B and 13B: 64
    optimizer, data = config.optimizer, config.data
    optimizer.warmup_init_lr, optimizer.peak_lr, optimizer.min_lr = 1e-8, 1e-5, 0.0
    optimizer.warmup_steps, optimizer.b2 = 1000, 0.999
    # LAVIS: up to 128 tokens of instruction and 256 of output.
    data.max_text_tokens = 256 if is_encoder_decoder else 128 + 256
    if is_encoder_decoder:
        data.max_input_tokens = 128
    data.max_words, data.prompt = 0, "{}"
    data.crop_scale, data.flip_probability = (0.9, 1.0), 0.0
    config.eval.length_penalty, config.eval.max_new_tokens = 1.0, 256
    config.eval.min_new_tokens = 1


def _model(task: str, language_model: str) -> ConfigDict:
    """Sizes; the fields are those of the config classes in `jaxblip.models`."""
    model = ConfigDict()
    if task != "language_model":
        model.vision = model_fields(VitConfig)
    if task == "clip":
        model.text = model_fields(ClipTextConfig, vocab_size=0)
        model.embed_dim = 512  # width of the contrastive space
    if task in BLIP_TASKS:
        model.text = model_fields(MedConfig, vocab_size=0)  # text encoder and decoder alike
    if task == "blip_retrieval":
        model.embed_dim = 256  # width of the contrastive space
    if task in ("blip_caption", "blip_vqa"):
        model.dec_token_id = -1  # token that starts a generated text; -1 = the tokenizer's [DEC]
    if task in ("blip_retrieval", "blip_vqa"):
        # token that starts a text that is read with its image; -1 = the tokenizer's [ENC], as in
        # BLIP's code; 0 = none, so that [CLS] does, as in transformers
        model.enc_token_id = -1
    if task in ("stage1", *STAGE2_TASKS):
        # vocab_size = 0 stands for the tokenizer's number of entries
        model.qformer = model_fields(QFormerConfig, vocab_size=0)
        model.vision_norm_epsilon = 1e-5  # as in LAVIS; the Hugging Face port has 1e-6
        # What makes visual tokens of the image's: qformer, or in its place linear, mlp (LLaVA-1.5)
        # or perceiver (Flamingo), which read no text, so that stage 1 has qformer only
        model.connector = QFORMER
    if task in STAGE2_TASKS:
        model.perceiver = model_fields(PerceiverConfig)
    if task == "stage2":
        del model.qformer["vocab_size"], model.qformer["max_positions"]  # there is no text side
    if task == "stage1":
        model.embed_dim = 256  # width of the contrastive space
        model.dec_token_id = -1  # token that starts a generated text; -1 = the tokenizer's [DEC]
    if task in ("language_model", *STAGE2_TASKS):
        model.language_model = language_model_section(language_model, vocab_size=0)
        if "start_token_id" in model.language_model:
            # what the decoder reads first; -1 = the tokenizer's padding, as in T5
            model.language_model.start_token_id = -1
    return model


def _parts_with_layers(task: str, model: ConfigDict) -> list[str]:
    """Parts of the parameter tree with stacks of layers; BLIP's decoder has the sizes of `text`."""
    parts = [part for part in ("vision", "text", "qformer", "language_model") if part in model]
    if task in ("blip_caption", "blip_vqa"):
        parts.append("decoder")
    return [part for part in parts if (task, part) != ("blip_caption", "text")]


def _lora(task: str) -> ConfigDict:
    """Low-rank factors beside frozen linear maps (`models.lora`)."""
    lora = ConfigDict()
    lora.rank = 0  # of the factors; 0 = no LoRA
    lora.alpha = 16.0  # the product of the factors is scaled by alpha / rank
    lora.dropout = 0.0  # share of the factors' inputs that training drops
    # Names of linear maps: query, key, value and out of attention, up, gate and down behind it
    lora.targets = ("query", "value")
    # Path prefixes of what has factors, all of it frozen, such as language_model or vision
    has_own = task in ("language_model", *STAGE2_TASKS)
    lora.parts = ("language_model",) if has_own else ("vision",)
    return lora


def _loss(task: str, is_encoder_decoder: bool) -> ConfigDict:
    loss = ConfigDict()
    if is_encoder_decoder and task != "instruct":
        # The encoder reads the prompt and the first words of the caption, a random number of them,
        # and the loss is about the rest (BLIP-2 §3.3); False: about the whole caption
        loss.prefix_lm = True
    if task == "clip":
        loss.label_smoothing = 0.0  # share of the target that is uniform over the batch
        loss.gradient_to_all = True  # gradient to both sides of each comparison, as CLIP
    if task == "stage1":
        loss.itc_weight = 1.0  # weight of the contrastive loss in the sum
        loss.itm_weight = 1.0  # weight of the matching loss
        loss.itg_weight = 1.0  # weight of the generation loss
        loss.itc_label_smoothing = 0.1  # share of the target that is uniform over the batch
        loss.itg_label_smoothing = 0.1  # share of the target that is uniform over the words
        loss.gradient_to_all = False  # reference: no gradient through the gathered side
        loss.use_image_id = True  # captions of one image are never each other's negatives
    if task == "blip_retrieval":
        loss.itc_weight = 1.0  # weight of the contrastive loss in the sum
        loss.itm_weight = 1.0  # weight of the matching loss
        loss.itc_label_smoothing = 0.0  # share of the target that is uniform over the batch
        loss.gradient_to_all = False  # BLIP: the side that is compared with has no gradient
        loss.use_image_id = True  # captions of one image are never each other's negatives
    if task in ("blip_retrieval", "clip", "stage1"):
        # Texts that are compared with all images of the batch at a time, and once more in the
        # backward pass, for batches of which not even all scores fit; 0 = all texts at once
        loss.itc_block_size = 0
    if task in ("language_model", "stage1", *STAGE2_TASKS):
        # Positions of the texts whose scores of all words exist at a time, with their gradients;
        # 0 = all positions
        loss.vocab_chunk = 16
    if task in ("blip_caption", "blip_vqa"):
        loss.label_smoothing = 0.1  # share of the target that is uniform over the words
    return loss


def _init(task: str) -> ConfigDict:
    """Where parts start from.

    Each is the work directory of a run, published weights ("hf:NAME", "hf:NAME@REVISION", a folder,
    or a file .safetensors, .pth or .gguf), "random", or "" (random if trained). Published weights
    bring the sizes of their part with them, and the tokenizer where data.tokenizer is "".
    """
    init = ConfigDict()
    init.all = ""  # all parts that it has and that are not named below
    if task != "language_model":
        init.vision = ""  # image encoder
    if task in ("stage1", *STAGE2_TASKS):
        init.qformer = ""  # Q-Former and vision norm
    if task in ("language_model", *STAGE2_TASKS):
        init.language_model = ""  # language model
    return init


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file, with overrides.

    Args:
      path: a Python file with `get_config`, or `FILE:ARG` to hand it an argument. It may import
        its neighbours.
      overrides: each `config.field=value`, or `config.section.field=value`.

    Raises:
      UserError: no such file, one that is no Python, an unknown field (names the nearest real one),
        or a value that is not of the field's type.
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise UserError(
            f"The config file {file!r} does not exist; the shipped ones are in configs/."
        )
    with _neighbours_importable(file):
        try:
            get_config = runpy.run_path(file).get("get_config")
        except SyntaxError as error:
            raise UserError(
                f"The config file {file!r} is no Python: line {error.lineno}: {error.msg}."
            ) from error
        if get_config is None:
            raise UserError(f"The config file {file!r} defines no function get_config(arg='').")
        config = get_config(argument)
    config.lock()
    apply_overrides(config, overrides)
    if "language_model" in config.model:
        language_model_config(config)  # an architecture that does not fit, before any download
    return config


def config_from_dict(saved: Mapping[str, Any]) -> ConfigDict:
    """The config that `ConfigDict.to_dict` gave and JSON kept, locked.

    Raises:
      UserError: it has a task that does not exist, or a field of another type than ours.
    """
    if saved.get("task") not in TASKS:
        raise UserError(f"The saved config is of no task that exists: task={saved.get('task')!r}.")
    language_model = saved.get("model", {}).get("language_model", {}).get("architecture", "opt")
    config = default_config(saved["task"], language_model=language_model)
    try:
        config.update(_tuples(saved))
    except TypeError as error:
        raise UserError(
            f"The saved config is of another version of jaxblip and cannot be read: {error}."
        ) from error
    return config.lock()


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


@contextlib.contextmanager
def _neighbours_importable(file: str) -> Iterator[None]:
    """Lets a config import the files beside it, without leaving them in the module table.

    Two folders of configs may both have a `common.py`.
    """
    folder, before = str(Path(file).resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).resolve().parent == Path(folder):
                del sys.modules[name]
