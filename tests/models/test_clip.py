"""CLIP against transformers."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxblip.models.clip import Clip, ClipTextConfig, valid_to_end_of_text
from jaxblip.models.vit import VitConfig
from reference import clip_params, randomized

END, VOCAB, EMBED = 12, 13, 8
MODEL = Clip(
    VitConfig(
        image_size_px=8,
        patch_size_px=4,
        width=16,
        num_layers=2,
        num_heads=2,
        mlp_width=24,
        activation="quick_gelu",
        layer_norm_epsilon=1e-5,
        pre_norm=True,
        patch_bias=False,
    ),
    ClipTextConfig(
        vocab_size=VOCAB, max_positions=7, width=12, num_layers=3, num_heads=2, mlp_width=20
    ),
    embed_dim=EMBED,
)
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
LENGTHS = np.array([7, 3, 5])  # the end-of-text token included


@functools.cache
def reference() -> transformers.CLIPModel:
    blocks = dict(num_attention_heads=2)
    config = transformers.CLIPConfig(
        vision_config=dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, image_size=8, patch_size=4,
            **blocks,
        ),
        text_config=dict(
            hidden_size=12, intermediate_size=20, num_hidden_layers=3, vocab_size=VOCAB,
            max_position_embeddings=7, eos_token_id=END, bos_token_id=0, pad_token_id=1, **blocks,
        ),
        projection_dim=EMBED,
    )
    return randomized(transformers.CLIPModel(config))


def texts(padding=1):
    """Ids that end with END, and their mask."""
    ids = np.random.default_rng(1).integers(2, END, (3, 7))
    valid = np.arange(7) < LENGTHS[:, None]
    ids[np.arange(3), LENGTHS - 1] = END
    return np.where(valid, ids, padding), valid


@functools.partial(jax.jit, static_argnums=0)
def apply(name, params, *inputs):
    return MODEL.apply({"params": params}, *inputs, method=name)


def run(name, *inputs):
    return apply(name, clip_params(reference()), *inputs)


def test_image_embeddings():
    pixels = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    with torch.no_grad():
        pooled = reference().vision_model(pixels).pooler_output
        expected = torch.nn.functional.normalize(reference().visual_projection(pooled), dim=-1)
    np.testing.assert_allclose(run("embed_images", IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_text_embeddings_come_from_the_end_of_text_token():
    ids, valid = texts()
    with torch.no_grad():
        pooled = reference().text_model(torch.tensor(ids)).pooler_output
        expected = torch.nn.functional.normalize(reference().text_projection(pooled), dim=-1)
    np.testing.assert_allclose(run("embed_texts", ids, valid), expected, rtol=1e-4, atol=1e-4)


# Ids of each row up to the end-of-text token, that included, and what follows.
ROWS = {
    "padded with zeros": ([3, 5, END], [0, 0, 0, 0]),
    "padded with the end of text": ([3, 5, 7, END], [END, END, END]),
    "an end of text within": ([3, END], [4, 6, END, 1, 1]),
    "as long as the context": ([3, 4, 5, 6, 7, 8, END], []),
    "nothing but the end of text": ([END], [1, 1, 1, 1, 1, 1]),
}


def pooled_by_transformers(ids, eos_token_id):
    """The text feature for a config with this `eos_token_id`."""
    config = copy.deepcopy(reference().text_model.config)
    config.eos_token_id = eos_token_id
    model = transformers.CLIPTextModel(config)
    model.load_state_dict(reference().text_model.state_dict())
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).pooler_output.numpy()


def pooled(ids, eos_token_id):
    valid = valid_to_end_of_text(jnp.asarray(ids), eos_token_id)
    return run(lambda model, *inputs: model.text(*inputs), ids, valid), valid


@pytest.mark.parametrize("eos_token_id", [END, 2])
def test_ids_without_a_mask_end_where_transformers_pools(eos_token_id):
    """By the id of the end-of-text token, and by the highest id where an old config says 2."""
    ids = np.array([first + rest for first, rest in ROWS.values()])
    ours, valid = pooled(ids, eos_token_id)
    np.testing.assert_array_equal(valid.sum(axis=1), [len(first) for first, _ in ROWS.values()])
    expected = pooled_by_transformers(ids, eos_token_id)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("eos_token_id", "ends"), [(9, [1, 3]), (2, [4, 0])])
def test_an_id_that_is_not_the_highest_marks_the_end_only_for_new_configs(eos_token_id, ends):
    ids = np.array([[3, 9, 5, 9, 11, 1, 1], [12, 2, 4, 9, 11, 1, 1]])
    ours, valid = pooled(ids, eos_token_id)
    np.testing.assert_array_equal(valid.sum(axis=1) - 1, ends)
    expected = pooled_by_transformers(ids, eos_token_id)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_text_without_an_end_of_text_counts_as_its_first_token():
    ids = np.array([[3, 5, 7, 4, 6, 8, 10]])
    ours, valid = pooled(ids, END)
    assert valid.tolist() == [[True] + [False] * 6]
    np.testing.assert_allclose(ours, pooled_by_transformers(ids, END), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, END])
def test_padding_does_not_matter(padding):
    expected = run("embed_texts", *texts())
    np.testing.assert_allclose(run("embed_texts", *texts(padding)), expected, rtol=1e-5, atol=1e-6)


def test_both_towers_give_the_similarities_of_transformers():
    ids, valid = texts()
    with torch.no_grad():
        output = reference()(torch.tensor(ids), torch.tensor(IMAGES.transpose(0, 3, 1, 2)))
    images, captions = run("__call__", IMAGES, ids, valid)
    scale = np.exp(clip_params(reference())["logit_scale"])
    np.testing.assert_allclose(
        scale * images @ captions.T, output.logits_per_image.numpy(), rtol=1e-3, atol=1e-3
    )
