"""Generation by any language model, from embeddings: the whole, and its two halves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxblip.decoding.causal import CausalDecoder
from jaxblip.decoding.encoder_decoder import EncoderDecoder
from jaxblip.decoding.search import Decoder, DecodingConfig, run_search
from jaxblip.sharding import rows_stay_split

# Layers up to this size are held twice, for faster steps: up to those of OPT-2.7B in bfloat16.
TAKEN_APART_BYTES = 6 * 2**30


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
    `jax.jit(generate, static_argnames=("language_model", "config"))`. Compiled apart, `prefill` and
    `decode` do the same, without a second copy of the cache.

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
    room = config.max_new_tokens, config.num_beams
    logits, state = prefill(language_model, params, embeddings, valid, *room)
    ids, _ = decode(language_model, params, logits, state, config, rng, said_ids)
    return ids


def prefill(
    language_model: nn.Module,
    params: Any,
    embeddings: Float[Array, "batch input width"],
    valid: Bool[Array, "batch input"],
    max_new_tokens: int,
    num_beams: int = 1,
) -> tuple[Float[Array, "batch vocab"], Any]:
    """Reads the input, once for all beams of a row; arguments and errors as of `generate`.

    Returns:
      The scores of the first new token, and the state from which `decode` goes on.
    """
    decoder = make_decoder(language_model, params)
    return decoder.prefill(embeddings, valid, max_new_tokens, num_beams)


def decode(
    language_model: nn.Module,
    params: Any,
    logits: Float[Array, "batch vocab"],
    state: Any,
    config: DecodingConfig,
    rng: jax.Array | None = None,
    said_ids: Int[Array, "batch said"] | None = None,
) -> tuple[Int[Array, "batch new"], Any]:
    """All new tokens; arguments, ids and errors as of `generate`.

    Compiled with `donate_argnames="state"`, it writes into the cache that it is given.

    Args:
      logits, state: of `prefill`, with the `max_new_tokens` and `num_beams` of `config`.

    Returns:
      The ids, and the last state, for which nobody has a use but the donated one.
    """
    decoder = make_decoder(language_model, params)
    said_ids = all_said(decoder, said_ids, len(logits))
    return run_search(decoder, logits, state, config, rng=rng, prompt_ids=said_ids)


def make_decoder(language_model: nn.Module, params: Any, *, many_steps: bool = True) -> Decoder:
    """A language model as the searches want it.

    Args:
      many_steps: work that is done once, before the first of them, may cost some time.
    """
    if language_model.config.is_encoder_decoder:
        return EncoderDecoder(language_model, params)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params["layers"]))
    by_layer = many_steps and size <= TAKEN_APART_BYTES
    return CausalDecoder(language_model, params, by_layer=by_layer)


def all_said(
    decoder: Decoder, said_ids: Int[Array, "batch said"] | None, batch: int
) -> Int[Array, "batch all_said"] | None:
    """What a repetition penalty counts; in transformers, too, a start token counts as said."""
    said = [ids for ids in (decoder.start_ids(batch), said_ids) if ids is not None]
    return jnp.concatenate(said, axis=1) if said else None


def jit_on_mesh(function: Callable[..., Any], mesh: Mesh, **options: Any) -> Callable[..., Any]:
    """`jax.jit` of what is computed for rows that are split as in training, see `training.step`.

    Kernels that the compiler cannot split split themselves, and the parameters of `fsdp` are
    gathered, not the rows.
    """

    @functools.wraps(function)
    def on_mesh(*args: Any, **kwargs: Any) -> Any:
        with rows_stay_split(mesh), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return jax.jit(on_mesh, **options)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What the compiler is told about inference.

    XLA computes in float32 on a CPU. It would cast the bfloat16 weights of all layers before the
    loops over tokens and layers, and keep both: three times the memory, and no less time.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return None
