"""T5 there and back: transformers' logits, and its bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from jaxblip.interop.families.t5 import hf_t5_config, t5_config, t5_entries, t5_layout
from jaxblip.interop.files import open_weights
from jaxblip.interop.load import stored_params
from jaxblip.models.attention import causal_mask
from jaxblip.models.t5 import T5Config, T5LanguageModel, shift_right
from reference import randomized
from reference_t5 import VARIANTS, random_t5, t5_shapes, with_own_head
from reference_weights import assert_exports, params_in
from tiny_checkpoints import config_of, same_bits, save
from tiny_tasks import fast_jit

RNG = np.random.default_rng(0)
IDS, TARGETS = RNG.integers(2, 13, (2, 6)), RNG.integers(2, 13, (2, 4))
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)
TOKENS = dict(eos_token_id=1, pad_token_id=0)


def expected_logits(reference):
    with torch.no_grad():
        return reference(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(VALID).long(),
            labels=torch.tensor(TARGETS),
        ).logits.numpy()


@fast_jit(static_argnums=0)
def logits(config, params):
    def run(module):
        decoder = module.embed(shift_right(TARGETS, config.start_token_id))
        mask = causal_mask(np.ones(TARGETS.shape, bool))
        return module.logits(module(module.embed(IDS), VALID, decoder, mask))

    return T5LanguageModel(config).apply({"params": params}, method=run)


def imported(folder):
    config = t5_config(config_of(folder))
    layout = t5_layout(config)
    return config, layout, params_in(folder, layout, t5_shapes(config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant, tmp_path):
    reference = random_t5(variant)
    folder = save(reference, tmp_path / "theirs")
    config, layout, params = imported(folder)
    assert config.tied_head == (variant == "t5") == ("lm_head" not in params)
    expected = expected_logits(reference)
    np.testing.assert_allclose(logits(config, params), expected, rtol=1e-4, atol=1e-4)

    written = hf_t5_config(config, **TOKENS)
    model = assert_exports(params, layout, written, tmp_path / "ours", reference)
    same_bits(tmp_path / "ours", folder)
    np.testing.assert_array_equal(expected_logits(model), expected)
    assert t5_config(config_of(tmp_path / "ours")) == config


def test_a_head_that_was_never_taken_apart(tmp_path):
    """transformers 5 makes a T5 v1.1 with one tensor for words and head, and saves it once."""
    reference = random_t5("flan_t5")
    fresh = randomized(transformers.T5ForConditionalGeneration(reference.config))
    folder = save(fresh, tmp_path)
    assert "lm_head.weight" not in open_weights(folder).tensors
    config, _, params = imported(folder)
    assert not config.tied_head
    words = params["token_embedding"]["embedding"]
    np.testing.assert_array_equal(params["lm_head"]["kernel"], words.T)
    expected = expected_logits(fresh)
    np.testing.assert_allclose(logits(config, params), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["flan_t5", "t5"])
def test_files_of_older_versions(variant, tmp_path):
    """The words under all their names or under one other, and a bias that nothing reads."""
    reference = random_t5(variant)
    config = t5_config(reference.config.to_dict())
    layout, shapes = t5_layout(config), t5_shapes(config)
    state = reference.state_dict()
    aliases = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    aliases += ["lm_head.weight"] if config.tied_head else []
    assert {"shared.weight", *aliases} <= set(state)
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    others = {name: x for name, x in state.items() if name not in ("shared.weight", *aliases)}
    files = [state | {unused: torch.ones(8, 4)}]
    files += [others | {alias: state["shared.weight"]} for alias in aliases]
    for number, tensors in enumerate(files):
        torch.save(tensors, tmp_path / f"{number}.bin")
        stored = stored_params(open_weights(tmp_path / f"{number}.bin"), layout, shapes)
        words = stored["token_embedding"]["embedding"][()]
        np.testing.assert_array_equal(words, state["shared.weight"])
        if not config.tied_head:
            head = stored["lm_head"]["kernel"][()]
            np.testing.assert_array_equal(head, state["lm_head.weight"].T)


SMALL = T5Config(
    vocab_size=13, width=16, num_layers=2, num_decoder_layers=3, num_heads=4, head_width=6,
    mlp_width=24, num_position_buckets=8, max_position_distance=20, layer_norm_epsilon=1e-4,
    start_token_id=3,
)  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tied_head", [False, True])
def test_config_there_and_back(activation, gated, tied_head, tmp_path):
    config = dataclasses.replace(SMALL, activation=activation, gated=gated, tied_head=tied_head)
    written = hf_t5_config(config, **TOKENS)
    assert t5_config(written) == config
    theirs = transformers.T5Config(**written)
    assert (theirs.dense_act_fn, theirs.is_gated_act) == (activation, gated)
    assert theirs.scale_decoder_outputs == tied_head and theirs.decoder_start_token_id == 3
    theirs.save_pretrained(tmp_path)
    assert t5_config(config_of(tmp_path)) == config
    with torch.device("meta"):
        state = with_own_head(transformers.T5ForConditionalGeneration(theirs)).state_dict()
    assert {name for entry in t5_entries(config) for name in entry.names} == set(state)


def test_dropout_is_written():
    config = dataclasses.replace(SMALL, dropout=0.1)
    assert transformers.T5Config(**hf_t5_config(config)).dropout_rate == 0.1
