"""OPT: the names of transformers' `OPTForCausalLM`, alone and as the language model of BLIP-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblip.errors import UserError
from jaxblip.interop.entries import (
    Entries,
    Layout,
    also_under,
    embedding,
    linear,
    linear_from_heads,
    norm,
)
from jaxblip.models.opt import OptConfig

# Fields that must have one value. Only OPT-350M has others: it norms after each block and projects
# its embeddings.
_REQUIRED = {
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
    "_remove_final_layer_norm": False,
}
_DEFAULTS = _REQUIRED | {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "dropout": 0.1,
    "init_std": 0.02,
}


def opt_layout(config: OptConfig, ours: str = "") -> Layout:
    """A checkpoint of `OPTForCausalLM`; those of `OPTModel` are read as well.

    Args:
      ours: prefix of our paths, such as "language_model/".
    """
    entries = opt_entries(config, ours=ours)
    return Layout(also_under(entries, "model.decoder.", "decoder."))


def opt_entries(config: OptConfig, theirs: str = "", ours: str = "") -> Entries:
    """The parameters of `OptLanguageModel`."""
    at = f"{theirs}model.decoder"
    head = f"{theirs}lm_head.weight"  # tied; some files have both names, some only this one
    entries = [
        *embedding(f"{at}.embed_tokens", f"{ours}token_embedding", aliases=(head,)),
        *embedding(f"{at}.embed_positions", f"{ours}position_embedding"),
        *norm(f"{at}.final_layer_norm", f"{ours}final_norm"),
    ]
    for i in range(config.num_layers):
        layer, block = f"{at}.layers.{i}", f"{ours}layers"
        entries += [
            *norm(f"{layer}.self_attn_layer_norm", f"{block}/attention_norm", i),
            *linear(f"{layer}.self_attn.q_proj", f"{block}/attention/query", i),
            *linear(f"{layer}.self_attn.k_proj", f"{block}/attention/key", i),
            *linear(f"{layer}.self_attn.v_proj", f"{block}/attention/value", i),
            *linear_from_heads(f"{layer}.self_attn.out_proj", f"{block}/attention/out", i),
            *norm(f"{layer}.final_layer_norm", f"{block}/mlp_norm", i),
            *linear(f"{layer}.fc1", f"{block}/mlp/up", i),
            *linear(f"{layer}.fc2", f"{block}/mlp/down", i),
        ]
    return tuple(entries)


def opt_config(hf: Mapping[str, Any]) -> OptConfig:
    """The model that an OPT config of transformers describes.

    Args:
      hf: a config.json, or the `text_config` section of one. Fields that it leaves out have the
        defaults of transformers.

    Raises:
      UserError: the field and the value that `OptConfig` does not cover.
    """
    fields = _DEFAULTS | dict(hf)
    for field, value in (_REQUIRED | {"word_embed_proj_dim": fields["hidden_size"]}).items():
        if fields.get(field, value) != value:
            raise UserError(
                f"The OPT config has {field}={fields[field]!r}, which is not covered, only "
                f"{value!r}: all published sizes but 350M have it."
            )
    return OptConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_width=fields["ffn_dim"],
        max_positions=fields["max_position_embeddings"],
        dropout=float(fields["dropout"]),
        initializer_range=fields["init_std"],
    )


def hf_opt_config(config: OptConfig, **tokens: int) -> dict[str, Any]:
    """The config of `OPTForCausalLM`, of which `opt_config` makes `config` again.

    Args:
      tokens: ids that the model itself does not know: `bos_token_id`, `eos_token_id`,
        `pad_token_id`.
    """
    # The class computes its norms with PyTorch's default, whatever its config says.
    if config.layer_norm_epsilon != 1e-5:
        raise UserError(
            f"OPT in transformers has no layer_norm_epsilon other than 1e-05, and this model has "
            f"{config.layer_norm_epsilon}: it cannot be exported."
        )
    return _REQUIRED | {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "dropout": config.dropout,
        "init_std": config.initializer_range,
        **tokens,
    }
