"""Generation with a decoder-only language model that continues a prefix of embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.decoding.beam_cache import BeamCache
from jaxblip.errors import UserError
from jaxblip.models.attention import causal_mask
from jaxblip.models.decoder import token_logits
from jaxblip.models.layers import empty_cache
from jaxblip.models.opt import token_positions


class CausalDecoder:
    """A decoder-only language model with its parameters, as the searches want it (`Decoder`)."""

    def __init__(self, language_model: nn.Module, params: Any, *, by_layer: bool = False):
        """
        Args:
          by_layer: take the stacked layers apart, once for all steps. A loop over stacked layers
            copies the weights and the cache of each layer out of the stack, at every step: two
            thirds of what a step on few rows moves. Takes the layers' memory once more.
        """
        self._model, self._params, self._layers = language_model, params, None
        self._head = self._apply(method="head")
        if by_layer:
            self._layers = _taken_apart(params["layers"], language_model.config.num_layers)
        # On a CPU, XLA multiplies a single row in float32, to which it casts all weights each time.
        on_cpu = jax.default_backend() == "cpu"
        self._least_rows = 2 if on_cpu and language_model.dtype == jnp.bfloat16 else 1

    def start_ids(self, batch: int) -> None:
        """There are none: what comes before the first new token is embeddings."""

    def prefill(
        self,
        embeddings: Float[Array, "batch prefix width"],
        valid: Bool[Array, "batch prefix"],
        max_new_tokens: int,
        num_beams: int = 1,
    ) -> tuple[Float[Array, "batch vocab"], BeamCache]:
        """Reads the prefix once a row; its beams share what is remembered of it.

        Args:
          embeddings: soft tokens, word embeddings (`embed`), or both.
          valid: False at padding, which may stand anywhere; at least one True a row.

        Returns:
          The scores of the first new token, and the state of `batch * num_beams` rows.

        Raises:
          UserError: when prefix and new tokens exceed the model's `max_positions`.
        """
        batch, prefix = valid.shape
        length, limit = prefix + max_new_tokens, self._model.config.max_positions
        if length > limit:
            raise UserError(
                f"decoding max_new_tokens={max_new_tokens} after a prefix of {prefix} tokens needs "
                f"{length} positions, but the language model has {limit}: lower max_new_tokens."
            )
        if batch == 1:  # a beam that nobody asks for does no harm
            num_beams = max(num_beams, self._least_rows)
        room = num_beams * max_new_tokens
        cache = empty_cache(self._model.config, batch, prefix + room, self._model.dtype)
        mask = jnp.pad(causal_mask(valid), ((0, 0), (0, 0), (0, 0), (0, room)))
        hidden, cache = self._apply(embeddings, token_positions(valid), mask, cache, 0)
        last_valid = prefix - 1 - jnp.argmax(valid[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(hidden, last_valid[:, None, None], axis=1)[:, 0]
        if self._layers:
            cache = _taken_apart(cache, len(self._layers))
        state = BeamCache.with_room(cache, valid, num_beams, max_new_tokens)
        return self._logits(hidden), state

    def step(
        self, ids: Int[Array, " rows"], index: Int[Array, ""], state: BeamCache
    ) -> tuple[Float[Array, "rows vocab"], BeamCache]:
        """Reads new token number `index` (from 0) of each row; scores the one after it."""
        state, positions = state.with_token(index), state.positions(index)
        copies = positions.size // ids.size
        embeddings = self._apply(jnp.repeat(ids, copies).reshape(positions.shape), method="embed")
        inputs = embeddings, positions, state.mask(index), state.cache, state.place(index)
        hidden, cache = self._read_by_layer(*inputs) if self._layers else self._apply(*inputs)
        hidden = hidden.reshape(positions.size, -1)[::copies]
        return self._logits(hidden), state.replace(cache=cache)

    def reorder(self, state: BeamCache, parents: Int[Array, "batch beams"]) -> BeamCache:
        """The state in which beam j of each row continues that row's former beam `parents[j]`."""
        return state.reordered(parents)

    def _apply(self, *inputs, method=None):
        return self._model.apply({"params": self._params}, *inputs, method=method)

    def _logits(self, hidden):
        if (rows := len(hidden)) < self._least_rows:
            hidden = jnp.repeat(hidden, self._least_rows, axis=0)
        if self._head is None:
            return self._apply(hidden, method="logits")[:rows]
        # Transposed once for all steps, not at each.
        return token_logits(hidden, self._head)[:rows]

    def _read_by_layer(self, embeddings, positions, mask, caches, place):
        """What the whole model does, by a model of one layer, with the parameters of each."""
        model = self._model
        one = model.clone(config=dataclasses.replace(model.config, num_layers=1))

        def layer(model, *inputs):
            return model.layers(*inputs)

        def final_norm(model, x):
            return model.final_norm(x)

        inputs = embeddings.astype(model.dtype), positions, mask
        x, *shared = self._apply(*inputs, method="layer_inputs")
        written = []
        for params, cache in zip(self._layers, caches, strict=True):
            variables = {"params": {"layers": _stack_of_one(params)}}
            inputs = *shared, _stack_of_one(cache), place
            x, cache = one.apply(variables, x, *inputs, method=layer)
            written.append(*_taken_apart(cache, 1))
        return self._apply(x, method=final_norm), tuple(written)


def _taken_apart(stacked: Any, num_layers: int) -> tuple[Any, ...]:
    """Each layer of a tree of stacks."""
    return tuple(jax.tree.map(lambda x: x[i], stacked) for i in range(num_layers))


def _stack_of_one(layer: Any) -> Any:
    return jax.tree.map(lambda x: x[None], layer)
