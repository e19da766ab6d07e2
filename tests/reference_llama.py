"""Small random transformers models of the LLaMA family, and their weights for jaxblip."""

from __future__ import annotations

import transformers
from reference import Weights, randomized, stacked
from transformers import PreTrainedModel

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


def llama_params(model: PreTrainedModel) -> dict:
    """Parameters of `LlamaLanguageModel`."""
    w, config = Weights(model), model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def norm(name):
        return {"scale": w[f"{name}.weight"]}

    def layer(i):
        at = f"model.layers.{i}"
        attention = {
            "query": w.to_heads(f"{at}.self_attn.q_proj", heads),
            "key": w.to_heads(f"{at}.self_attn.k_proj", kv_heads),
            "value": w.to_heads(f"{at}.self_attn.v_proj", kv_heads),
            "out": w.from_heads(f"{at}.self_attn.o_proj", heads),
        }
        if config.model_type == "qwen3":
            attention["query_norm"] = norm(f"{at}.self_attn.q_norm")
            attention["key_norm"] = norm(f"{at}.self_attn.k_norm")
        return {
            "attention_norm": norm(f"{at}.input_layernorm"),
            "attention": attention,
            "mlp_norm": norm(f"{at}.post_attention_layernorm"),
            "mlp": {name: w.linear(f"{at}.mlp.{name}_proj") for name in ("gate", "up", "down")},
        }

    params = {
        "token_embedding": w.embedding("model.embed_tokens"),
        "layers": stacked([layer(i) for i in range(config.num_hidden_layers)]),
        "final_norm": norm("model.norm"),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = w.linear("lm_head")
    return params
