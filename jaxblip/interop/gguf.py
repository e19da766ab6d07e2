"""GGUF files of llama.cpp: language models of the LLaMA family, under the names of transformers.

The package `gguf`, llama.cpp's own, reads the format and undoes its quantization.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jaxblip.errors import UserError
from jaxblip.interop.families.llama import llama_config
from jaxblip.interop.files import TensorInfo, Weights
from jaxblip.models.llama import rotary_frequencies

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

# llama.cpp writes LLaMA, Vicuna, SmolLM2 and Mistral alike, as "llama".
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# What is not quantized keeps its type; all else becomes float32.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ROPE_FACTORS = "rope_freqs.weight"  # how much slower each pair turns; no parameter
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


def transformers_name(name: str) -> str:
    """The name that a tensor of a GGUF file has in transformers; an unknown one stays as it is."""
    match = _NAME.fullmatch(name)
    if match is None or match["part"] not in NAMES:
        return name
    layer = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{layer}{NAMES[match['part']]}.{match['kind']}"


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Where a tensor is in the file.

    Attributes:
      kind: of `gguf.GGMLQuantizationType`.
      paired_heads: heads whose rows stand in pairs, or 0; see `_halved`.
    """

    offset: int
    num_bytes: int
    kind: Any
    paired_heads: int


def open_gguf(file: str | os.PathLike, source: str | None = None) -> Weights:
    """The weights of a GGUF file, each dequantized when it is read.

    Names and the order of rows are those of transformers, and `config` is the `config.json` that
    the metadata stands for, so that `llama_config` and `llama_layout` take both.

    Args:
      source: what messages call the file.

    Raises:
      UserError: the package `gguf` is not installed, the file is damaged, or the model is of
        another family or has tensors of a type that cannot be dequantized.
    """
    file = Path(file)
    source = os.fspath(file) if source is None else source
    gguf, reader = _reader(file, source)
    infos, pieces = _tensors(gguf, reader, source)
    config = _config(reader, infos, source)
    if config["model_type"] in ("llama", "mistral"):
        for part in ("q", "k"):
            heads = "num_attention_heads" if part == "q" else "num_key_value_heads"
            for name in infos:
                if f".self_attn.{part}_proj." in name:
                    pieces[name] = dataclasses.replace(pieces[name], paired_heads=config[heads])

    def read(name: str) -> np.ndarray:
        info, piece = infos[name], pieces[name]
        if not math.prod(info.shape):
            return np.empty(info.shape, info.dtype)
        # A mapping of its own for each tensor: when the array goes, so do its pages.
        flat = np.memmap(file, np.uint8, "r", piece.offset, (piece.num_bytes,)).view(np.ndarray)
        rows = flat.reshape(info.shape[0], -1)  # blocks of quantization do not cross rows
        if piece.paired_heads:
            rows = _halved(rows, piece.paired_heads)
        if piece.kind.name in DTYPES:
            return rows.view(info.dtype).reshape(info.shape)
        return gguf.quants.dequantize(rows, piece.kind).reshape(info.shape)

    return Weights(source, infos, read, config, file.parent)


def gguf_tokenizer(file: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, as transformers builds it; `save_pretrained` writes its files.

    `AutoTokenizer` would read the file through PyTorch, which the conversion itself does without.

    Raises:
      UserError: the package `gguf` is not installed, or transformers cannot convert it.
    """
    _, reader = _reader(Path(file), os.fspath(file))
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

        fields, settings = (
            {
                ours: value
                for name, ours in GGUF_TOKENIZER_MAPPING[group].items()
                if (value := _field(reader, f"tokenizer.{name}")) is not None
            }
            for group in ("tokenizer", "tokenizer_config")
        )
        if fields.get("tokenizer_type") == "llama":
            settings.setdefault("add_bos_token", True)  # llama.cpp, where the file says nothing
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            place = fields.get(f"{name}_id")
            settings[name] = None if place is None else fields["tokens"][place]
        converted, more = convert_gguf_tokenizer(_field(reader, "general.architecture"), fields)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, **settings, **more)
    except (ValueError, LookupError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"transformers makes no tokenizer of {os.fspath(file)!r} ({reason}): update "
            "transformers, or take the tokenizer of the original model."
        ) from error
    if _field(reader, "tokenizer.ggml.pre") == "smollm":
        # transformers leaves GPT-2's splitting, which joins spaces before a digit otherwise.
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def _reader(file: Path, source: str) -> tuple[Any, GGUFReader]:
    """The module `gguf`, and its reader of this file, which reads no tensor yet."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError(
            f"{source!r} is a GGUF file, and the package that reads them is not installed: "
            "pip install gguf."
        ) from error
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(
            f"{source!r} is no whole GGUF file that the installed gguf reads: {error}. Fetch it "
            "again, or update gguf."
        ) from error
    if reader.byte_order != "I":
        raise UserError(f"{source!r} is of the other byte order: take a file for this machine.")
    if _field(reader, "split.count", 1) > 1:
        raise UserError(
            f"{source!r} is one of {_field(reader, 'split.count')} parts of a model: join them "
            "with `llama-gguf-split --merge`."
        )
    return gguf, reader


def _field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _tensors(
    gguf: Any, reader: GGUFReader, source: str
) -> tuple[dict[str, TensorInfo], dict[str, _Piece]]:
    infos, pieces = {}, {}
    kinds = {tensor.tensor_type for tensor in reader.tensors}
    refused = {kind for kind in kinds if kind.name not in DTYPES and not _is_covered(gguf, kind)}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        kind = tensor.tensor_type
        if kind in refused:
            raise UserError(
                f"The tensor {tensor.name!r} of {source!r} is of type {kind.name}, which the "
                "installed gguf cannot dequantize: update it, or take a file of another "
                "quantization, such as Q8_0."
            )
        name = transformers_name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        infos[name] = TensorInfo(shape, DTYPES.get(kind.name, np.dtype(np.float32)))
        pieces[name] = _Piece(int(tensor.data_offset), int(tensor.n_bytes), kind, 0)
    return infos, pieces


def _is_covered(gguf: Any, kind: Any) -> bool:
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _halved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries or keys in the order of transformers.

    Rotary embeddings turn pairs of a head's elements: (i, i + half) in transformers, neighbours in
    llama.cpp's "llama", whose converter has moved the rows to match (`LlamaModel.permute`).
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(reader: GGUFReader, tensors: Mapping[str, TensorInfo], source: str) -> dict[str, Any]:
    """The `config.json` that the metadata stands for."""
    architecture = _field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{source!r} has general.architecture={architecture!r}, which is not covered: it must "
            f"be one of {', '.join(ARCHITECTURES)}."
        )

    def field(name: str, default: Any = None) -> Any:
        value = _field(reader, f"{architecture}.{name}", default)
        # Written as float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def needed(name: str) -> int:
        value = field(name)
        if not isinstance(value, int):
            given = "no" if value is None else "a list for"
            raise UserError(
                f"{source!r} has {given} {architecture}.{name} in its metadata, which needs one "
                "number: its layers must be alike."
            )
        return value

    if field("expert_count"):
        raise UserError(f"{source!r} is a mixture of experts, which is not covered.")
    words = "model.embed_tokens.weight"
    if words not in tensors:
        raise UserError(f"{source!r} has no 'token_embd.weight': it is no whole model.")
    heads = needed("attention.head_count")
    width = needed("embedding_length")
    head_width = field("attention.key_length", width // heads)
    config = {
        "model_type": architecture,
        "vocab_size": tensors[words].shape[0],
        "hidden_size": width,
        "intermediate_size": needed("feed_forward_length"),
        "num_hidden_layers": needed("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": (
            heads if field("attention.head_count_kv") is None else needed("attention.head_count_kv")
        ),
        "head_dim": head_width,
        "max_position_embeddings": needed("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": field("rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in tensors,
    }
    turned = field("rope.dimension_count", head_width)
    if turned != head_width:
        config["partial_rotary_factor"] = turned / head_width
    if (window := field("attention.sliding_window")) is not None:
        if architecture != "llama":
            raise UserError(
                f"{source!r} has {architecture}.attention.sliding_window={window}, which is "
                "covered for Mistral only."
            )
        config |= {"model_type": "mistral", "sliding_window": window}
    if (scaling := _rope_scaling(reader, field, config, source)) is not None:
        config["rope_scaling"] = scaling
    for token in ("bos", "eos"):
        config[f"{token}_token_id"] = _field(reader, f"tokenizer.ggml.{token}_token_id")
    config["pad_token_id"] = _field(reader, "tokenizer.ggml.padding_token_id")
    return config


def _rope_scaling(
    reader: GGUFReader, field: Any, config: Mapping[str, Any], source: str
) -> dict[str, Any] | None:
    """The `rope_scaling` of the config.

    The kind of LLaMA 3.1 is in the file as a tensor only, of what each frequency is divided by.
    """
    factors = next((x.data for x in reader.tensors if x.name == ROPE_FACTORS), None)
    if factors is not None and np.ptp(factors) + abs(factors[0] - 1) > 0:
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": field("rope.scaling.original_context_length", 8192),
        }
        whole, divided = (
            rotary_frequencies(llama_config(dict(config) | {"rope_scaling": kind}))
            for kind in (None, scaling)
        )
        if whole.shape != factors.shape or not np.allclose(whole / divided, factors, rtol=1e-3):
            raise UserError(
                f"{source!r} divides its rotary frequencies ({ROPE_FACTORS!r}) otherwise than "
                "LLaMA 3.1 does, which is not covered."
            )
        return scaling
    kind, factor = field("rope.scaling.type", "none"), field("rope.scaling.factor")
    if factor is None and field("rope.scale_linear") is not None:  # files of 2023
        kind, factor = "linear", field("rope.scale_linear")
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    return {"rope_type": kind, "factor": factor}
