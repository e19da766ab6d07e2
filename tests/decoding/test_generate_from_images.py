"""Generation by BLIP-2, a prompt of its own for each image: against transformers, and by itself."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import randomized
from reference_t5 import VARIANTS, with_own_head
from reference_weights import params_of
from tiny_checkpoints import OPT, QFORMER, QUERIES, VISION, shapes_of
from tiny_tasks import DEC, fast_jit, random_params, tiny_config

from jaxblip.decoding import DecodingConfig, generate_from_images, generate_text
from jaxblip.interop.families.blip2 import blip2_layout, blip2_model
from jaxblip.tasks import make_task

VOCAB, ROWS, PROMPT, NEW = 40, 20, 6, 8
IMAGE_TOKEN, BOS, PAD = VOCAB - 1, 2, 0
T5 = dict(
    model_type="t5", vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=3,
    num_decoder_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip
# Config and stop token: one that the random model says early, late or never.
LANGUAGE_MODELS = {
    "OPT": (OPT | dict(vocab_size=VOCAB, bos_token_id=BOS), 36),
    "FlanT5": (T5 | VARIANTS["blip2"], 6),
}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(ROWS, 8, 8, 3)).astype(np.float32)
LENGTHS = 1 + np.arange(ROWS) % PROMPT
IS_LEFT_PADDED = {"OPT": True, "FlanT5": False}
compiled = fast_jit(generate_text, static_argnames=("model", "config", "penalize_prompt"))


def prompts(left):
    """Ids that begin with BOS, which stands for their padding, too, and so is said in any case."""
    ids = np.random.default_rng(1).integers(4, IMAGE_TOKEN, (ROWS, PROMPT))
    places = np.arange(PROMPT)[::-1] if left else np.arange(PROMPT)
    valid = places < LENGTHS[:, None]
    first = PROMPT - LENGTHS if left else np.zeros(ROWS, int)
    ids[np.arange(ROWS), first] = BOS
    return np.where(valid, ids, BOS).astype(np.int32), valid


@functools.cache
def example(name):
    """The model of transformers, ours, and our parameters."""
    text, _ = LANGUAGE_MODELS[name]
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        num_query_tokens=QUERIES,
    )
    reference = transformers.Blip2ForConditionalGeneration(config)
    if name == "FlanT5":
        with_own_head(reference.language_model)
    reference = randomized(reference)
    with torch.no_grad():
        for parameter, value in reference.named_parameters():
            if parameter.endswith("qkv.bias"):  # published checkpoints have no key bias
                value[len(value) // 3 : 2 * len(value) // 3] = 0
            if parameter.endswith("Attention.q.weight"):  # of T5, which does not scale its scores
                value /= 2
        reference.language_model.lm_head.weight[IMAGE_TOKEN] = 0  # nothing says the placeholder
    model = blip2_model(config.to_dict())
    ids, valid = jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
    shapes = shapes_of(model, IMAGES[:1], *2 * (ids, valid))
    return reference, model, params_of(reference, blip2_layout(model), shapes)


def config(name, num_beams):
    _, stop = LANGUAGE_MODELS[name]
    return DecodingConfig(
        NEW, stop, PAD, num_beams=num_beams, length_penalty=-1.0, repetition_penalty=1.5
    )


def settings(search):
    return dict(
        max_new_tokens=search.max_new_tokens,
        eos_token_id=search.stop_token_id,
        pad_token_id=search.pad_token_id,
        num_beams=search.num_beams,
        length_penalty=search.length_penalty,
        repetition_penalty=search.repetition_penalty,
        early_stopping=False,
        do_sample=False,
    )


def padded(new, search):
    """Transformers' new tokens in our width; behind a stop token it may have more of them."""
    result = np.full((len(new), NEW), PAD)
    for row, ids in zip(result, new.tolist(), strict=True):
        stop = search.stop_token_id
        length = ids.index(stop) + 1 if stop in ids else len(ids)
        row[:length] = ids[:length]
    return result


def run(name, search, ids, valid, **fields):
    _, model, params = example(name)
    return np.asarray(compiled(model, params, IMAGES, ids, search, prompt_valid=valid, **fields))


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_same_tokens_as_transformers(name, num_beams):
    (reference, _, _), search = example(name), config(name, num_beams)
    ids, valid = prompts(IS_LEFT_PADDED[name])
    placeholders = np.full((ROWS, QUERIES), IMAGE_TOKEN)
    expected = reference.generate(
        pixel_values=torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy()),
        input_ids=torch.tensor(np.concatenate([placeholders, ids], axis=1)),
        attention_mask=torch.tensor(np.concatenate([placeholders > 0, valid], axis=1)).long(),
        **settings(search),
    ).numpy()
    # A decoder-only model repeats its input, and a decoder begins with its start token.
    new = expected[:, 1 if name == "FlanT5" else QUERIES + PROMPT :]
    ours = run(name, search, ids, valid)
    np.testing.assert_array_equal(ours, padded(new, search))
    ends = {list(row).index(search.stop_token_id) for row in ours if search.stop_token_id in row}
    assert len(ends) > 2 and (ours[:, -1] != PAD).any() and IMAGE_TOKEN not in ours
    assert len({tuple(row) for row in ours}) > 5


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.filterwarnings("ignore:Passing .repetition_penalty. with .inputs_embeds.")
def test_the_prompt_may_be_exempt_from_the_repetition_penalty(num_beams):
    """As in LAVIS, where the language model gets embeddings alone."""
    (reference, model, params), search = example("OPT"), config("OPT", num_beams)
    search = dataclasses.replace(search, stop_token_id=14)  # rare, so that the rows are long
    ids, valid = prompts(left=True)
    embeddings, counts = fast_jit(model.apply, static_argnames="method")(
        {"params": params}, IMAGES, ids, valid, method="prefix"
    )
    expected = reference.language_model.generate(
        inputs_embeds=torch.tensor(np.asarray(embeddings)),
        attention_mask=torch.tensor(np.asarray(counts)).long(),
        **settings(search),
    ).numpy()
    ours = run("OPT", search, ids, valid, penalize_prompt=False)
    np.testing.assert_array_equal(ours, padded(expected, search))
    assert (ours != run("OPT", search, ids, valid)).any(axis=1).sum() > 2


@pytest.mark.parametrize("num_beams", [1, 5])
def test_padding_and_other_rows_do_not_matter(num_beams):
    search = config("OPT", num_beams)
    ids, valid = prompts(left=True)
    expected = run("OPT", search, ids, valid)
    order = np.random.default_rng(2).permutation(ROWS)
    often = 28  # as padding, a token that the model likes to say
    scattered, gaps = np.full_like(ids, often), np.zeros_like(valid)
    for row in range(ROWS):
        places = np.linspace(0, PROMPT - 1, LENGTHS[row]).round().astype(int)
        scattered[row, places], gaps[row, places] = ids[row, valid[row]], True
    assert (gaps != valid).any()
    np.testing.assert_array_equal(run("OPT", search, scattered, gaps), expected)
    _, model, params = example("OPT")
    moved = compiled(model, params, IMAGES[order], ids[order], search, prompt_valid=valid[order])
    np.testing.assert_array_equal(moved, expected[order])


# By a task, from pixels as they are in batches


@functools.cache
def stage2(name):
    task = make_task(tiny_config(name))
    return task, random_params(task)


@pytest.mark.parametrize("name", ["stage2", "stage2_t5"])
def test_one_prompt_for_all_images_is_that_prompt_for_each(name):
    task, params = stage2(name)
    size = task.config.data.image_size_px
    images = np.random.default_rng(0).integers(0, 256, (ROWS, size, size, 3), np.uint8)
    search = DecodingConfig(5, -1, PAD, repetition_penalty=1.5)
    prompt = [3, 7, 9]
    each = np.tile(np.array(prompt, np.int32), (ROWS, 1))
    wide = np.pad(each, ((0, 0), (0, 2)), constant_values=DEC)
    valid = np.arange(5) < np.full((ROWS, 1), 3)

    @fast_jit
    def run(params, each, wide, valid):
        by_task = functools.partial(generate_from_images, task, params, images)
        pixels = task.normalize_images(images)
        return (
            by_task(prompt, search),
            by_task(each, search),
            by_task(wide, search, prompt_valid=valid),
            generate_text(task.model, params, pixels, each, search),
            by_task(each, dataclasses.replace(search, repetition_penalty=1.0)),
        )

    shared, *same, without_penalty = (np.asarray(ids) for ids in run(params, each, wide, valid))
    for ids in same:
        np.testing.assert_array_equal(ids, shared)
    assert (without_penalty != shared).any() and len({tuple(row) for row in shared}) > 3


def test_the_prefix_of_a_task_tells_what_counts():
    task, params = stage2("stage2")
    queries = task.config.model.qformer.num_query_tokens
    size = task.config.data.image_size_px
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    ids, valid = np.array([[3, 7], [5, 4]]), np.array([[False, True], [True, True]])

    @fast_jit
    def run(params):
        return task.prefix(params, images, ids, valid), task.prefix(params, images, [5, 4])

    (embeddings, counts), (shared, all_count) = run(params)
    np.testing.assert_array_equal(counts[:, :queries], True)
    np.testing.assert_array_equal(counts[:, queries:], valid)
    np.testing.assert_array_equal(all_count, True)
    words = params["language_model"]["token_embedding"]["embedding"]
    np.testing.assert_allclose(embeddings[:, queries:], words[ids], rtol=1e-6)
    np.testing.assert_allclose(shared[1], embeddings[1], rtol=1e-6)
    np.testing.assert_allclose(shared[:, :queries], embeddings[:, :queries], rtol=1e-6)


def test_a_mask_of_another_shape_is_refused():
    task, params = stage2("stage2")
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"prompt_ids.*\(2, 3\).*prompt_valid.*\(2, 4\)"):
        jax.eval_shape(lambda: task.prefix(params, images, np.ones((2, 3)), np.ones((2, 4), bool)))
