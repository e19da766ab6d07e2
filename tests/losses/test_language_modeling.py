"""Token cross-entropy against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.losses.language_modeling import token_cross_entropy

ROWS, TEXT, VOCAB = 3, 5, 7
RNG = np.random.default_rng(0)
LOGITS = (2 * RNG.normal(size=(ROWS, TEXT, VOCAB))).astype(np.float32)
TARGETS = RNG.integers(0, VOCAB, (ROWS, TEXT))
# The middle row has no target, as a text of which everything is prompt; the last has a gap.
COUNTS = np.array([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)


def ours(logits, counts=COUNTS, label_smoothing=0.0):
    return token_cross_entropy(
        jnp.asarray(logits),
        jnp.asarray(TARGETS),
        jnp.asarray(counts),
        label_smoothing=label_smoothing,
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_value_and_gradient_are_those_of_torch(label_smoothing):
    value, grad = jax.value_and_grad(
        lambda logits: ours(logits, label_smoothing=label_smoothing).loss
    )(LOGITS)
    theirs = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        theirs.reshape(-1, VOCAB),
        torch.tensor(np.where(COUNTS, TARGETS, -100).ravel()),
        ignore_index=-100,
        label_smoothing=label_smoothing,
    )
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert not grad[~COUNTS].any()


def test_accuracy_and_number_of_tokens():
    output = ours(LOGITS)
    counted = np.argwhere(COUNTS)
    right = [LOGITS[row, t].argmax() == TARGETS[row, t] for row, t in counted]
    assert 0 < sum(right) < len(right)
    assert float(output.accuracy) == pytest.approx(np.mean(right))
    assert float(output.num_tokens) == len(counted)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_any_target_the_loss_is_zero(label_smoothing):
    nothing = np.zeros_like(COUNTS)
    value, grad = jax.value_and_grad(lambda x: ours(x, nothing, label_smoothing).loss)(LOGITS)
    assert float(value) == 0.0
    assert not grad.any()
    output = ours(LOGITS, nothing)
    assert (float(output.accuracy), float(output.num_tokens)) == (0.0, 0.0)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    output = ours(logits)
    assert output.loss.dtype == jnp.float32
    assert float(output.loss) == pytest.approx(float(ours(logits.astype(jnp.float32)).loss))
