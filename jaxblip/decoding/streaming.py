"""Generation token by token: one compiled step, the loop in Python, and the text as it grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.decoding.generation import all_said, make_decoder
from jaxblip.decoding.search import DecodingConfig, process_scores, sampling_logits
from jaxblip.errors import UserError

_UNSETTLED_END = re.compile("[\\s\ufffd]+$")  # U+FFFD stands for a character whose bytes lack some
_LAST_WORD = re.compile(r"\s*\S+$")


@flax.struct.dataclass
class Stream:
    """A generation in progress.

    Attributes:
      ids: the new tokens so far, and padding behind them.
      index: number of new tokens.
      state: the decoder's, which has read all of them but the last.
      said_ids: what `config.repetition_penalty` counts besides the new tokens.
    """

    ids: Int[Array, "batch new"]
    index: Int[Array, ""]
    state: Any
    said_ids: Int[Array, "batch said"] | None

    def last_ids(self) -> Int[Array, " batch"]:
        """The newest token of each row."""
        return jnp.take(self.ids, self.index - 1, axis=1)


def begin_stream(
    language_model: nn.Module,
    params: Any,
    embeddings: Float[Array, "batch input width"],
    valid: Bool[Array, "batch input"],
    config: DecodingConfig,
    rng: jax.Array | None = None,
    said_ids: Int[Array, "batch said"] | None = None,
) -> Stream:
    """The first token; `advance_stream` gives the next ones. Together they are `generate`.

    Compile both once, with `language_model` and `config` static. A row that has stopped is not
    padded: what follows its stop token has no meaning.

    Args:
      language_model, params, embeddings, valid, config, rng, said_ids: as in `generate`.

    Raises:
      UserError: for beam search, which has no last word before its end.
    """
    if config.num_beams > 1:
        raise UserError(
            f"decoding num_beams={config.num_beams} cannot be streamed, since a beam search knows "
            "its first token only at its end: set num_beams to 1."
        )
    decoder = make_decoder(language_model, params, many_steps=False)
    logits, state = decoder.prefill(embeddings, valid, config.max_new_tokens)
    ids = jnp.full((valid.shape[0], config.max_new_tokens), config.pad_token_id, jnp.int32)
    said_ids = all_said(decoder, said_ids, len(valid))
    return _append(logits, Stream(ids, jnp.int32(0), state, said_ids), config, rng)


def advance_stream(
    language_model: nn.Module,
    params: Any,
    stream: Stream,
    config: DecodingConfig,
    rng: jax.Array | None = None,
) -> Stream:
    """One token more; at most `config.max_new_tokens - 1` times."""
    decoder = make_decoder(language_model, params, many_steps=False)
    logits, state = decoder.step(stream.last_ids(), stream.index - 1, stream.state)
    return _append(logits, stream.replace(state=state), config, rng)


def _append(logits, stream: Stream, config: DecodingConfig, rng) -> Stream:
    """The stream with the token that `greedy_search`, or `sample_search`, takes here."""
    scores = process_scores(logits, stream.ids, stream.index, config, stream.said_ids)
    if config.sample:
        key = jax.random.fold_in(rng, stream.index)
        token = jax.random.categorical(key, sampling_logits(scores, config))
    else:
        token = jnp.argmax(scores, axis=-1)
    ids = stream.ids.at[:, stream.index].set(token.astype(jnp.int32))
    return stream.replace(ids=ids, index=stream.index + 1)


def text_pieces(
    tokens: Iterable[int], decode: Callable[[list[int]], str], *, by_word: bool = False
) -> Iterator[str]:
    """Text as its tokens come; the pieces joined are `decode(all tokens).strip()`.

    A piece is held back as long as later tokens may change it: white space at the end, which may be
    all that comes, and bytes that are not yet a character.

    Args:
      decode: all tokens so far to text.
      by_word: for a `decode` that may still remove a space before the last word, as the clean-up
        of some tokenizers does: each word is held back until the next one begins.
    """
    ids, given = [], 0
    for token in tokens:
        ids.append(token)
        settled = _UNSETTLED_END.sub("", decode(ids).lstrip())
        if by_word:
            settled = _LAST_WORD.sub("", settled)
        if len(settled) > given:
            yield settled[given:]
            given = len(settled)
    if rest := decode(ids).strip()[given:]:
        yield rest
