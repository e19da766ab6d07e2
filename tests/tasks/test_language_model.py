"""Packed rows: every text is read, scored and trained on as if it stood alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxblip import sharding
from jaxblip.config import default_config
from jaxblip.errors import UserError
from jaxblip.models.language_models import continued_hidden
from jaxblip.tasks import make_task
from tiny_tasks import fast_jit, random_params

VOCAB, ROW = 24, 12
# Rows that are full and rows that are not; texts of one token, whose only one is given.
LENGTHS = [(5, 4, 3), (1, 7, 1, 2), (12,), (6, 2), (3, 3, 3, 3), (2,), (11, 1), (4, 1)]

MODELS = {
    "opt": ("opt", {}),
    "llama": ("llama", {"num_kv_heads": 4}),
    "mistral": ("llama", {"num_kv_heads": 4, "sliding_window": 3}),
    "qwen3": ("llama", {"qk_norm": True, "tied_head": True, "head_width": 6}),
}


def make_config(architecture="opt", **data):
    config = default_config("language_model", language_model=architecture)
    config.compute_dtype = config.frozen_dtype = "float32"
    config.batch_size = len(LENGTHS)
    config.data.max_text_tokens, config.data.packing = ROW, True
    config.model.language_model.update(
        vocab_size=VOCAB, width=16, mlp_width=40, num_heads=8, num_layers=2
    )
    if architecture != "t5":
        config.model.language_model.max_positions = 16
    config.data.update(data)
    return config


@pytest.fixture(scope="module", params=MODELS)
def task(request):
    architecture, fields = MODELS[request.param]
    config = make_config(architecture)
    config.model.language_model.update(fields)
    return make_task(config)


@pytest.fixture(scope="module")
def params(task):
    return random_params(task)


def texts():
    rng = np.random.default_rng(0)
    return [[rng.integers(1, VOCAB, length) for length in row] for row in LENGTHS]


def packed_rows():
    ids = np.zeros((len(LENGTHS), ROW), np.int32)
    segments = np.zeros_like(ids)
    for row, members in enumerate(texts()):
        joined = np.concatenate(members)
        ids[row, : len(joined)] = joined
        numbers = np.repeat(np.arange(1, len(members) + 1), list(map(len, members)))
        segments[row, : len(joined)] = numbers
    return {"text_ids": ids, "text_mask": segments > 0, "segment_ids": segments}


def rows_of_one_text():
    flat = [text for row in texts() for text in row]
    ids = np.zeros((len(flat), ROW), np.int32)
    mask = np.arange(ROW) < np.array(list(map(len, flat)))[:, None]
    ids[mask] = np.concatenate(flat)
    return {"text_ids": ids, "text_mask": mask}


def logits_of(task, params, batch):
    return np.asarray(fast_jit(task.apply)(params, *task.model_inputs(batch)))


def test_logits_of_a_text_do_not_depend_on_its_neighbours(task, params):
    packed, alone = packed_rows(), rows_of_one_text()
    # Both in the order of the texts.
    found = logits_of(task, params, packed)[packed["text_mask"]]
    expected = logits_of(task, params, alone)[alone["text_mask"]]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # Without the segment ids they do: where a text begins behind another one.
    mixed = {field: packed[field] for field in ("text_ids", "text_mask")}
    mixed = logits_of(task, params, mixed)[packed["text_mask"]]
    first = packed["segment_ids"][packed["text_mask"]] == 1
    np.testing.assert_allclose(mixed[first], expected[first], rtol=1e-5, atol=1e-5)
    begins = np.diff(packed["segment_ids"], prepend=0)[packed["text_mask"]] > 0
    assert (abs(mixed - expected).max(axis=1)[begins & ~first] > 1e-2).all()


def test_loss_and_gradients_are_those_of_rows_of_one_text(task, params):
    def value(params, batch):
        output = task.loss(params, batch, None)
        return output.loss, output

    both = fast_jit(jax.value_and_grad(value, has_aux=True))
    (_, found), gradients = both(params, packed_rows())
    (_, expected), expected_gradients = both(params, rows_of_one_text())
    # The first token of each text is given.
    targets = sum(length - 1 for row in LENGTHS for length in row)
    assert float(found.weight) == float(expected.weight) == targets
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    for name, metric in expected.metrics.items():
        np.testing.assert_allclose(found.metrics[name], metric, rtol=1e-5)
    largest = max(abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * largest),
        gradients,
        expected_gradients,
    )


def test_evaluation_of_texts_by_themselves_gives_the_loss_of_packed_rows(task, params):
    alone = rows_of_one_text()
    loss, correct, tokens = fast_jit(task.token_sums)(params, *alone.values()).sum(axis=0)
    packed = fast_jit(lambda *arguments: task.loss(*arguments, None))(params, packed_rows())
    np.testing.assert_allclose(loss / tokens, packed.loss, rtol=1e-5)
    np.testing.assert_allclose(correct / tokens, packed.metrics["token_accuracy"], rtol=1e-5)


def test_no_gradient_from_one_text_to_another(task, params):
    """Through the embeddings: position by position, also of the last row, which has padding."""
    batch = {field: array[[1, -1]] for field, array in packed_rows().items()}
    segments = batch["segment_ids"]

    def hidden_sum(embeddings, row, position):
        def run(module):
            arrays = batch["text_mask"], segments
            return continued_hidden(module.language_model, embeddings, *arrays)

        return task.model.apply({"params": params}, method=run)[row, position].sum()

    embeddings = np.random.default_rng(1).normal(size=(2, ROW, 16)).astype(np.float32)
    gradient = fast_jit(jax.grad(hidden_sum))
    for row, position in ((0, 7), (0, 9), (0, 10), (1, 3), (1, 4)):
        reached = np.asarray(abs(gradient(embeddings, row, position))).sum(axis=-1) > 0
        same = segments[row] == segments[row, position]
        window = getattr(task.model.config, "sliding_window", 0) or ROW
        near = np.arange(ROW) > position - 2 * (window - 1) - 1  # two layers
        expected = np.zeros((2, ROW), bool)
        expected[row] = same & (np.arange(ROW) <= position) & near
        np.testing.assert_array_equal(reached, expected)


def test_packed_batches_have_one_field_more(task):
    shapes = task.batch_shapes(8)
    assert list(shapes) == ["text_ids", "text_mask", "segment_ids"] == list(task.fields)
    assert {field: (leaf.shape, leaf.dtype.name) for field, leaf in shapes.items()} == {
        "text_ids": ((8, ROW), "int32"),
        "text_mask": ((8, ROW), "bool"),
        "segment_ids": ((8, ROW), "int32"),
    }
    alone = make_config()
    alone.data.packing = False
    assert make_task(alone).fields == ("text_ids", "text_mask")


def test_packed_rows_give_the_same_loss_on_a_mesh():
    task = make_task(make_config())
    params, batch = random_params(task), packed_rows()
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
    loss = fast_jit(lambda params, batch: task.loss(params, batch, None).loss)
    found = loss(placed, sharding.put_batch(batch, mesh))
    np.testing.assert_allclose(found, loss(params, batch), rtol=1e-5)


def test_what_cannot_be_packed_is_said_in_one_sentence():
    with pytest.raises(UserError, match="data.packing=True needs a decoder-only language model"):
        make_task(make_config("t5"))
    with pytest.raises(UserError, match="data.packing=True .* data.captions_per_text=2"):
        make_task(make_config(captions_per_text=2))
