"""What a training step changes, and the split of the parameters into trainable and frozen."""

from __future__ import annotations

import difflib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int32, Key

from jaxblip.errors import UserError
from jaxblip.models.lora import is_factor

Params = dict[str, Any]


@struct.dataclass
class TrainState:
    """All that changes from step to step: donated to the step, and saved in checkpoints.

    The key of a step is `fold_in(rng, step)`, so `rng` itself never changes.
    """

    step: Int32[Array, ""]
    params: Params  # trainable only, float32
    opt_state: optax.OptState
    rng: Key[Array, ""]
    skipped_in_a_row: Int32[Array, ""]  # updates skipped since the last applied one
    skipped_total: Int32[Array, ""]

    @classmethod
    def create(
        cls, params: Params, optimizer: optax.GradientTransformation, rng: Key[Array, ""]
    ) -> TrainState:
        """State before the first step; may be called under `jax.eval_shape`."""
        # Arrays of their own: donating one buffer twice is an error.
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            rng=rng,
            skipped_in_a_row=jnp.zeros((), jnp.int32),
            skipped_total=jnp.zeros((), jnp.int32),
        )


def split_params(
    params: Params, frozen: tuple[str, ...], trainable: tuple[str, ...] = ()
) -> tuple[Params, Params]:
    """Splits nested parameters into (trainable, frozen) by path prefixes, of which the longest
    counts. Low-rank factors (`models.lora`) always train.

    Args:
      params: nested dicts of arrays.
      frozen: prefixes of whole path components, such as "vision" or "language_model/layers".
      trainable: of what trains although a shorter prefix of `frozen` has it.

    Raises:
      UserError: when a prefix matches no parameter, or one of `trainable` nothing frozen.
    """
    flat = flatten_dict(params, sep="/")
    for field, given in ("frozen", frozen), ("trainable", trainable):
        for prefix in given:
            if not any(is_under(path, prefix) for path in flat):
                raise UserError(_unknown_prefix(field, prefix, list(flat)))
    for prefix in trainable:
        if not any(is_under(prefix, other) and prefix != other for other in frozen):
            part = prefix.partition("/")[0]
            raise UserError(
                f"config.trainable={prefix!r} is in nothing that is frozen, so it trains in any "
                f"case: add {part!r} to config.frozen to train nothing else of it."
            )
    parts: tuple[Params, Params] = ({}, {})
    for path, leaf in flat.items():
        is_frozen = _longest(path, frozen) > _longest(path, trainable) and not is_factor(path)
        parts[is_frozen][path] = leaf
    return unflatten_dict(parts[0], sep="/"), unflatten_dict(parts[1], sep="/")


def merge_params(trainable: Params, frozen: Params) -> Params:
    """The full tree again; the inverse of `split_params`."""
    merged = {**flatten_dict(trainable, sep="/"), **flatten_dict(frozen, sep="/")}
    return unflatten_dict(merged, sep="/")


def cast_frozen(tree: Params, dtype: jnp.dtype) -> Params:
    """The tree with its floating-point leaves as `dtype`; integers and booleans stay."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def is_under(path: str, prefix: str) -> bool:
    """Whether a path is a prefix of whole components, or begins with it."""
    return path == prefix or path.startswith(prefix + "/")


def _longest(path: str, prefixes: tuple[str, ...]) -> int:
    """Length of the longest prefix that the path is under; -1 where there is none."""
    return max((len(prefix) for prefix in prefixes if is_under(path, prefix)), default=-1)


def _unknown_prefix(field: str, prefix: str, paths: list[str]) -> str:
    parts = [path.split("/") for path in paths]
    known = sorted({"/".join(part[:n]) for part in parts for n in range(1, len(part) + 1)})
    near = difflib.get_close_matches(prefix, known, n=1, cutoff=0.0)
    hint = f" The nearest path is {near[0]!r}." if near else ""
    return f"The {field} part {prefix!r} matches no parameter of the model.{hint}"
