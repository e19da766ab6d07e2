"""AdamW or Muon with BLIP-2's weight-decay mask, and their rate: linear warm-up, cosine decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers

from jaxblip.errors import UserError
from jaxblip.models.layers import matrix_axes

# Decided by name and not by rank: scanned stacks add a leading dimension, and the biases of
# attention are [heads, head_width].
NOT_DECAYED = ("bias", "scale")

# Parameters that stand before the first layer of a part. What is in no layer and is not among them,
# such as a final norm or a head, stands behind the last one.
EMBEDDINGS = re.compile(
    r"(^|/)([a-z]+_embeddings?|cls_token|query_tokens|latents|embedding_norm|pre_norm|"
    r"relative_position_bias)(/|$)"
)
# Parameters with layers on axis 0: those of stacks, and keys and values that a layer is given.
STACKS = re.compile(r"(^|/)(layers|groups|[a-z]+_key_values)/")


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Learning rate as a function of the step, counted from 0.

    Linear from `optimizer.warmup_init_lr` to `optimizer.peak_lr` over `optimizer.warmup_steps`,
    then a cosine that reaches `optimizer.min_lr` at `steps` (BLIP-2 §3.4 and appendix). It moves at
    every step, where LAVIS moves it once an epoch.

    Raises:
      UserError: when the warm-up does not end before the run does, or a rate is negative.
    """
    optimizer = config.optimizer
    for name in ("peak_lr", "min_lr", "warmup_init_lr"):
        if optimizer[name] < 0:
            raise UserError(f"optimizer.{name}={optimizer[name]} must not be negative.")
    if not 0 <= optimizer.warmup_steps < config.steps:
        raise UserError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be at least 0 and below "
            f"steps={config.steps}: the learning rate decays between the two."
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=optimizer.warmup_init_lr,
        peak_value=optimizer.peak_lr,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=config.steps,  # optax counts the warm-up in
        end_value=optimizer.min_lr,
    )


def weight_decay_mask(params: Any) -> Any:
    """The same tree, True where weight decay applies.

    Not decayed: biases, scales of norms, and scalars. Decayed: kernels, query tokens, word and
    position embeddings, as in LAVIS.
    """

    def decayed(path: tuple, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return name not in NOT_DECAYED and leaf.ndim > 0

    return jax.tree.map_with_path(decayed, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer without its learning rate: the step multiplies what it gives by minus that.

    Kept apart, the schedule follows the run's step even where an update was skipped.
    `optimizer.clip_norm` is the largest global gradient norm; 0 switches clipping off.

    Raises:
      UserError: `optimizer.name` is none of `DIRECTIONS`.
    """
    optimizer = config.optimizer
    if optimizer.name not in DIRECTIONS:
        raise UserError(
            f"optimizer.name={optimizer.name!r} is none of {', '.join(DIRECTIONS)}: choose one."
        )
    decay = {part: value for part, value in optimizer.layer_decay.items() if value != 1.0}
    for part, value in decay.items():
        if not 0 < value < 1:
            raise UserError(
                f"optimizer.layer_decay.{part}={value} must be above 0 and at most 1, where it is "
                "off."
            )
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm > 0 else []
    return optax.chain(
        *clip,
        DIRECTIONS[optimizer.name](optimizer),
        optax.add_decayed_weights(optimizer.weight_decay, mask=weight_decay_mask),
        *([_scale_by_layer(decay)] if decay else []),
    )


def _adam(optimizer: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)


def _muon(optimizer: ConfigDict) -> optax.GradientTransformation:
    """Orthogonalised momentum for matrices, Adam for everything else, Nesterov's way in both.

    Muon's updates are scaled to the root mean square that Adam's have (Liu et al. 2025, "Muon is
    Scalable for LLM Training", §2.2), so both work at one learning rate.
    """
    return optax.contrib.muon(
        learning_rate=-1.0,  # the direction itself
        beta=optimizer.momentum,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        eps=optimizer.eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrix_dimensions,
    )


DIRECTIONS: dict[str, Callable] = {"adamw": _adam, "muon": _muon}


def layer_factors(params: Any, decay: Mapping[str, float]) -> Any:
    """The same tree: what each parameter's learning rate is multiplied by.

    Layer-wise decay as in BEiT (arXiv 2106.08254): of a part with L layers and decay d,
    layer i (from 0) has d ** (L - i), what stands before the layers d ** (L + 1), and what stands
    behind them 1, as every other part has. LAVIS, from which the fine-tuning of BLIP-2 has the
    formula, computes the factors and never applies them.

    Args:
      params: of all parts, or of those that train; a stack has its layers on axis 0.
      decay: of some parts, by the name that they have on top of the tree.

    Returns:
      Scalars, and for stacks arrays that broadcast along axis 0.

    Raises:
      UserError: no layer of a part is among `params`.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    depths = {part: _num_layers(part, leaves) for part in decay}

    def factor(path: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        part = name.partition("/")[0]
        if part not in decay:
            return 1.0
        if STACKS.search(name):
            # Of the Q-Former, an element of axis 0 is a group of blocks.
            block = re.search(r"/block_(\d+)/", name)
            blocks = _blocks_per_layer(part, leaves)
            layers = np.arange(leaf.shape[0]) * blocks + int(block[1] if block else 0)
            factors = decay[part] ** (leaf.shape[0] * blocks - layers)
            return factors.astype(np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
        return decay[part] ** (depths[part] + 1) if EMBEDDINGS.search(name) else 1.0

    return jax.tree.map_with_path(factor, params)


def _scale_by_layer(decay: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies updates by `layer_factors`: behind weight decay, which goes by the rate, too."""

    def init(params: Any) -> optax.EmptyState:
        layer_factors(params, decay)  # says early what cannot be
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None):
        return jax.tree.map(lambda u, f: u * f, updates, layer_factors(updates, decay)), state

    return optax.GradientTransformation(init, update)


def _num_layers(part: str, leaves: Mapping[str, Any]) -> int:
    """Of the deepest stack of a part."""
    inside = [
        leaf.shape[0]
        for name, leaf in leaves.items()
        if name.startswith(f"{part}/") and STACKS.search(name)
    ]
    if not inside:
        raise UserError(
            f"optimizer.layer_decay.{part} is about the layers of {part}, of which none trains: "
            f"take {part} out of config.frozen, or set --config.optimizer.layer_decay.{part}=1."
        )
    return max(inside) * _blocks_per_layer(part, leaves)


def _blocks_per_layer(part: str, leaves: Mapping[str, Any]) -> int:
    pattern = re.compile(rf"^{part}/.*\bblock_(\d+)/")
    return max((int(found[1]) + 1 for found in map(pattern.match, leaves) if found), default=1)


def matrix_dimensions(params: Any) -> Any:
    """The same tree: which axes of a parameter Muon takes as rows and columns, None for Adam."""

    def dimensions(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        found = matrix_axes(jax.tree_util.keystr(path, simple=True, separator="/"))
        if found is None:
            return None
        inputs, outputs = found
        axes = tuple(range(leaf.ndim - inputs - outputs, leaf.ndim))
        return MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree.map_with_path(dimensions, params)
