"""SigLIP against transformers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxblip.models.siglip import Siglip, SiglipTextConfig
from jaxblip.models.vit import VitConfig
from jaxblip.sharding import make_mesh, parameter_spec
from reference import randomized
from reference_vision import gradients, siglip_params

EPSILON = 0.01  # large enough to matter
VOCAB, LENGTH, WIDTH, TEXT_WIDTH = 13, 7, 16, 12
MODEL = Siglip(
    VitConfig(
        image_size_px=8,
        patch_size_px=4,
        width=WIDTH,
        num_layers=2,
        num_heads=2,
        mlp_width=24,
        activation="gelu_tanh",
        layer_norm_epsilon=EPSILON,
        has_cls_token=False,
    ),
    SiglipTextConfig(
        vocab_size=VOCAB,
        max_positions=LENGTH,
        width=TEXT_WIDTH,
        num_layers=2,
        num_heads=2,
        mlp_width=20,
        layer_norm_epsilon=EPSILON,
    ),
    vision_norm_epsilon=EPSILON,
)
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
PIXELS = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
IDS = np.random.default_rng(1).integers(0, VOCAB, (3, LENGTH))
VALID = np.arange(LENGTH) < np.array([7, 3, 5])[:, None]


@functools.cache
def reference() -> transformers.SiglipModel:
    config = transformers.SiglipConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "layer_norm_eps": EPSILON,
        },
        text_config={
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": LENGTH,
            "layer_norm_eps": EPSILON,
            "projection_size": WIDTH,  # SigLIP 2 g-opt has towers of different width, too
        },
    )
    return randomized(transformers.SiglipModel(config))


@functools.partial(jax.jit, static_argnums=0)
def apply(method, params, *inputs):
    return MODEL.apply({"params": params}, *inputs, method=method)


def run(method, *inputs):
    return apply(method, siglip_params(reference()), *inputs)


def normalized(x: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x, dim=-1).numpy()


def test_image_embeddings():
    with torch.no_grad():
        pooled = reference().vision_model(PIXELS).pooler_output
    np.testing.assert_allclose(
        run("embed_images", IMAGES), normalized(pooled), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("valid", [None, VALID])
def test_text_embeddings_come_from_the_last_position(valid):
    """With and without a mask; the released models have none and look at padding."""
    mask = None if valid is None else torch.tensor(valid).long()
    with torch.no_grad():
        pooled = reference().text_model(torch.tensor(IDS), attention_mask=mask).pooler_output
    ours = run("embed_texts", IDS) if valid is None else run("embed_texts", IDS, valid)
    np.testing.assert_allclose(ours, normalized(pooled), rtol=1e-5, atol=1e-6)


def test_the_state_of_the_last_position_before_the_projection():
    with torch.no_grad():
        expected = reference().text_model(torch.tensor(IDS)).last_hidden_state[:, -1].numpy()
    state = run(lambda model, ids: model.text(ids), IDS)
    np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def pair_logits(model, *inputs):
    return model.logits(*model(*inputs))


def test_logits_of_all_pairs():
    with torch.no_grad():
        expected = reference()(input_ids=torch.tensor(IDS), pixel_values=PIXELS).logits_per_image
    np.testing.assert_allclose(run(pair_logits, IMAGES, IDS), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_sigmoid_loss():
    """Through both towers, the pooling head, the scale and the bias."""
    signs = 2 * np.eye(3, dtype=np.float32) - 1
    model = reference()
    model.zero_grad()
    logits = model(input_ids=torch.tensor(IDS), pixel_values=PIXELS).logits_per_image
    (-torch.nn.functional.logsigmoid(logits * torch.tensor(signs)).sum()).backward()
    expected = siglip_params(gradients(model))

    def loss(params):
        return -jnp.sum(jax.nn.log_sigmoid(apply(pair_logits, params, IMAGES, IDS) * signs))

    def compare(path, ours, theirs):
        # A constant added to all keys cancels in the softmax: that gradient is only rounding.
        is_key_bias = jax.tree_util.keystr(path).endswith("['key']['bias']")
        scale = 1.0 if is_key_bias else np.abs(theirs).max()
        assert scale > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * scale)

    jax.tree.map_with_path(compare, jax.jit(jax.grad(loss))(siglip_params(model)), expected)


def initialize():
    return MODEL.init(jax.random.key(0), IMAGES, IDS)["params"]


def test_the_parameter_tree_and_its_place_on_a_mesh():
    params = jax.eval_shape(initialize)
    assert jax.tree.structure(params) == jax.tree.structure(siglip_params(reference()))
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    for path, leaf in jax.tree.leaves_with_path(params):
        parameter_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh)


def test_initial_scale_and_bias():
    """SigLIP §3.2: 10 and -10."""

    def scale_and_bias():
        params = initialize()
        return jnp.exp(params["logit_scale"]), params["logit_bias"]

    np.testing.assert_allclose(jax.jit(scale_and_bias)(), (10.0, -10.0), rtol=1e-6)
