"""Every task on several meshes of 8 virtual devices: the same run as on one device."""

import functools

import jax
import numpy as np
import pytest
from tiny_tasks import TASK_NAMES, random_params, run, shallow, tiny_config

from jaxblip.tasks import make_task

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]


def config(task):
    """With dropout, whose random bits must not depend on the mesh either."""
    config = shallow(tiny_config(task))
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
    return config


@functools.cache
def run_on(task, data, fsdp, tensor):
    """What the parameters have moved by, metrics of each step, and the parameters' shardings."""
    state, history, _ = run(config(task), {"data": data, "fsdp": fsdp, "tensor": tensor})
    before = random_params(make_task(config(task)))
    moved = {
        part: jax.tree.map(lambda new, old: np.asarray(new) - old, params, before[part])
        for part, params in state.params.items()
    }
    return moved, history, jax.tree.map(lambda x: x.sharding, state.params)


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("mesh", MESHES)
def test_two_steps_are_those_of_one_device(task, mesh):
    moved, history, shardings = run_on(task, *mesh)
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
    # The comparison would mean nothing if no parameter were split.
    is_split = [not sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings)]
    assert any(is_split) == (mesh != (8, 1, 1))


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_run_that_is_compared_learns_and_draws(task):
    """Guards the test above: parameters move by far more than its tolerance."""
    _, history, _ = run_on(task, 1, 1, 1)
    assert all(metrics["grad_norm"] > 1e-2 for metrics in history)
    assert history[0]["loss"] != pytest.approx(history[1]["loss"], rel=1e-3)
