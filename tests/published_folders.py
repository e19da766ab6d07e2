"""Folders as they are published: tiny weights of transformers, a tokenizer, a processor."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from tiny_tasks import fast_jit
from reference import randomized
from reference_blip import CLASSES as BLIP
from reference_blip import DEC as BLIP_DEC
from reference_blip import random_blip
from reference_t5 import VARIANTS, with_own_head
from tiny_checkpoints import (
    CLIP_TEXT,
    IMAGE_TOKEN,
    OPT,
    QFORMER,
    QUERIES,
    VISION,
    VOCAB,
    WORDS,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jaxblip.interop.processors import ImageProcessing
from jaxblip.tasks.base import normalize_images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
LLAMA = dict(
    model_type="llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, bos_token_id=0,
    eos_token_id=2, pad_token_id=1, max_position_embeddings=32,
)  # fmt: skip
T5 = dict(
    model_type="t5", vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=3,
    num_decoder_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
    **VARIANTS["blip2"],
)  # fmt: skip
BERT = dict(
    vocab_size=WORDS - 1, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=8,
)  # fmt: skip
INSTRUCTBLIP = "InstructBlipForConditionalGeneration"
OVER_ANY = ("Blip2ForConditionalGeneration", INSTRUCTBLIP)  # over any language model
LANGUAGE_MODELS = {"opt": OPT, "llama": LLAMA, "t5": T5}
OF_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(size: int, first: list[str], last: list[str] = (), **special):
    """A tokenizer of whole words: `first`, as many words as are lacking, `last`."""
    words = [f"w{i}" for i in range(size - len(first) - len(last))]
    vocabulary = {word: i for i, word in enumerate([*first, *words, *last])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As published ones do: BERT's text has both ends, a decoder's a beginning, an encoder's an end.
    start = special.get("cls_token", special.get("bos_token"))
    end = special.get("sep_token", None if start else special["eos_token"])
    parts = [token for token in (start, "$A", end) if token]
    ids = [(token, vocabulary[token]) for token in parts if token != "$A"]
    backend.post_processor = TemplateProcessing(single=" ".join(parts), special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tokenizer_of(name: str):
    """That of a kind of model: bert, blip, clip, t5, or a language model."""
    if name == "blip":  # ids as in `reference_blip`; as published, without [DEC] and [ENC]
        return tokenizer(
            BLIP_DEC, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], pad_token="[PAD]",
            unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        )  # fmt: skip
    if name == "bert":
        return tokenizer(
            WORDS - 1, OF_BERT, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
            sep_token="[SEP]", mask_token="[MASK]",
        )  # fmt: skip
    if name == "clip":
        return tokenizer(
            VOCAB, ["<s>", "<pad>", "<unk>"], ["</s>"], bos_token="<s>", eos_token="</s>",
            pad_token="<pad>", unk_token="<unk>",
        )  # fmt: skip
    first = ["<pad>", "</s>", "<unk>"] if name == "t5" else ["<s>", "<pad>", "</s>", "<unk>"]
    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    if name != "t5":
        special["bos_token"] = "<s>"
    return tokenizer(VOCAB, first, ["<image>"], **special)


def random_model(
    name: str, language_model: str = "opt", vision: dict | None = None, seed: int = 0
):
    """A tiny model of the transformers class `name`, with every parameter random."""
    if name in BLIP:
        return random_blip(name, seed, talkative=True)
    vision = VISION | (vision or {})
    if name == "CLIPModel":
        config = transformers.CLIPConfig(
            vision_config=vision, text_config=CLIP_TEXT, projection_dim=8
        )
    elif name == "CLIPVisionModel":
        config = transformers.CLIPVisionConfig(**vision)
    elif name == "SiglipVisionModel":
        config = transformers.SiglipVisionConfig(**vision)
    elif name == "BertModel":
        config = transformers.BertConfig(**BERT)
    elif name == INSTRUCTBLIP:
        config = transformers.InstructBlipConfig(
            vision_config=vision,
            qformer_config=QFORMER,
            text_config=LANGUAGE_MODELS[language_model],
            image_token_index=IMAGE_TOKEN,
            num_query_tokens=QUERIES,
        )
    elif name.startswith("Blip2"):
        retrieval = name == "Blip2ForImageTextRetrieval"
        config = transformers.Blip2Config(
            vision_config=vision,
            qformer_config=QFORMER | dict(use_qformer_text_input=retrieval),
            text_config=LANGUAGE_MODELS[language_model],
            image_token_index=None if retrieval else IMAGE_TOKEN,
            num_query_tokens=QUERIES,
            image_text_hidden_size=8,
        )
    else:
        kind = {"OPTForCausalLM": "opt", "LlamaForCausalLM": "llama"}.get(name, "t5")
        fields = dict(LANGUAGE_MODELS[kind])
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = getattr(transformers, name)(config)
    if "T5" in name or (name in OVER_ANY and language_model == "t5"):
        with_own_head(getattr(model, "language_model", model))
    model = randomized(model, seed, scale=0.2)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("qkv.bias"):  # published checkpoints have no key bias
                value[len(value) // 3 : 2 * len(value) // 3] = 0
        if name in OVER_ANY:  # nothing says the placeholder
            model.language_model.lm_head.weight[IMAGE_TOKEN] = 0
    return model


KINDS = {
    "Blip2ForImageTextRetrieval": "bert",
    "BertModel": "bert",
    **dict.fromkeys(BLIP, "blip"),
    "CLIPModel": "clip",
    "OPTForCausalLM": "opt",
    "LlamaForCausalLM": "llama",
    "T5ForConditionalGeneration": "t5",
}


def publish(folder: Path, name: str, language_model: str = "opt", **fields):
    """The model, and `folder` with all that belongs to it."""
    model = random_model(name, language_model, **fields)
    model.save_pretrained(folder)
    kind = language_model if name in OVER_ANY else KINDS.get(name)
    if kind:
        made = tokenizer_of(kind)
        if name == "Blip2ForImageTextRetrieval":
            made.add_tokens(["[DEC]"], special_tokens=True)
        made.save_pretrained(folder)
    if name == INSTRUCTBLIP:
        made = tokenizer_of("bert")
        made.add_tokens(["[DEC]"], special_tokens=True)
        made.save_pretrained(folder / "qformer_tokenizer")
    if hasattr(model.config, "vision_config") or "Vision" in name:
        size = getattr(model.config, "vision_config", model.config).image_size
        content = ImageProcessing(size, mean=MEAN, std=STD).to_hf()
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return model


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 images `[batch, height, width, 3]` as the processor of `publish` has them."""
    normal = np.asarray(normalize_images(images, MEAN, STD))
    return torch.tensor(normal.transpose(0, 3, 1, 2).copy())


# Of transformers' image encoders, and of those in the files of LAVIS and of BLIP's authors.
AUTHORS_VIT_NAMES = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("layer_norm", "norm"),
)


def compute(run, *inputs, method=None):
    """What a method of a run's model gives."""
    function = fast_jit(lambda params: run.task.apply(params, *inputs, method=method))
    return jax.tree.map(np.asarray, function(run.params))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-4)
