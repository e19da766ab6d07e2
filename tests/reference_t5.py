"""Small random T5 models of transformers, and their weights as jaxblip parameter trees."""

from __future__ import annotations

import torch
import transformers

from reference import Weights, randomized, stacked

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


def t5_params(model: transformers.T5ForConditionalGeneration) -> dict:
    """Parameters of `T5LanguageModel`."""
    w, heads = Weights(model), model.config.num_heads

    def norm(name):
        return {"scale": w[f"{name}.weight"]}

    def attention(at):
        params = w.attention(at, heads, "q", "k", "v")
        return params | {"out": w.from_heads(f"{at}.o", heads)}

    def feed_forward(at):
        names = {"gate": "wi_0", "up": "wi_1"} if model.config.is_gated_act else {"up": "wi"}
        return {ours: w.linear(f"{at}.{name}") for ours, name in (names | {"down": "wo"}).items()}

    def layer(at, is_decoder):
        params = {
            "attention_norm": norm(f"{at}.0.layer_norm"),
            "attention": attention(f"{at}.0.SelfAttention"),
            "mlp_norm": norm(f"{at}.{1 + is_decoder}.layer_norm"),
            "mlp": feed_forward(f"{at}.{1 + is_decoder}.DenseReluDense"),
        }
        if is_decoder:
            cross = attention(f"{at}.1.EncDecAttention")
            params["cross_attention_norm"] = norm(f"{at}.1.layer_norm")
            params["cross_attention"] = {name: cross[name] for name in ("query", "out")}
            return params, {name: cross[name] for name in ("key", "value")}
        return params, None

    def stack(name):
        count = len(getattr(model, name).block)
        layers, encoder_key_values = zip(
            *(layer(f"{name}.block.{i}.layer", name == "decoder") for i in range(count))
        )
        first = f"{name}.block.0.layer.0.SelfAttention"
        params = {
            "relative_position_bias": w[f"{first}.relative_attention_bias.weight"],
            "layers": stacked(layers),
            "final_norm": norm(f"{name}.final_layer_norm"),
        }
        return params, encoder_key_values

    (encoder, _), (decoder, encoder_key_values) = stack("encoder"), stack("decoder")
    params = {
        "token_embedding": w.embedding("shared"),
        "encoder": encoder,
        "decoder": decoder,
        "encoder_key_values": stacked(encoder_key_values),
    }
    if not model.config.scale_decoder_outputs:
        params["lm_head"] = w.linear("lm_head")
    return params
