"""Counted operations against formulas written by hand, and against XLA where it counts right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tiny_tasks import ROWS, tiny_config

from jaxblip.models.vit import VisionTransformer, VitConfig
from jaxblip.planning.operations import count_operations
from jaxblip.tasks import make_task


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_and_convolutions():
    assert count_operations(jnp.matmul, zeros(3, 5), zeros(5, 7)) == 2 * 3 * 5 * 7
    batched = lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b)  # noqa: E731
    assert count_operations(batched, zeros(2, 4, 3, 8), zeros(2, 6, 3, 8)) == 2 * 2 * 3 * 4 * 6 * 8
    patches = nn.Conv(10, (4, 4), (4, 4))
    params = jax.eval_shape(patches.init, jax.random.key(0), zeros(2, 8, 8, 3))
    found = count_operations(patches.apply, params, zeros(2, 8, 8, 3))
    assert found == 2 * (2 * 4 * 10) * 4 * 4 * 3
    assert count_operations(jnp.exp, zeros(5)) == 0


def test_loops_count_as_often_as_they_run():
    def layers(x, kernels):
        def layer(x, kernel):
            return jax.lax.cond(x[0, 0] > 0, lambda: jnp.tanh(x @ kernel), lambda: x), None

        return jax.lax.scan(jax.checkpoint(layer), x, kernels)[0].sum()

    x, kernels = zeros(3, 8), zeros(5, 8, 8)
    once = 5 * 2 * 3 * 8 * 8
    assert count_operations(layers, x, kernels) == once
    assert count_operations(jax.jit(layers), x, kernels) == once
    # A layer again, and two products more a layer: of the input's gradient and of the kernel's.
    assert count_operations(jax.grad(layers, (0, 1)), x, kernels) == 4 * once

    def endless(x):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="unknown length"):
        count_operations(endless, zeros(4, 4))


def test_each_device_of_a_mesh_counts():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    assert count_operations(product, zeros(16, 4), zeros(4, 6)) == 2 * 16 * 4 * 6


def transformer(tokens, width, mlp_width, layers):
    """Products of a forward pass: four projections, attention, two maps of the MLP."""
    return layers * (8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * mlp_width)


def test_a_vit_b_has_its_published_operations():
    model = VisionTransformer(VitConfig())
    images = zeros(1, 224, 224, 3)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    found = count_operations(model.apply, params, images)
    c = model.config
    tokens = (224 // c.patch_size_px) ** 2
    patches = 2 * tokens * c.patch_size_px**2 * 3 * c.width
    assert found == patches + transformer(tokens + 1, c.width, c.mlp_width, c.num_layers)


def test_frozen_parameters_cost_no_gradients_of_their_own():
    """Of a frozen language model: forward, and the gradients of activations alone."""
    task = make_task(tiny_config("stage2"))
    params = jax.eval_shape(task.init, jax.random.key(0))
    trainable, frozen = (
        {name: tree for name, tree in params.items() if (name in task.config.frozen) == is_frozen}
        for is_frozen in (False, True)
    )
    batch = task.batch_shapes(ROWS)

    def loss(trainable, frozen):
        return task.loss({**trainable, **frozen}, batch_of(batch), None).loss

    def batch_of(shapes):
        return {field: jnp.zeros(shape.shape, shape.dtype) for field, shape in shapes.items()}

    forward = count_operations(loss, trainable, frozen)
    some = count_operations(jax.grad(loss, 0), trainable, frozen)
    every = count_operations(jax.grad(loss, (0, 1)), trainable, frozen)
    assert forward < some < 3 * forward and every > some
    assert every == pytest.approx(3 * forward, rel=0.1)
