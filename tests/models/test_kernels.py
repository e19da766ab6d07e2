"""Which kernel computes attention, and that each computes the same."""

from __future__ import annotations

import warnings

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxblip import sharding
from jaxblip.models import attention, kernels

VIT_G = (128, 257, 16, 88)
VIT_G_LARGE = (16, 1226, 16, 88)
OPT = (64, 64, 32, 80)
PACKED = (8, 2048, 32, 128)
MASKED = dict(has_mask=True)
SEGMENTS = dict(has_mask=True, has_segments=True)


@pytest.mark.parametrize(
    ("platform", "dtype", "query", "key", "options", "expected"),
    [
        ("cpu", "float32", VIT_G, VIT_G, {}, "xla"),
        ("cpu", "bfloat16", VIT_G, VIT_G, {}, "xla"),
        # NVIDIA: half precision, narrow heads of a multiple of 8, more than one query
        ("gpu", "bfloat16", VIT_G, VIT_G, {}, "cudnn"),
        ("gpu", "float16", VIT_G, VIT_G, {}, "cudnn"),
        ("gpu", "float32", VIT_G, VIT_G, {}, "xla"),
        ("gpu", "bfloat16", OPT, OPT, MASKED, "cudnn"),
        ("gpu", "bfloat16", OPT, OPT, SEGMENTS, "cudnn"),
        ("gpu", "bfloat16", OPT, OPT, dict(has_bias=True), "xla"),
        ("gpu", "bfloat16", (64, 1, 32, 80), OPT, MASKED, "xla"),
        ("gpu", "bfloat16", (8, 64, 2, 44), (8, 64, 2, 44), {}, "xla"),
        ("gpu", "bfloat16", (8, 64, 2, 256), (8, 64, 2, 256), {}, "xla"),
        # TPU: long sequences, and no mask but that of segments
        ("tpu", "bfloat16", VIT_G, VIT_G, {}, "xla"),
        ("tpu", "bfloat16", VIT_G_LARGE, VIT_G_LARGE, {}, "pallas"),
        ("tpu", "float32", VIT_G_LARGE, VIT_G_LARGE, {}, "pallas"),
        ("tpu", "bfloat16", PACKED, PACKED, SEGMENTS, "pallas"),
        ("tpu", "bfloat16", PACKED, PACKED, MASKED, "xla"),
        ("tpu", "bfloat16", PACKED, PACKED, dict(has_bias=True), "xla"),
        ("tpu", "bfloat16", (8, 32, 32, 128), PACKED, {}, "xla"),
        # on several devices: where each has whole rows and heads
        ("tpu", "bfloat16", PACKED, PACKED, SEGMENTS | dict(num_devices=4), "xla"),
        ("tpu", "bfloat16", PACKED, PACKED, SEGMENTS | dict(mesh={"data": 4}), "pallas"),
        ("tpu", "bfloat16", PACKED, PACKED, dict(mesh={"data": 2, "fsdp": 8}), "xla"),
        ("gpu", "bfloat16", OPT, OPT, dict(mesh={"tensor": 32}), "cudnn"),
        ("gpu", "bfloat16", OPT, OPT, dict(mesh={"tensor": 64}), "xla"),
        ("gpu", "bfloat16", OPT, (64, 64, 4, 80), dict(mesh={"tensor": 8}), "xla"),
        ("gpu", "bfloat16", OPT, OPT, dict(num_devices=8), "cudnn"),
    ],
)
def test_the_choice(platform, dtype, query, key, options, expected):
    assert kernels.choose_kernel("auto", platform, dtype, query, key, **options) == expected
    assert kernels.choose_kernel("xla", platform, dtype, query, key, **options) == "xla"
    if expected != "xla":
        chosen = kernels.choose_kernel(expected, platform, dtype, query, key, **options)
        assert chosen == expected


def qkv(length, heads, kv_heads, width, dtype=jnp.float32, batch=2):
    rng = np.random.default_rng(0)
    shapes = [(batch, length, heads, width)] + 2 * [(batch, length, kv_heads, width)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def on_platform(monkeypatch, name):
    monkeypatch.setattr(kernels, "platform", lambda: name)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    kernels._say_once.cache_clear()


def loss(*inputs, mask=None):
    return attention.dot_product_attention(*inputs, mask=mask).astype(jnp.float32).sum()


def lowered(function, *args, platform):
    traced = jax.jit(jax.grad(function, (0, 1, 2))).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_on_a_cpu_attention_is_that_of_jax():
    inputs = qkv(6, 2, 2, 8)
    valid = jnp.ones((2, 6), bool)
    for mask in None, attention.padding_mask(valid), attention.sequence_mask(valid):
        ours = jax.make_jaxpr(lambda *x: attention.dot_product_attention(*x, mask=mask))(*inputs)
        dense = attention.dense_mask(mask)
        plain = jax.make_jaxpr(lambda *x: jax.nn.dot_product_attention(*x, mask=dense))(*inputs)
        assert str(ours) == str(plain)


@pytest.mark.parametrize(
    ("wanted", "platform", "said"),
    [
        ("cudnn", "cpu", "Attention by cudnn needs a GPU, and this is for a CPU: XLA computes it."),
        ("pallas", "gpu", "Attention by pallas needs a TPU, and this is for a GPU"),
        ("auto", "gpu", "Attention by cuDNN is unavailable (cuDNN is not detected.): XLA"),
    ],
)
def test_a_kernel_that_is_not_there_falls_back_and_says_so_once(
    monkeypatch, wanted, platform, said
):
    on_platform(monkeypatch, platform)
    inputs = qkv(6, 2, 2, 8, jnp.bfloat16)
    expected = jax.nn.dot_product_attention(*inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ours = attention.dot_product_attention(*inputs, kernel=wanted)
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    messages = [str(warning.message) for warning in caught if "Attention" in str(warning.message)]
    assert len(messages) == 1 and messages[0].startswith(said)


def segments(length):
    """Three texts and padding in one row, one text and padding in the other."""
    ids = np.zeros((2, length), np.int32)
    ids[0, : length - 7] = np.sort(np.arange(length - 7) * 3 // (length - 7)) + 1
    ids[1, : length // 2] = 1
    return jnp.asarray(ids)


@pytest.mark.parametrize("masked", [False, True])
def test_the_pallas_kernel_computes_what_xla_does(monkeypatch, masked):
    """Interpreted; with lengths and widths that fill no tile, and keys that heads share."""
    length = 150
    inputs = qkv(length, 4, 2, 24)
    ids = segments(length)
    mask = attention.sequence_mask(ids > 0, ids) if masked else None
    weights = np.random.default_rng(1).normal(size=inputs[0].shape)
    if masked:  # what padding sees has no meaning
        weights *= np.asarray(ids > 0)[..., None, None]

    def total(*inputs):
        return jnp.sum(attention.dot_product_attention(*inputs, mask=mask) * weights)

    expected = jax.value_and_grad(total, (0, 1, 2))(*inputs)
    on_platform(monkeypatch, "tpu")
    monkeypatch.setattr(kernels, "PALLAS_MIN_LENGTH", length)
    assert "pallas_call" in str(jax.make_jaxpr(total)(*inputs))
    with pltpu.force_tpu_interpret_mode():
        ours = jax.value_and_grad(total, (0, 1, 2))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, expected)


def places(axes=("data", "fsdp", "tensor")):
    mesh = sharding.make_mesh(dict(zip(axes, (2, 2, 2), strict=True)), jax.devices()[:8])
    return mesh, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))


def test_the_pallas_kernel_compiles_for_tpu_on_a_mesh(monkeypatch):
    on_platform(monkeypatch, "tpu")
    mesh, rows_and_heads = places()
    shape = jax.ShapeDtypeStruct((4, 577, 4, 88), jnp.bfloat16, sharding=rows_and_heads)
    ids = jax.ShapeDtypeStruct((4, 577), jnp.int32)

    def on_mesh(query, key, value, ids):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss(query, key, value, mask=attention.sequence_mask(ids > 0, ids))

    text = lowered(on_mesh, shape, shape, shape, ids, platform="tpu")
    assert text.count("@tpu_custom_call") == 3  # forward, and backward to keys and to queries
    assert "tensor<1x2x640x88xbf16>" in text  # one row and two heads each, whole tiles


@pytest.mark.parametrize(("length", "masked"), [(257, False), (64, True), (61, True)])
def test_cudnn_takes_any_length_and_mask_on_a_mesh(monkeypatch, length, masked):
    from jax._src.cudnn import fused_attention_stablehlo

    on_platform(monkeypatch, "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    mesh, rows_and_heads = places()
    shape = jax.ShapeDtypeStruct((4, length, 4, 88), jnp.bfloat16, sharding=rows_and_heads)
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32)

    def on_mesh(query, key, value, ids):
        mask = attention.sequence_mask(ids > 0, ids) if masked else None
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss(query, key, value, mask=mask)

    text = lowered(on_mesh, shape, shape, shape, ids, platform="cuda")
    even = length + length % 2
    assert text.count("custom_call @__cudnn$fmha") == 2
    assert f"tensor<1x{even}x2x88xbf16>" in text
    # Without a gradient nothing is padded.
    alone = jax.ShapeDtypeStruct(shape.shape, shape.dtype)
    forward = jax.jit(attention.dot_product_attention).trace(alone, alone, alone)
    forward = forward.lower(lowering_platforms=("cuda",)).as_text()
    assert forward.count("custom_call @__cudnn$fmha") == 1 and "stablehlo.pad" not in forward


def test_padding_to_even_lengths_changes_nothing(monkeypatch):
    """With XLA in the place of cuDNN, which is not here."""
    plain = jax.nn.dot_product_attention
    seen = []

    def instead(query, key, value, *, mask, scale, implementation):
        seen.append((query.shape[1], key.shape[1]))
        return plain(query, key, value, mask=mask, scale=scale)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    query, key, value = qkv(7, 2, 2, 8)
    mask = jnp.asarray(np.random.default_rng(2).random((2, 1, 5, 7)) < 0.7).at[..., 0].set(True)
    weights = np.random.default_rng(1).normal(size=(2, 5, 2, 8))
    for some in None, mask, mask[:, :, :1]:

        def total(attend):
            def of(*inputs):
                return jnp.sum(attend(inputs) * weights)

            return jax.value_and_grad(of, (0, 1, 2))(query[:, :5], key, value)

        ours = total(lambda inputs: kernels.cudnn_attention(*inputs, some, scale=8**-0.5))
        expected = total(lambda inputs: plain(*inputs, mask=some))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)
    assert (6, 8) in seen
