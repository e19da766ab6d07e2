"""Where a run's parameters come from: random values, and parts of other runs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxblip.errors import UserError
from jaxblip.sharding import tree_shardings
from jaxblip.tasks import Task
from jaxblip.training.checkpoints import (
    fingerprint,
    load_frozen_references,
    load_params,
    saved_steps,
)
from jaxblip.training.state import Params, cast_frozen, split_params

# Which parts of the parameter tree a field of `config.init` stands for. The norm between encoder
# and Q-Former is trained with the Q-Former.
PARTS = {
    "vision": ("vision",),
    "qformer": ("qformer", "vision_norm"),
    "language_model": ("language_model",),
}
RANDOM = "random"

References = dict[str, dict[str, str]]


def abstract_params(task: Task) -> tuple[Params, Params]:
    """Shapes of the trainable and of the frozen parameters; nothing is computed."""
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    trainable, frozen = split_params(shapes, tuple(task.config.frozen))
    return trainable, jax.eval_shape(lambda t: cast_frozen(t, task.config.frozen_dtype), frozen)


def initial_trainable(task: Task, mesh: Mesh) -> Params:
    """The parameters that train, in float32 on the mesh: random, or as `config.init` says."""
    shapes, _ = abstract_params(task)
    params, _ = _parts(task, mesh, shapes)
    return params


def frozen_params(task: Task, mesh: Mesh) -> tuple[Params, References]:
    """The parameters that do not train, as `config.frozen_dtype` on the mesh, and where they are from.

    Raises:
      UserError: a frozen part has no source in `config.init`.
    """
    config = task.config
    _, shapes = abstract_params(task)
    for part in shapes:
        if not _source(config, part):
            raise UserError(
                f"The part {part!r} is frozen but has no weights: set --config.init."
                f"{_init_field(part)} to the work directory of a run that trained it, or to "
                f"{RANDOM!r}."
            )
    params, revisions = _parts(task, mesh, shapes)
    references = {
        part: {
            "source": _source(config, part),
            "revision": revisions[part],
            "fingerprint": fingerprint(tree),
        }
        for part, tree in params.items()
    }
    return params, references


def _parts(task: Task, mesh: Mesh, shapes: Params) -> tuple[Params, dict[str, str]]:
    """Values for `shapes`, and the revision of each part: the step of the run that it is from."""
    config = task.config
    shardings = tree_shardings(shapes, mesh)
    params, revisions = {}, {}
    for part, tree in shapes.items():
        source = _source(config, part)
        if source in ("", RANDOM):
            revisions[part] = f"seed {config.seed}"
            continue
        values, revisions[part] = load_part(source, part)
        values = _fit(values, tree, part, source)
        params[part] = jax.tree.map(
            lambda value, like, sharding: jax.make_array_from_callback(
                like.shape, sharding, lambda index: np.asarray(value[index], like.dtype)
            ),
            values,
            tree,
            shardings[part],
        )
    missing = {part: tree for part, tree in shapes.items() if part not in params}
    if missing:
        random = jax.jit(
            lambda key: _select_like(task.init(key), missing),
            out_shardings={part: shardings[part] for part in missing},
        )(jax.random.key(config.seed))
        params |= random
    return params, revisions


def load_part(source: str, part: str, step: int | None = None) -> tuple[Params, str]:
    """A part of another run's latest checkpoint, as numpy arrays, and the step it is from.

    Where the part was frozen in that run, its reference is followed to the run that trained it.
    """
    steps = saved_steps(source)
    if not steps:
        raise UserError(
            f"{source!r} is to supply the part {part!r}, but there is no run with checkpoints in "
            "that folder: train it first, or name another work directory in config.init."
        )
    step = steps[-1] if step is None else step
    reference = load_frozen_references(source, step).get(part)
    if reference is None:
        return load_params(source, part, step), str(step)
    if reference["source"] == RANDOM:
        raise UserError(
            f"The part {part!r} was random and frozen in the run {source!r}: there are no weights "
            "to load; name another source in config.init."
        )
    return load_part(reference["source"], part, int(reference["revision"]))


def _init_field(part: str) -> str:
    return next((field for field, parts in PARTS.items() if part in parts), part)


def _source(config: ConfigDict, part: str) -> str:
    return config.init.get(_init_field(part), "")


def _select_like(params: Any, like: Any) -> Any:
    """The leaves of `params` that `like` has, with its dtypes."""
    flat = flatten_dict(params)
    return unflatten_dict(
        {path: flat[path].astype(leaf.dtype) for path, leaf in flatten_dict(like).items()}
    )


def _fit(values: Any, shapes: Any, part: str, source: str) -> Any:
    """The values that the model wants; the source may have more, such as stage 1's text side."""
    if isinstance(shapes, jax.ShapeDtypeStruct):  # a part that is a single parameter
        values, shapes = {"": values}, {"": shapes}
        return _fit(values, shapes, part, source)[""]
    have, want = flatten_dict(values, sep="/"), flatten_dict(shapes, sep="/")
    wrong = [
        f"{part}/{path} is {tuple(have[path].shape) if path in have else 'absent'} there and "
        f"{tuple(leaf.shape)} here"
        for path, leaf in want.items()
        if path not in have or tuple(have[path].shape) != tuple(leaf.shape)
    ]
    if wrong:
        raise UserError(
            f"The part {part!r} of {source!r} does not fit the model of this config: "
            f"{'; '.join(wrong[:8])}{f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''}. "
            f"Give config.model the sizes of that run."
        )
    return unflatten_dict({path: have[path] for path in want}, sep="/")
