"""LLaMA, Mistral, Qwen2 and Qwen3 there and back: transformers' logits, and its bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from tiny_checkpoints import config_of, same_bits, save
from tiny_tasks import fast_jit

from jaxblip.errors import UserError
from jaxblip.interop.families.llama import (
    ARCHITECTURES,
    hf_llama_config,
    llama_config,
    llama_entries,
    llama_layout,
)
from jaxblip.interop.files import open_weights
from jaxblip.interop.load import check, stored_params
from jaxblip.models.attention import causal_mask
from jaxblip.models.llama import LlamaConfig, LlamaLanguageModel
from jaxblip.models.opt import token_positions
from reference_llama import VARIANTS, llama_shapes, random_llama
from reference_weights import assert_exports, params_in

IDS = np.random.default_rng(0).integers(3, 13, (2, 6))
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)
TOKENS = dict(bos_token_id=2, eos_token_id=2, pad_token_id=1)


def expected_logits(reference):
    with torch.no_grad():
        output = reference(torch.tensor(IDS), attention_mask=torch.tensor(VALID).long())
    return output.logits[VALID].numpy()


@fast_jit(static_argnums=0)
def logits(config, params):
    def run(module):
        hidden, _ = module(module.embed(IDS), token_positions(VALID), causal_mask(VALID))
        return module.logits(hidden)

    return LlamaLanguageModel(config).apply({"params": params}, method=run)


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant, tmp_path):
    reference = random_llama(variant)
    folder = save(reference, tmp_path / "theirs")
    config = llama_config(config_of(folder))
    layout = llama_layout(config)
    params = params_in(folder, layout, llama_shapes(config))
    ours = logits(config, params)[VALID]
    np.testing.assert_allclose(ours, expected_logits(reference), rtol=1e-4, atol=1e-5)

    written = hf_llama_config(config, **TOKENS)
    model = assert_exports(params, layout, written, tmp_path / "ours", reference)
    same_bits(tmp_path / "ours", folder)
    # The class may be another one that computes the same, as LLaMA for Mistral without a window.
    np.testing.assert_allclose(
        expected_logits(model), expected_logits(reference), rtol=1e-5, atol=1e-6
    )
    again = llama_config(config_of(tmp_path / "ours"))
    # What transformers wrote may have left the initialization's scale to its class.
    assert written_out(again) == written_out(config)


def written_out(config):
    _, num_kv_heads, head_width = config.attention_shape
    return dataclasses.replace(config, num_kv_heads=num_kv_heads, head_width=head_width)


SMALL = LlamaConfig(vocab_size=13, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=8)


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "llama"),
        (dict(head_width=10, tied_head=True), "llama"),
        (dict(qkv_bias=True, out_bias=True), "llama"),
        (dict(mlp_bias=True), "llama"),
        (dict(rope_type="linear", rope_factor=4.0), "llama"),
        (dict(rope_type="llama3", rope_factor=8.0, rope_theta=5e5), "llama"),
        (dict(sliding_window=3), "mistral"),
        (dict(width=30, head_width=8), "mistral"),
        (dict(qkv_bias=True), "qwen2"),
        (dict(qkv_bias=True, head_width=10, sliding_window=3), "qwen2"),
        (dict(qk_norm=True), "qwen3"),
        (dict(qk_norm=True, qkv_bias=True, out_bias=True, sliding_window=3), "qwen3"),
        (dict(num_kv_heads=0, initializer_range=0.1, norm_epsilon=1e-3, max_positions=7), "llama"),
    ],
)
def test_the_class_that_computes_the_config(fields, model_type, tmp_path):
    config = dataclasses.replace(SMALL, **fields)
    written = hf_llama_config(config, **TOKENS)
    assert written["model_type"] == model_type
    assert written["architectures"] == [ARCHITECTURES[model_type]]
    assert written["bos_token_id"] == 2
    assert llama_config(written) == written_out(config)
    # transformers takes the file, and makes a model of the same tensors.
    theirs = transformers.AutoConfig.for_model(**written)
    theirs.save_pretrained(tmp_path)
    assert llama_config(config_of(tmp_path)) == written_out(config)
    with torch.device("meta"):
        state = getattr(transformers, ARCHITECTURES[model_type])(theirs).state_dict()
    names = {name for entry in llama_entries(config) for name in entry.names}
    assert names == set(state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(out_bias=True), "qkv_bias=False, out_bias=True"),
        (dict(qkv_bias=True, mlp_bias=True), "mlp_bias=True"),
        (dict(qk_norm=True, mlp_bias=True), "qk_norm=True"),
        (dict(mlp_bias=True, sliding_window=3), "sliding_window=3"),
        (dict(mlp_bias=True, width=30, head_width=8), "num_heads=4 on width=30"),
    ],
)
def test_what_no_class_computes_is_not_exported(fields, message):
    with pytest.raises(UserError, match=f"{message}.*cannot be exported"):
        hf_llama_config(dataclasses.replace(SMALL, **fields))


def test_files_of_older_versions(tmp_path):
    """A tied head beside the words or in their place, and the frequencies of each layer."""
    reference = random_llama("smollm2")
    config = llama_config(reference.config.to_dict())
    layout, shapes = llama_layout(config), llama_shapes(config)
    state = reference.state_dict()
    words = "model.embed_tokens.weight"
    assert {words, "lm_head.weight"} <= set(state)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    only_head = {name: tensor for name, tensor in state.items() if name != words}
    for number, tensors in enumerate((state, only_head, state | frequencies)):
        torch.save(tensors, tmp_path / f"{number}.bin")
        stored = stored_params(open_weights(tmp_path / f"{number}.bin"), layout, shapes)
        np.testing.assert_array_equal(stored["token_embedding"]["embedding"][()], state[words])


def test_a_head_of_its_own_must_be_there(tmp_path):
    weights = open_weights(save(random_llama("smollm2"), tmp_path))
    config = dataclasses.replace(llama_config(weights.config), tied_head=False)
    with pytest.raises(UserError, match="Missing in the file:\n  lm_head.weight"):
        check(weights, llama_layout(config), llama_shapes(config))


def test_prefixes():
    entries = llama_entries(SMALL, "language_model.", "lm/")
    assert all(entry.theirs.startswith("language_model.") for entry in entries)
    assert all(slot.path.startswith("lm/") for entry in entries for slot in entry.ours)
    paths = {slot.path for entry in llama_layout(SMALL, "lm/").entries for slot in entry.ours}
    assert paths == {slot.path for entry in entries for slot in entry.ours}
