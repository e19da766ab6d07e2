"""Connectors in place of the Q-Former: against plain PyTorch, and through the tasks."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from published_folders import tokenizer_of
from tiny_checkpoints import VOCAB as WORDS
from tiny_tasks import VISION_WIDTH, WIDTH, fast_jit, random_params, run, tiny_config

from jaxblip.decoding.image_to_text import ImageToText
from jaxblip.decoding.make import make_image_to_text
from jaxblip.errors import UserError
from jaxblip.interop.export import _target
from jaxblip.models.connectors import PerceiverConfig, PerceiverResampler
from jaxblip.sharding import make_mesh
from jaxblip.tasks import make_task
from jaxblip.training.sources import _given

IMAGE_TOKENS, LATENTS = 5, 3


def connector_config(name, connector):
    config = tiny_config(name)
    for part in config.model.values():
        if "num_layers" in getattr(part, "keys", tuple)():
            part.num_layers = 2
    config.model.connector = connector
    config.model.perceiver.update(num_latents=LATENTS, num_layers=2, num_heads=4, mlp_ratio=2)
    return config


def by_hand(features, params, num_heads):
    """Flamingo's pseudo-code (Fig. 5) with the norms of OpenFlamingo, from PyTorch's functions."""
    tensors = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)
    x, width = torch.tensor(features), features.shape[-1]

    def norm(x, p):
        return torch.nn.functional.layer_norm(x, (width,), p["scale"], p["bias"])

    def linear(x, p):
        kernel = p["kernel"].reshape(x.shape[-1], -1)
        return x @ kernel + p["bias"].reshape(-1)

    def heads(x):
        return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)

    latents = tensors["latents"].expand(len(x), -1, -1)
    for layer in range(2):
        p = jax.tree.map(lambda stack: stack[layer], tensors["layers"])  # noqa: B023
        own = norm(latents, p["attention_norm"])
        seen = torch.cat([norm(x, p["token_norm"]), own], dim=1)
        query = heads(linear(own, p["attention"]["query"]))
        key, value = (heads(linear(seen, p["key_values"][name])) for name in ("key", "value"))
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).reshape(own.shape)
        latents = latents + linear(attended, p["attention"]["out"])
        hidden = linear(norm(latents, p["mlp_norm"]), p["mlp"]["up"])
        latents = latents + linear(torch.nn.functional.gelu(hidden), p["mlp"]["down"])
    return norm(latents, tensors["final_norm"])


def test_the_perceiver_is_that_of_the_paper():
    width, rng = 12, np.random.default_rng(0)
    features = rng.normal(size=(2, IMAGE_TOKENS, width)).astype(np.float32)
    config = PerceiverConfig(num_latents=LATENTS, num_layers=2, num_heads=4, mlp_ratio=2)
    model = PerceiverResampler(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), features)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    ours = fast_jit(model.apply)({"params": params}, features)
    assert ours.shape == (2, LATENTS, width) and model.num_tokens(IMAGE_TOKENS) == LATENTS
    np.testing.assert_allclose(ours, by_hand(features, params, 4).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_maps_of_each_token(connector):
    task = make_task(connector_config("stage2", connector))
    params = random_params(task)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    features = task.apply(params, images, method="image_features")
    visual = task.apply(params, images, method="visual_tokens")
    x = torch.tensor(np.asarray(features))
    if connector == "mlp":
        up = params["connector"]["up"]
        x = torch.nn.functional.gelu(x @ torch.tensor(up["kernel"]) + torch.tensor(up["bias"]))
        assert up["kernel"].shape == (VISION_WIDTH, WIDTH)
    else:
        assert "connector" not in params
    projection = params["projection"]
    expected = x @ torch.tensor(projection["kernel"]) + torch.tensor(projection["bias"])
    assert visual.shape == (2, IMAGE_TOKENS, WIDTH) and "qformer" not in params
    np.testing.assert_allclose(visual, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "connector"),
    [("stage2", "perceiver"), ("stage2_t5", "linear"), ("instruct", "mlp")],
)
def test_steps_train_the_connector_and_nothing_frozen(name, connector):
    config = connector_config(name, connector)
    config.optimizer.warmup_init_lr = 1e-3
    task = make_task(config)
    assert not any(field.startswith("instruction") for field in task.fields)
    count = LATENTS if connector == "perceiver" else IMAGE_TOKENS
    assert task.model.num_visual_tokens == count
    before = random_params(task)
    state, history, frozen = run(config, {}, steps=1)
    assert np.isfinite(history[0]["loss"]) and set(frozen) == {"vision", "language_model"}
    parts = {"vision_norm", "projection"} | ({"connector"} if connector != "linear" else set())
    assert set(state.params) == parts
    for part in parts:
        both = state.params[part], before[part]
        moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), *both)
        assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(("name", "connector"), [("stage2", "perceiver"), ("instruct", "linear")])
def test_texts_are_generated_and_ranked(name, connector):
    config = connector_config(name, connector)
    config.model.language_model.vocab_size = WORDS
    task, mesh = make_task(config), make_mesh({}, jax.devices()[:1])
    text = make_image_to_text(task, tokenizer_of("opt"), mesh)
    assert type(text) is ImageToText
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    params, prompts = random_params(task), [text.prompt("w1 w2")] * 2
    decoding = text.decoding_config(max_new_tokens=3, num_beams=1)
    assert len(text.generate(params, images, prompts, decoding)) == 2
    assert text._positions() == 16 - task.model.num_visual_tokens


def test_a_projection_is_for_one_connector():
    config, tree = connector_config("stage2", "mlp"), dict.fromkeys(("projection", "connector"))
    assert _given(config, tree, "stage2", True) == {}
    assert _given(config, tree, "stage2", False, "mlp") == tree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.connector": "qformr"}, "'qformr' is none of qformer, linear, mlp, perceiver"),
        ({"init.qformer": "runs/stage1"}, "names a Q-Former, and model.connector='perceiver'"),
        ({"model.perceiver.num_heads": 5}, "num_heads=5 does not divide the width=24"),
        ({"model.perceiver.num_latents": 40}, "num_latents=40 and data.max_text_tokens=6 together"),
        ({"model.perceiver.num_layers": 0}, "num_layers=0 is less than 1"),
    ],
)
def test_what_cannot_be_is_said(changes, message):
    config = connector_config("stage2", "perceiver")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        make_task(config)


def test_stage_1_needs_a_qformer():
    config = tiny_config("stage1")
    config.model.connector = "linear"
    with pytest.raises(UserError, match="'linear' reads no text, and stage 1 .* in stage 2"):
        make_task(config)


def test_transformers_has_no_place_for_another_connector():
    with pytest.raises(UserError, match="connector='linear', and no BLIP-2 of transformers"):
        _target(make_task(connector_config("stage2", "linear")), None)
