"""A run as a folder of transformers: the class that its task has there, tokenizer and processor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxblip.data import inputs, run_tokenizers
from jaxblip.data.tokenizers import save_tokenizer
from jaxblip.errors import UserError
from jaxblip.interop.entries import Layout
from jaxblip.interop.families import blip, blip2, clip, instructblip, llama, opt, t5
from jaxblip.interop.processors import ImageProcessing
from jaxblip.interop.save import save_params
from jaxblip.models import lora
from jaxblip.models.llama import LlamaConfig
from jaxblip.models.opt import OptConfig
from jaxblip.models.t5 import T5Config
from jaxblip.tasks import Task, make_task
from jaxblip.tasks.parts import has_qformer, language_model_config
from jaxblip.training.checkpoints import (
    FOLDER,
    check_frozen,
    load_frozen_references,
    stored_fingerprint,
)
from jaxblip.training.initialize import abstract_params, random_params, stored_or_error
from jaxblip.training.piecewise import InMemory, saved_params
from jaxblip.training.restore import read_config
from jaxblip.training.sources import prefixes

Params = dict[str, Any]

IMAGE_TOKEN = "<image>"  # stands for a visual token in a prompt

BLIP = {
    "blip_caption": (blip.blip_captioner_layout, blip.hf_blip_captioner_config),
    "blip_retrieval": (blip.blip_retrieval_layout, blip.hf_blip_retrieval_config),
    "blip_vqa": (blip.blip_question_answering_layout, blip.hf_blip_question_answering_config),
}
LANGUAGE_MODELS = {
    OptConfig: (opt.opt_layout, opt.hf_opt_config),
    LlamaConfig: (llama.llama_layout, llama.hf_llama_config),
    T5Config: (t5.t5_layout, t5.hf_t5_config),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A class of transformers for a model.

    Attributes:
      layout: how it names the parameters.
      config: its config.json.
      notes: what it computes otherwise, a sentence each.
      processor: its processor_config.json; empty where it reads text alone.
    """

    layout: Layout
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def export_run(
    workdir: str, folder: Path, dtype: Any = None, step: int | None = None
) -> tuple[Params, list[str]]:
    """Writes the folder that `from_pretrained` loads.

    Args:
      workdir: of the run; its frozen parts come from their sources, and are checked.
      dtype: of the weights; None keeps that of the run, or float32 where its parts differ.
      step: which checkpoint, by default the latest.

    Returns:
      The parameters, unread, and what is to be said of them.

    Raises:
      UserError: the run cannot be read, or no class has its model.
    """
    config, step = read_config(workdir, step)
    task, tokenizer = make_task(config), run_tokenizers.run_tokenizer(config, workdir, sources=())
    params, notes = run_params(task, workdir, step)
    target = _target(task, tokenizer)
    if dtype is None:
        dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    left = save_params(params, target.layout, folder, target.config, dtype=dtype)
    save_tokenizer(tokenizer, folder)
    other = run_tokenizers.run_qformer_tokenizer(config, workdir, sources=())
    if other is not None:  # in a folder of the name that the processor expects
        save_tokenizer(other, folder / run_tokenizers.QFORMER_TOKENIZER_FOLDER)
    if "vision" in config.model:
        _write_processor(config, target, folder)
    (name,) = target.config["architectures"]
    if left:
        kept = [path for path in flatten_dict(params, sep="/") if path not in left]
        notes.append(f"{name} has no place for {', '.join(prefixes(left, kept))}: left behind.")
    return params, [f"Written as {name}.", *notes, *target.notes]


def run_params(task: Task, workdir: str, step: int) -> tuple[Params, list[str]]:
    """All parameters of a run, trained and frozen, none of them read unless they are random.

    Low-rank factors are part of the kernels beside them.

    Raises:
      UserError: a frozen part is not the one that the run was trained with.
    """
    _, shapes = abstract_params(task)
    stored = stored_or_error(task, shapes)
    flat = flatten_dict(shapes, sep="/")
    missing = {path: leaf for path, leaf in flat.items() if path not in stored.params}
    random = flatten_dict(random_params(task, unflatten_dict(missing, sep="/")), sep="/")
    random = {path: InMemory(np.asarray(leaf)) for path, leaf in random.items()}
    frozen = unflatten_dict({path: (stored.params | random)[path] for path in flat}, sep="/")
    references = {
        part: stored.references[part] | {"fingerprint": stored_fingerprint(tree)}
        for part, tree in frozen.items()
    }
    check_frozen(load_frozen_references(workdir, step), references, where=workdir)
    trained = flatten_dict(saved_params(f"{workdir}/{FOLDER}/{step}"), sep="/")
    flat = trained | flatten_dict(frozen, sep="/")
    params = unflatten_dict(_without_factors(flat, task.lora), sep="/")
    lines = [
        f"{source} has no {', '.join(lacking)}: random there, and here as well."
        for source, lacking in stored.lacking.items()
    ]
    return params, lines


class _MergedKernel:
    """A kernel with its low-rank factors, put together when it is read."""

    is_stacked = False

    def __init__(self, kernel: Any, factors: tuple[Any, Any], config: lora.LoraConfig):
        self._arrays, self._config = (kernel, *factors), config
        self.shape, self.size = kernel.shape, kernel.size
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        return lora.merged_kernel(*(array[index] for array in self._arrays), self._config)


def _without_factors(flat: Mapping[str, Any], config: lora.LoraConfig) -> dict[str, Any]:
    merged = {path: leaf for path, leaf in flat.items() if not lora.is_factor(path)}
    for path in flat.keys() - merged.keys():
        at, _, name = path.rpartition("/")
        if name == lora.A:
            factors = flat[path], flat[f"{at}/{lora.B}"]
            merged[f"{at}/kernel"] = _MergedKernel(flat[f"{at}/kernel"], factors, config)
    return merged


def _target(task: Task, tokenizer: Any) -> Target:
    """The class for the model of a task, and its tokenizer's ids; adds the image's placeholder."""
    config, model = task.config, task.model
    if not has_qformer(config):
        raise UserError(
            f"The run has model.connector={config.model.connector!r}, and no BLIP-2 of "
            "transformers has a place for it: only runs with a Q-Former are exported."
        )
    if config.task == "clip":
        ids = _ids(tokenizer, inputs.text_encoder(config, tokenizer))
        processor = {"processor_class": "CLIPProcessor"}
        return Target(
            clip.clip_layout(model), clip.hf_clip_config(model, **ids), processor=processor
        )
    if config.task == "stage1":
        return Target(
            blip2.blip2_retrieval_layout(model),
            blip2.hf_blip2_retrieval_config(model),
            blip2.export_notes(model),
            {"processor_class": "Blip2Processor"},
        )
    if config.task in BLIP:
        encoder, (layout, hf_config) = inputs.text_encoder(config, tokenizer), BLIP[config.task]
        text = {"sep_token_id": encoder.stop_id, "pad_token_id": encoder.pad_id}
        if "label_smoothing" in config.loss:
            text["label_smoothing"] = config.loss.label_smoothing
        return Target(
            layout(model),
            hf_config(model, **text),
            blip.export_notes(model),
            {"processor_class": "BlipProcessor"},
        )
    language_model = language_model_config(config)
    ids = _ids(tokenizer, inputs.text_encoder(config, tokenizer))
    if config.task == "language_model":
        layout, hf_config = LANGUAGE_MODELS[type(language_model)]
        return Target(
            layout(language_model, "language_model/"), hf_config(language_model, **ids)
        )
    model = model.clone(language_model_config=language_model)  # as it is when it trains
    num_queries = model.qformer_config.num_query_tokens
    image_token, notes = _image_token(tokenizer, language_model.vocab_size)
    layout, hf_config, processor = blip2.blip2_layout, blip2.hf_blip2_config, "Blip2Processor"
    if config.task == "instruct":
        layout, hf_config = instructblip.instructblip_layout, instructblip.hf_instructblip_config
        processor = "InstructBlipProcessor"
    return Target(
        layout(model),
        hf_config(model, image_token_index=image_token, **ids),
        (*blip2.export_notes(model), *notes),
        {"processor_class": processor, "num_query_tokens": num_queries},
    )


def _ids(tokenizer: Any, encoder: Any) -> dict[str, int]:
    """Ids of special tokens, as the run uses them."""
    ids = {
        "bos_token_id": encoder.start_id,
        "eos_token_id": encoder.stop_id,
        "pad_token_id": encoder.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _image_token(tokenizer: Any, vocab_size: int) -> tuple[int | None, tuple[str, ...]]:
    """The placeholder of a visual token, which transformers looks up like a word."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        if len(tokenizer) >= vocab_size:
            note = (
                f"The language model has no row left for the placeholder {IMAGE_TOKEN!r} that "
                "transformers puts into a prompt: there, call model.resize_token_embeddings, and "
                "set model.config.image_token_index."
            )
            return None, (note,)
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), ()


def _write_processor(config: ConfigDict, target: Target, folder: Path) -> None:
    image = ImageProcessing.of_run(config.data).to_hf()
    image["processor_class"] = target.processor["processor_class"]
    files = {"preprocessor_config.json": image, "processor_config.json": target.processor}
    for name, content in files.items():
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
