"""bfloat16: what rounding costs our models, beside what it costs those of transformers.

Weights and images have values that bfloat16 holds, so the errors are those of the computation. It
is compared with transformers' own attention ("eager"): PyTorch's kernel for the CPU keeps weights
of the attention in float32 which the kernels for GPUs round, as both sides here do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import randomized
from reference_t5 import VARIANTS, with_own_head
from reference_weights import params_in
from tiny_checkpoints import save
from tiny_tasks import fast_jit

from jaxblip.interop.families import blip, blip2, clip, instructblip
from jaxblip.models.attention import padding_mask

SEEDS, ROWS, TEXT, QUERIES, VOCAB, SIZE, WIDTH = 8, 8, 8, 4, 64, 16, 64
LAST = VOCAB - 1  # id of the image's placeholder, of CLIP's end and of BLIP's beginning of texts
BLOCKS = dict(
    hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3, num_attention_heads=4
)
VISION = BLOCKS | dict(image_size=SIZE, patch_size=4)
TEXTS = BLOCKS | dict(vocab_size=VOCAB, max_position_embeddings=TEXT)
QFORMER = TEXTS | dict(encoder_hidden_size=WIDTH, num_hidden_layers=4)
LANGUAGE_MODELS = {
    "opt": dict(
        model_type="opt", vocab_size=VOCAB, hidden_size=WIDTH, word_embed_proj_dim=WIDTH,
        ffn_dim=2 * WIDTH, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32,
    ),
    "llama": BLOCKS | dict(
        model_type="llama", vocab_size=VOCAB, num_key_value_heads=2, bos_token_id=2,
        eos_token_id=2, pad_token_id=1,
    ),
    "t5": VARIANTS["blip2"] | dict(
        model_type="t5", vocab_size=VOCAB, d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=3,
        num_heads=4, decoder_start_token_id=0,
    ),
}  # fmt: skip

Batch = dict[str, np.ndarray]
Outputs = dict[str, Any]


class Case(NamedTuple):
    """A class of transformers, the same model here, and what both give for a batch."""

    config: transformers.PreTrainedConfig
    model: Callable  # of the config.json and the dtype
    layout: Callable
    theirs: Callable[[Any, Batch], Outputs]
    ours: Callable[[Any, Batch], Outputs]


def random_batch(seed: int) -> Batch:
    """Images, and texts without padding: what stands there has no meaning."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(ROWS, SIZE, SIZE, 3)).astype(jnp.bfloat16).astype(np.float32)
    texts = rng.integers(3, LAST, (3, ROWS, TEXT)).astype(np.int32)
    batch = {"images": images} | dict(zip(("text", "input", "instruction"), texts, strict=True))
    return batch | {"valid": np.ones((ROWS, TEXT), bool)}


def tensors(model, batch: Batch, **ids) -> dict:
    """The images, and integers by the names of transformers."""
    pixels = torch.tensor(np.moveaxis(batch["images"], 3, 1).copy()).to(model.dtype)
    return {"pixel_values": pixels} | {k: torch.tensor(x).long() for k, x in ids.items()}


def ended(ids):
    return np.concatenate([ids[:, :-1], np.full((ROWS, 1), LAST)], axis=1)


def begun(ids):
    return np.concatenate([np.full((ROWS, 1), LAST), ids[:, 1:]], axis=1)


def clip_theirs(model, batch):
    output = model(**tensors(model, batch, input_ids=ended(batch["text"])))
    return {"image": output.image_embeds, "text": output.text_embeds}


def clip_ours(model, batch):
    ids = batch["text"].at[:, -1].set(LAST)
    image, text = model(batch["images"], ids, batch["valid"])
    return {"image": image, "text": text}


def stage1_theirs(model, batch):
    given = tensors(model, batch, input_ids=batch["text"], attention_mask=batch["valid"])
    contrast, match = model(**given), model(**given, use_image_text_matching_head=True)
    return {
        "features": contrast.vision_model_output.last_hidden_state,
        "image": contrast.image_embeds,
        "text": contrast.text_embeds,
        "both": match.text_model_output.last_hidden_state,
    }


def stage1_ours(model, batch):
    features = model.image_features(batch["images"])
    image = model.read_image(features)
    return {
        "features": features,
        "image": model.embed_images(image),
        "text": model.embed_texts(batch["text"], batch["valid"]),
        "both": model.qformer(image, batch["text"]),
    }


def stage2_theirs(model, batch):
    is_encoder_decoder = model.config.text_config.is_encoder_decoder
    prefix = np.full((ROWS, QUERIES), LAST)
    text = batch["input" if is_encoder_decoder else "text"]
    ids = {"input_ids": np.concatenate([prefix, text], axis=1)}
    if is_encoder_decoder:
        ids["labels"] = batch["text"]
    if model.config.model_type == "instructblip":
        ids |= {"qformer_input_ids": batch["instruction"], "qformer_attention_mask": batch["valid"]}
    logits = model(**tensors(model, batch, **ids)).logits
    return {"logits": logits if is_encoder_decoder else logits[:, QUERIES - 1 : -1]}


def stage2_ours(model, batch):
    valid = batch["valid"]
    given = dict(input_ids=batch["input"], input_valid=valid)
    if model.qformer_config.has_text:
        given |= dict(instruction_ids=batch["instruction"], instruction_valid=valid)
    return {"logits": model(batch["images"], batch["text"], valid, **given)}


def captioner_theirs(model, batch):
    return {"logits": model(**tensors(model, batch, input_ids=begun(batch["text"]))).logits}


def captioner_ours(model, batch):
    return {"logits": model(batch["images"], batch["text"], batch["valid"])}


def retrieval_theirs(model, batch):
    output = model(**tensors(model, batch, input_ids=batch["text"]))
    return {"features": output.last_hidden_state, "both": output.question_embeds}


def retrieval_ours(model, batch):
    features = model.image_features(batch["images"])
    hidden, _ = model.text(batch["text"], padding_mask(batch["valid"]), model.read_image(features))
    return {"features": features, "both": hidden}


def stage2(language_model: str, kind: str = "Blip2") -> Case:
    config = getattr(transformers, f"{kind}Config")(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=LANGUAGE_MODELS[language_model],
        image_token_index=LAST,
        num_query_tokens=QUERIES,
    )
    config.architectures = [f"{kind}ForConditionalGeneration"]
    model, layout = {
        "Blip2": (blip2.blip2_model, blip2.blip2_layout),
        "InstructBlip": (instructblip.instructblip_model, instructblip.instructblip_layout),
    }[kind]
    return Case(config, model, layout, stage2_theirs, stage2_ours)


def blip_config(architecture: str) -> transformers.BlipConfig:
    return transformers.BlipConfig(
        vision_config=VISION,
        text_config=TEXTS | dict(bos_token_id=LAST, sep_token_id=2),
        image_text_hidden_size=32,
        architectures=[architecture],
    )


CASES = {
    "CLIP": Case(
        transformers.CLIPConfig(
            vision_config=VISION,
            text_config=TEXTS | dict(bos_token_id=0, eos_token_id=LAST),
            projection_dim=32,
            architectures=["CLIPModel"],
        ),
        clip.clip_model,
        clip.clip_layout,
        clip_theirs,
        clip_ours,
    ),
    "BLIP-2 stage 1": Case(
        transformers.Blip2Config(
            vision_config=VISION,
            qformer_config=QFORMER | dict(use_qformer_text_input=True),
            text_config=LANGUAGE_MODELS["opt"],
            num_query_tokens=QUERIES,
            image_text_hidden_size=32,
            architectures=["Blip2ForImageTextRetrieval"],
        ),
        lambda hf, dtype: blip2.blip2_retrieval_model(hf, dtype=dtype),
        blip2.blip2_retrieval_layout,
        stage1_theirs,
        stage1_ours,
    ),
    "BLIP-2, OPT": stage2("opt"),
    "BLIP-2, LLaMA": stage2("llama"),
    "BLIP-2, T5": stage2("t5"),
    "InstructBLIP, LLaMA": stage2("llama", "InstructBlip"),
    "BLIP, captions": Case(
        blip_config("BlipForConditionalGeneration"),
        blip.blip_captioner,
        blip.blip_captioner_layout,
        captioner_theirs,
        captioner_ours,
    ),
    "BLIP, retrieval": Case(
        blip_config("BlipForImageTextRetrieval"),
        lambda hf, dtype: blip.blip_retrieval_model(hf, dtype=dtype),
        blip.blip_retrieval_layout,
        retrieval_theirs,
        retrieval_ours,
    ),
}


def random_reference(config, seed: int) -> transformers.PreTrainedModel:
    model = getattr(transformers, config.architectures[0])(config)
    if getattr(config, "text_config", config).model_type == "t5":
        with_own_head(model.language_model)
    model = randomized(model, seed, scale=0.15)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("qkv.bias"):  # published checkpoints have no key bias
                value[len(value) // 3 : 2 * len(value) // 3] = 0
            if name.endswith("Attention.q.weight"):  # of T5, which does not scale its scores
                value /= 4
            value.copy_(value.bfloat16().float())
    return model


def squared_error(outputs: Outputs, expected: Outputs) -> float:
    """Relative to each output, averaged over them."""
    return np.mean(
        [np.sum((outputs[name] - x) ** 2) / np.sum(x**2) for name, x in expected.items()]
    )


def float64(outputs: Outputs) -> Outputs:
    return {name: x.double().numpy() for name, x in outputs.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_error_is_no_larger_than_that_of_transformers(name, tmp_path):
    case = CASES[name]
    model = case.model(case.config.to_dict(), jnp.bfloat16)
    layout = case.layout(model)
    batch = jax.tree.map(jnp.asarray, random_batch(0))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method=case.ours))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes["params"])
    shapes = {part: tree for part, tree in shapes.items() if layout.holds(part)}
    run = fast_jit(lambda params, batch: model.apply({"params": params}, batch, method=case.ours))

    ours, theirs = [], []
    for seed in range(SEEDS):
        batch, reference = random_batch(seed), random_reference(case.config, seed)
        folder = save(reference, tmp_path / str(seed))
        rounded = type(reference).from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        with torch.no_grad():
            expected = float64(case.theirs(reference, batch))
            outputs = float64(case.theirs(rounded, batch))
        theirs.append(squared_error(outputs, expected))
        params = params_in(folder, layout, shapes) | {"temperature": np.float32(1)}
        outputs = {k: np.asarray(x, np.float64) for k, x in run(params, batch).items()}
        ours.append(squared_error(outputs, expected))
    ours, theirs = np.mean(ours) ** 0.5, np.mean(theirs) ** 0.5
    print(f"{name}: {ours:.2e}, transformers {theirs:.2e}")
    assert 1e-3 < theirs < 0.1  # rounding shows, and it is no chaos
    assert ours <= theirs
