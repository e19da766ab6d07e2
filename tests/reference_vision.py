"""Weights of the image encoders and towers of transformers as jaxblip parameter trees.

Beside those of `reference`: BLIP and SigLIP.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import transformers

from reference import Weights, clip_layers_params, stacked


def gradients(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` with the gradients of the parameters in their place.

    What turns weights into a parameter tree turns it into the tree of the gradients.
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.copy_(torch.zeros_like(ours) if theirs.grad is None else theirs.grad)
    return twin


def _thirds(joint: np.ndarray, heads: int) -> dict[str, np.ndarray]:
    """The joint `[3 * width]` or `[width, 3 * width]` projection by name, split into heads."""
    parts = np.split(joint, 3, axis=-1)
    names = ("query", "key", "value")
    return {n: p.reshape(*p.shape[:-1], heads, -1) for n, p in zip(names, parts, strict=True)}


def joint_attention(kernel: np.ndarray, bias: np.ndarray, heads: int) -> dict:
    """Projections to heads from one kernel `[width, 3 * width]` and its bias."""
    kernels, biases = _thirds(kernel, heads), _thirds(bias, heads)
    return {name: {"kernel": kernels[name], "bias": biases[name]} for name in kernels}


def blip_vit_params(model: transformers.BlipVisionModel) -> dict:
    """Parameters of `VisionTransformer` (without the norm behind it) in the BLIP variant."""
    w, heads = Weights(model), model.config.num_attention_heads

    def layer(i):
        at = f"encoder.layers.{i}"
        qkv = f"{at}.self_attn.qkv"
        attention = joint_attention(w[f"{qkv}.weight"].T, w[f"{qkv}.bias"], heads)
        out = w.from_heads(f"{at}.self_attn.projection", heads)
        return {
            "attention_norm": w.norm(f"{at}.layer_norm1"),
            "attention": attention | {"out": out},
            "mlp_norm": w.norm(f"{at}.layer_norm2"),
            "mlp": w.mlp(f"{at}.mlp.fc1", f"{at}.mlp.fc2"),
        }

    return {
        "patch_embedding": w.patches("embeddings.patch_embedding"),
        "cls_token": w["embeddings.class_embedding"].reshape(-1),
        "position_embedding": w["embeddings.position_embedding"][0],
        "layers": stacked([layer(i) for i in range(model.config.num_hidden_layers)]),
    }


def siglip_vit_params(model: transformers.SiglipVisionModel) -> dict:
    """Parameters of `VisionTransformer` (without the norm behind it) in the SigLIP variant."""
    w = Weights(model)
    return {
        "patch_embedding": w.patches("embeddings.patch_embedding"),
        "position_embedding": w["embeddings.position_embedding.weight"],
        "layers": clip_layers_params(model),
    }


def siglip_pooling_params(model: transformers.SiglipVisionModel) -> dict:
    """Parameters of `AttentionPooling`."""
    w, heads = Weights(model.head), model.config.num_attention_heads
    attention = joint_attention(w["attention.in_proj_weight"].T, w["attention.in_proj_bias"], heads)
    out = w.from_heads("attention.out_proj", heads)
    return {
        "query_tokens": w["probe"][0],
        "token_key_values": {name: attention[name] for name in ("key", "value")},
        "attention": {"query": attention["query"], "out": out},
        "mlp_norm": w.norm("layernorm"),
        "mlp": w.mlp("mlp.fc1", "mlp.fc2"),
    }


def siglip_text_params(model: transformers.SiglipTextModel) -> dict:
    """Parameters of `SiglipTextTower` (without the projection behind it)."""
    w = Weights(model)
    return {
        "token_embedding": w.embedding("embeddings.token_embedding"),
        "position_embedding": w.embedding("embeddings.position_embedding"),
        "layers": clip_layers_params(model),
        "final_norm": w.norm("final_layer_norm"),
    }


def siglip_params(model: transformers.SiglipModel) -> dict:
    """Parameters of `Siglip`."""
    w = Weights(model)
    return {
        "vision": siglip_vit_params(model.vision_model),
        "vision_norm": w.norm("vision_model.post_layernorm"),
        "image_pooling": siglip_pooling_params(model.vision_model),
        "text": siglip_text_params(model.text_model),
        "text_projection": w.linear("text_model.head"),
        "logit_scale": w["logit_scale"][0],
        "logit_bias": w["logit_bias"][0],
    }
