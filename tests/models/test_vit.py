"""The vision transformer against transformers, in all variants."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxblip.errors import UserError
from jaxblip.models.layers import layer_norm
from jaxblip.models.positions import sincos2d_positions
from jaxblip.models.vit import AttentionPooling, VisionTransformer, VitConfig
from jaxblip.sharding import make_mesh, parameter_spec
from reference import Weights, clip_vit_params, eva_vit_params, randomized
from reference_vision import blip_vit_params, gradients, siglip_pooling_params, siglip_vit_params
from tiny_checkpoints import shapes_of

WIDTH, DEPTH, SIDE = 16, 2, 12
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
    "layer_norm_eps": 0.01,  # large enough to matter
}
CONFIG = VitConfig(
    image_size_px=SIDE,
    patch_size_px=4,
    width=WIDTH,
    num_layers=DEPTH,
    num_heads=2,
    mlp_width=24,
    layer_norm_epsilon=0.01,
)


@dataclasses.dataclass(frozen=True)
class Variant:
    model_class: type
    config_class: type
    params: object  # from the transformers model to the tree of `VisionTransformer`
    config: VitConfig


VARIANTS = {
    "eva": Variant(
        transformers.Blip2VisionModel,
        transformers.Blip2VisionConfig,
        eva_vit_params,
        dataclasses.replace(CONFIG, key_bias=False),
    ),
    "clip": Variant(
        transformers.CLIPVisionModel,
        transformers.CLIPVisionConfig,
        clip_vit_params,
        dataclasses.replace(
            CONFIG,
            activation="quick_gelu",
            pre_norm=True,
            patch_bias=False,
        ),
    ),
    "blip": Variant(
        transformers.BlipVisionModel,
        transformers.BlipVisionConfig,
        blip_vit_params,
        CONFIG,
    ),
    "siglip": Variant(
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig,
        siglip_vit_params,
        dataclasses.replace(CONFIG, activation="gelu_tanh", has_cls_token=False),
    ),
}


def random_reference(name: str, **sizes) -> torch.nn.Module:
    variant = VARIANTS[name]
    model = randomized(variant.model_class(variant.config_class(**(SIZES | sizes))))
    if name == "eva":
        clear_key_bias(model)
    return model


@functools.cache
def reference(name: str) -> torch.nn.Module:
    return random_reference(name)


def clear_key_bias(model: torch.nn.Module) -> None:
    """What EVA-CLIP has in the key third of its joint bias."""
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.qkv.bias[WIDTH : 2 * WIDTH] = 0.0


def images(side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)


def pixels(side: int = SIDE) -> torch.Tensor:
    return torch.tensor(images(side).transpose(0, 3, 1, 2))


def run(model: torch.nn.Module, side: int = SIDE):
    """The model's output, and the output of each block, the norm behind them not applied."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda *args: seen.append(args[-1]))
        for layer in model.encoder.layers
    ]
    output = model(pixels(side))
    for hook in hooks:
        hook.remove()
    return output, seen


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, images):
    return VisionTransformer(config).apply({"params": params}, images)


def assert_same(ours, theirs: torch.Tensor):
    theirs = theirs.detach().numpy()
    # Small values are sums of large ones: the error is relative to those.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


# Against transformers


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("blocks", [DEPTH, DEPTH - 1])
def test_tokens_after_the_last_block_and_the_one_before(name, blocks):
    variant = VARIANTS[name]
    config = dataclasses.replace(variant.config, num_layers=blocks)
    params = variant.params(reference(name))
    params["layers"] = jax.tree.map(lambda leaf: leaf[:blocks], params["layers"])
    tokens = encode(config, params, images())
    assert tokens.shape == (2, config.num_tokens, WIDTH)
    assert_same(tokens, run(reference(name))[1][blocks - 1])


def vision_norm(name, tokens):
    """The norm that stands outside of the encoder."""
    params = Weights(reference(name)).norm("post_layernorm")
    norm = layer_norm(VARIANTS[name].config.layer_norm_epsilon, jnp.float32)
    return norm.apply({"params": params}, tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_final_norm_and_pooled_output(name):
    variant = VARIANTS[name]
    output, _ = run(reference(name))
    tokens = encode(variant.config, variant.params(reference(name)), images())
    normed = vision_norm(name, tokens)
    if name == "clip":  # norms nothing but what it pools
        assert_same(tokens, output.last_hidden_state)
        assert_same(normed[:, 0], output.pooler_output)
        return
    assert_same(normed, output.last_hidden_state)
    if name == "siglip":
        params = siglip_pooling_params(reference(name))
        pooled = AttentionPooling(variant.config).apply({"params": params}, normed)
    else:  # BLIP and BLIP-2 in transformers norm the class token twice
        pooled = vision_norm(name, normed[:, 0])
    assert_same(pooled, output.pooler_output)


def parameter_gradients(name, weights):
    """Gradients of a weighted sum of the tokens, and of the pooled output where pooling learns."""
    config = VARIANTS[name].config

    def loss(params):
        tokens = VisionTransformer(config).apply({"params": params["vision"]}, images())
        if name == "siglip":
            pooled = AttentionPooling(config).apply({"params": params["pooling"]}, tokens)
            return jnp.sum(pooled * weights[:, 0])
        return jnp.sum(tokens * weights)

    model = reference(name)
    params = {"vision": VARIANTS[name].params(model)}
    if name == "siglip":
        params["pooling"] = siglip_pooling_params(model)
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients(name):
    variant, model = VARIANTS[name], reference(name)
    weights = np.random.default_rng(1).normal(size=(2, variant.config.num_tokens, WIDTH))
    weights = weights.astype(np.float32)
    model.zero_grad()
    tokens = run(model)[1][-1]
    if name == "siglip":
        (model.head(tokens) * torch.tensor(weights[:, 0])).sum().backward()
    else:
        (tokens * torch.tensor(weights)).sum().backward()
    twin = gradients(model)
    if name == "eva":
        clear_key_bias(twin)
    expected = {"vision": variant.params(twin)}
    if name == "siglip":
        expected["pooling"] = siglip_pooling_params(twin)

    def compare(path, ours, theirs):
        scale = np.abs(theirs).max()
        if "key/bias" in jax.tree_util.keystr(path, simple=True, separator="/"):
            # Zero but for rounding: a constant added to all keys cancels in the softmax.
            scale = 1.0
            assert np.abs(theirs).max() < 1e-3
        assert scale > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * scale)

    jax.tree.map_with_path(compare, parameter_gradients(name, weights), expected)


def test_pixels_that_fill_no_patch_are_cut_off_where_the_config_says_so():
    model = random_reference("siglip", image_size=14)
    config = dataclasses.replace(VARIANTS["siglip"].config, image_size_px=14, crop_to_patches=True)
    assert config.num_tokens == 9
    tokens = encode(config, siglip_vit_params(model), images(14))
    assert_same(tokens, run(model, 14)[1][-1])


# Sizes

# The other sizes are counted in tests/interop/test_vision.py.
EVA_G = {"width": 1408, "num_heads": 16, "mlp_width": 6144, "patch_size_px": 14, "key_bias": False}
CLIP_L = {
    "width": 1024,
    "num_heads": 16,
    "mlp_width": 4096,
    "patch_size_px": 14,
    "pre_norm": True,
    "patch_bias": False,
}


def count(config: VitConfig) -> int:
    side = config.image_size_px
    shapes = shapes_of(VisionTransformer(config), jnp.zeros((1, side, side, 3)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("side", "expected"), [(224, 985_894_528), (364, 986_485_888)])
def test_parameters_of_eva_clip_without_its_last_block(side, expected):
    assert count(VitConfig(image_size_px=side, num_layers=39, **EVA_G)) == expected


@pytest.mark.parametrize(("blocks", "millions"), [(23, 290.58), (24, 303.18)])
def test_parameters_of_clip_vit_l(blocks, millions):
    assert round(count(VitConfig(num_layers=blocks, **CLIP_L)) / 1e6, 2) == millions


# Placement and errors


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_sharding_rule(name):
    config = VARIANTS[name].config

    class Both(nn.Module):
        @nn.compact
        def __call__(self, images):
            tokens = VisionTransformer(config, name="vision")(images)
            return AttentionPooling(config, name="image_pooling")(tokens)

    params = shapes_of(Both(), images())
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    for path, leaf in jax.tree.leaves_with_path(params):
        parameter_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh)


@pytest.mark.parametrize("has_cls_token", [True, False])
def test_positions_may_start_as_sines(has_cls_token):
    config = dataclasses.replace(CONFIG, position_init="sincos2d", has_cls_token=has_cls_token)
    images = jnp.zeros((1, config.image_size_px, config.image_size_px, 3))
    params = jax.jit(VisionTransformer(config).init)(jax.random.key(0), images)["params"]
    table = params["position_embedding"]
    side = config.image_size_px // config.patch_size_px
    np.testing.assert_array_equal(table[has_cls_token:], sincos2d_positions(side, config.width))
    np.testing.assert_array_equal(table[:has_cls_token], 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size_px": 14}, "14 px.*patch_size_px=4"),
        ({"num_heads": 3}, "num_heads=3.*width=16"),
        ({"position_init": "sine"}, "position_init='sine'.*normal, sincos2d"),
    ],
)
def test_sizes_that_do_not_fit(wrong, message):
    with pytest.raises(UserError, match=re.compile(message)):
        dataclasses.replace(CONFIG, **wrong)
