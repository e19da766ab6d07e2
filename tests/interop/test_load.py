"""Loading: one error for all that does not fit, and shards that read only what they need."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxblip import sharding
from jaxblip.errors import UserError
from jaxblip.interop import entries as e
from jaxblip.interop.files import TensorInfo, Weights, open_weights
from jaxblip.interop.load import check, load_params, stored_params
from tiny_checkpoints import random_model, save

LAYERS, WIDTH, HEADS, HIDDEN = 12, 8, 4, 16
LAYOUT = e.Layout(
    (
        *e.embedding("model.words", "token_embedding", aliases=("head.weight",)),
        *(
            entry
            for i in range(LAYERS)
            for entry in (
                *e.joint_qkv(f"model.layers.{i}.qkv.weight", "layers/attention", i),
                *e.linear(f"model.layers.{i}.fc1", "layers/mlp/up", i),
                *e.norm(f"model.layers.{i}.norm", "layers/mlp_norm", i),
            )
        ),
    ),
    ignored=(r".*\.inv_freq",),
    absent=("temperature",),
)


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


SHAPES = {
    "token_embedding": {"embedding": struct(24, WIDTH)},
    "layers": {
        "attention": {p: {"kernel": struct(LAYERS, WIDTH, HEADS, 2)} for p in e.QKV},
        "mlp": {"up": {"kernel": struct(LAYERS, WIDTH, HIDDEN), "bias": struct(LAYERS, HIDDEN)}},
        "mlp_norm": {"scale": struct(LAYERS, WIDTH), "bias": struct(LAYERS, WIDTH)},
    },
}


def tensors():
    flat, rng = flatten_dict(SHAPES, sep="/"), np.random.default_rng(0)
    return {
        entry.theirs: rng.normal(
            size=entry.their_shape([slot.shape(flat[slot.path].shape) for slot in entry.ours])
        ).astype(np.float32)
        for entry in LAYOUT.entries
    }


def weights_of(arrays, reads=None):
    def read(name):
        if reads is not None:
            reads.append(name)
        return arrays[name]

    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    return Weights("somewhere", infos, read, {}, None)


# Errors


def message(arrays, shapes=SHAPES, layout=LAYOUT):
    with pytest.raises(UserError) as caught:
        check(weights_of(arrays), layout, shapes)
    return str(caught.value)


def test_what_fits_passes_without_reading():
    reads = []
    check(weights_of(tensors() | {"model.rotary.inv_freq": np.zeros(3)}, reads), LAYOUT, SHAPES)
    assert reads == []


def test_missing_keys_are_grouped_with_the_nearest_in_the_file():
    arrays = tensors()
    for i in range(LAYERS):
        if i != 5:
            arrays[f"model.layers.{i}.fc_1.weight"] = arrays.pop(f"model.layers.{i}.fc1.weight")
    del arrays["model.layers.3.norm.bias"]
    text = message(arrays)
    assert text.count("\n") == 6, text
    assert (
        "Missing in the file:\n"
        "  model.layers.{0-4,6-11}.fc1.weight (the file has model.layers.{0-4,6-11}.fc_1.weight)\n"
    ) in text
    assert "  model.layers.3.norm.bias" in text
    assert (
        "Left over in the file:\n"
        "  model.layers.{0-4,6-11}.fc_1.weight (the model has model.layers.{0-4,6-11}.fc1.weight)"
    ) in text
    assert text.startswith("The weights in 'somewhere' do not fit the model.")


def test_a_layer_too_many_is_left_over():
    arrays = tensors() | {
        f"model.layers.{LAYERS}.{name}": np.zeros(3) for name in ("fc1.bias", "norm.bias")
    }
    text = message(arrays)
    assert "Missing" not in text
    assert (
        f"  model.layers.{LAYERS}.fc1.bias (the model has model.layers.{{0-11}}.fc1.bias)" in text
    )


def test_wrong_shapes_are_grouped_with_both_shapes():
    arrays = tensors()
    for i in range(LAYERS):
        arrays[f"model.layers.{i}.fc1.weight"] = np.zeros((HIDDEN, WIDTH + 1), np.float32)
    # The same number of values in another shape is another tensor.
    arrays["model.layers.2.qkv.weight"] = arrays["model.layers.2.qkv.weight"].T
    text = message(arrays)
    assert "  model.layers.{0-11}.fc1.weight: 16 x 9 in the file, 16 x 8 in the model\n" in text
    assert "  model.layers.2.qkv.weight: 8 x 24 in the file, 24 x 8 in the model\n" in text


def test_all_kinds_come_in_one_error():
    arrays = tensors()
    del arrays["model.words.weight"]
    arrays["model.layers.0.norm.weight"] = np.zeros(3)
    arrays["entirely.different"] = np.zeros(3)
    shapes = SHAPES | {"temperature": struct(), "mlp_norm": {"scale": struct(2)}}
    text = message(arrays, shapes)
    for part in [
        "Missing in the file:\n  model.words.weight",
        "Left over in the file:\n  entirely.different",
        "Of another shape:\n  model.layers.0.norm.weight: 3 in the file, 8 in the model",
        "Without a place in such a file:\n  temperature\n  mlp_norm/scale",
    ]:
        assert part in text


def test_groups_over_two_numbers_say_where_not_all_are_meant():
    arrays = {f"block.{i}.layer.{j}.w": np.zeros(3) for i, j in [(0, 0), (0, 1), (1, 0)]}
    text = message(tensors() | arrays)
    assert "  block.{0-1}.layer.{0-1}.w [3 of these]" in text
    assert "of these" not in message(tensors() | arrays | {"block.1.layer.1.w": np.zeros(3)})


def test_a_stack_that_the_layout_fills_in_part_is_not_whole():
    layout = e.Layout(e.rms_norm("a", "norm", 0) + e.rms_norm("b", "norm", 2))
    arrays = {"a.weight": np.zeros(4), "b.weight": np.zeros(4)}
    assert "Without a place in such a file:\n  norm/scale" in message(
        arrays, {"norm": {"scale": struct(3, 4)}}, layout
    )


def test_an_alias_stands_in_and_is_never_left_over():
    arrays = tensors()
    words = arrays["model.words.weight"]
    check(weights_of(arrays | {"head.weight": words}), LAYOUT, SHAPES)
    del arrays["model.words.weight"]
    stored = stored_params(weights_of(arrays | {"head.weight": words}), LAYOUT, SHAPES)
    np.testing.assert_array_equal(stored["token_embedding"]["embedding"][()], words)


# Reading


@pytest.mark.parametrize(
    "index",
    [(), 3, slice(2, 5), (slice(None), slice(1, 4)), (7, 2), (slice(8, None), 1, slice(0, 9, 2))],
)
def test_stored_params_index_as_arrays_do(index):
    arrays = tensors()
    stored = stored_params(weights_of(arrays), LAYOUT, SHAPES)
    kernel = stored["layers"]["mlp"]["up"]["kernel"]
    whole = np.stack([arrays[f"model.layers.{i}.fc1.weight"].T for i in range(LAYERS)])
    actual = kernel[index]
    assert actual.shape == whole[index].shape
    np.testing.assert_array_equal(actual, whole[index])
    words = stored["token_embedding"]["embedding"]
    np.testing.assert_array_equal(words[4:7, 2], arrays["model.words.weight"][4:7, 2])


def test_only_what_is_wanted_is_read():
    reads = []
    stored = stored_params(weights_of(tensors(), reads), LAYOUT, SHAPES)
    assert reads == []
    stored["layers"]["mlp"]["up"]["kernel"][2:4, :3]
    assert reads == ["model.layers.2.fc1.weight", "model.layers.3.fc1.weight"]
    del reads[:]
    part = {"token_embedding": SHAPES["token_embedding"]}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        weights_of(tensors(), reads), LAYOUT, part, jax.tree.map(lambda _: place, part)
    )
    assert list(params) == ["token_embedding"] and reads == ["model.words.weight"]


def test_dtype_is_that_of_the_shapes_or_the_given_one():
    stored = stored_params(weights_of(tensors()), LAYOUT, SHAPES)
    assert stored["token_embedding"]["embedding"][:2].dtype == np.float32
    stored = stored_params(weights_of(tensors()), LAYOUT, SHAPES, "bfloat16")
    half = stored["token_embedding"]["embedding"][()]
    assert half.dtype == jax.numpy.bfloat16
    expected = jax.numpy.asarray(tensors()["model.words.weight"], "bfloat16")
    np.testing.assert_array_equal(half, expected)


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}, {"fsdp": 2, "tensor": 4}]
)
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_mesh_holds_the_same_values_in_its_shards(sizes, by_layer, monkeypatch):
    if by_layer:
        monkeypatch.setattr("jaxblip.interop.load.LARGE_BYTES", 0)
    mesh, reads, arrays = sharding.make_mesh(sizes), [], tensors()
    placed = sharding.tree_shardings(SHAPES, mesh)
    params = load_params(weights_of(arrays, reads), LAYOUT, SHAPES, placed)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    alone = load_params(weights_of(arrays), LAYOUT, SHAPES, jax.tree.map(lambda _: place, SHAPES))
    kernel = np.stack([arrays[f"model.layers.{i}.fc1.weight"].T for i in range(LAYERS)])
    np.testing.assert_array_equal(alone["layers"]["mlp"]["up"]["kernel"], kernel)
    for param, expected, where in zip(*map(jax.tree.leaves, (params, alone, placed)), strict=True):
        assert param.sharding == where
        np.testing.assert_array_equal(param, expected)
    # Once for each different shard: devices with the same one share what was read.
    shards = len({str(s.index) for s in params["layers"]["mlp"]["up"]["kernel"].addressable_shards})
    assert reads.count("model.layers.0.fc1.weight") == shards
    assert shards == 8 // sizes.get("data", 1)


def test_bfloat16_goes_layer_by_layer_bit_for_bit(monkeypatch):
    """Not a number and infinity included: nothing is computed on the way."""
    monkeypatch.setattr("jaxblip.interop.load.LARGE_BYTES", 0)
    arrays = tensors()
    arrays["model.layers.3.fc1.weight"][0, :3] = np.nan, -np.inf, 1e-40
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    placed = sharding.tree_shardings(SHAPES, mesh)
    params = load_params(weights_of(arrays), LAYOUT, SHAPES, placed, "bfloat16")
    kernel = np.asarray(params["layers"]["mlp"]["up"]["kernel"])
    expected = np.stack([arrays[f"model.layers.{i}.fc1.weight"].T for i in range(LAYERS)])
    expected = expected.astype(kernel.dtype)
    np.testing.assert_array_equal(kernel.view(np.uint16), expected.view(np.uint16))


def test_a_saved_model_on_a_mesh(tmp_path):
    from jaxblip.interop.families.opt import opt_config, opt_layout

    weights = open_weights(save(random_model("OPTForCausalLM"), tmp_path))
    config = opt_config(weights.config)
    layout = opt_layout(config, ours="language_model/")
    shapes = {}
    for entry in layout.entries:  # only what the rules of the mesh need
        (slot,) = entry.ours
        if slot.path == "language_model/layers/attention/query/kernel":
            shapes = {"language_model": {"layers": {"attention": {"query": {
                "kernel": struct(config.num_layers, 16, 2, 8)}}}}}  # fmt: skip
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    params = load_params(weights, layout, shapes, sharding.tree_shardings(shapes, mesh))
    kernel = params["language_model"]["layers"]["attention"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 4, 1, 8)
    for i in range(3):
        theirs = weights.read(f"model.decoder.layers.{i}.self_attn.q_proj.weight")
        np.testing.assert_array_equal(kernel[i].reshape(16, 16), theirs.T)
