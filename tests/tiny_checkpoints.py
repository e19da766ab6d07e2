"""Tiny random checkpoints as transformers saves them, and the models that read them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import torch
import transformers
from safetensors import safe_open

from reference import randomized

QUERIES, TEXT, VOCAB, WORDS = 3, 5, 13, 11
IMAGE_TOKEN = VOCAB - 1

VISION = dict(
    hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    image_size=8, patch_size=4,
)  # fmt: skip
QFORMER = dict(
    hidden_size=16, encoder_hidden_size=20, vocab_size=WORDS, max_position_embeddings=8,
    num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
)  # fmt: skip
OPT = dict(
    model_type="opt", vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24,
    num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32,
)  # fmt: skip
CLIP_TEXT = dict(
    hidden_size=12, intermediate_size=20, num_hidden_layers=2, vocab_size=VOCAB,
    max_position_embeddings=7, num_attention_heads=2, eos_token_id=12, bos_token_id=0,
    pad_token_id=1,
)  # fmt: skip


def random_model(name: str) -> transformers.PreTrainedModel:
    """A tiny model of the transformers class `name`, with every parameter random."""
    if name == "OPTForCausalLM":
        config = transformers.OPTConfig(**OPT)
    elif name == "CLIPModel":
        config = transformers.CLIPConfig(
            vision_config=VISION, text_config=CLIP_TEXT, projection_dim=8
        )
    else:
        retrieval = name == "Blip2ForImageTextRetrieval"
        config = transformers.Blip2Config(
            vision_config=VISION,
            qformer_config=QFORMER | dict(use_qformer_text_input=retrieval),
            text_config=OPT,
            image_token_index=None if retrieval else IMAGE_TOKEN,
            num_query_tokens=QUERIES,
            image_text_hidden_size=8,
        )
    model = randomized(getattr(transformers, name)(config), scale=0.2)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("qkv.bias"):  # published checkpoints have no key bias
                value[len(value) // 3 : 2 * len(value) // 3] = 0
    return model


def save(model: transformers.PreTrainedModel, folder: Path, **kwargs) -> Path:
    """`folder`, with the model as `save_pretrained` writes it."""
    model.save_pretrained(folder, **kwargs)
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, through the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def same_bits(ours: Path, theirs: Path) -> None:
    """Asserts that two folders have the same tensors, bit for bit."""
    actual, expected = read_all(ours), read_all(theirs)
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (actual[name], tensor))), name


def config_of(folder: Path) -> dict:
    """The config.json of a folder."""
    return json.loads((folder / "config.json").read_text())


def shapes_of(model, *inputs, **kwargs) -> dict:
    """Abstract parameters of a Flax module."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **kwargs))["params"]
