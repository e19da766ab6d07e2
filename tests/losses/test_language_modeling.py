"""Token cross-entropy against PyTorch, and in chunks against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.losses.language_modeling import chunked_token_cross_entropy, token_cross_entropy
from jaxblip.planning.operations import count_operations

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


WIDTH = 4
HIDDEN = RNG.normal(size=(ROWS, TEXT, WIDTH)).astype(np.float32)
KERNEL = RNG.normal(size=(WIDTH, VOCAB)).astype(np.float32)
BIAS = RNG.normal(size=VOCAB).astype(np.float32)


def from_hidden(hidden, kernel, bias, chunk, label_smoothing=0.1, counts=COUNTS):
    """The loss, twice as large for a gradient that is not 1, and the other means."""
    output = chunked_token_cross_entropy(
        lambda hidden: hidden @ kernel + bias,
        hidden,
        jnp.asarray(TARGETS),
        jnp.asarray(counts),
        label_smoothing=label_smoothing,
        chunk=chunk,
    )
    return 2 * output.loss, (output.accuracy, output.num_tokens)


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("counts", [COUNTS, np.zeros_like(COUNTS)])
def test_chunks_change_no_mean_and_no_gradient(chunk, label_smoothing, counts):
    def plain(hidden, kernel, bias):
        logits = hidden @ kernel + bias
        output = token_cross_entropy(
            logits, jnp.asarray(TARGETS), jnp.asarray(counts), label_smoothing=label_smoothing
        )
        return 2 * output.loss, (output.accuracy, output.num_tokens)

    def in_chunks(*inputs):
        return from_hidden(*inputs, chunk, label_smoothing, counts)

    ours, expected = (
        jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(HIDDEN, KERNEL, BIAS)
        for loss in (in_chunks, plain)
    )
    without_gradient = jax.jit(in_chunks)(HIDDEN, KERNEL, BIAS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (ours, without_gradient),
        (expected, expected[0]),
    )


def test_chunks_compute_no_product_twice_and_none_for_what_is_frozen():
    operations = [
        count_operations(
            jax.grad(lambda *inputs: from_hidden(*inputs, chunk=2)[0], arguments), *inputs
        )
        for inputs in [(HIDDEN, KERNEL, BIAS)]
        for arguments in ((0,), (0, 1), (0, 1, 2))
    ]
    of_one_product = 2 * ROWS * (TEXT + 1) * WIDTH * VOCAB  # chunks of 2: a position of padding
    assert operations == [2 * of_one_product, 3 * of_one_product, 3 * of_one_product]


def test_chunks_need_the_memory_of_a_chunk():
    rows, text, vocab = 4, 32, 4096
    hidden = jax.ShapeDtypeStruct((rows, text, WIDTH), jnp.float32)
    kernel = jax.ShapeDtypeStruct((WIDTH, vocab), jnp.float32)
    targets = jnp.zeros((rows, text), int)

    def planned(chunk):
        def loss(hidden, kernel):
            score = lambda hidden: hidden @ kernel  # noqa: E731
            return chunked_token_cross_entropy(
                score, hidden, targets, targets == 0, chunk=chunk
            ).loss

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, chunked = planned(0), planned(4)
    logits = 4 * rows * text * vocab
    assert whole > logits and chunked < logits / 2
