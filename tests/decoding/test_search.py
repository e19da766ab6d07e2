"""The searches over a model that is no network: a table of next-token probabilities."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblip.decoding import DecodingConfig, beam_search, greedy_search

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
    return run(model, logits, (), config).tolist()


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
