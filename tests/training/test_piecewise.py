"""Checkpoints that are read and written a layer at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxblip import sharding
from jaxblip.interop.entries import Layout, linear, plain
from jaxblip.interop.files import TensorInfo, Weights
from jaxblip.interop.load import put_params, stored_params
from jaxblip.training import piecewise
from jaxblip.training.checkpoints import (
    FOLDER,
    Checkpoints,
    fingerprint,
    load_params,
    stored_fingerprint,
)
from jaxblip.training.piecewise import InMemory, saved_params, write_checkpoint
from jaxblip.training.state import TrainState

RNG = np.random.default_rng(0)
PARAMS = {
    "language_model": {
        "layers": {"mlp": {"up": {"kernel": RNG.random((3, 8, 16), np.float32)}}},
        "token_embedding": {"embedding": RNG.random((12, 8), np.float32)},
    },
    "temperature": np.float32(0.07),
}


@pytest.fixture
def every_stack_is_large(monkeypatch):
    monkeypatch.setattr(piecewise, "SMALL_BYTES", 0)


def stack(tree):
    return tree["language_model"]["layers"]["mlp"]["up"]["kernel"]


def state_on(mesh):
    shardings = sharding.tree_shardings(PARAMS, mesh)
    params = jax.device_put(jax.tree.map(jnp.asarray, PARAMS), shardings)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, {}, jax.random.key(0), zero, zero)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_a_run_keeps_each_layer_in_a_chunk(sizes, tmp_path, every_stack_is_large):
    mesh = sharding.make_mesh(sizes)
    state = state_on(mesh)
    with Checkpoints(tmp_path) as saved:
        saved.save(7, state, {})
        saved.wait()
        restored, _ = saved.restore(state)
    saved = saved_params(tmp_path / FOLDER / "7")
    assert stack(saved).is_stacked and not saved["temperature"].is_stacked
    np.testing.assert_array_equal(stack(saved)[1], stack(PARAMS)[1])
    np.testing.assert_array_equal(stack(saved)[1, 2:4, 3], stack(PARAMS)[1, 2:4, 3])
    np.testing.assert_array_equal(stack(saved).first(2)[()], stack(PARAMS)[:2])
    half = stack(saved).as_dtype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(half[0], stack(PARAMS)[0].astype(ml_dtypes.bfloat16))
    placed = put_params(saved, sharding.tree_shardings(saved, mesh))
    for tree in (placed, restored.params, load_params(tmp_path)):
        jax.tree.map(np.testing.assert_array_equal, tree, PARAMS)
    assert stored_fingerprint(saved) == fingerprint(placed)


def test_what_is_written_layer_by_layer(tmp_path, every_stack_is_large):
    layout = Layout(
        tuple(
            entry
            for i in range(3)
            for entry in linear(f"layers.{i}.up", "mlp/up", i, bias=False)
        )
        + plain("words", "embedding")
    )
    tensors = {f"layers.{i}.up.weight": RNG.random((5, 4), np.float32) for i in range(3)}
    tensors["words"] = RNG.random((6, 4), np.float32).astype(ml_dtypes.bfloat16)
    infos = {name: TensorInfo(x.shape, x.dtype) for name, x in tensors.items()}
    reads = []

    def read(name):
        reads.append(name)
        return tensors[name]

    shapes = {
        "mlp": {"up": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), np.float32)}},
        "embedding": jax.ShapeDtypeStruct((6, 4), ml_dtypes.bfloat16),
    }
    stored = stored_params(Weights("memory", infos, read, {}, tmp_path), layout, shapes)
    write_checkpoint(tmp_path / FOLDER, stored | {"temperature": np.full((), 0.5, np.float32)})
    assert sorted(reads) == sorted(tensors)  # each of them once
    loaded = load_params(tmp_path)
    expected = np.stack([tensors[f"layers.{i}.up.weight"].T for i in range(3)])
    np.testing.assert_array_equal(loaded["mlp"]["up"]["kernel"], expected)
    np.testing.assert_array_equal(loaded["embedding"], tensors["words"])
    assert loaded["embedding"].dtype == ml_dtypes.bfloat16 and loaded["temperature"] == 0.5
    saved = saved_params(tmp_path / FOLDER / "0")
    assert saved["mlp"]["up"]["kernel"].is_stacked


def test_an_array_in_memory_is_read_like_the_others():
    array = InMemory(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert (array.shape, array.size, array.nbytes) == ((2, 3), 6, 24)
    assert array.as_dtype(np.float16)[1].dtype == np.float16
    np.testing.assert_array_equal(array[:, 1], [1, 4])
