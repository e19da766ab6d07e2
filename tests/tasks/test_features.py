"""Losses from image features are those from the images that they are of."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tasks import fast_jit, random_batch, random_params, shallow, tiny_config

from jaxblip.errors import UserError
from jaxblip.models.vit import VisionTransformer
from jaxblip.tasks import FROM_FEATURES, make_task
from jaxblip.training.initialize import abstract_params

TASKS = ("stage1", "stage2", "instruct_t5")


def config_of(name, features, dtype="bfloat16"):
    config = shallow(tiny_config(name))
    config.compute_dtype = dtype
    config.data.features = features
    return config


def rounding_jit(function):
    """Rounds to bfloat16 where the program says so; by itself XLA leaves some sums wider."""
    return jax.jit(function, compiler_options={"xla_allow_excess_precision": False})


@functools.cache
def batches(name, dtype="bfloat16"):
    """The tasks that read images and features, parameters, and a batch for each."""
    of_images, of_features = (make_task(config_of(name, path, dtype)) for path in ("", "somewhere"))
    params = random_params(of_images)
    batch = random_batch(of_images)
    encoder = VisionTransformer(of_images.model.vision_config, of_images.dtype)
    pixels = of_images.normalize_images(batch["image"])
    tokens = rounding_jit(encoder.apply)({"params": params["vision"]}, pixels)
    rest = {field: rows for field, rows in batch.items() if field != "image"}
    features = {"image_features": np.asarray(tokens.astype(jnp.bfloat16)), **rest}
    return of_images, of_features, params, batch, features


@pytest.mark.parametrize("name", TASKS)
def test_the_batch_has_features_in_the_place_of_images(name):
    of_images, of_features, _, _, features = batches(name)
    assert of_images.fields[0] == "image"
    assert of_features.fields == ("image_features", *of_images.fields[1:]) == tuple(features)
    shapes = of_features.batch_shapes(len(features["text_ids"]))
    described = {field: (rows.shape, rows.dtype) for field, rows in features.items()}
    assert {field: (shape.shape, shape.dtype) for field, shape in shapes.items()} == described


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_the_same_bits_where_the_encoder_computes_in_bfloat16(name):
    of_images, of_features, params, batch, features = batches(name)
    without_encoder = {part: tree for part, tree in params.items() if part != "vision"}
    loss = rounding_jit(of_features.loss)
    wanted = jax.device_get(rounding_jit(of_images.loss)(params, batch, None))
    assert jax.device_get(loss(without_encoder, features, None)) == wanted and wanted.loss > 0
    others = {**features, "image_features": features["image_features"][::-1]}
    assert loss(without_encoder, others, None).loss != wanted.loss


def test_losses_of_float32_are_those_of_features_rounded_to_bfloat16():
    of_images, of_features, params, batch, features = batches("stage2", "float32")
    wanted = float(fast_jit(of_images.loss)(params, batch, None).loss)
    found = float(fast_jit(of_features.loss)(params, features, None).loss)
    assert wanted != found == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize("name", TASKS)
def test_parameters_are_those_of_a_run_with_images(name):
    of_images, of_features, *_ = batches(name)
    assert abstract_params(of_features) == abstract_params(of_images)


def test_evaluation_goes_on_with_images():
    of_images, of_features, params, batch, _ = batches("stage1")
    described = jax.eval_shape(of_images.image_features, params, batch["image"])
    assert jax.eval_shape(of_features.image_features, params, batch["image"]) == described


def test_an_encoder_that_trains_has_no_features():
    config = config_of("stage1", "somewhere")
    config.frozen = ()
    with pytest.raises(UserError, match="'somewhere' is .* but here it trains: add vision to conf"):
        make_task(config)


def test_tasks_without_a_frozen_encoder_have_no_such_field():
    assert set(FROM_FEATURES) == {"instruct", "stage1", "stage2"}
    for name in ("clip", "blip_retrieval", "language_model"):
        assert "features" not in tiny_config(name).data
