"""The mapping language: what `split` takes apart, `join` puts together, in PyTorch's layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxblip.errors import UserError
from jaxblip.interop import entries as e

WIDTH, HEADS, HEAD_WIDTH, HIDDEN = 6, 2, 3, 5
HEADED = (WIDTH, HEADS, HEAD_WIDTH)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("made", "shapes"),
    [
        (e.linear("a", "b"), {"b/kernel": (WIDTH, HIDDEN), "b/bias": (HIDDEN,)}),
        (e.linear("a", "b"), {"b/kernel": HEADED, "b/bias": (HEADS, HEAD_WIDTH)}),
        (
            e.linear_from_heads("a", "b"),
            {"b/kernel": (HEADS, HEAD_WIDTH, HIDDEN), "b/bias": (HIDDEN,)},
        ),
        (e.linear("a", "b", bias=False), {"b/kernel": (WIDTH, HIDDEN)}),
        (e.norm("a", "b"), {"b/scale": (WIDTH,), "b/bias": (WIDTH,)}),
        (e.rms_norm("a", "b"), {"b/scale": (WIDTH,)}),
        (e.embedding("a", "b"), {"b/embedding": (HIDDEN, WIDTH)}),
        (e.patch_convolution("a", "b"), {"b/kernel": (2, 2, 3, WIDTH), "b/bias": (WIDTH,)}),
        (e.plain("a", "b", their_shape=lambda shape: (1, *shape)), {"b": (4, WIDTH)}),
        (e.plain("a", "b"), {"b": ()}),
        (
            e.joint_qkv("w", "b", bias="c"),
            {f"b/{part}/kernel": HEADED for part in e.QKV}
            | {f"b/{part}/bias": (HEADS, HEAD_WIDTH) for part in e.QKV},
        ),
        (
            e.joint_qkv("w", "b", bias="c", key_bias=False),
            {f"b/{part}/kernel": HEADED for part in e.QKV}
            | {f"b/{part}/bias": (HEADS, HEAD_WIDTH) for part in ("query", "value")},
        ),
        (e.joint_qkv("w", "b"), {f"b/{part}/kernel": HEADED for part in e.QKV}),
    ],
)
def test_join_and_split_are_inverse(made, shapes):
    values = {path: random(*shape) for path, shape in shapes.items()}
    assert sorted(slot.path for entry in made for slot in entry.ours) == sorted(shapes)
    for entry in made:
        arrays = [values[slot.path] for slot in entry.ours]
        theirs = entry.join(arrays)
        assert theirs.shape == entry.their_shape([array.shape for array in arrays])
        for array, again in zip(
            arrays, entry.split(theirs, [array.shape for array in arrays]), strict=True
        ):
            np.testing.assert_array_equal(again, array)


def test_layouts_are_those_of_pytorch():
    x, kernel = random(4, WIDTH), random(WIDTH, HIDDEN)
    (weight,) = (entry.join([kernel]) for entry in e.linear("a", "b", bias=False))
    expected = torch.nn.functional.linear(torch.tensor(x), torch.tensor(weight.copy()))
    np.testing.assert_allclose(x @ kernel, expected, rtol=1e-5)

    # One patch: a convolution over it is a sum over all its values.
    image, kernel = random(2, 2, 3), random(2, 2, 3, WIDTH)
    weight = e.patch_convolution("a", "b", bias=False)[0].join([kernel])
    pixels = torch.tensor(image.transpose(2, 0, 1)[None].copy())
    expected = torch.nn.functional.conv2d(pixels, torch.tensor(weight.copy()))[0, :, 0, 0]
    np.testing.assert_allclose(np.tensordot(image, kernel, 3), expected, rtol=1e-5)


def test_only_views_are_made():
    for made, shape in (e.linear("a", "b"), HEADED), (e.patch_convolution("a", "b"), (2, 2, 3, 4)):
        array = random(*shape)
        theirs = made[0].join([array])
        assert np.shares_memory(theirs, array)
        assert np.shares_memory(made[0].split(theirs, [shape])[0], array)


def test_a_key_bias_is_written_as_zero_and_refused_otherwise():
    _, bias = e.joint_qkv("w", "b", bias="layer.qkv.bias", key_bias=False)
    query, value = random(HEADS, HEAD_WIDTH), random(HEADS, HEAD_WIDTH) + 1
    joint = bias.join([query, value])
    np.testing.assert_array_equal(np.split(joint, 3)[1], 0)
    joint[WIDTH] = 1e-6  # the first value of the key part
    with pytest.raises(UserError, match=r"'layer\.qkv\.bias' is not zero.*key_bias=True"):
        bias.split(joint, [query.shape, value.shape])
    # No other part is taken for it.
    joint[WIDTH] = 0
    again, _ = bias.split(joint, [query.shape, value.shape])
    np.testing.assert_array_equal(again, query)


def test_aliases_are_further_names():
    made = e.also_under(
        e.embedding("model.decoder.words", "words", aliases=("head",)), "model.", ""
    )
    assert made[0].names == ("model.decoder.words.weight", "head", "decoder.words.weight")
    assert e.also_under(made, "other.", "")[0].names == made[0].names
