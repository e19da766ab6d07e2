"""BERT as the start of a Q-Former (BLIP-2 paper §3.1: "we initialize QFormer with BERT-base").

The names are those of transformers' `BertModel`, alone or within another class. Self-attention and
the embeddings are BERT's; its feed-forward networks start both sides, that of the text and that of
the queries. Query tokens and cross-attention are new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxblip.errors import UserError
from jaxblip.interop.entries import (
    Entries,
    Entry,
    Layout,
    embedding,
    linear,
    linear_from_heads,
    norm,
)
from jaxblip.interop.families.qformer import qformer_config
from jaxblip.interop.files import TensorInfo, Weights
from jaxblip.models.qformer import QFormerConfig

EMBEDDINGS = "embeddings"
# What other classes build on BERT, and index buffers.
TABLES = r"(bert\.)?embeddings\.(word|position)_embeddings\.weight"  # of the text side
IGNORED = (r"(bert\.)?pooler\..*", r"cls\..*", r"(bert\.)?embeddings\.position_ids")


def bert_qformer_layout(config: QFormerConfig, ours: str = "qformer/") -> Layout:
    """A checkpoint of `BertModel`, as `bert_weights` gives it, for `QFormer`.

    Checkpoints whose names begin with "bert." (`BertForPreTraining`) are read as well, and norms
    under TensorFlow's names (bert-base-uncased).

    Args:
      ours: prefix of our paths.
    """
    entries = [*norm(f"{EMBEDDINGS}.LayerNorm", f"{ours}embedding_norm")]
    ignored = IGNORED if config.has_text else (*IGNORED, TABLES)
    if config.has_text:
        text = f"{ours}text_embeddings"
        entries += [
            *embedding(f"{EMBEDDINGS}.word_embeddings", f"{text}/token_embedding"),
            *embedding(f"{EMBEDDINGS}.position_embeddings", f"{text}/position_embedding"),
        ]
    for i in range(config.num_layers):
        entries += _block(config, ours, i)
    crossing = f"{ours}groups/block_0/cross_attention"
    return Layout(
        tuple(map(_with_aliases, entries)),
        ignored=ignored,
        absent=(f"{ours}query_tokens", f"{ours}image_key_values", crossing, f"{crossing}_norm"),
    )


def _block(config: QFormerConfig, ours: str, i: int) -> Entries:
    group, place = divmod(i, config.cross_attention_frequency)
    theirs, block = f"encoder.layer.{i}", f"{ours}groups/block_{place}"
    attention = f"{block}/attention"
    entries = [
        entry
        for part in ("query", "key", "value")
        for entry in linear(f"{theirs}.attention.self.{part}", f"{attention}/{part}", group)
    ]
    sides = [
        (
            *linear(f"{theirs}.intermediate.dense", f"{block}/{side}_mlp/up", group),
            *linear(f"{theirs}.output.dense", f"{block}/{side}_mlp/down", group),
            *norm(f"{theirs}.output.LayerNorm", f"{block}/{side}_mlp_norm", group),
        )
        for side in (("text", "query") if config.has_text else ("query",))
    ]
    return (
        *entries,
        *linear_from_heads(f"{theirs}.attention.output.dense", f"{attention}/out", group),
        *norm(f"{theirs}.attention.output.LayerNorm", f"{attention}_norm", group),
        *(_for_each(same) for same in zip(*sides, strict=True)),
    )


def _for_each(entries: tuple[Entry, ...]) -> Entry:
    """One tensor for the places of several entries; export takes it from the first."""
    first = entries[0]
    return dataclasses.replace(
        first,
        ours=tuple(slot for entry in entries for slot in entry.ours),
        split=lambda tensor, shapes: [
            entry.split(tensor, [shape])[0] for entry, shape in zip(entries, shapes, strict=True)
        ],
        join=lambda arrays: first.join(arrays[:1]),
    )


def _with_aliases(entry: Entry) -> Entry:
    by_tensorflow = entry.theirs.replace("LayerNorm.weight", "LayerNorm.gamma")
    by_tensorflow = by_tensorflow.replace("LayerNorm.bias", "LayerNorm.beta")
    names = dict.fromkeys((entry.theirs, by_tensorflow))
    aliases = [f"{prefix}{name}" for prefix in ("", "bert.") for name in names]
    return dataclasses.replace(entry, aliases=tuple(aliases[1:]))


def bert_weights(weights: Weights, vocab_size: int) -> Weights:
    """The tensors of a BERT checkpoint in the form that a Q-Former has them.

    A Q-Former has no token types: that of type 0, which BERT adds to every word of a single text,
    is added to the positions. (LAVIS leaves it out, so its Q-Former starts a little off BERT.)

    Args:
      vocab_size: rows of the word table, at least BERT's. Those that BERT has not, such as that of
        `[DEC]`, are the mean of its words.

    Raises:
      UserError: the word table is missing or has more rows.
    """
    at = EMBEDDINGS if f"{EMBEDDINGS}.word_embeddings.weight" in weights.tensors else (
        f"bert.{EMBEDDINGS}"
    )  # fmt: skip
    words, positions, types = (
        f"{at}.{name}_embeddings.weight" for name in ("word", "position", "token_type")
    )
    if words not in weights.tensors:
        raise UserError(f"{weights.source!r} has no {words!r}: it is no checkpoint of BERT.")
    rows, width = weights.tensors[words].shape
    if rows > vocab_size:
        raise UserError(
            f"The BERT {weights.source!r} has {rows} words and the Q-Former {vocab_size}: give it "
            "the tokenizer and the vocab_size of the BERT that it starts from."
        )
    tensors = {name: info for name, info in weights.tensors.items() if name != types}
    tensors[words] = TensorInfo((vocab_size, width), tensors[words].dtype)

    def read(name: str) -> np.ndarray:
        tensor = weights.read(name)
        if name == words and rows < vocab_size:
            mean = tensor.mean(axis=0, dtype=np.float32).astype(tensor.dtype)
            return np.concatenate([tensor, np.broadcast_to(mean, (vocab_size - rows, width))])
        if name == positions and types in weights.tensors:
            return tensor + weights.read(types)[0]
        return tensor

    return dataclasses.replace(weights, tensors=tensors, reader=read)


def bert_qformer_config(
    hf: Mapping[str, Any],
    num_query_tokens: int = 32,
    *,
    cross_attention_frequency: int = 2,
    vocab_size: int | None = None,
) -> QFormerConfig:
    """The Q-Former of the size of a BERT, with a text side.

    Args:
      hf: the config.json of a `BertModel`.
      vocab_size: rows of the word table; by default one more than BERT has, for `[DEC]`.

    Raises:
      UserError: the field and the value that `QFormerConfig` does not cover.
    """
    if hf.get("model_type") != "bert":
        raise UserError(
            f"config.json has model_type={hf.get('model_type')!r}: a Q-Former starts from 'bert'."
        )
    if hf.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"config.json has position_embedding_type={hf['position_embedding_type']!r}: a "
            "Q-Former has a table of positions, 'absolute'."
        )
    vocab_size = hf.get("vocab_size", 30522) + 1 if vocab_size is None else vocab_size
    changed = {
        "vocab_size": vocab_size,
        "cross_attention_frequency": cross_attention_frequency,
        "use_qformer_text_input": True,
    }
    return qformer_config(dict(hf) | changed, num_query_tokens)
