"""Each task's loss against one written out in full, and what a step does with its frozen parts."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny_tasks import (
    COMPILER_OPTIONS,
    DEC,
    ENC,
    LANGUAGE_MODEL_MLP,
    QUERIES,
    ROWS,
    TASK_NAMES,
    TEXT,
    VISION_MLP,
    VISION_WIDTH,
    VOCAB,
    WIDTH,
    fast_jit,
    random_batch,
    random_params,
    start,
    tiny_config,
)

from jaxblip import sharding
from jaxblip.errors import UserError
from jaxblip.losses.matching import sample_hard_negatives
from jaxblip.models.attention import (
    bidirectional_mask,
    multimodal_causal_mask,
    unimodal_mask,
)
from jaxblip.models.language_models import continued_hidden
from jaxblip.models.t5 import T5LanguageModel
from jaxblip.tasks import make_task

FIELDS = {
    "blip_caption": {"image", "text_ids", "text_mask", "prompt_length"},
    "blip_retrieval": {"image", "text_ids", "text_mask", "image_id"},
    "blip_vqa": {"image", "text_ids", "text_mask", "instruction_ids", "instruction_mask"},
    "clip": {"image", "text_ids", "text_mask", "image_id"},
    "instruct": {
        "image", "text_ids", "text_mask", "prompt_length", "instruction_ids", "instruction_mask",
    },
    "instruct_t5": {
        "image", "text_ids", "text_mask", "input_ids", "input_mask", "instruction_ids",
        "instruction_mask",
    },
    "language_model": {"text_ids", "text_mask"},
    "language_model_t5": {"text_ids", "text_mask", "input_ids", "input_mask"},
    "stage1": {"image", "text_ids", "text_mask", "image_id"},
    "stage2": {"image", "text_ids", "text_mask", "prompt_length"},
    "stage2_llama": {"image", "text_ids", "text_mask", "prompt_length"},
    "stage2_t5": {"image", "text_ids", "text_mask", "input_ids", "input_mask"},
}
SMOOTHING = 0.1

# The losses in full, one row, one pass and one pair after the other.


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
    total = 0.0
    for i in range(ROWS):
        same = [j for j in range(ROWS) if image_id[j] == image_id[i]]
        target = np.full(ROWS, smoothing / ROWS)
        target[same] += (1 - smoothing) / len(same)
        of_image = jnp.max(image[i] @ other(text).T, axis=0) * scale
        of_text = jnp.max(other(image) @ text[i], axis=1) * scale
        for logits in (of_image, of_text):
            total -= jnp.sum(target * (logits - jax.nn.logsumexp(logits)))
    return total / (2 * ROWS)


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

    image_key, text_key = jax.random.split(jax.random.key(0))
    scores = image @ text.T * scale
    texts, _ = sample_hard_negatives(text_key, scores, jnp.asarray(image_id))
    images, _ = sample_hard_negatives(image_key, scores.T, jnp.asarray(image_id))
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
    image_key, text_key = jax.random.split(jax.random.key(0))
    texts, _ = sample_hard_negatives(text_key, scores, jnp.asarray(image_id))
    images, _ = sample_hard_negatives(image_key, scores.T, jnp.asarray(image_id))
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
def made(name):
    """The task, random parameters and a batch."""
    config = tiny_config(name)
    if name == "stage1":
        config.loss.update(itc_weight=2.0, itm_weight=0.5, itg_weight=3.0)
    if name == "blip_retrieval":
        config.loss.update(itc_weight=2.0, itm_weight=0.5)
    task = make_task(config)
    return task, random_params(task), random_batch(task)


@functools.cache
def jitted_loss(name):
    task, _, _ = made(name)
    return fast_jit(task.loss)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_loss_and_its_gradient_are_those_written_out(name):
    task, params, batch = made(name)

    def plain(params):
        return PLAIN[name](task, params, batch)

    def loss(params):
        return task.loss(params, jax.tree.map(jnp.asarray, batch), None).loss

    value, grads = fast_jit(jax.value_and_grad(loss))(params)
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
    output = jitted_loss("stage1")(params, batch, None)
    parts = {name: float(output.metrics[name]) for name in ("itc", "itm", "itg")}
    assert min(parts.values()) > 0.1
    expected = 2 * parts["itc"] + 0.5 * parts["itm"] + 3 * parts["itg"]
    assert float(output.loss) == pytest.approx(expected, rel=1e-6)
    assert float(output.metrics["temperature"]) == pytest.approx(float(params["temperature"]))
    assert 0 < float(output.metrics["itm_accuracy"]) < 1


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_weight_is_what_the_loss_is_a_mean_over(name):
    _, params, batch = made(name)
    expected = ROWS
    if name.startswith(("instruct", "language_model", "stage2")):
        given = np.full(ROWS, name == "language_model")  # BOS
        given = batch.get("prompt_length", given)
        expected = np.maximum(batch["text_mask"].sum(axis=1) - given, 0).sum()
    if name in ("blip_caption", "blip_vqa"):
        given = np.maximum(batch.get("prompt_length", 0), 1)  # [DEC]
        expected = np.maximum(batch["text_mask"].sum(axis=1) - given, 0).sum()
    assert float(jitted_loss(name)(params, batch, None).weight) == expected


@pytest.mark.parametrize("name", ["instruct", "stage2", "stage2_llama"])
@pytest.mark.parametrize("prompt", [0, 2, TEXT])
def test_prompt_tokens_carry_no_loss_in_stage2(name, prompt):
    _, params, batch = made(name)
    mask = np.ones((ROWS, TEXT), bool)
    batch = batch | {"text_mask": mask, "prompt_length": np.full(ROWS, prompt, np.int32)}
    output = jitted_loss(name)(params, batch, None)
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


# Fields and parameters


@pytest.mark.parametrize("name", TASK_NAMES)
def test_batch_shapes_are_those_of_the_fields(name):
    task, _, batch = made(name)
    shapes = task.batch_shapes(ROWS)
    assert set(task.fields) == set(shapes) == FIELDS[name]
    described = {field: (array.shape, array.dtype) for field, array in batch.items()}
    assert {field: (shape.shape, shape.dtype) for field, shape in shapes.items()} == described


@pytest.mark.parametrize("name", ["clip", "stage1", "stage2"])
def test_pixels_are_normalized_as_the_config_says(name):
    config = tiny_config(name)
    config.data.pixel_mean, config.data.pixel_std = (0.5, 0.25, 0.0), (0.5, 0.5, 2.0)
    task, images = make_task(config), np.array([[[[0, 51, 255]]]], np.uint8)
    np.testing.assert_allclose(task.normalize_images(images), [[[[-1, -0.1, 0.5]]]], rtol=1e-5)
    _, params, batch = made(name)
    as_configured, as_clip = (
        float(fast_jit(t.loss)(params, batch, None).loss) for t in (task, made(name)[0])
    )
    assert as_configured != pytest.approx(as_clip, rel=1e-3)


@pytest.mark.parametrize("log_scale, expected", [(10.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)])
def test_the_logit_scale_of_clip_is_clamped(log_scale, expected):
    task, params, _ = made("clip")
    constrained = task.constrain({**params, "logit_scale": jnp.float32(log_scale)})
    assert float(constrained["logit_scale"]) == pytest.approx(expected)
    assert constrained["vision"] is params["vision"]
    frozen_scale = {"vision": params["vision"]}
    assert task.constrain(frozen_scale) == frozen_scale


@pytest.mark.parametrize("temperature, expected", [(1e3, 0.5), (0.0, 0.001), (0.1, 0.1)])
def test_the_temperature_of_blip_is_clamped(temperature, expected):
    task, _, _ = made("blip_retrieval")
    constrained = task.constrain({"temperature": jnp.float32(temperature), "text": {}})
    assert float(constrained.pop("temperature")) == pytest.approx(expected)
    assert constrained == {"text": {}} == task.constrain({"text": {}})


def test_the_temperature_of_stage1_is_not_clamped():
    task, _, _ = made("stage1")
    assert task.constrain({"temperature": 1e3}) == {"temperature": 1e3}


# Dropout


def keyed_losses(name, metric, **dropout):
    """The metric with two keys, the first of them twice, under the given dropout rates."""
    config = tiny_config(name)
    for section, rates in dropout.items():
        config.model[section].update(rates)
    loss = fast_jit(make_task(config).loss)
    _, params, batch = made(name)
    return [
        float(loss(params, batch, jax.random.key(seed)).metrics[metric]) for seed in (0, 0, 1)
    ]


def loss_without_key(name, metric):
    _, params, batch = made(name)
    return float(jitted_loss(name)(params, batch, None).metrics[metric])


@pytest.mark.parametrize(
    ("name", "metric", "dropout"),
    [
        # Metrics that do not depend on which negatives are drawn.
        ("stage1", "itg", {"qformer": {"hidden_dropout": 0.3}}),
        ("stage1", "itc", {"qformer": {"attention_dropout": 0.3}}),
        ("stage2", "lm", {"qformer": {"hidden_dropout": 0.3}}),
        ("instruct", "lm", {"qformer": {"attention_dropout": 0.3}}),
        ("language_model", "lm", {"language_model": {"dropout": 0.3}}),
        ("language_model_t5", "lm", {"language_model": {"dropout": 0.3}}),
        ("blip_caption", "lm", {"text": {"hidden_dropout": 0.3}}),
        ("blip_retrieval", "itc", {"text": {"attention_dropout": 0.3}}),
        ("blip_vqa", "lm", {"text": {"attention_dropout": 0.3}}),
    ],
)
def test_a_key_switches_dropout_on(name, metric, dropout):
    first, again, other = keyed_losses(name, metric, **dropout)
    assert first == again
    without = loss_without_key(name, metric)
    assert len({round(value, 4) for value in (without, first, other)}) == 3


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_without_a_key_there_is_no_dropout(name):
    config = tiny_config(name)
    config.model.qformer.update(hidden_dropout=0.3, attention_dropout=0.3)
    _, params, batch = made(name)
    metrics = fast_jit(make_task(config).loss)(params, batch, None).metrics
    metric = {"stage1": "itg", "stage2": "lm"}[name]
    assert float(metrics[metric]) == pytest.approx(loss_without_key(name, metric), rel=1e-6)


@pytest.mark.parametrize("name", ["stage2", "stage2_t5"])
def test_a_frozen_language_model_has_no_dropout(name):
    keyed = keyed_losses(name, "lm", language_model={"dropout": 0.5})
    assert keyed == pytest.approx([loss_without_key(name, "lm")] * 3, rel=1e-5)


# Frozen parts in the step


def product_shapes(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of the results of all matrix products, inner jaxprs included."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            found |= product_shapes(inner)
    return found


def trained_kernels(name, frozen):
    """Which of the parts' feed-forward kernels a step computes a gradient of."""
    config = tiny_config(name)
    config.frozen = frozen
    step, state, frozen_params, _, task = start(config, {})
    jaxpr = jax.make_jaxpr(step)(state, frozen_params, random_batch(task))
    shapes = product_shapes(jaxpr.jaxpr)
    kernels = {
        "vision": (VISION_WIDTH, VISION_MLP),
        "language_model": (WIDTH, LANGUAGE_MODEL_MLP),
    }
    return {part for part, kernel in kernels.items() if shapes & {kernel, kernel[::-1]}}


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("clip", ("vision",)),
        ("stage1", ("vision",)),
        ("stage2", ("vision", "language_model")),
        ("stage2", ("language_model",)),
        ("stage2_llama", ("vision", "language_model")),
        ("stage2_t5", ("vision", "language_model")),
        ("instruct", ("vision", "language_model")),
    ],
)
def test_no_gradient_of_a_frozen_part_is_computed(name, frozen):
    has_language_model = name.startswith(("instruct", "stage2"))
    parts = {"vision", "language_model"} if has_language_model else {"vision"}
    if name == "clip":
        parts.add("language_model")  # the text tower, which is as wide
    assert trained_kernels(name, frozen) == parts - set(frozen)
    assert trained_kernels(name, ()) == parts


def test_the_instruction_must_leave_room_for_an_output():
    config = tiny_config("instruct")
    config.data.max_instruction_tokens = TEXT
    with pytest.raises(UserError, match=f"max_instruction_tokens={TEXT} leaves no room.*={TEXT}"):
        make_task(config)
    config = tiny_config("instruct_t5")
    config.data.max_instruction_tokens = 16  # the Q-Former's positions
    make_task(config)
    config.data.max_instruction_tokens = 17
    with pytest.raises(UserError, match="max_instruction_tokens=17 is more.*qformer.*=16"):
        make_task(config)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage2_llama", "stage2_t5"])
def test_steps_leave_frozen_parts_as_they_are_and_move_the_rest(name):
    config = tiny_config(name)
    config.frozen_dtype = "bfloat16"
    step, state, frozen, mesh, task = start(config, {})
    before, trained = bits(frozen), dict(jax.tree.leaves_with_path(jax.device_get(state.params)))
    assert set(frozen) == set(config.frozen) and not set(frozen) & set(state.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    batches = [sharding.put_batch(random_batch(task, i), mesh) for i in range(2)]
    step = step.lower(state, frozen, batches[0]).compile(compiler_options=COMPILER_OPTIONS)
    for batch in batches:
        state, metrics = step(state, frozen, batch)
    assert np.isfinite(metrics["loss"]) and int(metrics["skipped_total"]) == 0
    assert bits(frozen) == before
    for path, leaf in jax.tree.leaves_with_path(state.params):
        assert not np.array_equal(leaf, trained[path]), jax.tree_util.keystr(path)
