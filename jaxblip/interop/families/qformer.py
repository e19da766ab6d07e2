"""The Q-Former: the names of transformers' BLIP-2 and InstructBLIP, and of LAVIS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxblip.errors import UserError
from jaxblip.interop.entries import Entries, embedding, linear, linear_from_heads, norm, plain
from jaxblip.models.qformer import QFormerConfig


@dataclasses.dataclass(frozen=True)
class QFormerNames:
    """Where the parts of a Q-Former are; the defaults are those of transformers' BLIP-2.

    Attributes:
      layers: prefix of the layers' numbers.
      projections: what the queries, keys and values of an attention are under.
      embedding_norm: the norm that queries and text share.
      embeddings: what word and position tables are under.
      heads: names under which files have the word table once more, as the tied output.
    """

    layers: str = "qformer.encoder.layer."
    projections: str = "attention"
    embedding_norm: str = "qformer.layernorm"
    embeddings: str = "embeddings"
    heads: tuple[str, ...] = ()


INSTRUCTBLIP = QFormerNames(
    embedding_norm="qformer.embeddings.layernorm", embeddings="qformer.embeddings"
)
LAVIS = QFormerNames(
    layers="Qformer.bert.encoder.layer.",
    projections="self",
    embedding_norm="Qformer.bert.embeddings.LayerNorm",
    embeddings="Qformer.bert.embeddings",
    heads=("Qformer.cls.predictions.decoder.weight",),
)


def qformer_entries(
    config: QFormerConfig, names: QFormerNames = QFormerNames(), ours: str = "qformer/"
) -> Entries:
    """The parameters of `QFormer`, with or without its text side."""
    entries = [
        *plain("query_tokens", f"{ours}query_tokens", their_shape=lambda shape: (1, *shape)),
        *norm(names.embedding_norm, f"{ours}embedding_norm"),
    ]
    if config.has_text:
        words, text = f"{names.embeddings}.word_embeddings", f"{ours}text_embeddings"
        entries += [
            *embedding(words, f"{text}/token_embedding", aliases=names.heads),
            *embedding(f"{names.embeddings}.position_embeddings", f"{text}/position_embedding"),
        ]
    for i in range(config.num_layers):
        entries += _block(config, names, ours, i)
    return tuple(entries)


def _block(config: QFormerConfig, names: QFormerNames, ours: str, i: int) -> Entries:
    # The stack is over groups; a group begins with a block that attends to the image.
    group, place = divmod(i, config.cross_attention_frequency)
    theirs, block = f"{names.layers}{i}", f"{ours}groups/block_{place}"

    def attention(name: str, place_of: Mapping[str, str], path: str) -> Entries:
        projections = [
            entry
            for part, part_path in place_of.items()
            for entry in linear(
                f"{theirs}.{name}.{names.projections}.{part}", f"{part_path}/{part}", group
            )
        ]
        return (
            *projections,
            *linear_from_heads(f"{theirs}.{name}.output.dense", f"{path}/out", group),
            *norm(f"{theirs}.{name}.output.LayerNorm", f"{path}_norm", group),
        )

    path = f"{block}/attention"
    entries = [*attention("attention", {"query": path, "key": path, "value": path}, path)]
    if place == 0:
        path, image = f"{block}/cross_attention", f"{ours}image_key_values"
        places = {"query": path, "key": image, "value": image}
        entries += attention("crossattention", places, path)
    for side, suffix in (("query", "_query"), *((("text", ""),) if config.has_text else ())):
        down = f"{theirs}.output{suffix}"
        entries += [
            *linear(f"{theirs}.intermediate{suffix}.dense", f"{block}/{side}_mlp/up", group),
            *linear(f"{down}.dense", f"{block}/{side}_mlp/down", group),
            *norm(f"{down}.LayerNorm", f"{block}/{side}_mlp_norm", group),
        ]
    return tuple(entries)


BLIP2_TYPE, INSTRUCTBLIP_TYPE = "blip_2_qformer", "instructblip_qformer"

_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "use_qformer_text_input": False,
}


def qformer_config(hf: Mapping[str, Any], num_query_tokens: int) -> QFormerConfig:
    """The Q-Former that a `qformer_config` of transformers describes.

    Args:
      hf: the section of the config.json. Fields that it leaves out have the defaults of
        transformers' `Blip2QFormerConfig`; those of InstructBLIP's are the same, but for
        `model_type`, by which its Q-Former has a text side.
      num_query_tokens: stands outside of that section.

    Raises:
      UserError: an activation other than the exact GELU.
    """
    fields = _DEFAULTS | dict(hf)
    if fields.get("model_type") == INSTRUCTBLIP_TYPE:
        fields["use_qformer_text_input"] = True
    if fields["hidden_act"] != "gelu":
        raise UserError(
            f"qformer_config.hidden_act={fields['hidden_act']!r} is not covered, only 'gelu', "
            "which every published Q-Former has."
        )
    return QFormerConfig(
        num_query_tokens=num_query_tokens,
        width=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        cross_attention_frequency=fields["cross_attention_frequency"],
        has_text=fields["use_qformer_text_input"],
        vocab_size=fields["vocab_size"],
        max_positions=fields["max_position_embeddings"],
        layer_norm_epsilon=fields["layer_norm_eps"],
        hidden_dropout=float(fields["hidden_dropout_prob"]),
        attention_dropout=float(fields["attention_probs_dropout_prob"]),
        initializer_range=fields["initializer_range"],
    )


def hf_qformer_config(
    config: QFormerConfig, vision_width: int, model_type: str = BLIP2_TYPE
) -> dict[str, Any]:
    """The `qformer_config` of which `qformer_config` makes `config` again.

    Args:
      model_type: of the target class; that of InstructBLIP always has a text side, and so must
        `config`.
    """
    fields = {
        "model_type": model_type,
        "encoder_hidden_size": vision_width,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.layer_norm_epsilon,
        "cross_attention_frequency": config.cross_attention_frequency,
    }
    if model_type == BLIP2_TYPE:
        fields["use_qformer_text_input"] = config.has_text
    return fields
