"""AdamW against torch's, the schedule against its formula, the weight-decay mask by name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict

from jaxblip.errors import UserError
from jaxblip.tasks import make_task
from jaxblip.training.optimizer import (
    layer_factors,
    learning_rate,
    make_optimizer,
    matrix_dimensions,
    weight_decay_mask,
)
from tests.tiny_tasks import tiny_config


def config(**changes):
    optimizer = dict(
        name="adamw", momentum=0.95, peak_lr=1e-2, min_lr=1e-3, warmup_init_lr=1e-6, warmup_steps=5,
        b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.05, clip_norm=0.0, accumulation_steps=1,
        layer_decay={},
    )  # fmt: skip
    steps = changes.pop("steps", 30)
    return ConfigDict({"steps": steps, "optimizer": optimizer | changes})


def expected_rate(config, step):
    o = config.optimizer
    if step < o.warmup_steps:
        return o.warmup_init_lr + (o.peak_lr - o.warmup_init_lr) * step / o.warmup_steps
    done = (step - o.warmup_steps) / (config.steps - o.warmup_steps)
    return o.min_lr + (o.peak_lr - o.min_lr) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("changes", [{}, {"warmup_steps": 0}, {"min_lr": 0.0}, {"steps": 6}])
def test_the_learning_rate_follows_the_formula_at_every_step(changes):
    c = config(**changes)
    schedule = jax.jit(learning_rate(c))
    for step in range(c.steps + 3):
        expected = expected_rate(c, min(step, c.steps))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=2e-9)


def test_the_paper_schedule_at_its_turning_points():
    c = config(peak_lr=1e-4, min_lr=1e-5, warmup_steps=2000, steps=250_000)
    schedule = learning_rate(c)
    assert float(schedule(1000)) == pytest.approx(5.05e-5, rel=1e-3)
    assert float(schedule(2000)) == pytest.approx(1e-4, rel=1e-6)
    assert float(schedule(126_000)) == pytest.approx(5.5e-5, rel=1e-3)
    assert float(schedule(250_000)) == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.parametrize("warmup_steps", [-1, 30, 31])
def test_a_warmup_that_outlasts_the_run_is_refused(warmup_steps):
    with pytest.raises(UserError, match=rf"warmup_steps={warmup_steps} .*steps=30"):
        learning_rate(config(warmup_steps=warmup_steps))


def test_weight_decay_goes_by_name_also_in_scanned_stacks():
    layers, width, heads = 3, 8, 2
    shapes = {
        "vision": {
            "layers": {
                "attention": {
                    "query": {"kernel": (layers, width, heads, 4), "bias": (layers, heads, 4)},
                    "out": {"kernel": (layers, heads, 4, width), "bias": (layers, width)},
                },
                "attention_norm": {"scale": (layers, width), "bias": (layers, width)},
            },
            "position_embedding": (5, width),
        },
        "qformer": {
            "query_tokens": (4, width),
            "token_embedding": {"embedding": (11, width)},
            "norm": {"scale": (width,), "bias": (width,)},
        },
        "itg_head": {"bias": (11,)},
        "temperature": (),
        "logit_scale": (),
    }
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, yes in jax.tree.leaves_with_path(weight_decay_mask(params))
        if yes
    }
    assert decayed == {
        "vision/layers/attention/query/kernel",
        "vision/layers/attention/out/kernel",
        "vision/position_embedding",
        "qformer/query_tokens",
        "qformer/token_embedding/embedding",
    }


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_updates_equal_those_of_torch_adamw(clip_norm):
    c = config(clip_norm=clip_norm, weight_decay=0.3)
    rng = np.random.default_rng(0)
    start = {
        "dense": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
        "norm": {"scale": rng.normal(size=3)},
    }
    start = jax.tree.map(lambda x: x.astype(np.float32), start)
    optimizer, schedule = make_optimizer(c), learning_rate(c)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)

    leaves = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in jax.tree.leaves(start)]
    decayed = jax.tree.leaves(weight_decay_mask(start))
    reference = torch.optim.AdamW(
        [
            {"params": [p for p, d in zip(leaves, decayed, strict=True) if d]},
            {
                "params": [p for p, d in zip(leaves, decayed, strict=True) if not d],
                "weight_decay": 0.0,
            },
        ],
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=0.3,
    )
    for step in range(20):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), start)
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params)
        rate = schedule(step)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)  # noqa: B023

        for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
            leaf.grad = torch.tensor(grad)
        if clip_norm:
            assert float(torch.nn.utils.clip_grad_norm_(leaves, clip_norm)) > clip_norm
        for group in reference.param_groups:
            group["lr"] = expected_rate(c, step)
        reference.step()
    for ours, theirs in zip(jax.tree.leaves(params), leaves, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_the_optimizer_state_holds_two_moments_and_one_count():
    params = {"dense": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}}
    state = make_optimizer(config()).init(params)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state)) == [(), (3,), (3,), (4, 3), (4, 3)]
    assert optax.tree.get(state, "mu")["dense"]["kernel"].dtype == jnp.float32


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="optimizer.name='sgd' is none of adamw, muon"):
        make_optimizer(config(name="sgd"))


def muon_direction(matrix, coefficients=(3.4445, -4.775, 2.0315), steps=5):
    """Muon's update of a first gradient, in NumPy: five Newton-Schulz steps, scaled as Adam's."""
    x = matrix / np.linalg.norm(matrix)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    return 0.2 * np.sqrt(max(matrix.shape)) * x


def test_muon_orthogonalises_each_layer_and_each_map_as_one_matrix():
    rng = np.random.default_rng(0)
    layers, width, heads, head_width, hidden = 3, 8, 2, 4, 12
    shapes = {
        "attention": {
            "query": {"kernel": (layers, width, heads, head_width)},
            "out": {"kernel": (layers, heads, head_width, width)},
        },
        "mlp": {"up": {"kernel": (layers, width, hidden), "bias": (layers, hidden)}},
        "projection": {"kernel": (width, hidden)},
    }
    params = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    optimizer = make_optimizer(config(name="muon", weight_decay=0.0))
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)

    def check(update, grad, rows, columns):
        for layer in range(layers):
            expected = muon_direction(grad[layer].reshape(rows, columns))
            np.testing.assert_allclose(
                update[layer].reshape(rows, columns), expected, rtol=2e-3, atol=1e-4
            )

    for name in ("query", "out"):
        check(
            updates["attention"][name]["kernel"], grads["attention"][name]["kernel"], width, width
        )
    check(updates["mlp"]["up"]["kernel"], grads["mlp"]["up"]["kernel"], width, hidden)
    expected = muon_direction(grads["projection"]["kernel"])
    np.testing.assert_allclose(updates["projection"]["kernel"], expected, rtol=2e-3, atol=1e-4)
    # The rest has Adam with Nesterov's momentum: its first step goes by the gradient's sign.
    bias, first = updates["mlp"]["up"]["bias"], 1 + 0.9 * (1 - 0.9) / (1 - 0.9**2)
    np.testing.assert_allclose(bias, first * np.sign(grads["mlp"]["up"]["bias"]), rtol=1e-3)


def test_muon_decays_the_same_parameters_as_adamw():
    params = {"up": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    grads = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(config(name="muon", weight_decay=0.3))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["up"]["kernel"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(updates["up"]["bias"], 0.0)


@pytest.mark.parametrize("task", ["clip", "language_model", "stage1", "stage2"])
def test_muon_takes_all_linear_maps_of_a_task_and_nothing_else(task):
    shapes = jax.eval_shape(lambda: make_task(tiny_config(task)).init(jax.random.key(0)))
    for path, leaf in jax.tree.leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        adam = (
            "norm/", "embedding", "bias", "cls_token", "query_tokens", "temperature",
            "logit_scale", "itm_head", "lm_head",
        )  # fmt: skip
        of_muon = matrix_dimensions({name: leaf})[name] is not None
        assert of_muon != any(part in name for part in adam), name


def vision_shapes(layers, width=8):
    return {
        "vision": {
            "patch_embedding": {"kernel": (2, 2, 3, width), "bias": (width,)},
            "cls_token": (width,),
            "position_embedding": (5, width),
            "pre_norm": {"scale": (width,)},
            "layers": {
                "attention": {"query": {"kernel": (layers, width, 2, 4)}},
                "mlp": {"up": {"kernel": (layers, width, 12), "bias": (layers, 12)}},
            },
        },
        "vision_norm": {"scale": (width,)},
        "projection": {"kernel": (width, 6)},
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_layer_moves_at_its_own_rate_and_decays_by_it(name):
    """One step with known gradients, beside one without layer-wise decay."""
    layers, decay, rng = 3, 0.8, np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        vision_shapes(layers),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)

    def update(**layer_decay):
        optimizer = make_optimizer(config(name=name, weight_decay=0.3, layer_decay=layer_decay))
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree.leaves_with_path(updates)
        }

    plain, decayed = update(vision=1.0), update(vision=decay)
    assert plain.keys() == decayed.keys()
    for path, leaf in plain.items():
        for layer in range(layers if "/layers/" in path else 1):
            # LAVIS blip2.py: scale(id) = d ** (L + 1 - id), where block i (from 0) has id i + 1.
            factor = decay ** (layers + 1)
            if "/layers/" in path:
                factor = decay ** (layers + 1 - (layer + 1))
            if not path.startswith("vision/"):
                factor = 1.0
            index = layer if "/layers/" in path else ()
            np.testing.assert_allclose(decayed[path][index], factor * leaf[index], rtol=1e-6)


def test_the_factors_of_the_encoder_of_blip2_are_those_of_the_recipe():
    """Facts of the reference: of 39 blocks, patches have d ** 40, the last block d."""
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        vision_shapes(39),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    factors = layer_factors(shapes, {"vision": 0.95})
    assert factors["vision"]["patch_embedding"]["kernel"] == pytest.approx(0.95**40)
    blocks = factors["vision"]["layers"]["mlp"]["up"]["kernel"]
    assert blocks.shape == (39, 1, 1) and blocks.dtype == np.float32
    np.testing.assert_allclose(blocks.ravel(), 0.95 ** np.arange(39, 0, -1), rtol=1e-6)
    assert factors["vision_norm"]["scale"] == factors["projection"]["kernel"] == 1.0


def test_blocks_of_the_qformer_and_stacks_of_t5_count_by_depth():
    config = tiny_config("stage2_t5")  # 4 blocks in 2 groups; 2 layers of encoder, 3 of decoder
    shapes = jax.eval_shape(lambda: make_task(config).init(jax.random.key(0)))
    factors = layer_factors(shapes, {"qformer": 0.5, "language_model": 0.5})

    def exponents(tree):
        return (-np.log2(np.ravel(tree))).round().astype(int).tolist()

    qformer, t5 = factors["qformer"], factors["language_model"]
    of_blocks = [
        exponents(qformer["groups"][f"block_{i}"]["query_mlp"]["up"]["kernel"]) for i in range(2)
    ]
    assert of_blocks == [[4, 2], [3, 1]]
    assert exponents(qformer["image_key_values"]["key"]["kernel"]) == [4, 2]
    assert exponents(qformer["query_tokens"]) == [5]
    assert exponents(t5["encoder"]["layers"]["mlp"]["up"]["kernel"]) == [2, 1]
    assert exponents(t5["decoder"]["layers"]["mlp"]["up"]["kernel"]) == [3, 2, 1]
    assert exponents(t5["encoder_key_values"]["key"]["kernel"]) == [3, 2, 1]
    assert exponents(t5["token_embedding"]["embedding"]) == [4]
    behind = t5["decoder"]["final_norm"]["scale"], t5["lm_head"]["kernel"]
    assert [exponents(leaf) for leaf in behind] == [[0], [0]]
    assert set(jax.tree.leaves(factors["vision"])) == {1.0}


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5])
def test_a_layer_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match=f"layer_decay.vision={decay} must be above 0"):
        make_optimizer(config(layer_decay={"vision": decay}))


def test_layer_decay_of_what_is_frozen_is_refused():
    optimizer = make_optimizer(config(layer_decay={"vision": 0.9}))
    params = {"projection": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(UserError, match="about the layers of vision, of which none trains"):
        optimizer.init(params)


@pytest.mark.parametrize("task", ["blip_caption", "blip_vqa", "clip", "language_model", "stage1"])
def test_every_part_of_a_task_that_has_a_layer_decay_has_layers(task):
    config = tiny_config(task)
    shapes = jax.eval_shape(lambda: make_task(config).init(jax.random.key(0)))
    decay = dict.fromkeys(config.optimizer.layer_decay, 0.5)
    assert decay and min(np.min(x) for x in jax.tree.leaves(layer_factors(shapes, decay))) < 0.5
    assert {path[0].key for path, _ in jax.tree.leaves_with_path(shapes)} >= decay.keys()
