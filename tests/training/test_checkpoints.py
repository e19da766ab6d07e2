"""Checkpoints: bit-identical, on any mesh, complete or absent; frozen parts as references."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from jaxblip import sharding
from jaxblip.errors import UserError
from jaxblip.training.checkpoints import (
    Checkpoints,
    check_frozen,
    check_same_config,
    fingerprint,
    load_frozen_references,
    load_params,
    save_config,
    saved_steps,
)
from jaxblip.training.state import TrainState

OPTIMIZER = optax.scale_by_adam()


def mesh_of(**sizes):
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def params(hidden=16):
    rng = np.random.default_rng(0)
    return {
        "projection": {"kernel": rng.normal(size=(8, 4)), "bias": rng.normal(size=4)},
        "qformer": {
            "query_tokens": rng.normal(size=(4, 8)),
            "layers": {"mlp": {"up": {"kernel": rng.normal(size=(3, 8, hidden))}}},
        },
        "temperature": np.asarray(0.07),
    }


def state_on(mesh, step=0, hidden=16):
    """A train state after `step` toy updates, on the mesh, and the compiled update."""
    trainable = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params(hidden))
    state = TrainState.create(trainable, OPTIMIZER, jax.random.key(7))
    shardings = sharding.tree_shardings(state, mesh)

    def update(state):
        noise = jax.random.normal(jax.random.fold_in(state.rng, state.step))
        grads = jax.tree.map(lambda p: p + noise, state.params)
        updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
        new = jax.tree.map(lambda p, u: p - 0.1 * u, state.params, updates)
        return state.replace(step=state.step + 1, params=new, opt_state=opt_state)

    update = jax.jit(update, donate_argnums=0, out_shardings=shardings)
    state = jax.device_put(state, shardings)
    for _ in range(step):
        state = update(state)
    return state, update


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def reference(tree, source="runs/clip"):
    return {"source": source, "revision": "120", "fingerprint": fingerprint(tree)}


def test_what_is_restored_has_the_same_bits_and_goes_on_the_same_way(tmp_path):
    mesh = mesh_of(data=2, fsdp=2)
    state, update = state_on(mesh, step=3)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.save(3, state, {"next_index": 96, "epoch": [1, 2]})
        for _ in range(3):
            state = update(state)  # donates what is still being written
    like, update = state_on(mesh)
    with Checkpoints(tmp_path) as checkpoints:
        restored, data_state = checkpoints.restore(like)
    assert data_state == {"next_index": 96, "epoch": [1, 2]}
    assert_same_bits(restored, state_on(mesh, step=3)[0])
    for _ in range(3):
        restored = update(restored)
    assert_same_bits(restored, state)


def test_large_arrays_may_be_donated_while_they_are_written(tmp_path):
    bump = jax.jit(lambda s: s.replace(params={"w": s.params["w"] + 1}), donate_argnums=0)
    state = TrainState.create({"w": jnp.zeros((1000, 2000))}, optax.identity(), jax.random.key(0))
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        for step in range(4):
            checkpoints.save(step, state, None)
            for _ in range(5):
                state = bump(state)
    for step in range(4):
        assert (load_params(tmp_path, "w", step) == 5 * step).all()


@pytest.mark.parametrize(
    ("before", "after"),
    [({"data": 8}, {"fsdp": 4, "tensor": 2}), ({"fsdp": 4, "tensor": 2}, {"data": 1})],
)
def test_a_checkpoint_restores_onto_another_mesh(tmp_path, before, after):
    state, _ = state_on(mesh_of(**before), step=2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
    mesh = mesh_of(**after)
    shardings = sharding.tree_shardings(state, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        shardings,
    )
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(abstract)
    assert_same_bits(restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings


@pytest.mark.parametrize(
    ("mode", "values", "kept", "best"),
    [
        ("max", {1: 0.2, 2: 0.9, 3: 0.3, 6: 0.4}, [2, 5, 6], 2),
        ("min", {1: 0.2, 2: 0.9, 3: 0.3, 6: 0.4}, [1, 5, 6], 1),
        ("max", {1: 0.2, 2: float("nan"), 5: 0.1}, [1, 5, 6], 1),
        ("max", {1: 0.2, 6: 0.4}, [5, 6], 6),
    ],
)
def test_the_last_and_the_best_are_kept_together(tmp_path, mode, values, kept, best):
    state, _ = state_on(mesh_of(data=1))
    with Checkpoints(tmp_path, keep_last=2, best_metric="r1", best_mode=mode) as checkpoints:
        for step in range(1, 7):
            metrics = {"r1": values[step], "r5": 1.0} if step in values else None
            checkpoints.save(step, state, {}, metrics)
        checkpoints.wait()
        assert checkpoints.all_steps() == kept
        assert checkpoints.best_step() == best
        assert checkpoints.latest_step() == 6
    # The same after a restart, whose next save must not forget the best.
    with Checkpoints(tmp_path, keep_last=2, best_metric="r1", best_mode=mode) as checkpoints:
        assert checkpoints.best_step() == best
        checkpoints.save(7, state, {})
        checkpoints.save(8, state, {})
    assert saved_steps(tmp_path) == sorted({best, 7, 8})


def test_without_a_best_metric_only_the_last_are_kept(tmp_path):
    state, _ = state_on(mesh_of(data=1))
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {}, {"r1": -step})
        checkpoints.wait()
        assert checkpoints.all_steps() == [3] and checkpoints.best_step() is None


def test_a_step_is_saved_once(tmp_path):
    state, _ = state_on(mesh_of(data=1))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(5, state, {"first": True})
        assert not checkpoints.save(5, state, {"first": False})
        assert checkpoints.restore(state)[1] == {"first": True}
        assert not checkpoints.reached_preemption(5)


def test_a_checkpoint_that_was_being_written_at_a_kill_is_never_picked_up(tmp_path):
    script = textwrap.dedent(
        """
        import glob, os, signal, sys
        import jax, jax.numpy as jnp, optax
        from jaxblip.training.checkpoints import Checkpoints
        from jaxblip.training.state import TrainState

        state = TrainState.create(
            {"w": jax.random.normal(jax.random.key(0), (4000, 4000))},
            optax.scale_by_adam(),
            jax.random.key(0),
        )
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, state, {"next_index": 1})
        checkpoints.wait()
        checkpoints.save(2, state, {"next_index": 2})
        while not glob.glob(sys.argv[1] + "/checkpoints/2*/params*/*"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert run.returncode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "1" in names and len(names) == 2, "the kill came too late to leave half a checkpoint"
    assert saved_steps(tmp_path) == [1]
    assert load_params(tmp_path)["w"].shape == (4000, 4000)
    state, _ = state_on(mesh_of(data=1))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert checkpoints.save(3, state, {})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}
    assert_same_bits(load_params(tmp_path), jax.device_get(state.params))


def test_parameters_of_another_run_are_read_by_part(tmp_path):
    state, _ = state_on(mesh_of(fsdp=4, tensor=2), step=1)
    frozen = {"vision": reference({"kernel": jnp.ones(3)})}
    with Checkpoints(tmp_path, keep_last=2, frozen=frozen) as checkpoints:
        checkpoints.save(1, state, {})
        expected = jax.device_get(state.params)
        checkpoints.save(2, state.replace(params=jax.tree.map(jnp.zeros_like, state.params)), {})
    everything = load_params(tmp_path, step=1)
    assert_same_bits(everything, expected)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(everything))
    assert_same_bits(load_params(tmp_path, "qformer", 1), expected["qformer"])
    layers = load_params(tmp_path, "qformer/layers", step=1)
    assert_same_bits(layers, expected["qformer"]["layers"])
    assert load_params(tmp_path, "temperature", step=1) == expected["temperature"]
    assert not load_params(tmp_path, "projection")["kernel"].any()  # the latest step

    assert load_frozen_references(tmp_path) == frozen
    with pytest.raises(UserError, match=r"no trained part 'vision'.*qformer.*frozen: vision\."):
        load_params(tmp_path, "vision")
    with pytest.raises(UserError, match="no trained part 'qformer/query_tokens/x'"):
        load_params(tmp_path, "qformer/query_tokens/x")
    with pytest.raises(UserError, match=r"no checkpoint of step 9 .*\[1, 2\]"):
        load_params(tmp_path, step=9)


def test_only_what_is_trained_is_written(tmp_path):
    state, _ = state_on(mesh_of(data=1))
    vision = {"kernel": jnp.ones((1000, 1000))}  # 4 MB
    with Checkpoints(tmp_path, frozen={"vision": reference(vision)}) as checkpoints:
        checkpoints.save(1, state, {})
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written < 200_000


def test_a_run_without_checkpoints_is_named(tmp_path):
    for read in (load_params, load_frozen_references):
        with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}"):
            read(tmp_path)
    assert not list(tmp_path.iterdir()) and saved_steps(tmp_path) == []
    state, _ = state_on(mesh_of(data=1))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no complete"):
        checkpoints.restore(state)


def test_another_model_is_refused_with_the_parameter_that_differs(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(mesh_of(data=1))[0], {})
        other, _ = state_on(mesh_of(data=1), hidden=32)
        with pytest.raises(UserError, match=r"up/kernel' is \(3, 8, 16\) there and \(3, 8, 32\)"):
            checkpoints.restore(other)
        other.params.pop("temperature")
        other.params["qformer"].pop("layers")
        with pytest.raises(UserError, match=r"up/kernel' is \(3, 8, 16\) there and absent here"):
            checkpoints.restore(other)


def test_other_frozen_weights_are_refused(tmp_path):
    state, _ = state_on(mesh_of(data=1))
    first, second = {"kernel": jnp.ones((4, 4))}, {"kernel": jnp.ones((4, 4)) * 2}
    with Checkpoints(tmp_path, frozen={"vision": reference(first, "runs/a")}) as checkpoints:
        checkpoints.save(1, state, {})
    # The same weights from another place are the same weights.
    with Checkpoints(tmp_path, frozen={"vision": reference(first, "moved/a")}) as checkpoints:
        checkpoints.restore(state)
    with Checkpoints(tmp_path, frozen={"vision": reference(second, "runs/b")}) as checkpoints:
        with pytest.raises(UserError, match=r"'vision'.*'runs/b'.*'runs/a'.*--workdir"):
            checkpoints.restore(state)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="'vision' is frozen in .* and not in this run"):
            checkpoints.restore(state)
    with pytest.raises(UserError, match="'language_model' is not in .* and frozen in this run"):
        check_frozen({}, {"language_model": reference(first)})


def test_a_fingerprint_does_not_depend_on_where_the_arrays_lie():
    rng = np.random.default_rng(0)
    tree = {
        "up": {"kernel": rng.normal(size=(3, 8, 16)).astype(np.float32)},
        "lm_head": {"kernel": jnp.asarray(rng.normal(size=(8, 32)), jnp.bfloat16)},
        "query_tokens": rng.integers(-100, 100, (4, 8), np.int8),
        "temperature": np.float32(0.07),
        "norm": {"scale": np.array([True, False])},
    }
    expected = fingerprint(tree)
    assert len(expected) == 64
    for sizes in ({"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}):
        placed = jax.device_put(tree, sharding.tree_shardings(tree, mesh_of(**sizes)))
        assert fingerprint(placed) == expected
    assert fingerprint({}) != expected


def test_a_fingerprint_sees_every_kind_of_change():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    one_bit = array.copy()
    one_bit.view(np.uint32)[1, 2, 3] ^= 1
    swapped = array.copy()
    swapped[0, 0, 0], swapped[1, 1, 1] = array[1, 1, 1], array[0, 0, 0]
    negative_zero = array.copy()
    negative_zero[0, 0, 0] = -0.0
    trees = [
        {"a": array},
        {"a": one_bit},
        {"a": swapped},
        {"a": negative_zero},
        {"a": array.transpose(1, 0, 2)},
        {"a": array.reshape(4, 6)},
        {"a": array.view(np.int32)},
        {"a": jnp.asarray(array, jnp.bfloat16)},
        {"b": array},
        {"a": {"a": array}},
        {"a": array, "b": array},
        {"a": np.zeros_like(array)},
        {},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)


def test_orbax_stays_silent(tmp_path, capfd):
    # As after absl's flags are parsed, which turns its informational messages on.
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        state, _ = state_on(mesh_of(data=1))
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()
            checkpoints.restore(state)
        load_params(tmp_path, "projection")
        absl_logging.info("from elsewhere")
    finally:
        logging.getLogger().removeHandler(handler)
        absl_logging.set_verbosity(before)
    output = "".join(capfd.readouterr())
    assert "from elsewhere" in output
    assert [line for line in output.splitlines() if "from elsewhere" not in line] == []


CONFIG = {
    "steps": 600,
    "optimizer": {"peak_lr": 1e-3, "min_lr": 1e-5},
    "data": {"num_workers": 4, "crop_scale": (0.5, 1.0)},
    "mesh": {"data": -1},
}
MAY_CHANGE = ("mesh", "data.num_workers")


def workdir_with_checkpoint(path):
    save_config(path, CONFIG)
    with Checkpoints(path) as checkpoints:
        checkpoints.save(1, state_on(mesh_of(data=1))[0], {})
    return path


def test_the_same_config_may_go_on_also_on_another_mesh(tmp_path):
    workdir_with_checkpoint(tmp_path)
    check_same_config(tmp_path, CONFIG)
    changed = CONFIG | {"mesh": {"data": 4, "fsdp": 2}}
    changed["data"] = CONFIG["data"] | {"num_workers": 0}
    check_same_config(tmp_path, changed, ignore=MAY_CHANGE)
    with pytest.raises(UserError, match="mesh.data was -1, is now 4; mesh.fsdp was absent"):
        check_same_config(tmp_path, changed)


def test_another_config_is_refused_with_every_field_that_differs(tmp_path):
    workdir_with_checkpoint(tmp_path)
    other = {**CONFIG, "steps": 700, "optimizer": {"peak_lr": 0.002}, "mesher": 1}
    with pytest.raises(UserError) as error:
        check_same_config(tmp_path, other, ignore=MAY_CHANGE)
    message = str(error.value)
    assert str(tmp_path) in message and "--workdir" in message
    for difference in (
        "steps was 600, is now 700",
        "optimizer.peak_lr was 0.001, is now 0.002",
        "optimizer.min_lr was 1e-05, is now absent",
        "mesher was absent, is now 1",
    ):
        assert difference in message
    assert message.count(" is now ") == 4


def test_a_work_directory_without_checkpoints_may_change_its_config(tmp_path):
    check_same_config(tmp_path / "new", CONFIG)
    save_config(tmp_path, CONFIG)
    check_same_config(tmp_path, CONFIG | {"steps": 1})
    save_config(tmp_path, CONFIG | {"steps": 1})
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_checkpoints_of_an_unknown_config_are_refused(tmp_path):
    workdir_with_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        check_same_config(tmp_path, CONFIG)


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"best_metric": "r1", "best_mode": "most"}])
def test_options_that_cannot_be(tmp_path, options):
    with pytest.raises(UserError, match=f"{list(options)[-1]}="):
        Checkpoints(tmp_path, **options)
