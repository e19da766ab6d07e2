"""GGUF files, written here as llama.cpp's converter writes them, against transformers."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from reference_llama import LLAMA3_ROPE, VARIANTS, llama_params, random_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.gguf import dequant
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from jaxblip.errors import UserError
from jaxblip.interop.families.llama import llama_config, llama_layout
from jaxblip.interop.files import open_weights
from jaxblip.interop.gguf import gguf_tokenizer, transformers_name
from jaxblip.interop.load import load_params
from jaxblip.models.llama import LlamaLanguageModel, rotary_frequencies

F32 = gguf.GGMLQuantizationType.F32
ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[module]}.{kind}"


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys as the converter has them: (i, i + half) become neighbours."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write(file, model, kind=F32, *, endianess=gguf.GGUFEndian.LITTLE, extra=lambda writer: None):
    """`model` as a GGUF file; of its matrices each has the type `kind`."""
    c = model.config
    writer = gguf.GGUFWriter(file, ARCHITECTURE[c.model_type], endianess=endianess)
    writer.add_name("tiny")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    head_width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_rope_dimension_count(head_width)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    if getattr(c, "sliding_window", None):
        writer.add_sliding_window(c.sliding_window)
    if c.rope_parameters["rope_type"] == "llama3":
        ours = llama_config(c.to_dict())
        plain = llama_config(c.to_dict() | {"rope_parameters": {"rope_theta": ours.rope_theta}})
        factors = rotary_frequencies(plain) / rotary_frequencies(ours)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    extra(writer)
    for name, tensor in state_of(model).items():
        if ARCHITECTURE[c.model_type] == "llama" and ".q_proj." in name:
            tensor = interleaved(tensor, c.num_attention_heads)
        if ARCHITECTURE[c.model_type] == "llama" and ".k_proj." in name:
            tensor = interleaved(tensor, c.num_key_value_heads)
        # As in published files, vectors stay float32.
        dtype = kind if tensor.ndim == 2 else F32
        data = gguf.quantize(np.ascontiguousarray(tensor), dtype)
        writer.add_tensor(gguf_name(name), data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def state_of(model) -> dict[str, np.ndarray]:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def tiny(variant: str):
    # Published LLaMA 3.1 says nothing of its frequencies but the tensor of factors.
    rope = LLAMA3_ROPE | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    return random_llama(variant, **(dict(rope_parameters=rope) if variant == "llama3" else {}))


@functools.cache
def shapes(config):
    model = LlamaLanguageModel(config)
    words = jax.numpy.zeros((1, 2), int)

    def run(module):
        hidden, _ = module(module.embed(words), words, jax.numpy.ones((1, 1, 2, 2), bool))
        return module.logits(hidden)

    return jax.eval_shape(lambda key: model.init(key, method=run), jax.random.key(0))["params"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_config_are_those_of_the_model(variant, tmp_path):
    reference = tiny(variant)
    weights = open_weights(write(tmp_path / "tiny.gguf", reference))
    config = llama_config(weights.config)
    expected = llama_config(reference.config.to_dict())
    head_width = expected.attention_shape[-1]  # the file always says it
    assert config == dataclasses.replace(expected, head_width=head_width)
    on_device = jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes(config)
    )
    params = load_params(weights, llama_layout(config), shapes(config), on_device)
    jax.tree.map(np.testing.assert_array_equal, params, llama_params(reference))
    assert weights.config["eos_token_id"] == 2 and weights.folder == tmp_path


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_a_quantized_file_gives_the_values_that_quantization_left(variant, kind, tmp_path):
    reference = random_llama(variant, intermediate_size=64)
    kind = gguf.GGMLQuantizationType[kind]
    weights = open_weights(write(tmp_path / "tiny.gguf", reference, kind))
    for name, tensor in state_of(reference).items():
        expected = tensor
        if tensor.ndim == 2:
            expected = gguf.dequantize(gguf.quantize(tensor, kind), kind).reshape(tensor.shape)
        array, info = weights.read(name), weights.tensors[name]
        assert array.dtype == info.dtype and array.shape == info.shape == tensor.shape
        np.testing.assert_array_equal(array.astype(np.float32), expected, err_msg=name)
        if kind.name in ("F16", "BF16") and tensor.ndim == 2:
            assert array.dtype.itemsize == 2  # as it is in the file


@pytest.mark.parametrize("variant", ["llama", "smollm2", "qwen2", "qwen3"])
def test_transformers_reads_the_same_of_the_file(variant, tmp_path):
    file = write(tmp_path / "tiny.gguf", random_llama(variant))
    config = transformers.AutoConfig.for_model(**load_gguf_checkpoint(file)["config"])
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(file, return_tensors=True, model_to_load=empty)["tensors"]
    weights = open_weights(file)
    assert sorted(theirs) == sorted(weights.tensors)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(weights.read(name), tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_types_that_only_llama_cpp_writes(kind, tmp_path):
    """Random blocks, against the PyTorch code of transformers."""
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 6, 2 * block
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // block * size), np.uint8)
    blocks &= 0x3F  # no scale of a block is infinite, whichever of its bytes it is in

    def add(writer):
        writer.add_tensor("blk.9.ffn_up.weight", blocks, raw_dtype=kind)

    weights = open_weights(write(tmp_path / "tiny.gguf", random_llama("llama"), extra=add))
    array = weights.read("model.layers.9.mlp.up_proj.weight")
    expected = dequant.dequantize(torch.tensor(blocks), int(kind)).reshape(rows, columns)
    assert array.shape == (rows, columns) and np.isfinite(array).all() and array.std() > 0
    np.testing.assert_allclose(array, expected.numpy(), rtol=1e-6)


def test_names():
    for name in [*state_of(random_llama("llama3")), *state_of(random_llama("qwen3"))]:
        assert transformers_name(gguf_name(name)) == name
    for name in ("blk.0.ffn_gate_exps.weight", "v.patch_embd.weight", "rope_freqs.weight"):
        assert transformers_name(name) == name


def metadata(method, *values):
    return lambda writer: getattr(writer, method)(*values)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (metadata("add_expert_count", 4), "mixture of experts"),
        (metadata("add_uint16", "split.count", 3), "one of 3 parts.*gguf-split --merge"),
        (
            lambda w: w.add_tensor(
                "blk.0.x.weight", np.zeros((2, 292), np.uint8),
                raw_dtype=gguf.GGMLQuantizationType.Q8_K,
            ),
            "'blk.0.x.weight'.*type Q8_K",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 9], np.float32)),
            "rotary frequencies.*otherwise than LLaMA 3.1",
        ),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_refused(extra, message, tmp_path):
    write(tmp_path / "tiny.gguf", random_llama("llama"), extra=extra)
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path / "tiny.gguf")


def test_rotary_embeddings_of_the_metadata(tmp_path):
    def scaled(kind):
        def add(writer):
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(4.0)

        return add

    linear, yarn = gguf.RopeScalingType.LINEAR, gguf.RopeScalingType.YARN
    file = write(tmp_path / "linear.gguf", random_llama("llama"), extra=scaled(linear))
    config = llama_config(open_weights(file).config)
    assert (config.rope_type, config.rope_factor) == ("linear", 4.0)
    file = write(tmp_path / "yarn.gguf", random_llama("llama"), extra=scaled(yarn))
    with pytest.raises(UserError, match="yarn"):
        llama_config(open_weights(file).config)


def test_files_that_are_no_model_are_named(tmp_path, monkeypatch):
    whole = write(tmp_path / "tiny.gguf", random_llama("llama")).read_bytes()
    for number, content in enumerate((b"", b"GGUF", b"not GGUF at all", whole[:600], whole[:-64])):
        (tmp_path / f"{number}.gguf").write_bytes(content)
        with pytest.raises(UserError, match=f"{number}.gguf' is no whole GGUF file"):
            open_weights(tmp_path / f"{number}.gguf")
    write(tmp_path / "big.gguf", random_llama("llama"), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UserError, match="other byte order"):
        open_weights(tmp_path / "big.gguf")
    writer = gguf.GGUFWriter(tmp_path / "clip.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="general.architecture='clip'.*llama, qwen2, qwen3"):
        open_weights(tmp_path / "clip.gguf")
    with pytest.raises(UserError, match="no folder or file.*absent.gguf"):
        open_weights(tmp_path / "absent.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tiny.gguf").write_bytes(whole)
    with pytest.raises(UserError, match="only tiny.gguf: name that file itself"):
        open_weights(tmp_path / "folder")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        open_weights(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "smollm"])
def test_the_tokenizer_of_the_file(kind, tmp_path, monkeypatch):
    texts = ["a cat sat\n\n1. on the mat  22 times", "the cat's hat,   3 of them"]
    if kind == "llama":  # of sentencepiece
        special = ["<unk>", "<s>", "</s>"]
        bpe, alphabet = Tokenizer(models.BPE(unk_token=special[0], byte_fallback=True)), []
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        bpe, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
        bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts * 9,
        trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)

    def add(writer):
        writer.add_tokenizer_model("llama" if kind == "llama" else "gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        if kind == "llama":  # it has no list of merges, and says nothing of its first token
            writer.add_token_scores([-float(place) for place in range(len(tokens))])
        else:
            writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
            writer.add_add_bos_token(False)

    file = write(tmp_path / "tiny.gguf", random_llama("llama"), extra=add)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)  # users have none
        patch.delitem(sys.modules, "transformers.integrations.gguf.reader", raising=False)
        tokenizer = gguf_tokenizer(file)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in (*texts, f"{special[1]}user\n\n\n7{special[2]}\n", "  é"):
        ids = reference(text)["input_ids"]
        if kind == "smollm":  # transformers leaves GPT-2's splitting
            ids = bpe.encode(text).ids
            assert saved.decode(ids, skip_special_tokens=False) == bpe.decode(ids, False)
        assert tokenizer(text)["input_ids"] == saved(text)["input_ids"] == ids
    assert (saved("a")["input_ids"][0] == 2) == (kind == "llama")
    assert saved.bos_token == saved.eos_token == tokens[2]
    assert saved.unk_token is None and saved.pad_token is None


def test_a_tokenizer_that_transformers_does_not_know(tmp_path):
    def add(writer):
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(["a", "b", "c"])

    file = write(tmp_path / "tiny.gguf", random_llama("llama"), extra=add)
    with pytest.raises(UserError, match="makes no tokenizer of .*rwkv.*: update transformers, or"):
        gguf_tokenizer(file)
