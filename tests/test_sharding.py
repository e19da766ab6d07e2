"""The mesh, the rule table and the placement of batches, on 8 virtual devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxblip import sharding
from jaxblip.errors import UserError
from jaxblip.planning.costs import costs
from jaxblip.training.optimizer import weight_decay_mask
from jaxblip.training.state import TrainState


def mesh_of(data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1}, (8, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 4, "tensor": 2}, (1, 4, 2)),
        ({"tensor": -1, "data": 8}, (8, 1, 1)),
    ],
)
def test_mesh_sizes_and_the_rest(sizes, shape):
    mesh = sharding.make_mesh(sizes, jax.devices()[:8])
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert len({device.id for device in mesh.devices.flat}) == 8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"mesh.data=3\) .*= 3 x 1 x 1: .* 3 of 8 devices, and 5 would stand idle"),
        ({"data": 16}, "16 x 1 x 1: that is 16 devices, and there are 8"),
        ({"data": 2, "tensor": 2}, "= 2 x 1 x 2: .* and 4 would stand idle"),
        ({"data": -1, "fsdp": 3}, "= the rest x 3 x 1: 8 devices are not a multiple of 3"),
        ({"data": -1, "fsdp": -1}, "at most one"),
        ({"data": 0}, "positive"),
        ({"data": -2}, "positive"),
        ({"model": 8}, "'model' does not exist.*data, fsdp, tensor"),
    ],
)
def test_a_mesh_that_the_devices_do_not_allow(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes, jax.devices()[:8])


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("vision/layers/attention/query/kernel", (3, 8, 4, 2), (None, "fsdp", "tensor", None)),
        ("vision/layers/attention/query/bias", (3, 4, 2), (None, "tensor", None)),
        ("qformer/block_0/crossattention/key/kernel", (16, 4, 2), ("fsdp", "tensor", None)),
        ("vision/layers/attention/out/kernel", (3, 4, 2, 8), (None, "tensor", None, "fsdp")),
        ("vision/layers/attention/out/bias", (3, 8), (None, None)),
        ("qformer/block_0/query_mlp/up/kernel", (8, 16), ("fsdp", "tensor")),
        ("language_model/layers/mlp/gate/kernel", (3, 8, 16), (None, "fsdp", "tensor")),
        ("language_model/layers/mlp/up/bias", (3, 16), (None, "tensor")),
        ("language_model/layers/mlp/down/kernel", (3, 16, 8), (None, "tensor", "fsdp")),
        ("vision_norm/scale", (8,), (None,)),
        ("vision/layers/attention_norm/bias", (3, 8), (None, None)),
        ("language_model/token_embedding/embedding", (32, 8), ("tensor", "fsdp")),
        ("qformer/position_embedding/embedding", (32, 8), (None, "fsdp")),
        ("vision/position_embedding", (5, 8), (None, "fsdp")),
        ("vision/patch_embedding/kernel", (2, 2, 3, 8), (None, None, None, "fsdp")),
        ("vision/cls_token", (8,), (None,)),
        ("qformer/query_tokens", (4, 8), (None, "fsdp")),
        ("projection/kernel", (8, 16), ("fsdp", None)),
        ("itg_head/dense/kernel", (8, 8), ("fsdp", None)),
        ("itg_head/bias", (32,), ("tensor",)),
        ("lm_head/kernel", (8, 32), ("fsdp", "tensor")),
        ("temperature", (), ()),
        # What an axis does not divide stays whole along that dimension only.
        ("qformer/token_embedding/embedding", (30523, 8), (None, "fsdp")),
        ("qformer/block_0/attention/query/kernel", (8, 3, 2), ("fsdp", None, None)),
        ("qformer/query_tokens", (4, 6), (None, None)),
    ],
)
def test_the_rule_of_each_kind_of_parameter(path, shape, spec):
    assert sharding.parameter_spec(path, shape, mesh_of(1, 4, 2)) == PartitionSpec(*spec)


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'qformer/mystery/kernel'"):
        sharding.tree_shardings({"qformer": {"mystery": {"kernel": jnp.zeros((4, 4))}}}, mesh_of())
    # The rules are for whole path components.
    for path in ("layout/kernel", "myquery_tokens", "projections/bias", "query/kernel/extra"):
        with pytest.raises(ValueError, match=re.escape(path)):
            sharding.parameter_spec(path, (4, 4, 4), mesh_of())
    with pytest.raises(ValueError, match="too few"):
        sharding.parameter_spec("query/kernel", (4, 4), mesh_of())


def test_an_axis_that_splits_nothing_is_refused():
    params = {"layers": {"attention": {"query": {"kernel": jnp.zeros((12, 6, 4))}}}}
    for sizes in {"fsdp": 4}, {"data": 4, "tensor": 2}, {"data": 8}:
        sharding.check_axes_are_used(params, mesh_of(**sizes))
    with pytest.raises(UserError, match=r"mesh.tensor=4 divides none .* head counts.* each 4 "):
        sharding.check_axes_are_used(params, mesh_of(data=2, tensor=4))
    with pytest.raises(UserError, match=r"mesh.fsdp=8 divides none .* widths"):
        sharding.check_axes_are_used(params, mesh_of(fsdp=8))


def test_optimizer_moments_lie_where_their_parameters_do():
    mesh = mesh_of(2, 2, 2)
    params = {
        "vision": {"layers": {"mlp": {"up": {"kernel": jnp.zeros((3, 8, 16))}}}},
        "qformer": {"query_tokens": jnp.zeros((4, 8))},
        "temperature": jnp.zeros(()),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=weight_decay_mask),
    )
    state = jax.eval_shape(lambda: TrainState.create(params, optimizer, jax.random.key(0)))
    placed = sharding.tree_shardings(state, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for moments in (optax.tree.get(placed.opt_state, "mu"), optax.tree.get(placed.opt_state, "nu")):
        assert moments == placed.params
    kernel = placed.params["vision"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.spec == PartitionSpec(None, "fsdp", "tensor")
    for scalar in (placed.step, placed.rng, optax.tree.get(placed.opt_state, "count")):
        assert scalar.is_fully_replicated


def test_a_batch_keeps_its_rows_and_is_split_over_data_and_fsdp():
    mesh = mesh_of(2, 2, 2)
    batch = {
        "image": np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3),
        "image_id": np.arange(8, dtype=np.int32),
    }
    placed = sharding.put_batch(batch, mesh)
    for name, array in batch.items():
        assert placed[name].dtype == array.dtype
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding == sharding.batch_sharding(mesh)
        assert {shard.data.shape[0] for shard in placed[name].addressable_shards} == {2}
    assert sharding.process_shard(mesh) == (0, 1)


def test_process_shards_of_meshes_over_several_processes(monkeypatch):
    def shards(sizes, of_process):
        mesh = mesh_of(**sizes)
        local = set(of_process)

        class Placement:
            def addressable_devices_indices_map(self, shape):
                everywhere = sharding_of(mesh).devices_indices_map(shape)
                return {d: i for d, i in everywhere.items() if d.id in local}

        sharding_of = original
        monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: Placement())
        return sharding.process_shard(mesh)

    original = sharding.batch_sharding
    assert shards({"data": 8}, range(4)) == (0, 2)
    assert shards({"data": 8}, range(6, 8)) == (3, 4)
    # Here `tensor` runs across the processes: both read the whole batch.
    assert shards({"tensor": 8}, range(4, 8)) == (0, 1)
    assert shards({"data": 2, "tensor": 4}, range(2, 4)) == (0, 2)
    for devices in ((0, 2), (1, 2)):  # with a gap; not at a multiple of its own size
        with pytest.raises(UserError, match="not one block"):
            shards({"data": 8}, devices)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 2, 1)])
def test_rows_from_anywhere_in_the_batch_without_having_all_of_it(sizes):
    mesh = mesh_of(*sizes)
    draw = np.random.default_rng(0)
    x, weights = draw.normal(size=(2, 48, 3)).astype(np.float32)
    rows = draw.integers(0, 48, 48)
    rows[:8] = 40  # which many want at once

    def weighted(x, rows):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            taken = sharding.take_rows(x, rows)
        return jnp.sum(taken * weights), taken

    step = jax.jit(
        jax.value_and_grad(weighted, has_aux=True), in_shardings=sharding.batch_sharding(mesh)
    )
    compiled = step.lower(x, rows).compile()
    (_, taken), gradient = compiled(x, rows)
    np.testing.assert_array_equal(taken, x[rows])
    expected = np.zeros_like(x)
    np.add.at(expected, rows, weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    moved = costs(compiled.as_text(), num_devices=mesh.size).collectives
    shards = sharding.batch_shards(mesh)
    assert max((each.bytes for each in moved), default=0) <= x.nbytes / min(shards, 48 // shards)


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "fits"),
    [(8, 1, True), (16, 2, True), (4, 1, True), (6, 1, False), (8, 4, False)],
)
def test_batch_sizes_that_a_mesh_divides(batch_size, accumulation_steps, fits):
    mesh = mesh_of(2, 2, 2)  # four parts
    if fits:
        sharding.check_batch_size(batch_size, mesh, accumulation_steps)
        return
    multiple = 4 * accumulation_steps
    with pytest.raises(UserError, match=rf"batch_size={batch_size} .*multiple of {multiple}"):
        sharding.check_batch_size(batch_size, mesh, accumulation_steps)


def test_an_empty_batch_is_refused():
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        sharding.check_batch_size(0, mesh_of(2))


def test_accumulation_steps_below_one_are_refused():
    with pytest.raises(UserError, match="accumulation_steps=0"):
        sharding.check_batch_size(8, mesh_of(2), 0)


def test_the_report_names_large_parameters_that_stay_whole():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    params = {
        "odd": {"up": {"kernel": shape(1023, 2047)}},
        "even": {"up": {"kernel": shape(1024, 2048)}},
        "small": {"up": {"kernel": shape(3, 5)}},
    }
    (line,) = sharding.replicated_report(params, mesh_of(1, 2, 2))
    assert "odd/up/kernel (1023, 2047)" in line
    assert sharding.replicated_report(params, mesh_of(4)) == []
