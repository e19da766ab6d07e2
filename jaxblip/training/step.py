"""The training step: one compiled function from (state, frozen, batch) to (state, metrics)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Key

from jaxblip.sharding import rows_stay_split
from jaxblip.training.state import Params, TrainState, merge_params

Batch = dict[str, Array]
Metrics = dict[str, Array]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


class Task(Protocol):
    """What the step needs of a task."""

    def loss(self, params: Params, batch: Batch, rng: Key[Array, ""]) -> Any:
        """A `LossOutput` with `loss`, `weight` and `metrics`; `params` is the full tree."""

    def constrain(self, params: Params) -> Params:
        """The trainable parameters, put back into their allowed range after an update."""


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation_steps: int = 1,
) -> Step:
    """Builds the step, not yet compiled: see `jit_step`.

    Its metrics are float32 or int32 scalars: `loss`, the task's own, `grad_norm` (before clipping),
    `learning_rate`, `skipped_in_a_row`, `skipped_total`. An update whose loss or gradient norm is
    not finite is skipped: parameters and optimizer state stay, bit by bit, while the step advances.

    Args:
      task: the loss.
      optimizer: from `make_optimizer`; its output times minus the learning rate is the update.
      schedule: learning rate as a function of the step.
      accumulation_steps: micro-batches a step; it must divide the rows that each device holds.
    """

    def loss_fn(params: Params, frozen: Params, batch: Batch, rng: Array):
        output = task.loss(merge_params(params, frozen), batch, rng)
        return output.loss, output

    # With respect to the trainable parameters only: gradients of `frozen` are never computed.
    grad_fn = jax.value_and_grad(loss_fn, argnums=0, has_aux=True)

    def whole_batch(state: TrainState, frozen: Params, batch: Batch, rng: Array):
        (loss, output), grads = grad_fn(state.params, frozen, batch, rng)
        return grads, {"loss": loss, **output.metrics}

    def accumulated(state: TrainState, frozen: Params, batch: Batch, rng: Array):
        # Weighting makes a mean over tokens equal that of the whole batch, although micro-batches
        # hold different numbers of tokens.
        def add_micro_batch(grads: Params, inputs: tuple[Array, Batch]):
            index, micro_batch = inputs
            (loss, output), new = grad_fn(
                state.params, frozen, micro_batch, jax.random.fold_in(rng, index)
            )
            grads = jax.tree.map(lambda total, grad: total + output.weight * grad, grads, new)
            return grads, (output.weight, {"loss": loss, **output.metrics})

        micro_batches = split_micro_batches(batch, accumulation_steps)
        grads, (weights, metrics) = jax.lax.scan(
            add_micro_batch,
            jax.tree.map(jnp.zeros_like, state.params),
            (jnp.arange(accumulation_steps), micro_batches),
        )
        total = jnp.sum(weights)
        grads = jax.tree.map(lambda grad: grad / total, grads)
        return grads, jax.tree.map(lambda metric: jnp.sum(weights * metric) / total, metrics)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        compute = whole_batch if accumulation_steps == 1 else accumulated
        grads, metrics = compute(state, frozen, batch, rng)

        rate = schedule(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda param, update: param - rate * update, state.params, updates)
        params = task.constrain(params)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        new_state = state.replace(
            step=state.step + 1,
            params=_select(finite, params, state.params),
            opt_state=_select(finite, opt_state, state.opt_state),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            skipped_total=state.skipped_total + jnp.where(finite, 0, 1),
        )
        return new_state, {
            **metrics,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "skipped_in_a_row": new_state.skipped_in_a_row,
            "skipped_total": new_state.skipped_total,
        }

    return step


def jit_step(
    step: Step, state_shardings: Any, frozen_shardings: Any, batch_sharding: NamedSharding
) -> Step:
    """Compiles the step: the state is donated, so its buffers are reused and the argument is dead
    afterwards; the metrics are whole on every device, so that each process can read them.

    Args:
      step: from `make_train_step`.
      state_shardings: as the state, from `tree_shardings`.
      frozen_shardings: as the frozen parameters, from `tree_shardings`.
      batch_sharding: of each field, from `sharding.batch_sharding`.
    """
    mesh = batch_sharding.mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    @functools.wraps(step)
    def on_mesh(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        # The abstract mesh tells kernels that the compiler cannot split how to split themselves.
        with rows_stay_split(mesh), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, frozen, batch)

    return jax.jit(
        on_mesh,
        in_shardings=(state_shardings, frozen_shardings, batch_sharding),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """`[rows, ...]` becomes `[count, rows / count, ...]`; micro-batch k holds rows k, k + count, …

    Each device keeps the rows that it has and contributes equally to each micro-batch. The plain
    reshape to `[count, rows / count]` would give the first micro-batch the rows of the first
    devices, and send most of the batch across the network.
    """
    return jax.tree.map(
        lambda rows: jnp.moveaxis(rows.reshape(-1, count, *rows.shape[1:]), 1, 0), batch
    )


def _select(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
