"""T5 from Hugging Face: the model config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblip.errors import UserError
from jaxblip.models.t5 import T5_ACTIVATIONS, T5Config

# Other names that transformers knows for the activations of `T5Config`.
_SAME_ACTIVATION = {"gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu"}


def t5_config(hf: Mapping[str, Any]) -> T5Config:
    """The model that a T5 `config.json` describes, without dropout.

    Args:
      hf: the parsed file, or the `text_config` within that of a BLIP-2 or InstructBLIP model. What
        is missing has the default of transformers' `T5Config`.

    Raises:
      UserError: for a feed-forward network that `T5Config` cannot express.
    """
    gated, activation = _feed_forward(hf)
    num_layers = hf.get("num_layers", 6)
    num_decoder_layers = hf.get("num_decoder_layers")
    start_token_id = hf.get("decoder_start_token_id")
    return T5Config(
        vocab_size=hf.get("vocab_size", 32128),
        width=hf.get("d_model", 512),
        num_layers=num_layers,
        num_decoder_layers=num_layers if num_decoder_layers is None else num_decoder_layers,
        num_heads=hf.get("num_heads", 8),
        head_width=hf.get("d_kv", 64),
        mlp_width=hf.get("d_ff", 2048),
        gated=gated,
        activation=activation,
        # transformers 5 writes tie_word_embeddings=True for every T5 and tells the two kinds apart
        # by the scale of the head's input. A head that is tied but not scaled is the same function
        # as an untied one with the embedding's values.
        tied_head=hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True)),
        num_position_buckets=hf.get("relative_attention_num_buckets", 32),
        max_position_distance=hf.get("relative_attention_max_distance", 128),
        layer_norm_epsilon=hf.get("layer_norm_epsilon", 1e-6),
        start_token_id=hf.get("pad_token_id", 0) if start_token_id is None else start_token_id,
    )


def _feed_forward(hf: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the feed-forward network is gated, and its activation.

    `dense_act_fn` counts first: the BLIP-2 configs of FlanT5 have dense_act_fn="gelu", the exact
    form, beside feed_forward_proj="gated-gelu", which by itself means the tanh form.
    """
    projection = hf.get("feed_forward_proj", "relu")
    kind, _, name = projection.rpartition("-")
    if kind not in ("", "gated"):
        raise UserError(
            f"The T5 config has feed_forward_proj={projection!r}; it must be an activation, or "
            "'gated-' and an activation."
        )
    by_projection = "gelu_new" if projection == "gated-gelu" else name
    activation = hf.get("dense_act_fn", by_projection)
    activation = _SAME_ACTIVATION.get(activation, activation)
    if activation not in T5_ACTIVATIONS:
        raise UserError(
            f"The T5 config has the activation {activation!r} (dense_act_fn, or else "
            f"feed_forward_proj); only {', '.join(T5_ACTIVATIONS)} are supported."
        )
    return hf.get("is_gated_act", kind == "gated"), activation
