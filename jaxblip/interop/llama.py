"""Language models of the LLaMA family from Hugging Face: the model config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from jaxblip.errors import UserError
from jaxblip.models.llama import ROPE_TYPES, LlamaConfig

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
