"""SigLIP, and image encoders alone, there and back: transformers' outputs, and its bits."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from jaxblip.errors import UserError
from jaxblip.interop.families import clip, siglip
from jaxblip.interop.families.vision import vit_config
from jaxblip.interop.files import TensorInfo, Weights, open_weights
from jaxblip.interop.load import check
from jaxblip.interop.processors import find_image_processing
from jaxblip.interop.published import open_published
from jaxblip.models.layers import layer_norm
from jaxblip.models.vit import AttentionPooling, VisionTransformer
from reference import randomized
from reference_vision import siglip_shapes, vision_shapes
from reference_weights import assert_exports, params_in
from tiny_checkpoints import VISION, config_of, read_all, same_bits, save
from tiny_tasks import fast_jit

TEXT = dict(
    hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, vocab_size=13,
    max_position_embeddings=7, projection_size=20, bos_token_id=11, eos_token_id=12,
)  # fmt: skip
TOKENS = dict(bos_token_id=11, eos_token_id=12, pad_token_id=1)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
PIXELS = torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy())
IDS = np.random.default_rng(1).integers(2, 13, (3, 7))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-4)


# Both towers


def random_siglip(**text):
    config = transformers.SiglipConfig(vision_config=VISION, text_config=TEXT | text)
    return randomized(transformers.SiglipModel(config), scale=0.2)


@torch.no_grad()
def siglip_output(reference):
    return reference(input_ids=torch.tensor(IDS), pixel_values=PIXELS)


@fast_jit(static_argnums=0)
def siglip_logits(model, params):
    def run(module):
        images, texts = module(IMAGES, IDS)
        return images, texts, module.logits(images, texts)

    return model.apply({"params": params}, method=run)


def test_siglip_there_and_back(tmp_path):
    reference = random_siglip()
    folder = save(reference, tmp_path / "theirs")
    model = siglip.siglip_model(config_of(folder))
    layout = siglip.siglip_layout(model)
    params = params_in(folder, layout, siglip_shapes(model))
    images, texts, logits = siglip_logits(model, params)
    expected = siglip_output(reference)
    assert_close(images, expected.image_embeds)
    assert_close(texts, expected.text_embeds)
    assert_close(logits, expected.logits_per_image)

    written = siglip.hf_siglip_config(model, **TOKENS)
    again = assert_exports(params, layout, written, tmp_path / "ours", reference)
    same_bits(tmp_path / "ours", folder)
    assert torch.equal(siglip_output(again).logits_per_image, expected.logits_per_image)
    assert siglip.siglip_model(written) == model
    assert siglip.siglip_model(config_of(tmp_path / "ours")) == model
    assert again.config.text_config.eos_token_id == 12


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        # SigLIP 2 so400m and giant-opt, whose towers differ in width.
        ({}, dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27)),
        (
            dict(projection_size=1536),
            dict(hidden_size=1536, intermediate_size=6144, num_hidden_layers=40),
        ),
    ],
)
def test_full_size(text, vision):
    so400m = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, vocab_size=256000)
    heads = dict(num_attention_heads=16)
    hf = transformers.SiglipConfig(
        text_config=so400m | heads | text, vision_config=vision | heads | dict(patch_size=14)
    )
    with torch.device("meta"):
        state = transformers.SiglipModel(hf).state_dict()
    tensors = {key: TensorInfo(tuple(x.shape), np.dtype("float32")) for key, x in state.items()}
    model = siglip.siglip_model(hf.to_dict())
    weights = Weights("SigLIP", tensors, None, {}, None)
    check(weights, siglip.siglip_layout(model), siglip_shapes(model))


def test_defaults_are_those_of_transformers():
    assert siglip.siglip_model({}) == siglip.siglip_model(transformers.SiglipConfig().to_dict())


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "siglip2"}, "model_type='siglip2' is not covered"),
        ({"text_config": {"hidden_act": "swish"}}, "SigLIP text tower with hidden_act='swish'"),
        ({"text_config": {"attention_dropout": 0.1}}, "attention_dropout=0.1"),
        ({"text_config": {"projection_size": 512}}, "projection_size=512 .* image tower, 768"),
        ({"text_config": {"hidden_size": 384}}, "projection_size=None with hidden_size=384"),
    ],
)
def test_what_is_not_covered(hf, message):
    with pytest.raises(UserError, match=message):
        siglip.siglip_model(hf)


def test_the_image_tower_of_a_whole_checkpoint(tmp_path):
    """The layout knows the rest, and it stays unread."""
    reference = random_siglip()
    folder = save(reference, tmp_path)
    model = siglip.siglip_model(config_of(folder))
    shapes = {"vision": siglip_shapes(model)["vision"]}
    params = params_in(folder, siglip.siglip_layout(model), shapes)
    assert list(params) == ["vision"]
    table = reference.vision_model.embeddings.position_embedding.weight.detach()
    np.testing.assert_array_equal(params["vision"]["position_embedding"], table)


# SigLIP 2


def test_the_image_tower_of_siglip2_at_fixed_resolution(tmp_path):
    """Its checkpoints are of SigLIP's class, with more words, another filter, and crooked sizes."""
    vision, text = VISION | dict(image_size=10), dict(vocab_size=40, max_position_embeddings=9)
    config = transformers.SiglipConfig(vision_config=vision, text_config=TEXT | text)
    reference = randomized(transformers.SiglipModel(config), scale=0.2)
    folder = save(reference, tmp_path)
    SiglipImageProcessorPil(size={"height": 10, "width": 10}, resample=2).save_pretrained(folder)
    processing = find_image_processing(folder)
    assert (processing.size_px, processing.interpolation) == (10, "bilinear")
    published = open_published(folder)
    assert (published.name, published.task) == ("SiglipModel", "")
    assert list(published.configs) == ["vision"]
    shapes = siglip_shapes(siglip.siglip_model(config_of(folder)))
    shapes = {part: shapes[part] for part in ("vision", "vision_norm", "image_pooling")}
    stored = published.stored(shapes)
    params = jax.tree.map(lambda leaf: leaf[()], stored)
    images = np.random.default_rng(0).normal(size=(2, 10, 10, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference.vision_model(torch.tensor(images.transpose(0, 3, 1, 2).copy()))
    tokens, pooled = encode(published.configs["vision"], params, images)
    assert_close(tokens, expected.last_hidden_state)
    assert_close(pooled, expected.pooler_output)


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Siglip2Model"])
def test_siglip2_of_any_aspect_is_refused(name, tmp_path):
    vision = VISION | dict(num_patches=4)
    del vision["image_size"]
    if name == "Siglip2Model":
        config = transformers.Siglip2Config(vision_config=vision, text_config=TEXT)
    else:
        config = transformers.Siglip2VisionConfig(**vision)
    folder = save(getattr(transformers, name)(config), tmp_path)
    fields = config_of(folder)
    for remain in ({"architectures": fields["architectures"]}, {}):  # as GGUF, without a class
        written = {key: value for key, value in fields.items() if key != "architectures"} | remain
        (folder / "config.json").write_text(json.dumps(written))
        with pytest.raises(UserError, match=f"is a {name}, the NaFlex form.*fixed resolution"):
            open_published(folder)


# An image encoder alone

ENCODERS = {
    "SiglipVisionModel": (siglip.siglip_vision_layout, siglip.hf_siglip_vision_config),
    "CLIPVisionModel": (clip.clip_vision_layout, clip.hf_clip_vision_config),
}


@torch.no_grad()
def encoder_output(reference):
    return reference(PIXELS)


@fast_jit(static_argnums=0)
def encode(config, params, images=IMAGES):
    """Tokens, and what is pooled of them."""
    norm = layer_norm(config.layer_norm_epsilon, jnp.float32)
    tokens = VisionTransformer(config).apply({"params": params["vision"]}, images)
    normed = norm.apply({"params": params["vision_norm"]}, tokens)
    if "image_pooling" not in params:
        return tokens, normed[:, 0]
    return normed, AttentionPooling(config).apply({"params": params["image_pooling"]}, normed)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_alone_there_and_back(name, tmp_path):
    model_class = getattr(transformers, name)
    reference = randomized(model_class(model_class.config_class(**VISION)), scale=0.2)
    folder = save(reference, tmp_path / "theirs")
    config = vit_config(config_of(folder))
    to_layout, hf_config = ENCODERS[name]
    layout, shapes = to_layout(config), vision_shapes(config)
    if name == "CLIPVisionModel":
        del shapes["image_pooling"]
    params = params_in(folder, layout, shapes)
    tokens, pooled = encode(config, params)
    expected = encoder_output(reference)
    assert_close(tokens, expected.last_hidden_state)
    assert_close(pooled, expected.pooler_output)

    written = hf_config(config)
    again = assert_exports(params, layout, written, tmp_path / "ours", reference)
    assert torch.equal(encoder_output(again).pooler_output, expected.pooler_output)
    assert vit_config(written) == config
    # Under the names of transformers 4, which 5 reads as well; both are read here.
    assert all(tensor.startswith("vision_model.") for tensor in read_all(tmp_path / "ours"))
    assert not any(tensor in open_weights(folder).tensors for tensor in read_all(tmp_path / "ours"))
    both = params_in(tmp_path / "ours", layout, shapes)
    jax.tree.map(np.testing.assert_array_equal, both, params)
