"""The language models that can stand behind a Q-Former, and what they all do with text.

There are two kinds. A decoder-only model (OPT, the LLaMA family) continues its input: it has
`embed`, `__call__` over embeddings with positions, mask and cache, and `logits`. An encoder-decoder
model (T5) answers it: it has `embed`, `encode`, `read_encoder`, `decode`, `__call__` for known
targets, and `logits`. `config.is_encoder_decoder` tells them apart.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.errors import UserError
from jaxblip.models.attention import causal_mask, sequence_mask
from jaxblip.models.llama import LlamaConfig, LlamaLanguageModel
from jaxblip.models.opt import OptConfig, OptLanguageModel, token_positions
from jaxblip.models.t5 import T5Config, T5LanguageModel, shift_right

LanguageModelConfig = OptConfig | LlamaConfig | T5Config

# Config and module of each architecture, by the name that experiment configs have for it.
LANGUAGE_MODELS: dict[str, tuple[type, type[nn.Module]]] = {
    "opt": (OptConfig, OptLanguageModel),
    "llama": (LlamaConfig, LlamaLanguageModel),
    "t5": (T5Config, T5LanguageModel),
}


def config_class(architecture: str) -> type:
    """The config of an architecture; UserError where there is none of that name."""
    if architecture not in LANGUAGE_MODELS:
        raise UserError(
            f"There is no language model {architecture!r}: choose one of "
            f"{', '.join(LANGUAGE_MODELS)}."
        )
    return LANGUAGE_MODELS[architecture][0]


def make_language_model(
    config: LanguageModelConfig, dtype: jnp.dtype = jnp.float32
) -> nn.Module:
    """The language model that `config` describes."""
    modules = dict(LANGUAGE_MODELS.values())
    return modules[type(config)](config, dtype)


def continued_hidden(
    language_model: nn.Module,
    embeddings: Float[Array, "batch length width"],
    valid: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None = None,
) -> Float[Array, "batch length width"]:
    """Hidden states of a decoder-only model over whole sequences; padding may stand anywhere.

    Args:
      segment_ids: of packed rows: which of its texts a token belongs to. Each text lies in one
        piece, and is read as if it were alone.
    """
    positions, mask = token_positions(valid, segment_ids), sequence_mask(valid, segment_ids)
    hidden, _ = language_model(embeddings, positions, mask)
    return hidden


def answer_hidden(
    language_model: nn.Module,
    embeddings: Float[Array, "batch input width"],
    valid: Bool[Array, "batch input"],
    text_ids: Int[Array, "batch text"],
) -> Float[Array, "batch text width"]:
    """Decoder states of an encoder-decoder model for a known answer: position t says token t.

    Args:
      embeddings: what the encoder reads.
      text_ids: padded on the right, where states have no meaning.
    """
    decoder_ids = shift_right(text_ids, language_model.config.start_token_id)
    # Padding stands behind the text, where no token looks.
    mask = causal_mask(jnp.ones(decoder_ids.shape, bool))
    return language_model(embeddings, valid, language_model.embed(decoder_ids), mask)
