"""The step: frozen parts get no gradient, accumulation is exact, bad updates are skipped."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.errors import UserError
from jaxblip.training.optimizer import learning_rate, make_optimizer
from jaxblip.training.state import TrainState, cast_frozen, merge_params, split_params
from jaxblip.training.step import jit_step, make_train_step, split_micro_batches

ROWS, WIDTH, HIDDEN, OUT = 32, 6, 10, 3
CONFIG = ConfigDict(
    {
        "steps": 50,
        "optimizer": dict(
            name="adamw", peak_lr=1e-2, min_lr=1e-3, warmup_init_lr=1e-3, warmup_steps=2,
            b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.05, clip_norm=0.0, accumulation_steps=1,
            layer_decay={},
        ),
    }
)  # fmt: skip


@struct.dataclass
class Output:
    loss: jax.Array
    weight: jax.Array
    metrics: dict


class Unconstrained:
    def constrain(self, params):
        return params


class ToyTask(Unconstrained):
    """A mean over unmasked items through one layer of `vision` and one of `head`."""

    def loss(self, params, batch, rng):
        hidden = jnp.tanh(batch["x"] @ params["vision"]["up"]["kernel"].astype(jnp.float32))
        head = params["head"]["down"]
        error = hidden @ head["kernel"] + head["bias"] - batch["y"]
        weight = jnp.sum(batch["mask"].astype(jnp.float32))
        mean = jnp.sum(jnp.mean(error**2, -1) * batch["mask"]) / jnp.maximum(weight, 1)
        return Output(mean, weight, {"half": mean / 2, "noise": jax.random.uniform(rng)})


def toy_params():
    rng = np.random.default_rng(1)
    return {
        "vision": {"up": {"kernel": jnp.asarray(rng.normal(size=(WIDTH, HIDDEN)), jnp.float32)}},
        "head": {
            "down": {
                "kernel": jnp.asarray(rng.normal(size=(HIDDEN, OUT)), jnp.float32),
                "bias": jnp.zeros(OUT),
            }
        },
    }


def toy_batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "y": rng.normal(size=(ROWS, OUT)).astype(np.float32),
        "mask": rng.random(ROWS) < 0.6,
    }


def setup(frozen=("vision",), accumulation_steps=1, mesh=None, config=CONFIG):
    """(compiled step, state, frozen parameters, mesh)."""
    mesh = mesh or sharding.make_mesh({}, jax.devices()[:1])
    trainable, frozen = split_params(toy_params(), frozen)
    frozen = cast_frozen(frozen, jnp.bfloat16)
    optimizer = make_optimizer(config)
    state = TrainState.create(trainable, optimizer, jax.random.key(0))
    state_shardings = sharding.tree_shardings(state, mesh)
    frozen_shardings = sharding.tree_shardings(frozen, mesh)
    step = jit_step(
        make_train_step(ToyTask(), optimizer, learning_rate(config), accumulation_steps),
        state_shardings,
        frozen_shardings,
        sharding.batch_sharding(mesh),
    )
    state = jax.device_put(state, state_shardings, may_alias=False)
    return step, state, jax.device_put(frozen, frozen_shardings), mesh


def run(steps=3, **kwargs):
    step, state, frozen, mesh = setup(**kwargs)
    history = []
    for i in range(steps):
        state, metrics = step(state, frozen, sharding.put_batch(toy_batch(i), mesh))
        history.append(jax.device_get(metrics))
    return state, frozen, history


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def contractions(jaxpr):
    """Shapes of the results of all matrix products, inner jaxprs included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            found += contractions(inner)
    return found


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_no_gradient_of_a_frozen_parameter_is_computed(accumulation_steps):
    def shapes(frozen_parts):
        step, state, frozen, _ = setup(frozen_parts, accumulation_steps)
        jaxpr = jax.make_jaxpr(step)(state, frozen, toy_batch(0))
        return contractions(jaxpr.jaxpr)

    gradient_of_vision = {(WIDTH, HIDDEN), (HIDDEN, WIDTH)}
    frozen, trained = shapes(("vision",)), shapes(())
    assert len(frozen) == 3  # two forward products, and the gradient of the head's kernel
    assert not gradient_of_vision & set(frozen)
    # Training the first layer needs its gradient, and the activations' through the second.
    assert len(trained) == 5
    assert gradient_of_vision & set(trained)


def test_frozen_parameters_keep_their_bits_and_dtype():
    step, state, frozen, mesh = setup()
    before, moved = bits(frozen), bits(state.params)
    for i in range(3):
        state, _ = step(state, frozen, sharding.put_batch(toy_batch(i), mesh))
    assert bits(frozen) == before
    assert frozen["vision"]["up"]["kernel"].dtype == jnp.bfloat16
    assert all(old != new for old, new in zip(moved, bits(state.params), strict=True))
    assert "vision" not in state.params
    assert all("vision" not in jax.tree_util.keystr(path)
               for path, _ in jax.tree.leaves_with_path(state.opt_state))  # fmt: skip


def test_a_step_equals_plain_adamw_on_the_gradient_of_the_loss():
    state, frozen, history = run(steps=1)
    params, _ = split_params(toy_params(), ("vision",))

    def loss(params):
        return ToyTask().loss(merge_params(params, frozen), toy_batch(0), jax.random.key(0)).loss

    value, grads = jax.value_and_grad(loss)(params)
    optimizer = optax.adamw(
        1e-3, b1=0.9, b2=0.98, weight_decay=0.05,
        mask={"head": {"down": {"kernel": True, "bias": False}}},
    )  # fmt: skip
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for ours, theirs in zip(
        jax.tree.leaves(state.params),
        jax.tree.leaves(optax.apply_updates(params, updates)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert history[0]["loss"] == pytest.approx(float(value), rel=1e-6)
    assert history[0]["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    assert history[0]["learning_rate"] == pytest.approx(1e-3)
    assert int(state.step) == 1


@pytest.mark.parametrize("accumulation_steps", [2, 8])
def test_accumulation_equals_one_batch_with_uneven_weights(accumulation_steps):
    counts = split_micro_batches(toy_batch(0), accumulation_steps)["mask"].sum(-1).tolist()
    assert len(set(counts)) > 1  # an unweighted mean would be wrong
    assert accumulation_steps < 8 or 0 in counts  # a micro-batch may hold nothing that counts
    one, _, expected = run()
    many, _, history = run(accumulation_steps=accumulation_steps)
    for name in ("loss", "half", "grad_norm"):
        np.testing.assert_allclose(
            [m[name] for m in history], [m[name] for m in expected], rtol=1e-5
        )
    for ours, theirs in zip(
        jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)


def test_micro_batches_take_every_row_once_and_an_equal_share_of_each_device():
    rows = np.arange(ROWS)
    split = split_micro_batches({"rows": rows, "image": np.zeros((ROWS, 2, 2, 3), np.uint8)}, 4)
    assert split["image"].shape == (4, ROWS // 4, 2, 2, 3)
    assert sorted(split["rows"].ravel().tolist()) == rows.tolist()
    for micro_batch in split["rows"]:
        devices = micro_batch // (ROWS // 8)  # with 8 devices, each holding 4 rows in a block
        assert sorted(devices.tolist()) == list(range(8))


def test_accumulation_moves_no_row_between_devices():
    step, state, frozen, mesh = setup(
        accumulation_steps=4, mesh=sharding.make_mesh({"data": 8}, jax.devices()[:8])
    )
    batch = sharding.put_batch(toy_batch(0), mesh)
    text = step.lower(state, frozen, batch).compile().as_text()
    assert "all-reduce" in text  # of gradients
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2}]
)
@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_losses_and_parameters_are_those_of_one_device(sizes, accumulation_steps):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = sharding.make_mesh(sizes, devices)
    one, _, expected = run()
    many, _, history = run(mesh=mesh, accumulation_steps=accumulation_steps)
    np.testing.assert_allclose(
        [m["loss"] for m in history], [m["loss"] for m in expected], rtol=1e-5
    )
    for ours, theirs in zip(
        jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_bad_update_is_skipped_and_counted(bad, accumulation_steps):
    step, state, frozen, mesh = setup(accumulation_steps=accumulation_steps)

    def do(state, seed, spoil):
        batch = toy_batch(seed)
        batch["y"][np.flatnonzero(batch["mask"])[0], 0] = bad if spoil else 0.0
        return step(state, frozen, sharding.put_batch(batch, mesh))

    state, _ = do(state, 0, spoil=False)
    before = bits(state.params), bits(state.opt_state)
    seen = []
    for seed in (1, 2):
        state, metrics = do(state, seed, spoil=True)
        seen.append((int(metrics["skipped_in_a_row"]), int(metrics["skipped_total"])))
        assert not np.isfinite(metrics["loss"])
        assert (bits(state.params), bits(state.opt_state)) == before
    state, metrics = do(state, 3, spoil=False)
    seen.append((int(metrics["skipped_in_a_row"]), int(metrics["skipped_total"])))
    assert seen == [(1, 1), (2, 2), (0, 2)]
    assert bits(state.params) != before[0]
    assert int(state.step) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    # The schedule counts steps, not applied updates.
    assert float(metrics["learning_rate"]) == pytest.approx(float(learning_rate(CONFIG)(3)))


def test_a_gradient_that_is_not_finite_is_skipped_although_the_loss_is():
    class RootTask(Unconstrained):
        def loss(self, params, batch, rng):  # sqrt at 0: value 0, gradient infinite
            return Output(jnp.sqrt(params["head"]["down"]["bias"][0]), jnp.float32(1), {})

    params, frozen = split_params(toy_params(), ("vision",))
    optimizer = make_optimizer(CONFIG)
    step = jax.jit(make_train_step(RootTask(), optimizer, learning_rate(CONFIG)))
    state, metrics = step(
        TrainState.create(params, optimizer, jax.random.key(0)), frozen, toy_batch(0)
    )
    assert metrics["loss"] == 0 and not np.isfinite(metrics["grad_norm"])
    assert int(state.skipped_total) == 1
    assert bits(state.params) == bits(params)


def test_the_task_constrains_the_parameters_after_the_update():
    class Clamped(ToyTask):
        def constrain(self, params):
            return jax.tree.map(lambda leaf: jnp.clip(leaf, -0.1, 0.1), params)

    params, frozen = split_params(toy_params(), ("vision",))
    optimizer = make_optimizer(CONFIG)
    step = jax.jit(make_train_step(Clamped(), optimizer, learning_rate(CONFIG)))
    state, _ = step(TrainState.create(params, optimizer, jax.random.key(0)), frozen, toy_batch(0))
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(state.params)) < 0.1001


def test_the_state_is_donated_and_the_frozen_parameters_are_not():
    step, state, frozen, mesh = setup()
    batch = sharding.put_batch(toy_batch(0), mesh)
    with warnings.catch_warnings(action="error"):  # a donation in vain is a warning
        memory = step.lower(state, frozen, batch).compile().memory_analysis()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert memory.alias_size_in_bytes >= state_bytes
    new_state, _ = step(state, frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, batch)))
    step(new_state, frozen, batch)


def test_each_step_and_micro_batch_draws_its_own_numbers_and_the_same_again():
    _, _, history = run(steps=4)
    noise = [float(m["noise"]) for m in history]
    assert len(set(noise)) == 4
    assert noise == [float(m["noise"]) for m in run(steps=4)[2]]

    class Draws(Unconstrained):
        def loss(self, params, batch, rng):
            draw = jax.random.uniform(rng)
            return Output(jnp.float32(0), jnp.float32(1), {"draw": draw, "square": draw**2})

    state = TrainState.create({}, optax.identity(), jax.random.key(0))
    step = make_train_step(Draws(), optax.identity(), lambda _: 0.0, accumulation_steps=2)
    _, metrics = step(state, {}, toy_batch(0))
    assert metrics["square"] - metrics["draw"] ** 2 > 1e-4  # their variance


def test_the_step_does_not_wait_for_the_device():
    step, state, frozen, mesh = setup()
    batch = sharding.put_batch(toy_batch(0), mesh)
    with jax.transfer_guard("disallow"):
        _, metrics = step(state, frozen, batch)
    assert all(isinstance(value, jax.Array) for value in metrics.values())


def test_split_and_merge_are_inverse():
    params = {"vision": {"a": 1}, "vision_norm": {"b": 2}, "head": {"layers": {"c": 3}, "d": 4}}
    trainable, frozen = split_params(params, ("vision", "head/layers"))
    assert trainable == {"vision_norm": {"b": 2}, "head": {"d": 4}}
    assert frozen == {"vision": {"a": 1}, "head": {"layers": {"c": 3}}}
    assert merge_params(trainable, frozen) == params
    assert split_params(params, ()) == (params, {})


@pytest.mark.parametrize(("prefix", "near"), [("vison", "vision"), ("head/layer", "head/layers")])
def test_a_frozen_part_that_does_not_exist_is_named_with_its_nearest(prefix, near):
    params = {"vision": {"a": 1}, "head": {"layers": {"c": 3}}}
    with pytest.raises(UserError, match=f"{prefix!r} .*nearest path is {near!r}"):
        split_params(params, ("vision", prefix))


def test_of_prefixes_the_longest_counts():
    params = {"q": {"tokens": 1, "layers": {"a": 2, "b": 3}}, "head": 4}
    trainable, frozen = split_params(params, ("q", "q/layers/b"), ("q/tokens", "q/layers"))
    assert trainable == {"q": {"tokens": 1, "layers": {"a": 2}}, "head": 4}
    assert frozen == {"q": {"layers": {"b": 3}}}


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("q/token", "trainable part 'q/token' matches no .*nearest path is 'q/tokens'"),
        ("head", "trainable='head' is in nothing that is frozen"),
        ("q", "trainable='q' is in nothing that is frozen"),
    ],
)
def test_an_exception_that_is_none_is_refused(trainable, message):
    with pytest.raises(UserError, match=message):
        split_params({"q": {"tokens": 1, "a": 2}, "head": 3}, ("q",), (trainable,))


def test_only_floating_leaves_are_cast():
    tree = {"w": jnp.ones(2), "ids": jnp.arange(2), "on": jnp.array([True])}
    cast = cast_frozen(tree, jnp.bfloat16)
    assert [leaf.dtype for leaf in jax.tree.leaves(cast)] == [jnp.int32, jnp.bool_, jnp.bfloat16]
