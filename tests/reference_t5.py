"""Small random T5 models of transformers, and their weights as jaxblip parameter trees."""

from __future__ import annotations

import jax.numpy as jnp
import torch
import transformers

from jaxblip.interop.families.t5 import t5_config, t5_layout
from jaxblip.models.attention import causal_mask
from jaxblip.models.t5 import T5Config, T5LanguageModel
from reference import randomized
from reference_weights import params_of
from tiny_checkpoints import shapes_of

# FlanT5, FlanT5 as BLIP-2 runs it, and the first T5.
VARIANTS = {
    "flan_t5": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "blip2": dict(feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False),
    "t5": dict(feed_forward_proj="relu"),
}


def random_t5(
    variant: str = "flan_t5", seed: int = 0, **overrides
) -> transformers.T5ForConditionalGeneration:
    """A tiny T5 with vocabulary 13, pad and start token 0, and stop token 1.

    Its heads are not as wide together as the model, and its stacks not as deep as each other. So
    short are its distances that 6 tokens reach every kind of bucket.
    """
    sizes = dict(
        vocab_size=13,
        d_model=16,
        d_kv=6,
        d_ff=24,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=5,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    config = transformers.T5Config(**(sizes | VARIANTS[variant] | overrides))
    return randomized(with_own_head(transformers.T5ForConditionalGeneration(config)), seed)


def with_own_head(
    model: transformers.T5ForConditionalGeneration,
) -> transformers.T5ForConditionalGeneration:
    """`model` with a head of its own where its checkpoints have one.

    transformers 5 ties the head of every new T5; of v1.1 and FlanT5 it is untied as they load.
    """
    if not model.config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def t5_shapes(config: T5Config) -> dict:
    """Abstract parameters of `T5LanguageModel`."""
    valid, embeddings = jnp.ones((1, 2), bool), jnp.zeros((1, 2, config.width))
    inputs = embeddings, valid, embeddings, causal_mask(valid)
    return shapes_of(T5LanguageModel(config), *inputs)


def t5_params(model: transformers.T5ForConditionalGeneration) -> dict:
    """Parameters of `T5LanguageModel`."""
    config = t5_config(model.config.to_dict())
    return params_of(model, t5_layout(config), t5_shapes(config))
