"""Evaluations on a mesh of 8 virtual devices: the same as on one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxblip import sharding
from jaxblip.data.sources import open_source
from jaxblip.data.tokenizers import train_wordpiece
from jaxblip.evaluation.evaluate import Evaluations
from jaxblip.models import kernels
from jaxblip.tasks import make_task
from jaxblip.training.state import split_params
from tiny_tasks import fast_jit, random_params, shallow, tiny_config

IMAGES = 6  # in batches of four, of which the last is filled up


@pytest.fixture(scope="module")
def tokenizer():
    source = open_source("shapes:heldout", image_size_px=8)
    return train_wordpiece((c for index in range(60) for c in source[index]["captions"]), 200)


def evaluation(name, settings, tokenizer, sizes):
    """The evaluation of a tiny task on a mesh, and random parameters, split over it."""
    config = shallow(tiny_config(name))
    config.eval.source, config.eval.max_images, config.eval.batch_size = "shapes:heldout", IMAGES, 4
    config.data.max_text_tokens = 12
    for part in ("text", "language_model", "qformer"):
        if "vocab_size" in config.model.get(part, {}):
            config.model[part].vocab_size = len(tokenizer)
    config.eval.update(settings)
    task = make_task(config)
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    (found,) = Evaluations(task, tokenizer, mesh)
    params = random_params(task)
    params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    return found, *split_params(params, ("vision",))


@pytest.mark.parametrize(("name", "settings"), [
    ("stage1", {"rerank_top_k": 3}),
    ("stage2", {"num_beams": 2, "max_new_tokens": 4}),
    ("stage2", {"kind": "loss"}),
], ids=["retrieval", "captions", "loss"])  # fmt: skip
def test_it_is_that_of_one_device(name, settings, tokenizer, monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    alone, *params = evaluation(name, settings, tokenizer, dict.fromkeys(sizes, 1))
    expected = alone.run(*params)
    split, *params = evaluation(name, settings, tokenizer, sizes)
    choose, meshes = kernels.choose_kernel, []

    def spied(*args, mesh, **case):
        meshes.append(mesh)
        return choose(*args, mesh=mesh, **case)

    monkeypatch.setattr(kernels, "choose_kernel", spied)
    assert split.run(*params) == pytest.approx(expected, rel=1e-5)
    assert split.predictions == alone.predictions
    assert len(split.predictions) == (0 if "kind" in settings else IMAGES)
    # As in training, attention knows how it is split.
    assert meshes and all(mesh == sizes for mesh in meshes)
