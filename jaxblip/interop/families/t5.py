"""T5: the names of transformers' `T5ForConditionalGeneration`, alone and within BLIP-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblip.errors import UserError
from jaxblip.interop.entries import (
    Entries,
    Layout,
    embedding,
    linear,
    linear_from_heads,
    plain,
    rms_norm,
)
from jaxblip.models.t5 import T5_ACTIVATIONS, T5Config

# The files of the first T5 have a position bias of the cross-attention, which nothing ever read.
UNUSED_BIAS = r"(.*\.)?decoder\..*\.EncDecAttention\.relative_attention_bias\.weight"


def t5_layout(config: T5Config, ours: str = "") -> Layout:
    """A checkpoint of `T5ForConditionalGeneration`.

    Args:
      ours: prefix of our paths, such as "language_model/".
    """
    return Layout(t5_entries(config, ours=ours), ignored=(UNUSED_BIAS,))


def t5_entries(config: T5Config, theirs: str = "", ours: str = "") -> Entries:
    """The parameters of `T5LanguageModel`."""
    words, head = f"{theirs}shared", f"{theirs}lm_head"
    # Both stacks read the same words, and some files have them under all names.
    stacks = tuple(f"{theirs}{stack}.embed_tokens.weight" for stack in ("encoder", "decoder"))
    heads = (f"{head}.weight",) if config.tied_head else ()
    entries = [
        *embedding(words, f"{ours}token_embedding", aliases=(*stacks, *heads)),
        *_stack(config, f"{theirs}encoder", f"{ours}encoder", config.num_layers),
        *_stack(
            config,
            f"{theirs}decoder",
            f"{ours}decoder",
            config.num_decoder_layers,
            f"{ours}encoder_key_values",
        ),
    ]
    if not config.tied_head:
        # transformers 5 saves a head that was never taken apart from the words under their name.
        entries += linear(head, f"{ours}lm_head", bias=False, aliases=(f"{words}.weight",))
    return tuple(entries)


def _stack(
    config: T5Config, theirs: str, ours: str, num_layers: int, encoder_key_values: str = ""
) -> Entries:
    """The encoder, or with `encoder_key_values` the decoder."""
    # transformers keeps the table that all layers share in the first.
    table = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    entries = [
        *plain(table, f"{ours}/relative_position_bias"),
        *rms_norm(f"{theirs}.final_layer_norm", f"{ours}/final_norm"),
    ]
    for i in range(num_layers):
        layer, block = f"{theirs}.block.{i}.layer", f"{ours}/layers"
        path = f"{block}/attention"
        entries += rms_norm(f"{layer}.0.layer_norm", f"{path}_norm", i)
        entries += _attention(f"{layer}.0.SelfAttention", path, path, i)
        if encoder_key_values:
            path = f"{block}/cross_attention"
            entries += rms_norm(f"{layer}.1.layer_norm", f"{path}_norm", i)
            entries += _attention(f"{layer}.1.EncDecAttention", path, encoder_key_values, i)
        last = f"{layer}.{2 if encoder_key_values else 1}"
        maps = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
        entries += rms_norm(f"{last}.layer_norm", f"{block}/mlp_norm", i)
        for name, path in (maps | {"wo": "down"}).items():
            entries += linear(f"{last}.DenseReluDense.{name}", f"{block}/mlp/{path}", i, bias=False)
    return tuple(entries)


def _attention(theirs: str, ours: str, key_values: str, i: int) -> Entries:
    return (
        *linear(f"{theirs}.q", f"{ours}/query", i, bias=False),
        *linear(f"{theirs}.k", f"{key_values}/key", i, bias=False),
        *linear(f"{theirs}.v", f"{key_values}/value", i, bias=False),
        *linear_from_heads(f"{theirs}.o", f"{ours}/out", i, bias=False),
    )


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


def hf_t5_config(config: T5Config, **tokens: int) -> dict[str, Any]:
    """The config of `T5ForConditionalGeneration`.

    `t5_config` makes `config` again, but for its dropout.

    Args:
      tokens: ids that the model itself does not know: `eos_token_id`, `pad_token_id`.
    """
    # By itself "gated-gelu" means the tanh form; the two fields behind it count more.
    name = "gelu" if config.gated and config.activation == "gelu_new" else config.activation
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "feed_forward_proj": f"gated-{name}" if config.gated else name,
        "is_gated_act": config.gated,
        "dense_act_fn": config.activation,
        "tie_word_embeddings": config.tied_head,
        "relative_attention_num_buckets": config.num_position_buckets,
        "relative_attention_max_distance": config.max_position_distance,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": config.dropout,
        "decoder_start_token_id": config.start_token_id,
        **tokens,
    }
