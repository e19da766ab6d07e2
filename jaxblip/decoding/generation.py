"""Generation by any language model, from embeddings or from images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxblip.decoding.causal import CausalDecoder
from jaxblip.decoding.encoder_decoder import EncoderDecoder
from jaxblip.decoding.search import DecodingConfig, run_search
from jaxblip.models.blip2 import Blip2Stage2
from jaxblip.models.language_models import make_language_model
from jaxblip.tasks.stage2 import Stage2Task


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


def generate_text(
    model: Blip2Stage2,
    params: Any,
    images: Float[Array, "batch height width 3"],
    prompt_ids: Int[Array, "#batch prompt"] | Int[Array, " prompt"],
    config: DecodingConfig,
    rng: jax.Array | None = None,
    *,
    prompt_valid: Bool[Array, "#batch prompt"] | Bool[Array, " prompt"] | None = None,
    instruction_ids: Int[Array, "batch instruction"] | None = None,
    instruction_valid: Bool[Array, "batch instruction"] | None = None,
    penalize_prompt: bool = True,
) -> Int[Array, "batch new"]:
    """What BLIP-2 or InstructBLIP says to images and prompts.

    Pure, and compiled once for each shape of the input:
    `jax.jit(generate_text, static_argnames=("model", "config", "penalize_prompt"))`.

    Args:
      params: of the whole model.
      images: normalised.
      prompt_ids: of the language model's vocabulary, for each image or one for all images.
      prompt_valid: False at padding, of the shape of `prompt_ids`; by default there is none.
        Padding may stand anywhere before a decoder-only model (tokenizers put it on the left); an
        encoder wants it on the right.
      instruction_ids: what the Q-Former of InstructBLIP reads, in its own vocabulary; as a rule the
        text of the prompt, once more.
      instruction_valid: False at padding, which stands on the right; by default there is none.
      penalize_prompt: `config.repetition_penalty` counts the prompt of a decoder-only model as
        said, as in transformers (which counts its placeholder of visual tokens, too). LAVIS counts
        new tokens only.
      config, rng: as in `generate`, whose result and errors these are, too.
    """
    prompt_ids = jnp.asarray(prompt_ids, jnp.int32)
    prompt, instruction = (prompt_ids, prompt_valid), (instruction_ids, instruction_valid)
    prefix = model.apply({"params": params}, images, *prompt, *instruction, method="prefix")
    language_model = make_language_model(model.language_model_config, model.dtype)
    return _generate(language_model, params, prefix, prompt_ids, config, rng, penalize_prompt)


def generate_from_images(
    task: Stage2Task,
    params: Any,
    images: UInt8[Array, "batch height width 3"],
    prompt_ids: Int[Array, "#batch prompt"] | Int[Array, " prompt"] | list[int],
    config: DecodingConfig,
    rng: jax.Array | None = None,
    *,
    prompt_valid: Bool[Array, "#batch prompt"] | None = None,
    instruction_ids: Int[Array, "batch instruction"] | None = None,
    instruction_valid: Bool[Array, "batch instruction"] | None = None,
    penalize_prompt: bool = True,
) -> Int[Array, "batch new"]:
    """What the model of a stage-2 task says to images and prompts.

    Args:
      images: as they are in batches; the task normalises them.
      prompt_ids: for each image, or one for all images (`data.inputs.prompt_ids`).

    Other arguments, result and errors are those of `generate_text`.
    """
    prompt_ids = jnp.asarray(prompt_ids, jnp.int32)
    prompt, instruction = (prompt_ids, prompt_valid), (instruction_ids, instruction_valid)
    prefix = task.prefix(params, images, *prompt, *instruction)
    return _generate(task.language_model, params, prefix, prompt_ids, config, rng, penalize_prompt)


def _generate(language_model, params, prefix, prompt_ids, config, rng, penalize_prompt):
    embeddings, valid = prefix
    said_ids = None
    if penalize_prompt and not language_model.config.is_encoder_decoder:
        num_queries = valid.shape[1] - prompt_ids.shape[-1]
        said_ids = jnp.where(valid[:, num_queries:], prompt_ids, -1)
    own_params = params["language_model"]
    return generate(language_model, own_params, embeddings, valid, config, rng, said_ids)
