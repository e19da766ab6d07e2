"""Small random transformers models of the LLaMA family, and their weights for jaxblip."""

from __future__ import annotations

import jax.numpy as jnp
import transformers
from reference import randomized
from reference_weights import params_of
from tiny_checkpoints import shapes_of
from transformers import PreTrainedModel

from jaxblip.interop.families.llama import llama_config, llama_layout
from jaxblip.models.attention import causal_mask
from jaxblip.models.llama import LlamaConfig, LlamaLanguageModel
from jaxblip.models.opt import token_positions

# Of the four frequencies of a head that is 8 wide, one is kept, one changed, and two are divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
VARIANTS = {
    "llama": ("Llama", dict(num_key_value_heads=1)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=10)),
    "mistral with a window": ("Mistral", dict(sliding_window=3)),
    "qwen2": ("Qwen2", dict()),
    "qwen3": ("Qwen3", dict(head_dim=6)),
}


def random_llama(variant: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny model of `VARIANTS` with vocabulary 13, pad 1 and stop token 2, 4 heads on 2."""
    family, fields = VARIANTS[variant]
    sizes = dict(
        vocab_size=13,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    config = getattr(transformers, f"{family}Config")(**(sizes | fields | overrides))
    return randomized(getattr(transformers, f"{family}ForCausalLM")(config), seed)


def llama_shapes(config: LlamaConfig) -> dict:
    """Abstract parameters of `LlamaLanguageModel`, those that embed and make logits included."""

    def everything(model, ids):
        valid = jnp.ones(ids.shape, bool)
        hidden, _ = model(model.embed(ids), token_positions(valid), causal_mask(valid))
        return model.logits(hidden)

    return shapes_of(LlamaLanguageModel(config), jnp.zeros((1, 2), int), method=everything)


def llama_params(model: PreTrainedModel) -> dict:
    """Parameters of `LlamaLanguageModel`."""
    config = llama_config(model.config.to_dict())
    return params_of(model, llama_layout(config), llama_shapes(config))
