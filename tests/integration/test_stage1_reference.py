"""Stage-1 training beside PyTorch: losses, learning rate and parameters over five steps."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from reference_stage1 import EPSILON, Stage1Reference, make_adamw, rate_at
from tiny_tasks import ROWS, fast_jit, random_batch, tiny_config

from jaxblip.tasks import make_task
from jaxblip.training.optimizer import learning_rate, make_optimizer
from jaxblip.training.state import TrainState, merge_params, split_params
from jaxblip.training.step import make_train_step

STEPS, WARMUP, SEED = 5, 2, 7
FIRST, PEAK, LAST = 1e-3, 1e-2, 2e-3  # of the learning rate
WEIGHT_DECAY = 0.5
# A constant added to all keys cancels in the softmax: their gradient is rounding, which Adam
# scales up to the size of any other.
WITHOUT_EFFECT = "['key']['bias']"


def config():
    made = tiny_config("stage1")
    made.steps, made.optimizer.warmup_steps = STEPS, WARMUP
    made.optimizer.update(
        warmup_init_lr=FIRST, peak_lr=PEAK, min_lr=LAST, weight_decay=WEIGHT_DECAY
    )
    made.model.vision_norm_epsilon, made.model.vision.key_bias = EPSILON, False  # EVA-CLIP
    return made


def drawing_noise(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The randomness of a step's hard negatives: of each image's texts, of each text's images."""
    rng = jax.random.fold_in(jax.random.key(SEED), step)
    for_images, for_texts = (
        np.asarray(jax.random.gumbel(jax.random.fold_in(key, 0), (ROWS, ROWS)))
        for key in jax.random.split(jax.random.split(rng, 3)[2])
    )
    return for_images, for_texts.T


def train(task, params, batches):
    """Metrics of each step, and the parameters behind the last."""
    trainable, frozen = split_params(params, task.config.frozen)
    optimizer = make_optimizer(task.config)
    state = TrainState.create(trainable, optimizer, jax.random.key(SEED))
    step = fast_jit(make_train_step(task, optimizer, learning_rate(task.config)))
    history = []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        history.append(jax.device_get(metrics))
    return history, merge_params(state.params, frozen)


def train_reference(model, batches):
    optimizer = make_adamw(model, WEIGHT_DECAY)
    history = []
    for step, batch in enumerate(batches):
        rate = rate_at(step, steps=STEPS, warmup=WARMUP, first=FIRST, peak=PEAK, last=LAST)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = model.losses(batch, drawing_noise(step))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        parts = {name: value.item() for name, value in losses.items()}
        history.append(parts | {"loss": loss.item(), "learning_rate": rate})
    return history, model.params()


def test_five_steps():
    """Ours has one packed pass for ITC and ITG and one for all of ITM; PyTorch has a pass each."""
    task, model = make_task(config()), Stage1Reference()
    before = model.params()
    batches = [random_batch(task, seed) for seed in range(STEPS)]
    history, params = train(task, before, batches)
    expected_history, expected_params = train_reference(model, batches)

    for step, (metrics, expected) in enumerate(zip(history, expected_history, strict=True)):
        found = {name: float(metrics[name]) for name in expected}
        assert found == pytest.approx(expected, rel=1e-5), step
    for (path, start), ours, theirs in zip(
        jax.tree.leaves_with_path(before),
        jax.tree.leaves(params),
        jax.tree.leaves(expected_params),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        if name.endswith(WITHOUT_EFFECT):
            continue
        # Relative to the way that the parameter has gone; a frozen one stays where it is.
        way = np.linalg.norm(theirs - start)
        assert (way > 1e-3) != name.startswith("['vision']"), name
        assert np.linalg.norm(ours - theirs) <= 1e-4 * way, name
