"""Generation by any language model, from embeddings."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.decoding.causal import CausalDecoder
from jaxblip.decoding.encoder_decoder import EncoderDecoder
from jaxblip.decoding.search import DecodingConfig, run_search


def generate(
    language_model: nn.Module,
    params: Any,
    embeddings: Float[Array, "batch input width"],
    valid: Bool[Array, "batch input"],
    config: DecodingConfig,
    rng: jax.Array | None = None,
    said_ids: Int[Array, "batch said"] | None = None,
) -> Int[Array, "batch new"]:
    """What a language model says to each row's embeddings, by the search that `config` asks for.

    A decoder-only model continues them; an encoder-decoder model reads them with its encoder. Pure,
    and compiled once for each shape of the input:
    `jax.jit(generate, static_argnames=("language_model", "config"))`.

    Args:
      language_model: unbound, of `models.language_models`, or a module with the methods and config
        fields of one of them.
      params: its parameters, without the collection's name.
      embeddings: soft tokens, word embeddings (`embed`), or both.
      valid: False at padding; at least one True a row. Padding may stand at either end; before a
        decoder-only model anywhere.
      rng: the key of all draws, where `config.sample`.
      said_ids: tokens that `config.repetition_penalty` counts besides the new ones and a start
        token; negative ones do not count.

    Returns:
      int32 ids `[batch, config.max_new_tokens]`: the new tokens of a row (nothing of the input, nor
      a start token) with its stop token, if it came to one, then padding.

    Raises:
      UserError: when input and new tokens exceed the `max_positions` of a decoder-only model, and
        when sampling is asked for without a random key.
    """
    kind = EncoderDecoder if language_model.config.is_encoder_decoder else CausalDecoder
    decoder = kind(language_model, params)
    logits, state = decoder.prefill(
        embeddings, valid, config.max_new_tokens, copies=config.num_beams
    )
    # In transformers, too, a start token counts as said when repetitions are penalized.
    said = [ids for ids in (decoder.start_ids(len(valid)), said_ids) if ids is not None]
    said_ids = jnp.concatenate(said, axis=1) if said else None
    return run_search(decoder, logits, state, config, rng=rng, prompt_ids=said_ids)
