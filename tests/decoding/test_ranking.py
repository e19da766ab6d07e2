"""Candidates ranked at once score as each of them does alone, read from its first token on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblip.decoding.ranking import candidate_log_likelihoods, read_input
from jaxblip.errors import UserError
from jaxblip.models.language_models import answer_hidden, continued_hidden, make_language_model
from jaxblip.models.llama import LlamaConfig
from jaxblip.models.opt import OptConfig
from jaxblip.models.t5 import T5Config
from tiny_tasks import fast_jit

VOCAB, WIDTH, INPUT = 13, 16, 5
SIZES = dict(vocab_size=VOCAB, width=WIDTH, num_layers=2, num_heads=2, mlp_width=24)
CONFIGS = {
    "opt": OptConfig(max_positions=12, **SIZES),
    "llama": LlamaConfig(max_positions=12, num_kv_heads=1, **SIZES),
    "llama_window": LlamaConfig(max_positions=12, num_kv_heads=1, sliding_window=4, **SIZES),
    "t5": T5Config(num_decoder_layers=2, head_width=8, **SIZES),
}
INPUT_LENGTHS = (5, 3, 1)
CANDIDATE_LENGTHS = (1, 4, 2, 6, 3)
LONGEST = 8  # padded beyond the longest candidate, and beyond the models' positions


@dataclasses.dataclass
class Example:
    """A random model, inputs of INPUT_LENGTHS, and candidates of CANDIDATE_LENGTHS."""

    name: str

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.model = make_language_model(CONFIGS[self.name])
        shape = (len(INPUT_LENGTHS), INPUT, WIDTH)
        self.embeddings = rng.normal(size=shape).astype(np.float32)
        self.valid = np.arange(INPUT) < np.array(INPUT_LENGTHS)[:, None]
        if not self.model.config.is_encoder_decoder:
            self.valid = self.valid[:, ::-1]
        self.ids = rng.integers(VOCAB, size=(len(CANDIDATE_LENGTHS), LONGEST), dtype=np.int32)
        self.candidate_valid = np.arange(LONGEST) < np.array(CANDIDATE_LENGTHS)[:, None]
        shapes = jax.eval_shape(self.initial)
        self.params = jax.tree.map(
            lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
        )

    def initial(self):
        embeddings, valid, ids = jnp.asarray(self.embeddings), self.valid, self.ids[:3]
        return self.model.init(jax.random.key(0), embeddings, valid, ids, method=_logits)["params"]

    def one_by_one(self):
        """Each pair of input and candidate is a row of its own, and nothing is cached."""
        rows, columns = np.indices((len(INPUT_LENGTHS), len(CANDIDATE_LENGTHS))).reshape(2, -1)
        longest = max(CANDIDATE_LENGTHS)
        ids, valid = self.ids[columns, :longest], self.candidate_valid[columns, :longest]
        logits = full_logits(self.model, self.params, self.embeddings[rows], self.valid[rows], ids)
        scores = np.asarray(jax.nn.log_softmax(logits))
        scores = np.take_along_axis(scores, ids[..., None], axis=-1)[..., 0]
        scores = np.where(valid, scores, 0).sum(axis=1)
        return scores.reshape(len(INPUT_LENGTHS), -1)

    def ranked(self, ids, valid):
        return np.asarray(rank(self.model, self.params, self.embeddings, self.valid, ids, valid))


def _rank(model, params, embeddings, valid, ids, candidate_valid):
    prefix = read_input(model, params, embeddings, valid)
    return candidate_log_likelihoods(model, params, prefix, ids, candidate_valid)


def _logits(model, embeddings, valid, ids):
    """Scores of each token of `ids` behind the embeddings."""
    if model.config.is_encoder_decoder:
        return model.logits(answer_hidden(model, embeddings, valid, ids))
    # The padding of the input is on its left: its last position predicts the first token.
    embeddings = jnp.concatenate([embeddings, model.embed(ids)], axis=1)
    valid = jnp.concatenate([valid, jnp.ones(ids.shape, bool)], axis=1)
    return model.logits(continued_hidden(model, embeddings, valid))[:, INPUT - 1 : -1]


rank = fast_jit(_rank, static_argnames="model")
full_logits = fast_jit(
    lambda model, params, *inputs: model.apply({"params": params}, *inputs, method=_logits),
    static_argnums=0,
)


@pytest.fixture(scope="module", params=CONFIGS)
def example(request):
    return Example(request.param)


def test_as_one_by_one(example):
    scores = example.ranked(example.ids[None], example.candidate_valid[None])
    np.testing.assert_allclose(scores, example.one_by_one(), rtol=2e-5)


def test_a_set_of_candidates_for_each_row(example):
    orders = np.random.default_rng(1).permuted(np.tile(np.arange(5), (3, 1)), axis=1)
    together = example.ranked(example.ids[None], example.candidate_valid[None])
    own = example.ranked(example.ids[orders], example.candidate_valid[orders])
    np.testing.assert_allclose(own, np.take_along_axis(together, orders, axis=1), rtol=2e-5)


def test_what_stands_at_padding_does_not_matter(example):
    ids = np.where(example.candidate_valid, example.ids, (example.ids + 1) % VOCAB)
    scores = example.ranked(example.ids[None], example.candidate_valid[None])
    other = example.ranked(ids[None], example.candidate_valid[None])
    np.testing.assert_array_equal(scores, other)


def test_an_input_longer_than_the_positions():
    model = make_language_model(dataclasses.replace(CONFIGS["opt"], max_positions=INPUT - 1))
    example = Example("opt")
    with pytest.raises(UserError, match=f"the language model has {INPUT - 1}"):
        read_input(model, example.params, example.embeddings, example.valid)
