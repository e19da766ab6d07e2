"""The LLaMA family: the names of transformers' LLaMA, Mistral, Qwen2 and Qwen3, which are the same.

Alone (`LlamaForCausalLM` and its like), and as the language model of BLIP-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from jaxblip.errors import UserError
from jaxblip.interop.entries import (
    Entries,
    Layout,
    embedding,
    linear,
    linear_from_heads,
    rms_norm,
)
from jaxblip.models.llama import ROPE_TYPES, LlamaConfig

# The rotary frequencies, which older versions of transformers saved with each layer.
INVERSE_FREQUENCIES = r"(.*\.)?rotary_emb\.inv_freq"


def llama_layout(config: LlamaConfig, ours: str = "") -> Layout:
    """A checkpoint of `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2…` or `Qwen3ForCausalLM`.

    Args:
      ours: prefix of our paths, such as "language_model/".
    """
    return Layout(llama_entries(config, ours=ours), ignored=(INVERSE_FREQUENCIES,))


def llama_entries(config: LlamaConfig, theirs: str = "", ours: str = "") -> Entries:
    """The parameters of `LlamaLanguageModel`."""
    at, head = f"{theirs}model", f"{theirs}lm_head"
    entries = [
        *embedding(
            f"{at}.embed_tokens",
            f"{ours}token_embedding",
            aliases=(f"{head}.weight",) if config.tied_head else (),
        ),
        *rms_norm(f"{at}.norm", f"{ours}final_norm"),
    ]
    if not config.tied_head:
        entries += linear(head, f"{ours}lm_head", bias=False)
    for i in range(config.num_layers):
        entries += _block(config, f"{at}.layers.{i}", f"{ours}layers", i)
    return tuple(entries)


def _block(config: LlamaConfig, theirs: str, ours: str, i: int) -> Entries:
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    entries = [
        *rms_norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm", i),
        *linear(f"{attention}.q_proj", f"{ours}/attention/query", i, bias=config.qkv_bias),
        *linear(f"{attention}.k_proj", f"{ours}/attention/key", i, bias=config.qkv_bias),
        *linear(f"{attention}.v_proj", f"{ours}/attention/value", i, bias=config.qkv_bias),
        *linear_from_heads(f"{attention}.o_proj", f"{ours}/attention/out", i, bias=config.out_bias),
        *rms_norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm", i),
        *linear(f"{mlp}.gate_proj", f"{ours}/mlp/gate", i, bias=config.mlp_bias),
        *linear(f"{mlp}.up_proj", f"{ours}/mlp/up", i, bias=config.mlp_bias),
        *linear(f"{mlp}.down_proj", f"{ours}/mlp/down", i, bias=config.mlp_bias),
    ]
    if config.qk_norm:
        entries += rms_norm(f"{attention}.q_norm", f"{ours}/attention/query_norm", i)
        entries += rms_norm(f"{attention}.k_norm", f"{ours}/attention/key_norm", i)
    return tuple(entries)


# What a config.json leaves out has the default of the checkpoint's own config class. Only sizes
# without which there is no model must be there.
_COMMON = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "layer_types": None,
}
_QWEN = dict(
    _COMMON,
    max_position_embeddings=32768,
    num_key_value_heads=32,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(_COMMON, max_position_embeddings=2048),
    "mistral": dict(
        _COMMON, max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096
    ),
    "qwen2": _QWEN,
    "qwen3": dict(_QWEN, head_dim=128),
}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
)  # fmt: skip


def llama_config(hf: Mapping[str, Any]) -> LlamaConfig:
    """The model that the `config.json` of a LLaMA, Mistral, Qwen2 or Qwen3 model describes.

    Dropout is not read: all published models of the family have none. Special tokens belong to the
    tokenizer.

    Args:
      hf: the parsed file, or the `text_config` within that of a vision-language model, as written
        by any version of transformers. What is missing has the default of the class of its
        `model_type` (llama, mistral, qwen2 or qwen3).

    Raises:
      UserError: the field and the value that `LlamaConfig` cannot express, or a size that is
        missing.
    """
    model_type = hf.get("model_type")
    if model_type not in DEFAULTS:
        raise UserError(
            f"config.json has model_type={model_type!r}, which is not of the LLaMA family: it must "
            f"be one of {', '.join(DEFAULTS)}."
        )
    if missing := [name for name in _SIZES if hf.get(name) is None]:
        raise UserError(
            f"config.json of this {model_type} model has no {missing[0]!r}: use the complete file "
            "that lies beside the weights."
        )
    fields = DEFAULTS[model_type] | dict(hf)
    if fields["hidden_act"] not in ("silu", "swish"):
        _refuse(fields, "hidden_act", "only 'silu'")
    if fields.get("quantization_config"):
        _refuse(fields, "quantization_config", "only weights that are not quantized")
    heads = fields["num_attention_heads"]
    # Where a class has no such field, its architecture fixes the biases and ignores the field.
    biases = model_type in ("llama", "qwen3") and bool(fields["attention_bias"])
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=_or(fields["num_key_value_heads"], heads),
        head_width=_or(fields["head_dim"], 0),
        mlp_width=fields["intermediate_size"],
        max_positions=fields["max_position_embeddings"],
        norm_epsilon=fields["rms_norm_eps"],
        tied_head=fields["tie_word_embeddings"],
        qkv_bias=model_type == "qwen2" or biases,
        out_bias=biases,
        mlp_bias=model_type == "llama" and bool(fields["mlp_bias"]),
        qk_norm=model_type == "qwen3",
        sliding_window=_sliding_window(fields),
        initializer_range=fields["initializer_range"],
        **_rope(fields),
    )


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_VARIANT = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "sliding_window")


def hf_llama_config(config: LlamaConfig, **tokens: int) -> dict[str, Any]:
    """The config of the first of `ARCHITECTURES` that computes what `config` says.

    `llama_config` makes `config` again, with the sizes written out for which it has 0.

    Args:
      tokens: ids that the model itself does not know: `bos_token_id`, `eos_token_id`,
        `pad_token_id`.

    Raises:
      UserError: none of them does.
    """
    for model_type, architecture in ARCHITECTURES.items():
        fields = _hf_fields(config, model_type)
        again = llama_config(fields)
        # Only the class of LLaMA insists on this, even where `head_dim` is given.
        is_valid = model_type != "llama" or config.width % config.num_heads == 0
        if is_valid and all(getattr(again, name) == getattr(config, name) for name in _VARIANT):
            return fields | {"architectures": [architecture]} | tokens
    variant = ", ".join(f"{name}={getattr(config, name)}" for name in _VARIANT)
    raise UserError(
        f"No class of {', '.join(ARCHITECTURES)} in transformers has {variant} with num_heads="
        f"{config.num_heads} on width={config.width}: the model cannot be exported."
    )


def _hf_fields(config: LlamaConfig, model_type: str) -> dict[str, Any]:
    """The config as `model_type` would say it; a class has no place for what it fixes.

    Rotary embeddings stand as transformers 4 wrote them, which every version reads.
    """
    heads, kv_heads, head_width = config.attention_shape
    fields = {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_width,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.initializer_range,
        "rope_theta": config.rope_theta,
    }
    if config.rope_type != "default":
        fields["rope_scaling"] = {"rope_type": config.rope_type, "factor": config.rope_factor}
    if config.rope_type == "llama3":
        fields["rope_scaling"] |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_positions,
        }
    if model_type in ("llama", "qwen3"):
        fields["attention_bias"] = config.qkv_bias
    if model_type == "llama":
        fields["mlp_bias"] = config.mlp_bias
    else:
        fields["sliding_window"] = config.sliding_window or None
    if model_type.startswith("qwen"):
        fields |= {"use_sliding_window": config.sliding_window > 0, "max_window_layers": 0}
    return fields


def _sliding_window(fields: Mapping[str, Any]) -> int:
    """The window that all layers have, or 0 where none has one.

    Qwen switches it on by `use_sliding_window`, for the layers from `max_window_layers` on or for
    those that `layer_types` names; Mistral has it in all layers; LLaMA has none.
    """
    model_type, kinds = fields["model_type"], fields["layer_types"]
    window = fields["sliding_window"] if model_type != "llama" else None
    first = 0
    if model_type.startswith("qwen"):
        window = window if fields["use_sliding_window"] else None
        first = fields["max_window_layers"]
    num_layers = fields["num_hidden_layers"]
    sliding = [window is not None and i >= first for i in range(num_layers)]
    if kinds is not None:
        named = [kind == "sliding_attention" for kind in kinds]
        known = set(kinds) <= {"sliding_attention", "full_attention"}
        if not known or len(kinds) != num_layers or (any(named) and window is None):
            _refuse(
                fields, "layer_types", "only full_attention or sliding_attention for each layer"
            )
        if not model_type.startswith("qwen") and named != sliding:
            _refuse(fields, "layer_types", f"only what sliding_window={window} means")
        sliding = named
    if any(sliding) and not all(sliding):
        name = "layer_types" if kinds is not None else "max_window_layers"
        _refuse(fields, name, "only the same attention in all layers")
    return window if all(sliding) else 0


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LlamaConfig` about rotary embeddings.

    transformers 5 writes all of them as `rope_parameters`; before, `rope_theta` stood by itself
    beside `rope_scaling`, whose "rope_type" was called "type" at first.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        _refuse(fields, name, "only the same rotary embedding in all layers")
    for place in (fields, rope):
        if _or(place.get("partial_rotary_factor"), 1.0) != 1.0:
            _refuse(place, "partial_rotary_factor", "only heads that are rotated as a whole")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        _refuse(fields, name, f"only the types {', '.join(ROPE_TYPES)}")

    def value(field, default=None):
        found = _or(rope.get(field), default)
        if found is None:
            raise UserError(
                f"config.json has {name}={dict(rope)!r} without {field!r}, which rope_type="
                f"{rope_type!r} needs: use the complete file that lies beside the weights."
            )
        return found

    result = {
        "rope_type": rope_type,
        "rope_theta": float(value("rope_theta", _or(fields.get("rope_theta"), 10000.0))),
    }
    if rope_type != "default":
        result["rope_factor"] = float(value("factor"))
    if rope_type == "llama3":
        original, default = "original_max_position_embeddings", fields["max_position_embeddings"]
        result |= {
            "rope_low_freq_factor": float(value("low_freq_factor")),
            "rope_high_freq_factor": float(value("high_freq_factor")),
            "rope_original_positions": _or(fields.get(original), value(original, default)),
        }
    return result


def _or(value: Any, default: Any) -> Any:
    """A config.json has null where a field follows another one."""
    return default if value is None else value


def _refuse(fields: Mapping[str, Any], name: str, covered: str) -> NoReturn:
    raise UserError(
        f"config.json has {name}={fields[name]!r}, which jaxblip's LLaMA family does not cover: "
        f"{covered}."
    )
