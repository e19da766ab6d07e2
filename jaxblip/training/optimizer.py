"""AdamW with BLIP-2's weight-decay mask, and its learning rate: linear warm-up, cosine decay."""

from __future__ import annotations

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

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
      UserError: when the warm-up does not end before the run does.
    """
    optimizer = config.optimizer
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
    """AdamW without its learning rate: the step multiplies its output by -`learning_rate(step)`.

    Kept apart, the schedule follows the run's step even where an update was skipped.
    `optimizer.clip_norm` is the largest global gradient norm; 0 switches clipping off.
    """
    optimizer = config.optimizer
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm > 0 else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=weight_decay_mask),
    )
