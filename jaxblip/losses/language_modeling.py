"""Token cross-entropy: the ITG loss of stage 1, the language-modelling loss of stage 2."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class TokenLoss:
    """Means over the tokens that count."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    num_tokens: Float[Array, ""]


def token_cross_entropy(
    logits: Float[Array, "batch text vocab"],
    targets: Int[Array, "batch text"],
    counts: Bool[Array, "batch text"],
    *,
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """Mean cross-entropy of `logits[:, t]` against `targets[:, t]` where `counts` is True.

    Label smoothing as in PyTorch's CrossEntropyLoss: a share of the target is uniform over the
    vocabulary. The mean is over the tokens of the global batch. With no token at all the loss is 0.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    of_target = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    losses = -(1 - label_smoothing) * of_target
    if label_smoothing:
        losses -= label_smoothing * log_probs.mean(axis=-1)
    num_tokens = counts.sum().astype(jnp.float32)
    divisor = jnp.maximum(num_tokens, 1.0)
    correct = logits.argmax(axis=-1) == targets
    return TokenLoss(
        loss=jnp.sum(losses * counts) / divisor,
        accuracy=jnp.sum(correct * counts) / divisor,
        num_tokens=num_tokens,
    )
