"""Token cross-entropy: the ITG loss of stage 1, the language-modelling loss of stage 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    return _means(*_sums_of_logits(logits, targets, counts, label_smoothing), counts)


def chunked_token_cross_entropy(
    score: Callable[[Float[Array, "batch chunk width"]], Float[Array, "batch chunk vocab"]],
    hidden: Float[Array, "batch text width"],
    targets: Int[Array, "batch text"],
    counts: Bool[Array, "batch text"],
    *,
    label_smoothing: float = 0.0,
    chunk: int = 0,
) -> TokenLoss:
    """`token_cross_entropy(score(hidden), ...)` that never has the logits of all tokens.

    The gradient of a chunk of logits is computed as soon as they are there, and taken back to
    `hidden` and to what is trained of the output head: nothing is computed twice, and no logits are
    kept for the backward pass.

    Args:
      score: the output head; it may close over parameters.
      chunk: positions of the texts that are scored at a time, in all rows; 0 = all.
    """
    num_chunks = -(-hidden.shape[1] // chunk) if chunk else 1
    if num_chunks == 1:
        logits = score(hidden)
        return token_cross_entropy(logits, targets, counts, label_smoothing=label_smoothing)
    chunks = [_split(x, num_chunks) for x in (hidden, targets, counts)]
    score, head = jax.closure_convert(score, chunks[0][0])
    return _means(*_sums(score, label_smoothing, head, *chunks), counts)


def _means(loss, correct, counts) -> TokenLoss:
    num_tokens = counts.sum().astype(jnp.float32)
    divisor = jnp.maximum(num_tokens, 1.0)
    return TokenLoss(loss / divisor, correct / divisor, num_tokens)


def _split(x: Array, num_chunks: int) -> Array:
    """`[batch, text, ...]` to `[chunks, batch, chunk, ...]`, with zeros behind the text."""
    chunk = -(-x.shape[1] // num_chunks)
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, chunk * num_chunks - x.shape[1])
    x = jnp.pad(x, padding).reshape(x.shape[0], num_chunks, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _sums_of_logits(logits, targets, counts, label_smoothing):
    """Sums over the tokens that count: of their losses, and of those whose best guess is right."""
    logits = logits.astype(jnp.float32)
    losses = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses -= (1 - label_smoothing) * of_target
    if label_smoothing:
        losses -= label_smoothing * logits.mean(axis=-1)
    correct = logits.argmax(axis=-1) == targets
    return jnp.sum(losses * counts), jnp.sum(correct * counts).astype(jnp.float32)


def _gradient_of_logits(logits, targets, counts, label_smoothing):
    """That of the sum of the losses: the softmax less what was wanted."""
    wanted = (jnp.arange(logits.shape[-1]) == targets[..., None]) * (1 - label_smoothing)
    wanted += label_smoothing / logits.shape[-1]
    gradient = jax.nn.softmax(logits.astype(jnp.float32), axis=-1) - wanted
    return (gradient * counts[..., None]).astype(logits.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(score, label_smoothing, head, hidden, targets, counts):
    """`_sums_of_logits` over all chunks; `head` is what `score` takes beside a chunk."""

    def add(sums, chunk):
        hidden, *others = chunk
        new = _sums_of_logits(score(hidden, *head), *others, label_smoothing)
        return (sums[0] + new[0], sums[1] + new[1]), None

    return jax.lax.scan(add, (0.0, 0.0), (hidden, targets, counts))[0]


def _sums_forward(score, label_smoothing, head, *chunks):
    is_trained = [leaf.perturbed for leaf in head]
    head, chunks = [leaf.value for leaf in head], [leaf.value for leaf in chunks]
    trained = [leaf for leaf, trains in zip(head, is_trained, strict=True) if trains]

    def score_trained(trained, hidden):
        left = iter(trained)
        leaves = zip(head, is_trained, strict=True)
        return score(hidden, *(next(left) if trains else leaf for leaf, trains in leaves))

    def add(totals, chunk):
        hidden, *others = chunk
        logits, back = jax.vjp(score_trained, trained, hidden)
        of_trained, of_hidden = back(_gradient_of_logits(logits, *others, label_smoothing))
        new = *_sums_of_logits(logits, *others, label_smoothing), of_trained
        return jax.tree.map(jnp.add, totals, new), of_hidden

    totals = 0.0, 0.0, jax.tree.map(jnp.zeros_like, trained)
    (loss, correct, of_trained), of_hidden = jax.lax.scan(add, totals, tuple(chunks))
    gradients = iter(of_trained)
    of_head = [next(gradients) if trains else None for trains in is_trained]
    return (loss, correct), (of_head, of_hidden)


def _sums_backward(score, label_smoothing, gradients, of_sums):
    of_loss = of_sums[0]
    of_head, of_hidden = jax.tree.map(lambda x: (x * of_loss).astype(x.dtype), gradients)
    return of_head, of_hidden, None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)
