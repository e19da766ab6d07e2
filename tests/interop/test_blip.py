"""BLIP's classes there and back: transformers' outputs after import, its bits after export."""

from __future__ import annotations

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from jaxblip.errors import UserError
from jaxblip.interop.families import blip
from jaxblip.interop.files import TensorInfo, Weights, open_weights
from jaxblip.interop.load import check, load_params, stored_params
from jaxblip.interop.save import save_params
from reference_blip import (
    ANSWERING,
    CAPTIONING,
    CLASSES,
    DEC,
    FAMILY,
    PAD,
    RETRIEVAL,
    SEP,
    SMOOTHING,
    images_and_pixels,
    ours,
    pair,
    random_blip,
    random_texts,
)
from tiny_checkpoints import config_of, same_bits, save
from tiny_tasks import fast_jit

IMAGES, PIXELS = images_and_pixels(2)
IDS, VALID = random_texts((6, 6))
# What our models do not know.
TEXT_FIELDS = dict(sep_token_id=SEP, pad_token_id=PAD, label_smoothing=SMOOTHING)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("blip")


@functools.cache
def saved(name, root, dtype="float32"):
    """The class's tiny checkpoint on disk."""
    model = random_blip(name).to(getattr(torch, dtype))
    return save(model, root / f"{name}-{dtype}")


def on_one_device(shapes):
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)


def imported(name, folder, dtype=None):
    weights = open_weights(folder)
    model, layout, shapes = ours(name, weights.config)
    written = FAMILY[name][2](model, **TEXT_FIELDS)
    params = load_params(weights, layout, shapes, on_one_device(shapes), dtype)
    return model, params, layout, written


@pytest.mark.parametrize("name", CLASSES)
def test_outputs_after_import(name, root):
    """Of the folder that transformers reads as well; more of them: tests/models/test_blip.py."""
    folder = saved(name, root)
    model, params, _, _ = imported(name, folder)
    reference = getattr(transformers, name).from_pretrained(folder)
    ids = np.concatenate([np.full((2, 1), DEC), IDS[:, 1:]], axis=1)
    ids, text = torch.tensor(ids), (IDS, VALID)
    with torch.no_grad():
        if name == RETRIEVAL:
            expected = reference(torch.tensor(IDS), PIXELS).itm_score
        elif name == CAPTIONING:
            expected = reference(PIXELS, ids).logits
        else:
            question = reference.text_encoder(
                torch.tensor(IDS),
                encoder_hidden_states=reference.vision_model(PIXELS).last_hidden_state,
            ).last_hidden_state
            expected = reference.text_decoder(ids, encoder_hidden_states=question).logits
    whole = params | ({"temperature": 0.07} if name == RETRIEVAL else {})
    actual = fast_jit(model.apply)(
        {"params": whole}, IMAGES, *text, *(text if name == ANSWERING else ())
    )
    actual = actual[0] if name == RETRIEVAL else actual
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_export_is_loaded_by_transformers_without_a_missing_or_unexpected_key(name, root, tmp_path):
    folder = saved(name, root)
    _, params, layout, written = imported(name, folder)
    assert save_params(params, layout, tmp_path, written, dtype=np.float32) == ()
    model, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    expected = getattr(transformers, name).from_pretrained(folder).state_dict()
    assert sorted(state) == sorted(expected)
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    same_bits(tmp_path, folder)


@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16_there_and_back_is_bit_exact(name, root, tmp_path):
    folder = saved(name, root, "bfloat16")
    _, params, layout, written = imported(name, folder, np.float32)
    save_params(params, layout, tmp_path, written, dtype=ml_dtypes.bfloat16)
    same_bits(tmp_path, folder)


@pytest.mark.parametrize("name", CLASSES)
def test_config_there_and_back(name, root):
    hf = config_of(saved(name, root))
    hf["text_config"] |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    model, _, _ = ours(name, hf)
    written = FAMILY[name][2](model, **TEXT_FIELDS)
    assert ours(name, written)[0] == model
    # Of what transformers makes of it, only what no model depends on may differ.
    config = flattened(transformers.BlipConfig(**written).to_dict())
    expected = flattened(transformers.BlipConfig(**hf).to_dict())
    unknown = {"_name_or_path", "dtype", "vision_config.initializer_range"}
    if name == RETRIEVAL:  # which begins no text
        unknown.add("text_config.bos_token_id")
    else:  # which have no contrastive space
        unknown.add("image_text_hidden_size")
    differing = {key for key, value in expected.items() if config.get(key) != value}
    assert differing <= unknown


def flattened(config, prefix=""):
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        fields |= flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return fields


def test_the_temperature_stays_behind(root, tmp_path):
    folder = saved(RETRIEVAL, root)
    _, params, layout, written = imported(RETRIEVAL, folder)
    whole = params | {"temperature": np.float32(0.05)}
    assert save_params(whole, layout, tmp_path, written) == ("temperature",)
    assert not layout.holds("temperature") and layout.holds("itm_head/kernel")
    same_bits(tmp_path, folder)


@pytest.mark.parametrize("name", [CAPTIONING, ANSWERING])
def test_files_of_older_versions_have_index_buffers_and_the_tied_head_under_both_names(
    name, root, tmp_path
):
    weights = open_weights(saved(name, root))
    _, layout, shapes = ours(name, weights.config)
    state = {key: torch.tensor(weights.read(key).copy()) for key in weights.tensors}
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    head, bias = (f"text_decoder.cls.predictions.{part}" for part in ("decoder", "bias"))
    both = state | {
        f"{head}.weight": state[words],
        f"{head}.bias": state[bias],
        "text_decoder.bert.embeddings.position_ids": torch.arange(24)[None],
    }
    only_head = {key: value for key, value in both.items() if key not in (words, bias)}
    for number, variant in enumerate((both, only_head)):
        file = tmp_path / f"{number}.bin"
        torch.save(variant, file)
        decoder = stored_params(open_weights(file), layout, shapes)["decoder"]
        table = decoder["text_embeddings"]["token_embedding"]["embedding"]
        np.testing.assert_array_equal(table[()], state[words])
        np.testing.assert_array_equal(decoder["itg_head"]["bias"][()], state[bias])


@pytest.mark.parametrize(
    ("name", "width"),  # question answering has texts as wide as images
    [*((name, 768) for name in CLASSES), (RETRIEVAL, 1024), (CAPTIONING, 1024)],
)
def test_full_size(name, width):
    """ViT-B/16 and L/16 at 384 px with BERT-base: every tensor has its place, and no memory."""
    large = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    hf = transformers.BlipConfig(
        vision_config=large if width == 1024 else {}, text_config=dict(num_attention_heads=12)
    )
    with torch.device("meta"):
        state = getattr(transformers, name)(hf).state_dict()
    tensors = {key: TensorInfo(tuple(x.shape), np.dtype("float32")) for key, x in state.items()}
    model, layout, shapes = ours(name, hf.to_dict())
    check(Weights(name, tensors, None, {}, None), layout, shapes)
    vision = sum(x.size for x in jax.tree.leaves(shapes["vision"]))
    assert (model.vision_config.width, vision) in [(768, 86_088_960), (1024, 303_688_704)]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"is_decoder": False}, "is_decoder=False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ],
)
@pytest.mark.parametrize("name", CLASSES)
def test_configs_that_are_not_covered_are_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        FAMILY[name][0]({"text_config": fields})


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_transformers(name):
    make = FAMILY[name][0]
    assert make({}) == make(transformers.BlipConfig().to_dict())


def test_what_the_target_class_lacks_is_refused():
    _, model, _, _ = pair(ANSWERING)
    wider = model.clone(vision_config=dataclasses.replace(model.vision_config, width=20))
    with pytest.raises(UserError, match="width 20 with texts of width 16"):
        blip.hf_blip_question_answering_config(wider)
    clip = dataclasses.replace(model.vision_config, pre_norm=True)
    with pytest.raises(UserError, match="pre_norm=True cannot be exported as blip_vision_model"):
        blip.hf_blip_captioner_config(pair(CAPTIONING)[1].clone(vision_config=clip))
