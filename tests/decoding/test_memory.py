"""Captions on a CPU: its weights in bfloat16 are not kept in float32 as well."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from published_folders import tokenizer_of
from tiny_tasks import tiny_config

from jaxblip.decoding.image_to_text import ImageToText
from jaxblip.sharding import make_mesh
from jaxblip.tasks import make_task
from jaxblip.training.initialize import abstract_params

SIZE = dict(num_layers=6, width=64, mlp_width=256)  # too many layers to be written out


def test_weights_have_no_copies_in_float32():
    config = tiny_config("stage2")
    config.compute_dtype = config.frozen_dtype = "bfloat16"
    config.frozen = ()
    for part in ("vision", "language_model"):
        config.model[part].update(SIZE)
    task = make_task(config)
    params, _ = abstract_params(task)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    text = ImageToText(task, tokenizer_of("opt"), make_mesh({}, jax.devices()[:1]))

    def temporary_bytes(function, *inputs, **static):
        compiled = function.lower(params, *inputs, **static).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    images = np.zeros((1, config.data.image_size_px, config.data.image_size_px, 3), np.uint8)
    visual = jax.eval_shape(text._encode, params, images)
    nothing = np.zeros((1, 0), np.int32), np.zeros((1, 0), bool)
    inputs = visual, np.zeros(1, np.int32), *nothing
    room = dict(num_beams=2, max_new_tokens=4)
    read = text._prefill.eval_shape(params, *inputs, **room)
    search, seeds = text.decoding_config(**room), np.zeros(2, np.uint32)
    used = [
        ("vision", temporary_bytes(text._encode, images)),
        ("language_model", temporary_bytes(text._prefill, *inputs, **room)),
        ("language_model", temporary_bytes(text._decode, *read, seeds, config=search)),
    ]
    for part, used_bytes in used[:2]:
        assert used_bytes < sum(leaf.size for leaf in jax.tree.leaves(params[part]["layers"]))
    # All steps share one copy of the layers in bfloat16, taken apart.
    assert used[2][1] < sum(3 * leaf.size for leaf in jax.tree.leaves(params["language_model"]))
