"""Tiny random BLIP models of transformers, and the same in jaxblip."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxblip.interop.entries import Layout
from jaxblip.interop.families import blip
from reference import randomized
from tiny_checkpoints import shapes_of

SIZE, TEXT, VOCAB, POSITIONS = 8, 6, 13, 24
PAD, SEP, DEC = 0, 2, 11
SMOOTHING = 0.1

RETRIEVAL = "BlipForImageTextRetrieval"
CAPTIONING = "BlipForConditionalGeneration"
ANSWERING = "BlipForQuestionAnswering"
CLASSES = (RETRIEVAL, CAPTIONING, ANSWERING)

# Of each class: model from config, layout, config from model.
FAMILY = {
    RETRIEVAL: (
        blip.blip_retrieval_model,
        blip.blip_retrieval_layout,
        blip.hf_blip_retrieval_config,
    ),
    CAPTIONING: (
        blip.blip_captioner,
        blip.blip_captioner_layout,
        blip.hf_blip_captioner_config,
    ),
    ANSWERING: (
        blip.blip_question_answering_model,
        blip.blip_question_answering_layout,
        blip.hf_blip_question_answering_config,
    ),
}


def random_blip(
    name: str, seed: int = 0, *, talkative: bool = False
) -> transformers.PreTrainedModel:
    """A tiny model of the transformers class `name`, with every parameter random.

    Args:
      talkative: make texts depend more on source and position than on the words' biases, and more
        of them end: random models say the same word over and over.
    """
    config = transformers.BlipConfig(
        vision_config=dict(
            # Its answer decoder reads texts by the width of images.
            hidden_size=16 if name == ANSWERING else 20,
            intermediate_size=28, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
            patch_size=4,
        ),
        text_config=dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=VOCAB, max_position_embeddings=POSITIONS, bos_token_id=DEC,
            sep_token_id=SEP, pad_token_id=PAD, label_smoothing=SMOOTHING,
        ),
        image_text_hidden_size=8,
    )  # fmt: skip
    model = randomized(getattr(transformers, name)(config), seed)
    if talkative:
        with torch.no_grad():
            for parameter, value in model.named_parameters():
                if re.search(r"position_embeddings|crossattention.self.(query|value).w", parameter):
                    value *= 3
                if parameter.endswith("predictions.bias"):
                    value[:] = torch.arange(VOCAB) == SEP
    return model


def ours(name: str, hf: Mapping) -> tuple:
    """Model, layout, and the abstract parameters that such a checkpoint has."""
    make, make_layout, _ = FAMILY[name]
    model = make(hf)
    layout = make_layout(model)
    shapes = shapes_of(model, *inputs(model.vision_config.image_size_px, name))
    return model, layout, {part: tree for part, tree in shapes.items() if layout.holds(part)}


def inputs(size: int, name: str) -> tuple:
    """Zeros, of the right shapes."""
    text = jnp.zeros((1, TEXT), int), jnp.ones((1, TEXT), bool)
    return (jnp.zeros((1, size, size, 3)), *text, *(text if name == ANSWERING else ()))


def as_tree(layout: Layout, arrays: Mapping[str, np.ndarray], shapes: Mapping) -> dict:
    """A tree of ours from arrays by the names of transformers: parameters, or their gradients."""
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.full(leaf.shape, np.nan)
        for path, leaf in jax.tree.leaves_with_path(shapes)
    }
    for entry in layout.entries:
        parts = entry.split(
            arrays[entry.theirs], [slot.shape(flat[slot.path].shape) for slot in entry.ours]
        )
        for slot, part in zip(entry.ours, parts, strict=True):
            flat[slot.path][() if slot.layer is None else slot.layer] = part
    leaves = [leaf.astype(np.float32) for leaf in flat.values()]
    assert not any(np.isnan(leaf).any() for leaf in leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@functools.cache
def pair(name: str, seed: int = 0, **variant) -> tuple:
    """A model of transformers, the same in jaxblip, its layout, and its parameters."""
    reference = random_blip(name, seed, **variant)
    model, layout, shapes = ours(name, reference.config.to_dict())
    arrays = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    return reference, model, layout, as_tree(layout, arrays, shapes)


def gradients(reference: torch.nn.Module, layout: Layout, params: Mapping) -> dict:
    """The gradients that a backward pass has left in `reference`, as a tree of ours."""
    arrays = {}
    for name, parameter in reference.named_parameters():
        # The cross-attention of a text encoder without image has none.
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        arrays[name] = grad.numpy()
    return as_tree(layout, arrays, params)


def images_and_pixels(count: int, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Random images, channels last for us and first for transformers."""
    images = np.random.default_rng(seed).normal(size=(count, SIZE, SIZE, 3)).astype(np.float32)
    return images, torch.tensor(images.transpose(0, 3, 1, 2).copy())


def random_texts(lengths, seed: int = 0, length: int = TEXT) -> tuple[np.ndarray, np.ndarray]:
    """Ids (no padding, no `[SEP]` among the valid ones) and their validity."""
    valid = np.arange(length) < np.asarray(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(3, DEC, valid.shape)
    return np.where(valid, ids, PAD), valid
