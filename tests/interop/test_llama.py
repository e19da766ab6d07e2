"""Configs of the LLaMA family as transformers and the hub write them."""

from __future__ import annotations

import json

import pytest
import transformers
from reference_llama import VARIANTS, random_llama

from jaxblip.errors import UserError
from jaxblip.interop.families.llama import DEFAULTS, llama_config
from jaxblip.models.llama import LlamaConfig

SIZES = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(model_type="llama", **fields):
    return llama_config(SIZES | {"model_type": model_type} | fields)


# Contents of published files, shortened to what the architecture needs.

VICUNA = dict(
    SIZES,
    architectures=["LlamaForCausalLM"],
    hidden_act="silu",
    initializer_range=0.02,
    max_position_embeddings=4096,
    model_type="llama",
    num_key_value_heads=32,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    tie_word_embeddings=False,
    transformers_version="4.31.0",
)
LLAMA_3_2_1B = dict(
    attention_bias=False,
    attention_dropout=0.0,
    head_dim=64,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=8192,
    max_position_embeddings=131072,
    mlp_bias=False,
    model_type="llama",
    num_attention_heads=32,
    num_hidden_layers=16,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_scaling=LLAMA3_SCALING,
    rope_theta=500000.0,
    tie_word_embeddings=True,
    vocab_size=128256,
)
MISTRAL_7B = dict(
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=32768,
    model_type="mistral",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=32000,
)
QWEN2_HALF_B = dict(
    hidden_act="silu",
    hidden_size=896,
    intermediate_size=4864,
    max_position_embeddings=32768,
    max_window_layers=21,
    model_type="qwen2",
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
)
QWEN3_0_6B = dict(
    attention_bias=False,
    head_dim=128,
    hidden_act="silu",
    hidden_size=1024,
    intermediate_size=3072,
    max_position_embeddings=40960,
    max_window_layers=28,
    model_type="qwen3",
    num_attention_heads=16,
    num_hidden_layers=28,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
)
PUBLISHED = {
    "Vicuna-7B v1.5": (
        VICUNA,
        LlamaConfig(num_kv_heads=32, max_positions=4096, norm_epsilon=1e-5),
    ),
    "Vicuna-7B v1.5 16k": (
        VICUNA | {"rope_scaling": {"factor": 4.0, "type": "linear"}},
        LlamaConfig(
            num_kv_heads=32, max_positions=4096, norm_epsilon=1e-5, rope_type="linear",
            rope_factor=4.0,
        ),
    ),
    "LLaMA-3.2-1B": (
        LLAMA_3_2_1B,
        LlamaConfig(
            vocab_size=128256, width=2048, num_layers=16, num_kv_heads=8, head_width=64,
            mlp_width=8192, max_positions=131072, norm_epsilon=1e-5, tied_head=True,
            rope_theta=500000.0, rope_type="llama3", rope_factor=32.0,
        ),
    ),
    "Mistral-7B v0.1": (
        MISTRAL_7B,
        LlamaConfig(
            num_kv_heads=8, mlp_width=14336, max_positions=32768, norm_epsilon=1e-5,
            sliding_window=4096,
        ),
    ),
    "Qwen2-0.5B": (
        QWEN2_HALF_B,
        LlamaConfig(
            vocab_size=151936, width=896, num_layers=24, num_heads=14, num_kv_heads=2,
            mlp_width=4864, max_positions=32768, tied_head=True, qkv_bias=True, rope_theta=1e6,
        ),
    ),
    "Qwen3-0.6B": (
        QWEN3_0_6B,
        LlamaConfig(
            vocab_size=151936, width=1024, num_layers=28, num_heads=16, num_kv_heads=8,
            head_width=128, mlp_width=3072, max_positions=40960, tied_head=True, qk_norm=True,
            rope_theta=1e6,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name, tmp_path):
    hf, expected = PUBLISHED[name]
    assert llama_config(hf) == expected
    # The same model as the installed transformers would write it.
    rewritten = transformers.AutoConfig.for_model(**hf)
    rewritten.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written
    assert effective(llama_config(written)) == effective(expected)


def effective(config):
    return {**vars(config), "head_width": config.attention_shape[2]}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_what_is_missing_has_the_default_of_its_class(model_type):
    defaults = transformers.AutoConfig.for_model(model_type)
    sizes = {name: getattr(defaults, name) for name in SIZES}
    short = llama_config({"model_type": model_type, **sizes})
    assert effective(short) == effective(llama_config(defaults.to_dict()))
    narrow = transformers.AutoConfig.for_model(model_type, hidden_size=1024)
    short = llama_config({"model_type": model_type, **sizes, "hidden_size": 1024})
    assert effective(short) == effective(llama_config(narrow.to_dict()))


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_null_follows_another_field(model_type):
    found = config(model_type, num_key_value_heads=None, head_dim=None, rope_parameters=None)
    assert found.attention_shape == (32, 32, 128) and found.rope_theta == 1e4


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_agrees_on_biases_and_norms(variant):
    model = random_llama(variant)
    config, names = llama_config(model.config.to_dict()), model.state_dict()
    has = {
        "qkv_bias": "q_proj.bias", "out_bias": "o_proj.bias", "mlp_bias": "down_proj.bias",
        "qk_norm": "k_norm.weight",
    }  # fmt: skip
    for field, name in has.items():
        assert getattr(config, field) == any(name in full for full in names), field


def test_a_field_of_another_class_is_without_effect():
    assert not config("mistral", attention_bias=True).qkv_bias
    assert config("qwen2", attention_bias=False).qkv_bias
    assert not config("qwen2", attention_bias=True).out_bias
    assert not config("qwen3", mlp_bias=True).mlp_bias
    assert config("llama", sliding_window=5).sliding_window == 0


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({}, 0),
        ({"use_sliding_window": True, "max_window_layers": 32}, 0),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 4096),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 32}, 0),
    ],
)
def test_sliding_window_of_qwen(fields, window):
    assert config("qwen2", **fields).sliding_window == window


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_SCALING}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_SCALING}, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3_SCALING},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, **LLAMA3_SCALING}},
    ],
)
def test_layouts_of_rotary_embeddings(rope):
    found = config(**rope)
    assert (found.rope_type, found.rope_theta, found.rope_factor) == ("llama3", 5e5, 32.0)
    assert found.rope_original_positions == 8192
    theirs = transformers.LlamaConfig(**SIZES, **json.loads(json.dumps(rope)))
    assert llama_config(theirs.to_dict()).rope_theta == 5e5


def test_original_positions_of_llama3():
    rope = {k: v for k, v in LLAMA3_SCALING.items() if not k.startswith("original")}
    found = config(rope_scaling=rope, max_position_embeddings=4096)
    assert found.rope_original_positions == 4096
    outside = config(rope_scaling=LLAMA3_SCALING, original_max_position_embeddings=1024)
    assert outside.rope_original_positions == 1024


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling={'type': 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters={'rope_type': 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "without 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without 'low_freq_factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "{'full_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "max_window_layers=28"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32},
            "layer_types=.'sliding_attention', 'sliding",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 16,
            },
            "layer_types=.'full_attention', 'sliding",
        ),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 32}, "'linear_attention'"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types=.'full_att"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 32},
            "layer_types=.'full_att",
        ),
    ],
)
def test_what_is_not_covered(fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)
