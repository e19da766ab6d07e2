"""Fields, parameters and dropout of the tasks."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tasks import ROWS, TASK_NAMES, TEXT, fast_jit, made, shallow, tiny_config

from jaxblip.errors import UserError
from jaxblip.models import kernels
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


@functools.cache
def jitted_loss(name):
    return fast_jit(made(name)[0].loss)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_batch_shapes_are_those_of_the_fields(name):
    task, _, batch = made(name)
    shapes = task.batch_shapes(ROWS)
    assert set(task.fields) == set(shapes) == FIELDS[name]
    described = {field: (array.shape, array.dtype) for field, array in batch.items()}
    assert {field: (shape.shape, shape.dtype) for field, shape in shapes.items()} == described


@pytest.mark.parametrize("name", ["clip", "stage1", "stage2"])
def test_pixels_are_normalized_as_the_config_says(name):
    config = shallow(tiny_config(name))
    config.data.pixel_mean, config.data.pixel_std = (0.5, 0.25, 0.0), (0.5, 0.5, 2.0)
    task, images = make_task(config), np.array([[[[0, 51, 255]]]], np.uint8)
    np.testing.assert_allclose(task.normalize_images(images), [[[[-1, -0.1, 0.5]]]], rtol=1e-5)
    _, params, batch = made(name)
    as_configured, as_clip = (
        float(loss(params, batch, None).loss) for loss in (fast_jit(task.loss), jitted_loss(name))
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
    config = shallow(tiny_config(name))
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
    config = shallow(tiny_config(name))
    config.model.qformer.update(hidden_dropout=0.3, attention_dropout=0.3)
    _, params, batch = made(name)
    metrics = fast_jit(make_task(config).loss)(params, batch, None).metrics
    metric = {"stage1": "itg", "stage2": "lm"}[name]
    assert float(metrics[metric]) == pytest.approx(loss_without_key(name, metric), rel=1e-6)


@pytest.mark.parametrize("name", ["stage2", "stage2_t5"])
def test_a_frozen_language_model_has_no_dropout(name):
    keyed = keyed_losses(name, "lm", language_model={"dropout": 0.5})
    assert keyed == pytest.approx([loss_without_key(name, "lm")] * 3, rel=1e-5)


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


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("stage1", "attention", "flash", "attention='flash' is none of auto, xla, cudnn, pallas"),
        ("clip", "loss.itc_block_size", -1, "loss.itc_block_size=-1 must be a number of texts"),
        ("stage2", "loss.vocab_chunk", -2, "loss.vocab_chunk=-2 must be a number of tokens"),
        ("clip", "model.vision.remat", "True", "remat='True' is not known; use one of none, full"),
    ],
)
def test_an_option_of_speed_or_memory_that_is_not_known(name, field, value, expected):
    config = tiny_config(name)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        make_task(config)
    assert expected in str(error.value)


@pytest.mark.parametrize("name", ["clip", "blip_caption", "stage2", "stage2_llama", "stage2_t5"])
def test_the_kernel_of_attention_reaches_every_part(name, monkeypatch):
    wanted = []

    def choose(kernel, *args, **options):
        wanted.append(kernel)
        return "xla"

    monkeypatch.setattr(kernels, "choose_kernel", choose)
    config = tiny_config(name)
    config.attention = "cudnn"
    task = make_task(config)
    jax.eval_shape(task.init, jax.random.key(0))
    assert len(wanted) >= 2 and set(wanted) == {"cudnn"}
