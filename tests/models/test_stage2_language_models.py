"""Stage 2 over each language model against transformers, and an instruction in the Q-Former."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import opt_params, random_opt
from reference_llama import llama_params, random_llama
from reference_t5 import random_t5, t5_params
from tiny_checkpoints import shapes_of
from tiny_tasks import fast_jit

from jaxblip.losses.language_modeling import token_cross_entropy
from jaxblip.models.attention import bidirectional_mask
from jaxblip.models.blip2 import Blip2Stage2
from jaxblip.models.language_models import LANGUAGE_MODELS, make_language_model
from jaxblip.models.llama import LlamaConfig
from jaxblip.models.opt import OptConfig
from jaxblip.models.qformer import QFormer, QFormerConfig
from jaxblip.models.t5 import T5Config
from jaxblip.models.vit import VitConfig

ROWS, QUERIES, TEXT, INPUT, INSTRUCTION, VOCAB = 4, 3, 6, 4, 5, 13
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(ROWS, 8, 8, 3)).astype(np.float32)
TEXT_IDS = RNG.integers(2, VOCAB, (ROWS, TEXT)).astype(np.int32)
TEXT_VALID = np.arange(TEXT) < np.array([6, 3, 5, 2])[:, None]
INPUT_IDS = RNG.integers(2, VOCAB, (ROWS, INPUT)).astype(np.int32)
INPUT_VALID = np.arange(INPUT) < np.array([4, 1, 2, 3])[:, None]
PROMPT_LENGTH = np.array([0, 1, 3, 1])
VISION = VitConfig(
    image_size_px=8, patch_size_px=4, width=12, num_layers=1, num_heads=2, mlp_width=20
)
QFORMER = QFormerConfig(
    num_query_tokens=QUERIES, width=16, num_layers=2, num_heads=2, mlp_width=24, has_text=False,
    vocab_size=11, max_positions=8, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
SIZES = dict(vocab_size=VOCAB, num_heads=4, mlp_width=24)


def t5_config(**fields):
    sizes = dict(width=16, head_width=6, num_layers=3, num_decoder_layers=2)
    buckets = dict(num_position_buckets=8, max_position_distance=5)
    return T5Config(**(SIZES | sizes | buckets | fields))


# The model of transformers, its weights for jaxblip, and its config here.
MODELS = {
    "opt": (
        lambda: random_opt(num_attention_heads=4),
        opt_params,
        OptConfig(width=16, num_layers=3, max_positions=32, **SIZES),
    ),
    "llama": (
        lambda: random_llama("llama"),
        llama_params,
        LlamaConfig(width=32, num_layers=2, num_kv_heads=1, **SIZES),
    ),
    "flan_t5": (lambda: random_t5("flan_t5"), t5_params, t5_config()),
    "flan_t5 of blip2": (lambda: random_t5("blip2"), t5_params, t5_config(activation="gelu")),
    "t5": (
        lambda: random_t5("t5"),
        t5_params,
        t5_config(activation="relu", gated=False, tied_head=True),
    ),
}


@functools.cache
def made(name):
    """The model of transformers, ours, and our parameters, all of them random."""
    make, convert, config = MODELS[name]
    reference = make()
    model = Blip2Stage2(VISION, QFORMER, config)
    shapes = shapes_of(model, *inputs(config))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    own = jax.tree.map(np.asarray, convert(reference))
    # The part is exactly the standalone model's tree.
    described = [jax.tree.map(lambda x: x.shape, tree) for tree in (own, shapes["language_model"])]
    assert described[0] == described[1]
    return reference, model, params | {"language_model": own}


def inputs(config):
    texts = (TEXT_IDS, TEXT_VALID)
    return (IMAGES, *texts, *((INPUT_IDS, INPUT_VALID) if config.is_encoder_decoder else ()))


def counted(config):
    """The target tokens: of a decoder-only model those behind the prompt."""
    if config.is_encoder_decoder:
        return TEXT_VALID
    return TEXT_VALID & (np.arange(TEXT) >= PROMPT_LENGTH[:, None])


@functools.cache
def compiled(model):
    @fast_jit
    def loss_and_gradient(params, offset):
        """Of the visual tokens, to which `offset` is added; the visual tokens come out as well."""

        def loss(offset):
            seen = []

            def add(call, args, kwargs, context):
                output = call(*args, **kwargs)
                if isinstance(context.module, Blip2Stage2) and "visual" in context.method_name:
                    seen.append(output)
                    return output + offset
                return output

            with nn.intercept_methods(add):
                config = model.language_model_config
                logits = model.apply({"params": params}, *inputs(config))
            return token_cross_entropy(logits, TEXT_IDS, counted(config)).loss, seen[0]

        return jax.value_and_grad(loss, has_aux=True)(offset)

    return loss_and_gradient


def of_transformers(reference, config, visual):
    """Loss and gradient of the visual tokens, from the sequence put together by hand."""
    labels = torch.tensor(np.where(counted(config), TEXT_IDS, -100)).long()
    visual = torch.tensor(np.asarray(visual), requires_grad=True)
    ids, valid = (
        (INPUT_IDS, INPUT_VALID) if config.is_encoder_decoder else (TEXT_IDS, TEXT_VALID)
    )
    words = reference.get_input_embeddings()(torch.tensor(ids).long())
    valid = np.concatenate([np.ones((ROWS, QUERIES), int), valid], axis=1)
    if not config.is_encoder_decoder:
        ignored = torch.full((ROWS, QUERIES), -100)
        labels = torch.cat([ignored, labels], dim=1)
    loss = reference(
        inputs_embeds=torch.cat([visual, words], dim=1),
        attention_mask=torch.tensor(valid),
        labels=labels,
    ).loss
    loss.backward()
    return loss.item(), visual.grad.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_transformers(name):
    reference, model, params = made(name)
    config = model.language_model_config
    offset = np.zeros((ROWS, QUERIES, config.width), np.float32)
    (loss, visual), gradient = compiled(model)(params, offset)
    expected, expected_gradient = of_transformers(reference, config, visual)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    size = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * size)
    assert size > 1e-3 and (np.abs(expected_gradient).max(axis=(1, 2)) > 0).all()


def test_the_table_has_a_model_of_each_config_tested_here():
    kinds = {config_class for config_class, _ in LANGUAGE_MODELS.values()}
    assert {type(config) for _, _, config in MODELS.values()} == kinds


def test_what_is_padding_in_the_encoder_does_not_matter():
    _, model, params = made("flan_t5")
    changed_ids = np.where(INPUT_VALID, INPUT_IDS, 7)
    assert (changed_ids != INPUT_IDS).any()

    @fast_jit
    def logits(input_ids):
        return model.apply(
            {"params": params}, IMAGES, TEXT_IDS, TEXT_VALID, input_ids, INPUT_VALID
        )

    np.testing.assert_allclose(logits(changed_ids), logits(INPUT_IDS), rtol=1e-5, atol=1e-5)
    seen = np.where(INPUT_VALID, INPUT_IDS - 1, INPUT_IDS)
    assert np.abs(logits(seen) - logits(INPUT_IDS)).max() > 1e-2


# The instruction in the Q-Former (InstructBLIP)

INSTRUCTION_IDS = RNG.integers(0, 11, (ROWS, INSTRUCTION)).astype(np.int32)
INSTRUCTION_VALID = np.arange(INSTRUCTION) < np.array([5, 2, 3, 1])[:, None]
WITH_TEXT = QFormerConfig(
    num_query_tokens=QUERIES, width=16, num_layers=2, num_heads=2, mlp_width=24,
    vocab_size=11, max_positions=8, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


@functools.cache
def instructed():
    model = Blip2Stage2(VISION, WITH_TEXT, t5_config())
    instruction = dict(instruction_ids=INSTRUCTION_IDS, instruction_valid=INSTRUCTION_VALID)
    shapes = shapes_of(model, *inputs(t5_config()), **instruction)
    rng = np.random.default_rng(2)
    return model, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@fast_jit
def visual_tokens(ids, valid):
    model, params = instructed()
    return model.apply({"params": params}, IMAGES, ids, valid, method="visual_tokens")


def test_the_instruction_meets_the_queries_and_only_they_go_on():
    model, params = instructed()

    @fast_jit
    def composed(params):
        def features(model):
            return model.vision_norm(model.vision(IMAGES))

        def read(qformer):
            mask = bidirectional_mask(QUERIES, jnp.array(INSTRUCTION_VALID))
            return qformer(qformer.read_image(seen), INSTRUCTION_IDS, mask)

        seen = model.apply({"params": params}, method=features)
        hidden = QFormer(WITH_TEXT).apply({"params": params["qformer"]}, method=read)
        return hidden[:, :QUERIES] @ params["projection"]["kernel"] + params["projection"]["bias"]

    tokens = visual_tokens(INSTRUCTION_IDS, INSTRUCTION_VALID)
    assert tokens.shape == (ROWS, QUERIES, 16)
    np.testing.assert_allclose(tokens, composed(params), rtol=1e-4, atol=1e-5)


def test_the_instruction_changes_the_visual_tokens_and_its_padding_does_not():
    tokens = visual_tokens(INSTRUCTION_IDS, INSTRUCTION_VALID)
    other_padding = np.where(INSTRUCTION_VALID, INSTRUCTION_IDS, 4)
    assert (other_padding != INSTRUCTION_IDS).any()
    np.testing.assert_allclose(
        visual_tokens(other_padding, INSTRUCTION_VALID), tokens, rtol=1e-5, atol=1e-6
    )
    other = visual_tokens((INSTRUCTION_IDS + 1) % 11, INSTRUCTION_VALID)
    assert (np.abs(other - tokens).max(axis=(1, 2)) > 1e-3).all()


def test_logits_are_about_the_instruction():
    model, params = instructed()
    instruction = dict(instruction_ids=INSTRUCTION_IDS, instruction_valid=INSTRUCTION_VALID)

    @fast_jit
    def run(instruction):
        return model.apply({"params": params}, *inputs(t5_config()), **instruction)

    assert np.abs(run(instruction) - run({})).max() > 1e-3


def test_an_instruction_needs_a_text_side():
    _, model, params = made("flan_t5")
    with pytest.raises(ValueError, match="has_text=True"):
        model.apply({"params": params}, IMAGES, INSTRUCTION_IDS, method="visual_tokens")


@pytest.mark.parametrize(
    ("language_model", "millions"),
    [
        (T5Config(width=2048), 187.26),
        (T5Config(width=4096), 188.84),
        (LlamaConfig(), 188.84),
        (LlamaConfig(width=5120, num_heads=40), 189.62),
    ],
    ids=["FlanT5-XL", "FlanT5-XXL", "Vicuna-7B", "Vicuna-13B"],
)
def test_trainable_parameters_of_instructblip(language_model, millions):
    """The encoder is as wide as ViT-g; its depth does not matter."""
    vision = VitConfig(patch_size_px=112, width=1408, num_layers=1, num_heads=16)
    model = Blip2Stage2(vision, QFormerConfig(), language_model)
    ids, valid = jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
    texts = (ids, valid) * (2 if language_model.is_encoder_decoder else 1)
    shapes = shapes_of(model, jnp.zeros((1, 224, 224, 3)), *texts, instruction_ids=ids)
    trained = {name: shapes[name] for name in ("vision_norm", "qformer", "projection")}
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(
    "config",
    [
        OptConfig(width=16, **SIZES),
        *(LlamaConfig(width=16, tied_head=tied, **SIZES) for tied in (False, True)),
        *(t5_config(tied_head=tied) for tied in (False, True)),
    ],
    ids=["opt", "llama", "llama, tied", "t5", "t5, tied"],
)
def test_scores_of_words_in_bfloat16_are_sums_that_nothing_rounds(config):
    model = make_language_model(config, jnp.bfloat16)
    hidden, kernel = jax.random.normal(jax.random.key(0), (2, VOCAB, 16)).astype(jnp.bfloat16)
    params = {"token_embedding": {"embedding": kernel}, "lm_head": {"kernel": kernel.T}}
    logits = model.apply({"params": params}, hidden, method="logits")
    scale = 16**-0.5 if isinstance(config, T5Config) and config.tied_head else 1.0
    expected = np.float32(hidden) @ np.float32(kernel).T * scale
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
