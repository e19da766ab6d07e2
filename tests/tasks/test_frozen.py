"""What a step does with the frozen parts of a task, and with the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny_tasks import (
    COMPILER_OPTIONS,
    LANGUAGE_MODEL_MLP,
    ROWS,
    VISION_MLP,
    VISION_WIDTH,
    WIDTH,
    random_batch,
    shallow,
    start,
    tiny_config,
)

from jaxblip import sharding
from jaxblip.models.language_models import continued_hidden
from jaxblip.planning.operations import count_operations
from jaxblip.tasks import make_task


def product_shapes(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of the results of all matrix products, inner jaxprs included."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            found |= product_shapes(inner)
    return found


def trained_kernels(name, frozen, **lora):
    """Which of the parts' feed-forward kernels a step computes a gradient of."""
    config = shallow(tiny_config(name))
    config.frozen = frozen
    config.lora.update(lora)
    step, state, frozen_params, _, task = start(config, {})
    jaxpr = jax.make_jaxpr(step)(state, frozen_params, random_batch(task))
    shapes = product_shapes(jaxpr.jaxpr)
    kernels = {
        "vision": (VISION_WIDTH, VISION_MLP),
        "language_model": (WIDTH, LANGUAGE_MODEL_MLP),
    }
    return {part for part, kernel in kernels.items() if shapes & {kernel, kernel[::-1]}}


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("clip", ("vision",)),
        ("stage1", ("vision",)),
        ("stage2", ("vision", "language_model")),
        ("stage2", ("language_model",)),
        ("stage2_llama", ("vision", "language_model")),
        ("stage2_t5", ("vision", "language_model")),
        ("instruct", ("vision", "language_model")),
    ],
)
def test_no_gradient_of_a_frozen_part_is_computed(name, frozen):
    has_language_model = name.startswith(("instruct", "stage2"))
    parts = {"vision", "language_model"} if has_language_model else {"vision"}
    if name == "clip":
        parts.add("language_model")  # the text tower, which is as wide
    assert trained_kernels(name, frozen) == parts - set(frozen)
    assert trained_kernels(name, ()) == parts


@pytest.mark.parametrize("name", ["stage2", "stage2_llama", "stage2_t5"])
def test_beside_low_rank_factors_no_gradient_of_a_kernel_is_computed(name):
    parts, targets = ("vision", "language_model"), ("up", "down")
    assert trained_kernels(name, parts, rank=3, targets=targets, parts=parts) == set()


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage2_llama", "stage2_t5"])
def test_steps_leave_frozen_parts_as_they_are_and_move_the_rest(name):
    config = shallow(tiny_config(name))
    config.frozen_dtype = "bfloat16"
    step, state, frozen, mesh, task = start(config, {})
    before, trained = bits(frozen), dict(jax.tree.leaves_with_path(jax.device_get(state.params)))
    assert set(frozen) == set(config.frozen) and not set(frozen) & set(state.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    batches = [sharding.put_batch(random_batch(task, i), mesh) for i in range(2)]
    step = step.lower(state, frozen, batches[0]).compile(compiler_options=COMPILER_OPTIONS)
    for batch in batches:
        state, metrics = step(state, frozen, batch)
    assert np.isfinite(metrics["loss"]) and int(metrics["skipped_total"]) == 0
    assert bits(frozen) == before
    for path, leaf in jax.tree.leaves_with_path(state.params):
        assert not np.array_equal(leaf, trained[path]), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["stage2", "stage2_llama"])
def test_a_frozen_language_model_is_differentiated_for_activations_only(name):
    """Each product with its parameters once more, each of the two of attention twice more."""
    config = tiny_config(name).model.language_model
    language_model = make_task(tiny_config(name)).language_model
    length = 6
    embeddings = jnp.zeros((ROWS, length, WIDTH))
    params = jax.eval_shape(
        lambda: language_model.init(jax.random.key(0), jnp.zeros((1, 1), int), method=_scores)
    )["params"]

    def loss(params, embeddings):
        logits = language_model.apply({"params": params}, embeddings, method=_logits)
        return jax.nn.logsumexp(logits)

    forward, activations, everything = (
        count_operations(function, params, embeddings)
        for function in (loss, jax.grad(loss, 1), jax.grad(loss, (0, 1)))
    )
    of_attention = config.num_layers * 2 * (2 * ROWS * length**2 * WIDTH)
    assert activations == 2 * forward + of_attention
    assert everything == 3 * forward


def _logits(model, embeddings):
    return model.logits(continued_hidden(model, embeddings, jnp.ones(embeddings.shape[:2], bool)))


def _scores(model, ids):
    return _logits(model, model.embed(ids))
