"""The searches over a table of next-token probabilities, and what they do to scores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from jaxblip.decoding import (
    CausalDecoder,
    DecodingConfig,
    beam_search,
    generate,
    greedy_search,
    run_search,
    sample_search,
)
from jaxblip.decoding.search import sampling_logits
from jaxblip.errors import UserError
from jaxblip.models.opt import OptConfig, OptLanguageModel
from reference import opt_params, random_opt
from slow_search import slow_generate

STOP, PAD = 0, 6


@dataclasses.dataclass
class Chain:
    """A Markov chain; its state counts each row's tokens, to see that beams keep their own."""

    log_probs: np.ndarray
    steps: int = 0

    def step(self, ids, index, state):
        self.steps += 1
        return jnp.asarray(self.log_probs)[ids], state

    def reorder(self, state, parents):
        return state


def chain(**next_tokens):
    """Probabilities by token, e.g. `t1={2: 0.6, 0: 0.4}`; what is missing gets next to nothing."""
    probabilities = np.full((7, 7), 1e-6)
    for name, row in next_tokens.items():
        for token, probability in row.items():
            probabilities[int(name[1:]), token] = probability
    return Chain(np.log(probabilities).astype(np.float32))


def search(model, first_tokens, **fields):
    """Ids of rows whose first token is drawn after `first_tokens`."""
    fields = dict(max_new_tokens=6, stop_token_id=STOP, pad_token_id=PAD) | fields
    config = DecodingConfig(**fields)
    run = greedy_search if config.num_beams == 1 else beam_search
    logits = jnp.asarray(model.log_probs)[jnp.array(first_tokens)]
    ids, _ = run(model, logits, (), config)
    return ids.tolist()


def test_greedy_takes_the_best_token_and_beam_search_the_best_sequence():
    # After 1, token 2 is likelier than 3; but only what follows 3 is certain.
    model = chain(
        t1={2: 0.6, 3: 0.4}, t2={4: 0.5, 5: 0.5}, t3={STOP: 1.0}, t4={STOP: 1.0}, t5={STOP: 1.0}
    )
    assert search(model, [1])[0][0] == 2
    assert search(model, [1], num_beams=2, length_penalty=0.0) == [[3, STOP, PAD, PAD, PAD, PAD]]


def test_length_penalty_chooses_between_short_and_long():
    # Stop at once with 0.4, or walk 2, 3, 4, stop with 0.6 * 0.7 * 0.8 * 0.8 = 0.27.
    model = chain(
        t1={STOP: 0.4, 2: 0.6},
        t2={3: 0.7, 5: 0.3},
        t3={4: 0.8, 5: 0.2},
        t4={STOP: 0.8, 5: 0.2},
        t5=dict.fromkeys(range(7), 1 / 7),  # whoever comes here is lost
    )
    short, long = [STOP] + [PAD] * 5, [2, 3, 4, STOP, PAD, PAD]
    assert search(model, [1], num_beams=2, length_penalty=0.0) == [short]
    assert search(model, [1], num_beams=2, length_penalty=-1.0) == [short]
    assert search(model, [1], num_beams=2, length_penalty=1.0) == [long]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_loop_ends_when_all_rows_have_stopped(num_beams):
    certain = chain(t1={2: 1.0}, t2={3: 1.0}, t3={STOP: 1.0}, t4={5: 1.0}, t5={4: 1.0})
    with jax.disable_jit():
        ids = search(certain, [1, 2], max_new_tokens=20, num_beams=num_beams, length_penalty=0.0)
        assert ids == [[2, 3, STOP] + [PAD] * 17, [3, STOP] + [PAD] * 18]
        assert certain.steps <= 5  # not 19
        # A row that never stops keeps going, and changes nothing for the other.
        certain.steps = 0
        ids = search(certain, [1, 4], max_new_tokens=20, num_beams=num_beams, length_penalty=0.0)
        assert certain.steps == 19
    assert ids[0] == [2, 3, STOP] + [PAD] * 17
    assert set(ids[1]) <= {STOP, 4, 5} and (num_beams > 1 or STOP not in ids[1])


def test_a_row_that_is_done_stays_as_it_is_while_others_go_on():
    # Two sequences finish, and the running 3, 4 (0.2) is behind them at its present length: done.
    # Left alone it would become 3, 4, 5, stop, and win by its length.
    model = chain(
        t1={STOP: 0.5, 2: 0.3, 3: 0.2},
        t2={STOP: 0.9, 4: 0.1},
        t3={4: 1.0},
        t4={5: 1.0},
        t5={STOP: 1.0},
        t6={6: 1.0},
    )
    alone = search(model, [1], num_beams=2, length_penalty=1.0)
    assert alone == [[2, STOP, PAD, PAD, PAD, PAD]]
    assert search(model, [1, 6], num_beams=2, length_penalty=1.0)[0] == alone[0]


# Repetition penalty: the decoder-only model of transformers sees the ids that it is given.

OPT_STOP, OPT_PAD, NEW = 2, 1, 8
OPT = OptLanguageModel(
    OptConfig(vocab_size=13, width=16, num_layers=3, num_heads=2, mlp_width=24, max_positions=32)
)
PENALIZED = [(1, 1.0), (5, -1.0), (5, 1.0)]


def penalized(num_beams, length_penalty, repetition_penalty=1.3):
    return DecodingConfig(
        max_new_tokens=NEW,
        stop_token_id=OPT_STOP,
        pad_token_id=OPT_PAD,
        num_beams=num_beams,
        length_penalty=length_penalty,
        repetition_penalty=repetition_penalty,
    )


def transformers_generate(reference, config, **inputs):
    """New tokens alone, padded to the full width."""
    with torch.no_grad():
        ids = reference.generate(
            **inputs,
            max_new_tokens=NEW,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            early_stopping=False,
            do_sample=False,
        ).numpy()
    ids = ids[:, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :]
    return np.pad(ids, ((0, 0), (0, NEW - ids.shape[1])), constant_values=OPT_PAD)


@pytest.mark.parametrize("num_beams, length_penalty", PENALIZED)
def test_repetition_penalty_behind_embeddings(num_beams, length_penalty):
    config = penalized(num_beams, length_penalty)
    reference = random_opt(24)
    params = opt_params(reference)
    prefix = np.random.default_rng(24).normal(size=(4, 5, 16)).astype(np.float32)
    # With padding, transformers leaves as many of the first NEW tokens of a row unpenalized as
    # there are padded embeddings: it takes these tokens for the prompt.
    full, padded = np.ones((4, 5), bool), np.arange(5) >= np.array([[0], [2], [4], [1]])
    run = jax.jit(generate, static_argnames=("language_model", "config"))
    ids = run(OPT, params, prefix, full, config)
    expected = transformers_generate(reference, config, inputs_embeds=torch.tensor(prefix))
    np.testing.assert_array_equal(ids, expected)
    for valid in full, padded:
        ids = run(OPT, params, prefix, valid, config)
        np.testing.assert_array_equal(ids, slow_generate(OPT, params, prefix, valid, config))
    free = slow_generate(OPT, params, prefix, valid, penalized(num_beams, length_penalty, 1.0))
    assert (np.asarray(ids) != free).any()


@pytest.mark.parametrize("num_beams, length_penalty", PENALIZED)
def test_repetition_penalty_counts_the_prompt(num_beams, length_penalty):
    config = penalized(num_beams, length_penalty)
    reference = random_opt(10)
    params = opt_params(reference)
    prompt = np.array([[3, 7, 7, 12], [5, 9, 4, 6], [8, 11, 10, 3]])
    valid = np.arange(4) >= np.array([[0], [1], [2]])
    decoder = CausalDecoder(OPT, params)

    @jax.jit
    def run(prompt_ids):
        embeddings = OPT.apply({"params": params}, prompt, method="embed")
        logits, state = decoder.prefill(embeddings, valid, NEW, num_beams)
        return run_search(decoder, logits, state, config, prompt_ids=prompt_ids)[0]

    ids = run(np.where(valid, prompt, -1))
    inputs = dict(input_ids=torch.tensor(prompt), attention_mask=torch.tensor(valid).long())
    np.testing.assert_array_equal(ids, transformers_generate(reference, config, **inputs))
    assert (np.asarray(ids) != run(np.full_like(prompt, -1))).any()


# Sampling.

SAMPLING = [
    {},
    dict(temperature=0.5),
    dict(temperature=1.7),
    dict(top_k=3),
    dict(top_p=0.7),
    dict(temperature=1.5, top_k=5, top_p=0.8),
    dict(top_p=0.01),
    dict(top_k=100),
]


def sampling_config(**fields):
    fields = dict(max_new_tokens=1, stop_token_id=-1, pad_token_id=PAD, sample=True) | fields
    return DecodingConfig(**fields)


def transformers_probabilities(logits, config):
    """Of the processors, in the order of transformers' `generate`."""
    scores = torch.tensor(logits)
    processors = [transformers.TemperatureLogitsWarper(config.temperature)]
    if config.top_k:
        processors.append(transformers.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(config.top_p))
    for processor in processors:
        scores = processor(None, scores)
    return scores.softmax(dim=-1).numpy()


@pytest.mark.parametrize("fields", SAMPLING)
def test_sampling_probabilities_are_those_of_transformers(fields):
    config = sampling_config(**fields)
    logits = np.random.default_rng(0).normal(size=(200, 11), scale=2.0).astype(np.float32)
    probabilities = jax.nn.softmax(sampling_logits(jnp.asarray(logits), config))
    np.testing.assert_allclose(probabilities, transformers_probabilities(logits, config), atol=1e-6)


@pytest.mark.parametrize("fields", SAMPLING)
def test_draws_follow_the_probabilities_of_transformers(fields):
    # Two tokens, the second by what the first was: 49 cells.
    config = sampling_config(**fields, max_new_tokens=2)
    logits = np.random.default_rng(1).normal(size=(7, 7)).astype(np.float32)
    table, draws = Chain(logits), 20_000
    first = jnp.broadcast_to(jnp.asarray(logits)[3], (draws, 7))
    ids = np.asarray(sample_search(table, first, (), config, jax.random.key(0))[0])
    probabilities = transformers_probabilities(logits, config)
    expected = draws * (probabilities[3][:, None] * probabilities).ravel()
    observed = np.bincount(ids[:, 0] * 7 + ids[:, 1], minlength=49)
    assert observed.sum() == draws
    assert not observed[expected == 0].any()
    possible = expected > 0
    if possible.sum() > 1:
        # Cells that are too rare for the statistic's distribution count as one.
        rare = possible & (expected < 5)
        often = possible & ~rare
        cells = [
            (np.append(x[often], x[rare].sum()) if rare.any() else x[often])
            for x in (observed, expected)
        ]
        assert scipy.stats.chisquare(cells[0], cells[1], sum_check=False).pvalue > 1e-3


def test_rows_and_steps_draw_independently():
    config = sampling_config(max_new_tokens=6)
    table = Chain(np.zeros((7, 7), np.float32))
    ids = np.asarray(sample_search(table, jnp.zeros((3000, 7)), (), config, jax.random.key(0))[0])
    correlation = np.corrcoef(ids.T)
    assert np.abs(correlation[np.triu_indices(6, 1)]).max() < 0.08
    assert len({tuple(row) for row in ids}) > 2900


def test_sampling_obeys_stop_token_minimal_length_and_penalty():
    table = Chain(np.zeros((7, 7), np.float32) + 3.0)
    fields = dict(max_new_tokens=6, min_new_tokens=3, stop_token_id=STOP)
    first = jnp.full((500, 7), 3.0)
    ids, _ = sample_search(table, first, (), sampling_config(**fields), jax.random.key(0))
    ids = np.asarray(ids)
    assert not (ids[:, :3] == STOP).any()
    for row in ids.tolist():
        length = row.index(STOP) + 1 if STOP in row else 6
        assert row[length:] == [PAD] * (6 - length)
    # Scores of 300 against 3: nothing is said twice.
    table.log_probs *= 100
    config = sampling_config(**fields, repetition_penalty=100.0)
    ids = np.asarray(sample_search(table, first * 100, (), config, jax.random.key(0))[0])
    for row in ids.tolist():
        said = row[: row.index(STOP)] if STOP in row else row
        assert len(set(said)) == len(said)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_beams=2), "num_beams=2"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(repetition_penalty=-1.0), "repetition_penalty=-1.0"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
    ],
)
def test_impossible_sampling_configs(fields, message):
    with pytest.raises(UserError, match=message):
        sampling_config(**fields)


def test_sampling_needs_a_key():
    table = Chain(np.zeros((7, 7), np.float32))
    with pytest.raises(UserError, match="needs a random key"):
        run_search(table, jnp.zeros((2, 7)), (), sampling_config())


def test_config_is_hashable():
    assert hash(sampling_config(top_p=0.5)) == hash(sampling_config(top_p=0.5))
    assert sampling_config(top_p=0.5) != sampling_config(top_p=0.6)
