"""Generation by an encoder-decoder: against transformers, and against a search without cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.decoding import DecodingConfig, EncoderDecoder, generate
from jaxblip.errors import UserError
from jaxblip.interop.families.t5 import t5_config
from jaxblip.models.attention import causal_mask
from jaxblip.models.t5 import T5LanguageModel, shift_right
from jaxblip.sharding import make_mesh, put_batch, tree_shardings
from reference_t5 import random_t5, t5_params
from slow_search import slow_search

START, STOP, PAD, WIDTH, INPUT, NEW = 0, 1, 0, 16, 5, 9
LENGTHS = (5, 3, 1, 4, 5, 2)
# Random models that stop at different places, and in some rows never.
SEEDS = {"flan_t5": (0, 7), "blip2": (2,), "t5": (1, 2)}
MODELS = {name: T5LanguageModel(t5_config(random_t5(name).config.to_dict())) for name in SEEDS}
compiled = jax.jit(generate, static_argnames=("language_model", "config"))


def config(num_beams=1, length_penalty=1.0, **fields):
    fields = dict(max_new_tokens=NEW, stop_token_id=STOP, pad_token_id=PAD) | fields
    return DecodingConfig(num_beams=num_beams, length_penalty=length_penalty, **fields)


@dataclasses.dataclass
class Example:
    """A model of transformers, the same in jaxblip, and right-padded inputs of LENGTHS."""

    variant: str = "flan_t5"
    seed: int = 0

    def __post_init__(self):
        self.reference = random_t5(self.variant, self.seed)
        self.model, self.params = MODELS[self.variant], t5_params(self.reference)
        rng = np.random.default_rng(self.seed)
        self.embeddings = rng.normal(size=(len(LENGTHS), INPUT, WIDTH)).astype(np.float32)
        self.valid = np.arange(INPUT) < np.array(LENGTHS)[:, None]

    def run(self, search, rng=None):
        ids = compiled(self.model, self.params, self.embeddings, self.valid, search, rng)
        return np.asarray(ids)

    def transformers(self, search):
        with torch.no_grad():
            ids = self.reference.generate(
                inputs_embeds=torch.tensor(self.embeddings),
                attention_mask=torch.tensor(self.valid).long(),
                max_new_tokens=search.max_new_tokens,
                min_new_tokens=search.min_new_tokens,
                num_beams=search.num_beams,
                length_penalty=search.length_penalty,
                repetition_penalty=search.repetition_penalty,
                eos_token_id=search.stop_token_id,
                pad_token_id=search.pad_token_id,
                early_stopping=False,
                do_sample=False,
            ).numpy()
        assert (ids[:, 0] == START).all()
        # Its beam search fills up with the stop token where padding is token 0.
        result = np.full((len(ids), search.max_new_tokens), search.pad_token_id)
        for row, new in zip(result, ids[:, 1:].tolist(), strict=True):
            length = new.index(STOP) + 1 if STOP in new else len(new)
            row[:length] = new[:length]
        return result

    def slow(self, search, prompt=(START,)):
        """Every sequence is read anew from its start token on, by the full pass."""

        def scorer(row):
            def logits(beams):
                new = len(beams[0])
                ids = np.zeros((search.num_beams, search.max_new_tokens), np.int32)
                ids[: len(beams), :new] = beams
                rows = slice(row, row + 1)
                inputs = self.embeddings[rows], self.valid[rows], ids
                scores = full_logits(self.model, self.params, *inputs)
                return np.asarray(scores)[: len(beams), new]

            return logits

        return slow_search(scorer, len(LENGTHS), search, prompt)


@jax.jit(static_argnums=0)
def full_logits(model, params, embeddings, valid, ids):
    """Logits of all tokens of each row of `ids`, which all have the same input."""
    rows = [jnp.repeat(x, len(ids), axis=0) for x in (embeddings, valid)]
    ids = shift_right(jnp.pad(ids, ((0, 0), (0, 1))), START)
    words = model.apply({"params": params}, ids, method="embed")
    mask = causal_mask(jnp.ones(ids.shape, bool))
    hidden = model.apply({"params": params}, *rows, words, mask)
    return model.apply({"params": params}, hidden, method="logits")


@pytest.mark.parametrize(
    "variant, search",
    [
        ("flan_t5", config()),
        ("flan_t5", config(5, -1.0)),
        ("flan_t5", config(5, 1.0)),
        ("blip2", config(5, -1.0)),
        ("t5", config()),
        ("t5", config(5, -1.0)),
    ],
)
def test_same_tokens_as_transformers_and_as_without_cache(variant, search):
    stops = set()
    for seed in SEEDS[variant]:
        example = Example(variant, seed)
        ids = example.run(search)
        np.testing.assert_array_equal(ids, example.transformers(search))
        np.testing.assert_array_equal(ids, example.slow(search))
        stops |= {list(row).index(STOP) if STOP in row else NEW for row in ids}
    assert len(stops) > 1 and NEW in stops


@pytest.mark.parametrize(
    "search",
    [
        config(repetition_penalty=1.5),
        config(5, 1.0, repetition_penalty=1.5),
        config(5, -1.0, repetition_penalty=1.5, min_new_tokens=3),
    ],
)
def test_repetition_penalty_and_min_new_tokens(search):
    without = dataclasses.replace(search, repetition_penalty=1.0)
    changed = by_start = 0
    for seed in SEEDS["flan_t5"]:
        example = Example("flan_t5", seed)
        ids = example.run(search)
        np.testing.assert_array_equal(ids, example.transformers(search))
        np.testing.assert_array_equal(ids, example.slow(search))
        changed += (ids != example.run(without)).any(axis=1).sum()
        by_start += (ids != example.slow(search, prompt=())).any(axis=1).sum()
        assert not (ids[:, : search.min_new_tokens] == STOP).any()
    assert changed > 3 and by_start > 0


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_and_other_rows_do_not_matter(num_beams):
    example, search = Example(), config(num_beams)
    expected = example.run(search)
    moved, valid = np.full_like(example.embeddings, 3.0), example.valid[:, ::-1].copy()
    for row, length in enumerate(LENGTHS):  # padding on the left, and of other values
        moved[row, INPUT - length :] = example.embeddings[row, :length]
    order = np.array([3, 0, 5, 1, 4, 2])
    example.embeddings, example.valid = moved[order], valid[order]
    np.testing.assert_array_equal(example.run(search), expected[order])


def test_beams_share_the_encoder():
    example, beams = Example(), 5
    decoder = EncoderDecoder(example.model, example.params)
    shapes = jax.eval_shape(lambda: decoder.prefill(example.embeddings, example.valid, NEW, beams))
    c, batch = example.model.config, len(LENGTHS)
    logits, state = shapes
    assert logits.shape == (batch, c.vocab_size)
    heads = (c.num_heads, c.head_width)
    assert state.encoder.key.shape == (c.num_decoder_layers, batch, INPUT, *heads)
    assert state.cache.key.shape == (c.num_decoder_layers, batch * beams, NEW, *heads)


def test_one_compilation_for_all_inputs_of_a_shape():
    traces = []

    @jax.jit
    def traced(params, embeddings, valid):
        traces.append(embeddings.shape)
        return generate(MODELS["flan_t5"], params, embeddings, valid, config())

    results = [
        np.asarray(traced(example.params, example.embeddings, example.valid))
        for example in (Example(seed=0), Example(seed=7))
    ]
    assert len(traces) == 1
    assert (results[0] != results[1]).any()


def test_same_tokens_on_several_devices():
    example, search = Example(), config(3, repetition_penalty=1.5)
    expected = example.run(search)
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    example.params = jax.device_put(example.params, tree_shardings(example.params, mesh))
    batch = put_batch({"embeddings": example.embeddings, "valid": example.valid}, mesh)
    example.embeddings, example.valid = batch["embeddings"], batch["valid"]
    np.testing.assert_array_equal(example.run(search), expected)


def test_bfloat16():
    example = Example()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), example.params)
    model = T5LanguageModel(example.model.config, jnp.bfloat16)
    ids = compiled(model, params, example.embeddings, example.valid, config(3))
    assert ids.shape == (6, NEW) and ids.dtype == jnp.int32
    assert ((ids >= 0) & (ids < 13)).all()


def test_one_new_token():
    example = Example()
    ids = example.run(config(max_new_tokens=1))
    np.testing.assert_array_equal(ids, example.run(config())[:, :1])


def test_sampling():
    example, search = Example(), config(sample=True, temperature=2.0)
    one, same, other = (example.run(search, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    best = example.run(config(sample=True, top_k=1), jax.random.key(0))
    np.testing.assert_array_equal(best, example.run(config()))
    with pytest.raises(UserError, match="needs a random key"):
        example.run(search)
