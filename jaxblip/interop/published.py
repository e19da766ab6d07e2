"""Published checkpoints: what a file of weights is, in jaxblip's terms.

The class in its config.json says which model it holds; the files of LAVIS and of BLIP's authors,
which have no config, are told by the names of their tensors.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxblip.errors import UserError
from jaxblip.interop.entries import Layout
from jaxblip.interop.families.bert import bert_qformer_config, bert_qformer_layout, bert_weights
from jaxblip.interop.families.blip import (
    blip_captioner,
    blip_captioner_layout,
    blip_question_answering_layout,
    blip_question_answering_model,
    blip_retrieval_layout,
    blip_retrieval_model,
)
from jaxblip.interop.families.blip2 import (
    blip2_layout,
    blip2_model,
    blip2_retrieval_layout,
    blip2_retrieval_model,
)
from jaxblip.interop.families.blip_original import is_original_blip, original_blip
from jaxblip.interop.families.clip import VISION_TYPE as CLIP_VISION
from jaxblip.interop.families.clip import clip_layout, clip_model, clip_vision_layout
from jaxblip.interop.families.instructblip import instructblip_layout, instructblip_model
from jaxblip.interop.families.lavis import (
    VISION_NORM_EPSILON,
    is_lavis,
    is_lavis_encoder,
    lavis_encoder,
    lavis_layout,
    lavis_model,
)
from jaxblip.interop.families.llama import llama_config, llama_layout
from jaxblip.interop.families.opt import opt_config, opt_layout
from jaxblip.interop.families.siglip import VISION_TYPE as SIGLIP_VISION
from jaxblip.interop.families.siglip import siglip_layout, siglip_model, siglip_vision_layout
from jaxblip.interop.families.t5 import t5_config, t5_layout
from jaxblip.interop.families.vision import vit_config
from jaxblip.interop.files import TensorInfo, Weights, open_weights
from jaxblip.interop.load import Params, stored_params
from jaxblip.models.blip import BlipCaptioner, BlipQuestionAnswering, BlipRetrieval
from jaxblip.models.positions import interpolate_positions

_DTYPE_OF_SIZE = {1: ml_dtypes.bfloat16, 8: np.float32}
POSITIONS = "vision/position_embedding"
SECTIONS = ("vision", "text", "qformer", "language_model")  # of `config.model`
FIELDS = ("vision_norm_epsilon", "embed_dim", "dec_token_id", "enc_token_id")  # beside them
# Files without a config.
LAVIS_NAMES = {
    "stage1": "LAVIS stage 1",
    "stage2": "LAVIS stage 2",
    "instruct": "LAVIS InstructBLIP",
}
LAVIS_ENCODER = "LAVIS EVA-CLIP"
ORIGINAL_BLIP = "BLIP of its authors"
QFORMER_TOKENIZER = "qformer_tokenizer"  # folder beside an InstructBLIP, as transformers has it
BERT = "BertModel"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
      name: the class of transformers that it is of, or what a file without a config is.
      weights: its tensors, none of them read.
      layout: where in the tree of a task they belong.
      task: the task that has the model as a whole; "" where it is but a part of one.
      configs: the model's configs, by section of `config.model`.
      fields: what else it says of `config.model` (`FIELDS`).
      tokenizers: by the section whose texts a tokenizer is for, the folder beside the weights where
        it lies.
      resizing: how its table of positions is brought to another image size
        (`models.positions.METHODS`).
    """

    name: str
    weights: Weights
    layout: Layout
    task: str = ""
    configs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resizing: str = "bicubic"

    @property
    def paths(self) -> frozenset[str]:
        """The parameters that it has."""
        return frozenset(slot.path for entry in self.layout.entries for slot in entry.ours)

    def own_dtypes(self, shapes: Params) -> Params:
        """`shapes` with the dtypes of the files: what is narrower than 16 bits becomes bfloat16.

        Of the layers of a stack the first counts.
        """
        flat = flatten_dict(shapes, sep="/")
        for entry in reversed(self.layout.entries):
            name = next((name for name in entry.names if name in self.weights.tensors), None)
            for slot in entry.ours if name else ():
                if slot.path in flat:
                    dtype = _DTYPE_OF_SIZE.get(self.weights.tensors[name].dtype.itemsize)
                    dtype = dtype or self.weights.tensors[name].dtype
                    flat[slot.path] = jax.ShapeDtypeStruct(flat[slot.path].shape, dtype)
        return unflatten_dict(flat, sep="/")

    def stored(self, shapes: Params, dtype: Any = None) -> Params:
        """A `StoredParam` for each parameter of `shapes` that the checkpoint has.

        Positions are resized to the image size of `shapes`, and of an encoder with fewer blocks
        the first ones are taken.

        Args:
          shapes: parameters of a task, or some of them.
          dtype: as in `interop.load.stored_params`.

        Raises:
          UserError: the checkpoint does not fit the shapes.
        """
        flat = flatten_dict(shapes, sep="/")
        fitted = _from_bert(self, flat) if self.name in _BERTS else self
        held = {path: leaf for path, leaf in flat.items() if path in fitted.paths}
        weights = fitted.weights
        if POSITIONS in held:
            rows = held[POSITIONS].shape[0]
            weights = _with_positions(fitted, rows)
        return stored_params(weights, fitted.layout, unflatten_dict(held, sep="/"), dtype)


def open_published(source: str | os.PathLike) -> Published:
    """What `source` holds; its tensors stay unread.

    Args:
      source: as in `interop.files.open_weights`.

    Raises:
      UserError: there is nothing to read, or it holds no model of `PUBLISHED`.
    """
    weights = open_weights(source)
    if is_lavis(weights):
        return _lavis(weights)
    if is_lavis_encoder(weights):
        config, layout = lavis_encoder(weights)
        return Published(LAVIS_ENCODER, weights, layout, configs={"vision": config})
    if is_original_blip(weights):
        return _original_blip(weights)
    weights = _with_key_bias(weights)
    names = [*(weights.config.get("architectures") or ()), weights.config.get("model_type", "")]
    names = [_OF_MODEL_TYPE.get(name, name) for name in names if name]
    for name in names:
        if name in PUBLISHED:
            return PUBLISHED[name](name, weights)
    if any(name.startswith("Siglip2") for name in names):
        raise UserError(
            f"{weights.source!r} is a {names[0]}, the NaFlex form of SigLIP 2, which reads images "
            "as patches in their own aspect, where jaxblip has squares: name a SigLIP 2 of fixed "
            "resolution, such as google/siglip2-base-patch16-224."
        )
    what = f"a {names[0]}" if names else "of no class that a config.json beside it names"
    raise UserError(
        f"{weights.source!r} is {what}, which jaxblip has no place for: it reads "
        f"{', '.join(PUBLISHED)}, GGUF files, and the .pth files of LAVIS's BLIP-2 and of BLIP."
    )


def _with_key_bias(weights: Weights) -> Weights:
    """Says in the config whether joint biases of the image encoder hold something for the keys.

    Those of published EVA-CLIPs do not; those of a run with such biases, exported, do.
    """
    biases = [name for name in weights.tensors if name.endswith("self_attn.qkv.bias")]
    if not any(np.split(weights.read(name), 3)[1].any() for name in biases):
        return weights
    vision = {**weights.config.get("vision_config", {}), "key_bias": True}
    return dataclasses.replace(weights, config={**weights.config, "vision_config": vision})


def _model(
    task: str,
    make: Callable[[Mapping[str, Any]], Any],
    layout: Callable[[Any], Layout],
    tokenizers: Mapping[str, str],
    name: str,
    weights: Weights,
) -> Published:
    """A whole model, which `make` makes of its config.json and `layout` finds in its files."""
    model = make(weights.config)
    parts = _configs(model), _fields(model)
    return Published(name, weights, layout(model), task, *parts, tokenizers)


def _lavis(weights: Weights) -> Published:
    model = lavis_model(weights)
    fields: dict[str, Any] = {"vision_norm_epsilon": VISION_NORM_EPSILON}
    if model.projection is None:
        task, tokenizers = "stage1", {"qformer": ""}
        fields |= {"embed_dim": model.embed_dim, "dec_token_id": model.qformer.vocab_size - 1}
    elif model.qformer.has_text:
        task, tokenizers = "instruct", {"qformer": QFORMER_TOKENIZER}
    else:
        task, tokenizers = "stage2", {}
    configs = {"vision": model.vision, "qformer": model.qformer}
    is_clip = model.vision is not None and model.vision.pre_norm
    return Published(
        LAVIS_NAMES[task],
        weights,
        lavis_layout(model),
        task,
        {section: config for section, config in configs.items() if config is not None},
        fields,
        tokenizers,
        resizing="bicubic_align_corners" if is_clip else "bicubic",
    )


def _original_blip(weights: Weights) -> Published:
    model, layout = original_blip(weights)
    task = {
        BlipCaptioner: "blip_caption",
        BlipQuestionAnswering: "blip_vqa",
        BlipRetrieval: "blip_retrieval",
    }[type(model)]
    parts = _configs(model), _fields(model)
    return Published(ORIGINAL_BLIP, weights, layout, task, *parts, {"text": ""})


def _siglip(name: str, weights: Weights) -> Published:
    model = siglip_model(weights.config)
    # No task has its text tower.
    return Published(name, weights, siglip_layout(model), "", _configs(model, ("vision",)))


def _vision(
    model_type: str, layout: Callable[[Any], Layout], name: str, weights: Weights
) -> Published:
    config = vit_config({"model_type": model_type} | dict(weights.config))
    return Published(name, weights, layout(config), "", {"vision": config})


def _language_model(
    read: Callable[[Mapping[str, Any]], Any],
    layout: Callable[[Any, str], Layout],
    name: str,
    weights: Weights,
) -> Published:
    config = read(weights.config)
    return Published(
        name,
        weights,
        layout(config, "language_model/"),
        "language_model",
        {"language_model": config},
        tokenizers={"language_model": ""},
    )


def _bert(name: str, weights: Weights) -> Published:
    config = bert_qformer_config(weights.config)
    layout = bert_qformer_layout(config)
    return Published(name, weights, layout, "", {"qformer": config}, tokenizers={"qformer": ""})


_BERTS = (BERT, "BertForMaskedLM", "BertForPreTraining")
_LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Everything that is read, by `architectures[0]` of its config.json.
PUBLISHED: dict[str, Callable[[str, Weights], Published]] = {
    "Blip2ForConditionalGeneration": partial(
        _model, "stage2", blip2_model, blip2_layout, {"language_model": ""}
    ),
    "Blip2ForImageTextRetrieval": partial(
        _model, "stage1", blip2_retrieval_model, blip2_retrieval_layout, {"qformer": ""}
    ),
    "BlipForConditionalGeneration": partial(
        _model, "blip_caption", blip_captioner, blip_captioner_layout, {"text": ""}
    ),
    "BlipForImageTextRetrieval": partial(
        _model, "blip_retrieval", blip_retrieval_model, blip_retrieval_layout, {"text": ""}
    ),
    "BlipForQuestionAnswering": partial(
        _model,
        "blip_vqa",
        blip_question_answering_model,
        blip_question_answering_layout,
        {"text": ""},
    ),
    "InstructBlipForConditionalGeneration": partial(
        _model,
        "instruct",
        instructblip_model,
        instructblip_layout,
        {"language_model": "", "qformer": QFORMER_TOKENIZER},
    ),
    "CLIPModel": partial(_model, "clip", clip_model, clip_layout, {"text": ""}),
    "CLIPVisionModel": partial(_vision, CLIP_VISION, clip_vision_layout),
    "SiglipModel": _siglip,
    "SiglipVisionModel": partial(_vision, SIGLIP_VISION, siglip_vision_layout),
    **dict.fromkeys(
        ("OPTForCausalLM", "OPTModel"), partial(_language_model, opt_config, opt_layout)
    ),
    **dict.fromkeys(_LLAMAS, partial(_language_model, llama_config, llama_layout)),
    "T5ForConditionalGeneration": partial(_language_model, t5_config, t5_layout),
    **dict.fromkeys(_BERTS, _bert),
}
# What a config without `architectures` means, such as that of a GGUF file.
_OF_MODEL_TYPE = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2Model",
    "siglip2_vision_model": "Siglip2VisionModel",
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bert": BERT,
}


def _configs(model: Any, sections: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """The configs of a model's parts, those of `sections` that it has."""
    names = {section: f"{section}_config" for section in sections}
    return {part: getattr(model, name) for part, name in names.items() if hasattr(model, name)}


def _fields(model: Any) -> dict[str, Any]:
    return {name: getattr(model, name) for name in FIELDS if getattr(model, name, None) is not None}


def _from_bert(published: Published, flat: Mapping[str, Any]) -> Published:
    """BERT in the form of the Q-Former of these shapes."""
    words = flat.get("qformer/text_embeddings/token_embedding/embedding")
    blocks = {path.split("/")[2] for path in flat if path.startswith("qformer/groups/block_")}
    config = dataclasses.replace(
        published.configs["qformer"],
        cross_attention_frequency=max(len(blocks), 1),
        has_text=words is not None,
    )
    vocab_size = config.vocab_size if words is None else words.shape[0]
    return dataclasses.replace(
        published,
        weights=bert_weights(published.weights, vocab_size),
        layout=bert_qformer_layout(config),
    )


def _with_positions(published: Published, rows: int) -> Weights:
    """The tensors, with a table of `rows` positions of the image encoder."""
    weights, config = published.weights, published.configs["vision"]
    entry = next(e for e in published.layout.entries if e.ours[0].path == POSITIONS)
    name = next((name for name in entry.names if name in weights.tensors), None)
    if name is None or rows == config.num_tokens:
        return weights
    info = weights.tensors[name]
    has_class = int(config.has_cls_token)
    side = math.isqrt(rows - has_class)
    # Of another number than the config says, the check of shapes will speak.
    if side**2 != rows - has_class or info.shape[-2] != config.num_tokens:
        return weights
    shape = (*info.shape[:-2], rows, info.shape[-1])

    def read(which: str) -> np.ndarray:
        tensor = weights.read(which)
        if which != name:
            return tensor
        table = tensor.reshape(-1, tensor.shape[-1]).astype(np.float32)
        side_from = math.isqrt(config.num_tokens - has_class)
        return interpolate_positions(table, side_from, side, published.resizing).reshape(shape)

    tensors = dict(weights.tensors) | {name: TensorInfo(shape, np.dtype(np.float32))}
    return dataclasses.replace(weights, tensors=tensors, reader=read)
