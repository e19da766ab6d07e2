"""BLIP-2 with FlanT5 and with the LLaMA family, there and back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxblip.errors import UserError
from jaxblip.interop.families import blip2
from jaxblip.interop.files import open_weights
from jaxblip.interop.load import stored_params
from reference import randomized
from reference_t5 import VARIANTS, with_own_head
from reference_weights import assert_exports, params_in
from tiny_checkpoints import (
    IMAGE_TOKEN,
    QFORMER,
    QUERIES,
    TEXT,
    VISION,
    VOCAB,
    config_of,
    same_bits,
    save,
    shapes_of,
)
from tiny_tasks import fast_jit

T5 = dict(
    model_type="t5", vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=2,
    num_decoder_layers=3, num_heads=4, decoder_start_token_id=0,
)  # fmt: skip
LLAMA = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, bos_token_id=2, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
LANGUAGE_MODELS = {
    "FlanT5": T5 | VARIANTS["blip2"],
    "T5": T5 | VARIANTS["t5"],
    "Vicuna": LLAMA | dict(model_type="llama"),
    "Qwen3": LLAMA | dict(model_type="qwen3", head_dim=6, tie_word_embeddings=True),
}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
INPUT, IDS = RNG.integers(3, IMAGE_TOKEN, (2, 4)), RNG.integers(3, IMAGE_TOKEN, (2, TEXT))
INPUT_VALID = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


def random_blip2(name):
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=LANGUAGE_MODELS[name],
        image_token_index=IMAGE_TOKEN,
        num_query_tokens=QUERIES,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    if config.text_config.model_type == "t5":
        with_own_head(model.language_model)
    model = randomized(model, scale=0.2)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("qkv.bias"):  # published checkpoints have no key bias
                value[len(value) // 3 : 2 * len(value) // 3] = 0
    return model


def expected_logits(reference, is_encoder_decoder):
    text, valid = (INPUT, INPUT_VALID) if is_encoder_decoder else (IDS, VALID)
    prefix = np.full((2, QUERIES), IMAGE_TOKEN)
    mask = np.concatenate([prefix > 0, valid], axis=1)
    with torch.no_grad():
        logits = reference(
            pixel_values=torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy()),
            input_ids=torch.tensor(np.concatenate([prefix, text], axis=1)),
            attention_mask=torch.tensor(mask).long(),
            labels=torch.tensor(IDS) if is_encoder_decoder else None,
        ).logits.numpy()
    return logits if is_encoder_decoder else logits[:, QUERIES - 1 : -1]


@fast_jit(static_argnums=0)
def logits(model, params):
    return model.apply({"params": params}, IMAGES, IDS, VALID, INPUT, INPUT_VALID)


def layout_and_shapes(model):
    inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, TEXT), int), jnp.ones((1, TEXT), bool)
    shapes = shapes_of(model, *inputs, *inputs[1:])
    return blip2.blip2_layout(model), shapes


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_there_and_back(name, tmp_path):
    reference = random_blip2(name)
    folder = save(reference, tmp_path / "theirs")
    model = blip2.blip2_model(config_of(folder))
    layout, shapes = layout_and_shapes(model)
    params = params_in(folder, layout, shapes)
    is_encoder_decoder = LANGUAGE_MODELS[name]["model_type"] == "t5"
    expected = expected_logits(reference, is_encoder_decoder)
    ours = logits(model, params)
    np.testing.assert_allclose(ours[VALID], expected[VALID], rtol=1e-4, atol=1e-4)

    written = blip2.hf_blip2_config(model, image_token_index=IMAGE_TOKEN, eos_token_id=2)
    again = assert_exports(params, layout, written, tmp_path / "ours", reference)
    same_bits(tmp_path / "ours", folder)
    np.testing.assert_array_equal(expected_logits(again, is_encoder_decoder), expected)
    assert blip2.blip2_model(config_of(tmp_path / "ours")) == model
    text = written["text_config"]
    assert text["model_type"] == LANGUAGE_MODELS[name]["model_type"] and text["eos_token_id"] == 2
    assert again.config.text_config.eos_token_id == 2


def test_frequencies_of_old_vicuna_files_are_left_over(tmp_path):
    reference = random_blip2("Vicuna")
    model = blip2.blip2_model(reference.config.to_dict())
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    torch.save(reference.state_dict() | {name: torch.ones(4)}, tmp_path / "blip2.bin")
    stored_params(open_weights(tmp_path / "blip2.bin"), *layout_and_shapes(model))


def test_other_language_models_are_named():
    with pytest.raises(UserError, match="it has opt, t5, llama, mistral, qwen2, qwen3"):
        blip2.blip2_model({"text_config": {"model_type": "gpt2"}})
