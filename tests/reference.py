"""Small random transformers models, and their weights as jaxblip parameter trees."""

from __future__ import annotations

import jax
import numpy as np
import torch
import transformers


def randomized(module: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """`module` in eval mode with every parameter random, so that none is left without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            is_norm_scale = parameter.ndim == 1 and "norm" in name.lower() and "weight" in name
            parameter.copy_(noise + 1.0 if is_norm_scale else noise)
    return module.eval()


def random_opt(seed: int = 0, **overrides) -> transformers.OPTForCausalLM:
    """A tiny OPT with vocabulary 13, pad 1 and stop token 2."""
    sizes = dict(
        vocab_size=13,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        do_layer_norm_before=True,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    config = transformers.OPTConfig(**(sizes | overrides))
    return randomized(transformers.OPTForCausalLM(config), seed)


class Weights:
    """The arrays of a torch module, read under a prefix of their names."""

    def __init__(self, module: torch.nn.Module):
        self.arrays = {name: x.detach().numpy() for name, x in module.state_dict().items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def _affine(self, name, kernel, bias_shape):
        if f"{name}.bias" not in self.arrays:
            return {"kernel": kernel}
        return {"kernel": kernel, "bias": self[f"{name}.bias"].reshape(bias_shape)}

    def linear(self, name: str) -> dict:
        return self._affine(name, self[f"{name}.weight"].T, -1)

    def to_heads(self, name: str, heads: int) -> dict:
        kernel = self[f"{name}.weight"].T
        return self._affine(name, kernel.reshape(len(kernel), heads, -1), (heads, -1))

    def from_heads(self, name: str, heads: int) -> dict:
        kernel = self[f"{name}.weight"].T
        return self._affine(name, kernel.reshape(heads, -1, kernel.shape[1]), -1)

    def norm(self, name: str) -> dict:
        return {"scale": self[f"{name}.weight"], "bias": self[f"{name}.bias"]}

    def embedding(self, name: str) -> dict:
        return {"embedding": self[f"{name}.weight"]}

    def patches(self, name: str) -> dict:
        """A convolution's `[out, in, height, width]` as `[height, width, in, out]`."""
        return self._affine(name, self[f"{name}.weight"].transpose(2, 3, 1, 0), -1)

    def attention(self, prefix: str, heads: int, query="q_proj", key="k_proj", value="v_proj"):
        """Projections to heads, without the output projection, whose place differs."""
        names = {"query": query, "key": key, "value": value}
        return {ours: self.to_heads(f"{prefix}.{name}", heads) for ours, name in names.items()}

    def mlp(self, up: str, down: str) -> dict:
        return {"up": self.linear(up), "down": self.linear(down)}


def stacked(trees: list[dict]) -> dict:
    """The parameters of a scanned stack: one more axis in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def opt_params(model: transformers.OPTForCausalLM) -> dict:
    """Parameters of `OptLanguageModel`."""
    w, heads = Weights(model.model.decoder), model.config.num_attention_heads

    def layer(i):
        at = f"layers.{i}"
        out = w.from_heads(f"{at}.self_attn.out_proj", heads)
        return {
            "attention_norm": w.norm(f"{at}.self_attn_layer_norm"),
            "attention": w.attention(f"{at}.self_attn", heads) | {"out": out},
            "mlp_norm": w.norm(f"{at}.final_layer_norm"),
            "mlp": w.mlp(f"{at}.fc1", f"{at}.fc2"),
        }

    return {
        "token_embedding": w.embedding("embed_tokens"),
        "position_embedding": w.embedding("embed_positions"),
        "layers": stacked([layer(i) for i in range(model.config.num_hidden_layers)]),
        "final_norm": w.norm("final_layer_norm"),
    }


def eva_vit_params(model: transformers.Blip2VisionModel) -> dict:
    """Parameters of `VisionTransformer` (without the norm behind it) in the EVA-CLIP variant."""
    w, heads = Weights(model), model.config.num_attention_heads

    def layer(i):
        at = f"encoder.layers.{i}"
        kernel = np.split(w[f"{at}.self_attn.qkv.weight"].T, 3, axis=1)
        bias = np.split(w[f"{at}.self_attn.qkv.bias"], 3)
        assert not bias[1].any(), "EVA-CLIP has no key bias"
        attention = {
            name: {
                "kernel": kernel[j].reshape(len(kernel[j]), heads, -1),
                **({"bias": bias[j].reshape(heads, -1)} if name != "key" else {}),
            }
            for j, name in enumerate(["query", "key", "value"])
        }
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


def clip_layers_params(model: torch.nn.Module) -> dict:
    """The scanned stack of a CLIP tower: `CLIPVisionModel` or `CLIPTextModel`."""
    w, heads = Weights(model.encoder), model.config.num_attention_heads

    def layer(i):
        at = f"layers.{i}"
        out = w.from_heads(f"{at}.self_attn.out_proj", heads)
        return {
            "attention_norm": w.norm(f"{at}.layer_norm1"),
            "attention": w.attention(f"{at}.self_attn", heads) | {"out": out},
            "mlp_norm": w.norm(f"{at}.layer_norm2"),
            "mlp": w.mlp(f"{at}.mlp.fc1", f"{at}.mlp.fc2"),
        }

    return stacked([layer(i) for i in range(model.config.num_hidden_layers)])


def clip_vit_params(model: transformers.CLIPVisionModel) -> dict:
    """Parameters of `VisionTransformer` (without the norm behind it) in the CLIP variant."""
    w = Weights(model)
    return {
        "patch_embedding": w.patches("embeddings.patch_embedding"),
        "cls_token": w["embeddings.class_embedding"],
        "position_embedding": w["embeddings.position_embedding.weight"],
        "pre_norm": w.norm("pre_layrnorm"),
        "layers": clip_layers_params(model),
    }


def qformer_params(model: transformers.Blip2ForImageTextRetrieval) -> dict:
    """Parameters of `QFormer` with its text side."""
    w, config = Weights(model), model.config.qformer_config
    heads, frequency = config.num_attention_heads, config.cross_attention_frequency

    def attention(at):
        params = w.attention(f"{at}.attention", heads, "query", "key", "value")
        return params | {"out": w.from_heads(f"{at}.output.dense", heads)}

    def block(i):
        at = f"qformer.encoder.layer.{i}"
        params = {
            "attention": attention(f"{at}.attention"),
            "attention_norm": w.norm(f"{at}.attention.output.LayerNorm"),
        }
        for side, suffix in ("query", "_query"), ("text", ""):
            up, down = f"{at}.intermediate{suffix}.dense", f"{at}.output{suffix}"
            params[f"{side}_mlp"] = w.mlp(up, f"{down}.dense")
            params[f"{side}_mlp_norm"] = w.norm(f"{down}.LayerNorm")
        if i % frequency == 0:
            cross = attention(f"{at}.crossattention")
            params["cross_attention"] = {name: cross[name] for name in ("query", "out")}
            params["cross_attention_norm"] = w.norm(f"{at}.crossattention.output.LayerNorm")
            image = {name: cross[name] for name in ("key", "value")}
            return params, image
        return params, None

    groups, images = [], []
    for first in range(0, config.num_hidden_layers, frequency):
        blocks = [block(first + i) for i in range(frequency)]
        groups.append({f"block_{i}": params for i, (params, _) in enumerate(blocks)})
        images.append(blocks[0][1])
    return {
        "query_tokens": w["query_tokens"][0],
        "embedding_norm": w.norm("qformer.layernorm"),
        "text_embeddings": {
            "token_embedding": w.embedding("embeddings.word_embeddings"),
            "position_embedding": w.embedding("embeddings.position_embeddings"),
        },
        "image_key_values": stacked(images),
        "groups": stacked(groups),
    }


def clip_params(model: transformers.CLIPModel) -> dict:
    """Parameters of `Clip`."""
    w = Weights(model)
    return {
        "vision": clip_vit_params(model.vision_model),
        "vision_norm": w.norm("vision_model.post_layernorm"),
        "text": {
            "token_embedding": w.embedding("text_model.embeddings.token_embedding"),
            "position_embedding": w.embedding("text_model.embeddings.position_embedding"),
            "layers": clip_layers_params(model.text_model),
            "final_norm": w.norm("text_model.final_layer_norm"),
        },
        "image_projection": w.linear("visual_projection"),
        "text_projection": w.linear("text_projection"),
        "logit_scale": w["logit_scale"],
    }
