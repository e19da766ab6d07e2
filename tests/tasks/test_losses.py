"""Each task's loss and its gradient against one written out in full."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tasks import (
    DEC,
    ENC,
    QUERIES,
    ROWS,
    TASK_NAMES,
    TEXT,
    VOCAB,
    WIDTH,
    fast_jit,
    made,
)

from jaxblip.models.attention import (
    bidirectional_mask,
    multimodal_causal_mask,
    unimodal_mask,
)
from jaxblip.models.language_models import continued_hidden
from jaxblip.models.t5 import T5LanguageModel

SMOOTHING = 0.1

# The losses in full, one pass and one pair after the other.


def pixels(batch):
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    return jnp.asarray((batch["image"] / 255.0 - mean) / std, jnp.float32)


def normalized(x):
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def contrast(image, text, scale, image_id, smoothing, other):
    """`image` has queries: `[rows, queries, embed]`; `other` is what the gather does."""
    same = image_id[:, None] == image_id
    targets = smoothing / ROWS + (1 - smoothing) * same / same.sum(axis=1, keepdims=True)
    of_image = jnp.max(jnp.einsum("iqe,je->ijq", image, other(text)), axis=2) * scale
    of_text = jnp.max(jnp.einsum("ie,jqe->ijq", text, other(image)), axis=2) * scale
    losses = [-targets * jax.nn.log_softmax(logits) for logits in (of_image, of_text)]
    return sum(map(jnp.sum, losses)) / (2 * ROWS)


def hard_negatives(scores, image_id):
    """A text for each image and an image for each text, drawn from all scores at once."""
    scores = jnp.where(image_id[:, None] == image_id, -jnp.inf, scores)
    keys = jax.random.split(jax.random.key(0))
    text_key, image_key = (jax.random.fold_in(key, 0) for key in keys)
    texts = jax.random.categorical(text_key, scores, axis=1)
    return texts, jax.random.categorical(image_key, scores, axis=0)


def token_loss(logits, targets, counts, smoothing=0.0):
    """`logits[row, t]` scores `targets[row, t]`."""
    logits, targets = logits[np.nonzero(counts)], targets[counts]
    one_hot = np.eye(VOCAB)[targets]
    wanted = (1 - smoothing) * one_hot + smoothing / VOCAB
    log_probs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return -jnp.sum(wanted * log_probs) / len(targets)


def plain_clip(task, params, batch):
    image, text = task.model.apply(
        {"params": params}, pixels(batch), batch["text_ids"], batch["text_mask"]
    )
    scale = jnp.exp(params["logit_scale"])
    return contrast(image[:, None], text, scale, batch["image_id"], 0.0, lambda x: x)


def plain_blip_retrieval(task, params, batch):
    """One pass for the embeddings and three for matching."""
    ids, valid = jnp.asarray(batch["text_ids"]), jnp.asarray(batch["text_mask"])
    image_id = batch["image_id"]

    def hidden(ids, valid, features=None):
        def read(model):
            source = None if features is None else model.text.read_source(features)
            return model.text(ids, valid[:, None, None], source)[0][:, 0]

        return task.model.apply({"params": params}, method=read)

    features = task.model.apply({"params": params}, pixels(batch), method="image_features")
    image = normalized(linear(params["image_projection"], features[:, 0]))
    text = normalized(linear(params["text_projection"], hidden(ids, valid)))
    scale = 1 / params["temperature"]
    itc = contrast(image[:, None], text, scale, image_id, 0.0, jax.lax.stop_gradient)

    texts, images = hard_negatives(image @ text.T * scale, image_id)
    ids = ids.at[:, 0].set(ENC)
    itm = 0.0
    for pair in [
        (features, ids, valid, 1),
        (features[images], ids, valid, 0),
        (features, ids[texts], valid[texts], 0),
    ]:
        features_of_pair, ids_of_pair, valid_of_pair, label = pair
        logits = linear(params["itm_head"], hidden(ids_of_pair, valid_of_pair, features_of_pair))
        itm -= jnp.sum(logits[:, label] - jax.nn.logsumexp(logits, axis=1)) / (3 * ROWS)
    return task.config.loss.itc_weight * itc + task.config.loss.itm_weight * itm


def next_word_loss(logits, batch, given):
    """With label smoothing; the first `given` tokens of each row are no targets."""
    counts = batch["text_mask"].copy()
    for row, length in enumerate(given):
        counts[row, : max(length, 1)] = False
    targets = np.roll(batch["text_ids"], -1, axis=1)
    return token_loss(logits, targets, np.roll(counts, -1, axis=1), SMOOTHING)


def plain_blip_caption(task, params, batch):
    texts = batch["text_ids"], batch["text_mask"]
    logits = task.model.apply({"params": params}, pixels(batch), *texts)
    return next_word_loss(logits, batch, batch["prompt_length"])


def plain_blip_vqa(task, params, batch):
    question = batch["instruction_ids"], batch["instruction_mask"]
    texts = batch["text_ids"], batch["text_mask"]
    logits = task.model.apply({"params": params}, pixels(batch), *question, *texts)
    return next_word_loss(logits, batch, np.zeros(ROWS, int))


def plain_language_model(task, params, batch):
    logits = task.model.apply({"params": params}, batch["text_ids"], batch["text_mask"])
    counts = batch["text_mask"].copy()
    counts[:, 0] = False  # BOS is given
    shifted = np.roll(batch["text_ids"], -1, axis=1)
    return token_loss(logits, shifted, np.roll(counts, -1, axis=1))


def plain_stage1(task, params, batch):
    """Three passes for matching, one for contrast and one for generation."""
    ids, valid, image_id = batch["text_ids"], batch["text_mask"], batch["image_id"]

    def apply(function):
        return task.model.apply({"params": params}, method=function)

    def hidden(features, ids, valid, make_mask):
        def passes(model):
            image = model.read_image(features)
            return model.qformer(image, ids, make_mask(QUERIES, jnp.asarray(valid)))

        return apply(passes)

    features = apply(lambda model: model.vision_norm(model.vision(pixels(batch))))

    unimodal = hidden(features, ids, valid, unimodal_mask)
    image = normalized(linear(params["image_projection"], unimodal[:, :QUERIES]))
    text = normalized(linear(params["text_projection"], unimodal[:, QUERIES]))
    scale = 1 / params["temperature"]
    itc = contrast(image, text, scale, image_id, SMOOTHING, jax.lax.stop_gradient)

    scores = jnp.max(image[:, None] @ text[None, :, :, None], axis=(2, 3)) * scale
    texts, images = hard_negatives(scores, image_id)
    ids, valid = jnp.asarray(ids), jnp.asarray(valid)
    pairs = [
        (features, ids, valid, 1),
        (features[images], ids, valid, 0),
        (features, ids[texts], valid[texts], 0),
    ]
    itm = 0.0
    for features_of_pair, ids_of_pair, valid_of_pair, label in pairs:
        queries = hidden(features_of_pair, ids_of_pair, valid_of_pair, bidirectional_mask)
        logits = jnp.mean(linear(params["itm_head"], queries[:, :QUERIES]), axis=1)
        itm -= jnp.sum(logits[:, label] - jax.nn.logsumexp(logits, axis=1)) / (3 * ROWS)

    decoder_ids = jnp.concatenate([jnp.full((ROWS, 1), DEC), ids[:, 1:]], axis=1)
    decoded = hidden(features, decoder_ids, valid, multimodal_causal_mask)[:, QUERIES:]
    head = params["itg_head"]
    x = linear(head["dense"], decoded)
    x = x * (1 + jax.scipy.special.erf(x / math.sqrt(2))) / 2
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
    x = x * head["norm"]["scale"] + head["norm"]["bias"]
    words = params["qformer"]["text_embeddings"]["token_embedding"]["embedding"]
    logits = x @ words.T + head["bias"]
    itg = token_loss(
        logits[:, :-1], batch["text_ids"][:, 1:], batch["text_mask"][:, 1:], SMOOTHING
    )
    weights = task.config.loss
    return weights.itc_weight * itc + weights.itm_weight * itm + weights.itg_weight * itg


def plain_stage2(task, params, batch):
    logits = task.model.apply(
        {"params": params}, pixels(batch), batch["text_ids"], batch["text_mask"]
    )
    counts = batch["text_mask"].copy()
    for row, length in enumerate(batch["prompt_length"]):
        counts[row, :length] = False
    return token_loss(logits, batch["text_ids"], counts)


def t5_loss(config, params, visual, batch):
    """The encoder reads [visual, input], the decoder says the text."""
    start = np.zeros((ROWS, 1), np.int32)
    decoder_ids = np.concatenate([start, batch["text_ids"][:, :-1]], axis=1)
    mask = jnp.tril(jnp.ones((TEXT, TEXT), bool))[None, None]
    valid = np.concatenate([np.ones(visual.shape[:2], bool), batch["input_mask"]], axis=1)

    def logits(model):
        read = jnp.concatenate([visual, model.embed(batch["input_ids"])], axis=1)
        hidden = model(read, jnp.array(valid), model.embed(decoder_ids), mask)
        return model.logits(hidden)

    own_params = {"params": params["language_model"]}
    scores = T5LanguageModel(config).apply(own_params, method=logits)
    return token_loss(scores, batch["text_ids"], batch["text_mask"])


def plain_language_model_t5(task, params, batch):
    return t5_loss(task.model.config, params, np.zeros((ROWS, 0, WIDTH), np.float32), batch)


def plain_stage2_t5(task, params, batch):
    visual = task.model.apply({"params": params}, pixels(batch), method="visual_tokens")
    return t5_loss(task.model.language_model_config, params, visual, batch)


def asked_tokens(task, params, batch):
    """The visual tokens of a Q-Former whose queries see the instruction, and it them."""
    valid = jnp.asarray(batch["instruction_mask"])

    def read(model):
        image = model.qformer.read_image(model.vision_norm(model.vision(pixels(batch))))
        mask = bidirectional_mask(QUERIES, valid)
        hidden = model.qformer(image, batch["instruction_ids"], mask)
        return linear(params["projection"], hidden[:, :QUERIES])

    return task.model.apply({"params": params}, method=read)


def plain_instruct(task, params, batch):
    visual = asked_tokens(task, params, batch)
    valid = np.concatenate([np.ones((ROWS, QUERIES), bool), batch["text_mask"]], axis=1)

    def logits(model):
        words = model.language_model.embed(batch["text_ids"])
        read = jnp.concatenate([visual, words], axis=1)
        return model.language_model.logits(continued_hidden(model.language_model, read, valid))

    scores = task.model.apply({"params": params}, method=logits)[:, QUERIES - 1 : -1]
    is_output = np.arange(TEXT) >= batch["prompt_length"][:, None]
    return token_loss(scores, batch["text_ids"], batch["text_mask"] & is_output)


def plain_instruct_t5(task, params, batch):
    visual = asked_tokens(task, params, batch)
    return t5_loss(task.model.language_model_config, params, visual, batch)


PLAIN = {
    "blip_caption": plain_blip_caption,
    "blip_retrieval": plain_blip_retrieval,
    "blip_vqa": plain_blip_vqa,
    "clip": plain_clip,
    "instruct": plain_instruct,
    "instruct_t5": plain_instruct_t5,
    "language_model": plain_language_model,
    "language_model_t5": plain_language_model_t5,
    "stage1": plain_stage1,
    "stage2": plain_stage2,
    "stage2_llama": plain_stage2,
    "stage2_t5": plain_stage2_t5,
}


@functools.cache
def compiled(name):
    """From parameters and batch to ((loss, what the task returns), gradient)."""

    def loss(params, batch):
        output = made(name)[0].loss(params, batch, None)
        return output.loss, output

    return fast_jit(jax.value_and_grad(loss, has_aux=True))


def output_of(name, batch):
    (_, output), _ = compiled(name)(made(name)[1], batch)
    return output


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_loss_and_its_gradient_are_those_written_out(name):
    task, params, batch = made(name)

    def plain(params):
        return PLAIN[name](task, params, batch)

    (value, _), grads = compiled(name)(params, batch)
    expected, expected_grads = fast_jit(jax.value_and_grad(plain))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        # Relative to the leaf; leaves whose gradient is zero but for rounding, to the largest.
        error = np.linalg.norm(ours - theirs)
        bound = 1e-5 * np.linalg.norm(theirs) + 1e-6 * size
        assert error <= bound, jax.tree_util.keystr(path)


def test_stage1_reports_its_parts():
    _, params, batch = made("stage1")
    output = output_of("stage1", batch)
    parts = {name: float(output.metrics[name]) for name in ("itc", "itm", "itg")}
    assert min(parts.values()) > 0.1
    expected = 2 * parts["itc"] + 0.5 * parts["itm"] + 3 * parts["itg"]
    assert float(output.loss) == pytest.approx(expected, rel=1e-6)
    assert float(output.metrics["temperature"]) == pytest.approx(float(params["temperature"]))
    assert 0 < float(output.metrics["itm_accuracy"]) < 1


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_weight_is_what_the_loss_is_a_mean_over(name):
    batch = made(name)[2]
    expected = ROWS
    if name.startswith(("instruct", "language_model", "stage2")):
        given = np.full(ROWS, name == "language_model")  # BOS
        given = batch.get("prompt_length", given)
        expected = np.maximum(batch["text_mask"].sum(axis=1) - given, 0).sum()
    if name in ("blip_caption", "blip_vqa"):
        given = np.maximum(batch.get("prompt_length", 0), 1)  # [DEC]
        expected = np.maximum(batch["text_mask"].sum(axis=1) - given, 0).sum()
    assert float(output_of(name, batch).weight) == expected


@pytest.mark.parametrize("name", ["instruct", "stage2", "stage2_llama"])
@pytest.mark.parametrize("prompt", [0, 2, TEXT])
def test_prompt_tokens_carry_no_loss_in_stage2(name, prompt):
    batch = made(name)[2]
    mask = np.ones((ROWS, TEXT), bool)
    batch = batch | {"text_mask": mask, "prompt_length": np.full(ROWS, prompt, np.int32)}
    output = output_of(name, batch)
    assert float(output.weight) == ROWS * (TEXT - prompt)
    # Without a prompt, the first token (BOS) is a target, predicted from the last query.
    assert (float(output.loss) == 0.0) == (prompt == TEXT)


@pytest.mark.parametrize(("name", "first"), [("language_model", 1), ("language_model_t5", 0)])
def test_language_model_sums_of_each_text(name, first):
    """The first token of a decoder-only model is given; a decoder's start token is no target."""
    task, params, batch = made(name)
    texts = [batch[field] for field in task.fields]
    sums = fast_jit(task.token_sums)(params, *texts)
    logits = np.asarray(fast_jit(task.apply)(params, *texts), np.float64)
    for row in range(ROWS):
        expected = np.zeros(3)
        for t in range(first, batch["text_mask"][row].sum()):
            scores, target = logits[row, t - first], batch["text_ids"][row, t]
            loss = np.log(np.exp(scores).sum()) - scores[target]
            expected += [loss, scores.argmax() == target, 1]
        np.testing.assert_allclose(sums[row], expected, rtol=1e-4)
