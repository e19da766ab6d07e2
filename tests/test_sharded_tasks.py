"""Every task on several meshes of 8 virtual devices: the same run as on one device."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from tiny_tasks import (
    COMPILER_OPTIONS,
    TASK_NAMES,
    VISION_WIDTH,
    WIDTH,
    random_batch,
    random_params,
    run,
    shallow,
    start,
    tiny_config,
)

from jaxblip import sharding
from jaxblip.planning import hlo
from jaxblip.planning.costs import COLLECTIVES
from jaxblip.tasks import make_task

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
SIGLIP = "_siglip"  # a task with SigLIP's image encoder
CASES = [
    *((task, mesh) for task in TASK_NAMES for mesh in MESHES),
    ("stage1", (1, 8, 1)),
    ("stage2_llama", (1, 1, 8)),  # which does not divide its 4 heads of keys and values
    ("stage1" + SIGLIP, (2, 2, 2)),
]


def config(task):
    """With dropout, whose random bits must not depend on the mesh either."""
    config = shallow(tiny_config(task.removesuffix(SIGLIP)))
    if task.endswith(SIGLIP):
        config.model.vision.update(has_cls_token=False, activation="gelu_tanh")
    # Adam divides each gradient by its size, and by as much the rounding in it, which is all there
    # is of some (of a key's bias, for instance). Beside this eps small gradients have no size: they
    # and their rounding enter the parameters as they are.
    config.optimizer.update(eps=1.0, peak_lr=1.0)
    if "qformer" in config.model:
        config.model.qformer.hidden_dropout = 0.1
    elif "language_model" in config.model:
        config.model.language_model.dropout = 0.1
    elif "hidden_dropout" in config.model.get("text", {}):
        config.model.text.hidden_dropout = 0.1
    if "itc_block_size" in config.loss:
        config.loss.itc_block_size = 4
    return config


@functools.cache
def run_on(task, data, fsdp, tensor):
    """What the parameters have moved by, metrics of each step, and what share of the parameters,
    the optimizer state and the frozen parameters the first device holds.
    """
    state, history, frozen = run(config(task), {"data": data, "fsdp": fsdp, "tensor": tensor})
    before = random_params(make_task(config(task)))
    moved = {
        part: jax.tree.map(lambda new, old: np.asarray(new) - old, params, before[part])
        for part, params in state.params.items()
    }
    return moved, history, [share(tree) for tree in (state.params, state.opt_state, frozen)]


def share(tree):
    leaves = jax.tree.leaves(tree)
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    return held / max(1, sum(leaf.size for leaf in leaves))


@pytest.mark.parametrize(
    ("task", "mesh"), CASES, ids=[f"{task}-{'x'.join(map(str, mesh))}" for task, mesh in CASES]
)
def test_two_steps_are_those_of_one_device(task, mesh):
    moved, history, shares = run_on(task, *mesh)
    expected_moved, expected, _ = run_on(task, 1, 1, 1)
    for ours, theirs in zip(history, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(moved), jax.tree.leaves(expected_moved), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6, err_msg=name)
    # Each device has its part of all; the rest are biases, and norms, which are large beside such
    # narrow layers.
    _, fsdp, tensor = mesh
    assert max(shares) <= (1 / (fsdp * tensor) + 0.16 if fsdp * tensor > 1 else 1)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_run_that_is_compared_learns_and_draws(task):
    """Guards the test above: parameters move by far more than its tolerance."""
    _, history, _ = run_on(task, 1, 1, 1)
    assert all(metrics["grad_norm"] > 1e-2 for metrics in history)
    assert history[0]["loss"] != pytest.approx(history[1]["loss"], rel=1e-3)


FROZEN_LAYERS = 6  # more than are written out when compiled


@pytest.fixture(scope="module")
def stage2_over_fsdp():
    """The step of stage 2 over 8 devices, compiled, with frozen parts that dwarf all else."""
    config = tiny_config("stage2")
    config.loss.vocab_chunk = 2  # of the 6 positions
    for part in ("vision", "language_model"):
        config.model[part].update(num_layers=FROZEN_LAYERS, width=64, mlp_width=512)
    step, state, frozen, mesh, task = start(config, {"data": 1, "fsdp": 8, "tensor": 1})
    batch = sharding.put_batch(random_batch(task), mesh)
    return step.lower(state, frozen, batch).compile(compiler_options=COMPILER_OPTIONS), frozen


def collectives(compiled, kind):
    """(number of elements, whether in the loop over layers) of each of the frozen parts."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* {kind}\(.*op_name=\"(.*?)\"", compiled.as_text())
    return [
        (math.prod(map(int, filter(None, shape.split(",")))), "while/body" in name)
        for shape, name in found
        if "vision/" in name or "language_model" in name
    ]


def test_frozen_parameters_are_gathered_a_layer_at_a_time(stage2_over_fsdp):
    compiled, frozen = stage2_over_fsdp
    stacks = [leaf for leaf in jax.tree.leaves(frozen) if leaf.shape[0] == FROZEN_LAYERS]
    largest_layer = max(leaf.size for leaf in stacks) // FROZEN_LAYERS
    gathered = collectives(compiled, "all-gather")
    assert max(size for size, _ in gathered) == largest_layer
    # Six kernels a block, in the image encoder and in the language model there and back, and the
    # words' embedding for the chunks of text positions.
    assert sum(in_loop for _, in_loop in gathered) == 6 * 3 + 1
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 4


def test_the_word_embeddings_are_gathered_once_for_all_chunks(stage2_over_fsdp):
    compiled, _ = stage2_over_fsdp
    program = hlo.parse(compiled.as_text())
    times = hlo.executions(program)
    gathers = [
        times[name]
        for name, computation in program.computations.items()
        for each in computation.values()
        if each.opcode == "all-gather" and ".logits" in each.attributes
    ]
    assert gathers == [1]


def test_layers_wait_for_parameters_alone(stage2_over_fsdp):
    """Sums over devices of what a layer has computed would stop it until all have theirs."""
    compiled, _ = stage2_over_fsdp
    for kind in ("all-reduce", "reduce-scatter", "all-to-all", "collective-permute"):
        assert not any(in_loop for _, in_loop in collectives(compiled, kind))


@pytest.mark.parametrize("task", ["stage1", "blip_retrieval"])
def test_hard_images_are_fetched_without_the_whole_batch(task):
    """Neither the tokens of all images nor their keys and values are ever on one device."""
    config = tiny_config(task)
    config.batch_size = rows = 32
    step, state, frozen, mesh, task = start(shallow(config), {"data": 4, "fsdp": 2, "tensor": 1})
    batch = sharding.put_batch(random_batch(task, rows=rows), mesh)
    lowered = step.lower(state, frozen, batch)
    program = hlo.parse(lowered.compile(compiler_options=COMPILER_OPTIONS).as_text())
    moved = [
        math.prod(shape.sizes)
        for computation in program.computations.values()
        for each in computation.values()
        if each.opcode.removesuffix("-start") in COLLECTIVES
        for shape in each.shapes
    ]
    tokens, width = task.model.vision_config.num_tokens, min(VISION_WIDTH, WIDTH)
    assert max(moved) >= 8 * tokens * VISION_WIDTH  # an image of each device
    assert max(moved) < rows * tokens * width
