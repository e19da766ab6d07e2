"""AdamW or Muon with BLIP-2's weight-decay mask, and their rate: linear warm-up, cosine decay."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers

from jaxblip.errors import UserError

# Decided by name and not by rank: scanned stacks add a leading dimension, and the biases of
# attention are [heads, head_width].
NOT_DECAYED = ("bias", "scale")


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
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm > 0 else []
    return optax.chain(
        *clip,
        DIRECTIONS[optimizer.name](optimizer),
        optax.add_decayed_weights(optimizer.weight_decay, mask=weight_decay_mask),
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

# End of a kernel's path -> how many trailing dimensions are inputs and outputs of its linear map.
# Those before them are the layers of a stack. Muon is for the maps between hidden states: patch
# embeddings, word embeddings and heads onto classes or words keep Adam.
MATRICES = (
    (r"(query|key|value)/kernel", 1, 2),  # [width, heads, head_width]
    (r"out/kernel", 2, 1),  # [heads, head_width, width]
    (r"(up|gate|down|dense|[a-z_]*projection)/kernel", 1, 1),
)


def matrix_dimensions(params: Any) -> Any:
    """The same tree: which axes of a parameter Muon takes as rows and columns, None for Adam."""

    def dimensions(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, inputs, outputs in MATRICES:
            if re.search(rf"(^|/){pattern}$", name):
                axes = tuple(range(leaf.ndim - inputs - outputs, leaf.ndim))
                return MuonDimensionNumbers(axes[:inputs], axes[inputs:])
        return None

    return jax.tree.map_with_path(dimensions, params)
