"""Where a run's parameters come from: random values, other runs, and published checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxblip.errors import UserError
from jaxblip.interop.load import put_params
from jaxblip.sharding import tree_shardings
from jaxblip.tasks import Task
from jaxblip.training.checkpoints import fingerprint
from jaxblip.training.sources import (
    RANDOM,
    Stored,
    init_field,
    is_converted,
    is_published,
    source_of,
    stored_parts,
)
from jaxblip.training.state import Params, cast_frozen, split_params

References = dict[str, dict[str, str]]


def abstract_params(task: Task) -> tuple[Params, Params]:
    """Shapes of the trainable and of the frozen parameters; nothing is computed."""
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    config = task.config
    trainable, frozen = split_params(shapes, tuple(config.frozen), tuple(config.trainable))
    return trainable, jax.eval_shape(lambda t: cast_frozen(t, config.frozen_dtype), frozen)


def initial_trainable(task: Task, mesh: Mesh) -> Params:
    """The parameters that train, in float32 on the mesh: random, or as `config.init` says."""
    shapes, _ = abstract_params(task)
    params, _ = _parts(task, mesh, shapes)
    return params


def frozen_params(
    task: Task, mesh: Mesh, parts: Sequence[str] = ()
) -> tuple[Params, References]:
    """The parameters that do not train, in `config.frozen_dtype` on the mesh, and their origin.

    Args:
      parts: the only ones that are read, where some are named.

    Raises:
      UserError: a frozen part has no source in `config.init`.
    """
    _, shapes = abstract_params(task)
    shapes = {part: tree for part, tree in shapes.items() if not parts or part in parts}
    params, references = _parts(task, mesh, shapes, are_frozen=True)
    for part, tree in params.items():
        references[part]["fingerprint"] = fingerprint(tree)
    return params, references


def random_params(task: Task, shapes: Params, shardings: Params | None = None) -> Params:
    """Those of the random parameters that `shapes` has, with its dtypes; only they are computed."""
    if not shapes:
        return {}
    make = jax.jit(lambda key: _select_like(task.init(key), shapes), out_shardings=shardings)
    return make(jax.random.key(task.config.seed))


def stored_or_error(task: Task, shapes: Params) -> Stored:
    """The values of frozen parameters that are not random.

    Raises:
      UserError: a part has no source; only what `config.init` calls random is random.
    """
    config = task.config
    _check_sources(config, {part for part in shapes if not source_of(config, part)})
    stored = stored_parts(config, shapes)
    random = {part for part in shapes if stored.references[part]["source"] == RANDOM}
    _check_sources(config, {part for part in random if source_of(config, part) != RANDOM})
    return stored


def _check_sources(config: ConfigDict, without: set[str]) -> None:
    for part in sorted(without):
        raise UserError(
            f"The part {part!r} is frozen but has no weights: set --config.init."
            f"{init_field(config, part)} to the work directory of a run that trained it, to "
            f"published weights (a folder, a file or hf:NAME), or to {RANDOM!r}."
        )


def _parts(
    task: Task, mesh: Mesh, shapes: Params, *, are_frozen: bool = False
) -> tuple[Params, References]:
    """Values for `shapes`, and where each part is from."""
    stored = stored_or_error(task, shapes) if are_frozen else _stored(task.config, shapes)
    flat, shardings = (flatten_dict(t, sep="/") for t in (shapes, tree_shardings(shapes, mesh)))
    params = put_params(stored.params, {path: shardings[path] for path in stored.params})
    missing = [path for path in flat if path not in params]
    random = random_params(
        task, *(unflatten_dict({p: t[p] for p in missing}, sep="/") for t in (flat, shardings))
    )
    params |= flatten_dict(random, sep="/")
    for source, lacking in stored.lacking.items():
        if jax.process_index() == 0:
            print(f"{source} has no {', '.join(lacking)}: these parameters start at random.")
    references = {part: dict(stored.references[part]) for part in shapes}
    return unflatten_dict({path: params[path] for path in flat}, sep="/"), references


def _stored(config: ConfigDict, shapes: Params) -> Stored:
    """`stored_parts`, and the projection of published weights that the Q-Former alone is from."""
    stored = stored_parts(config, shapes)
    source, part = config.init.get("qformer", ""), "projection"
    is_one = is_published(source) or is_converted(source)
    if part not in shapes or source_of(config, part) or not is_one:
        return stored
    as_all = config.copy_and_resolve_references()
    with as_all.unlocked():
        as_all.init.all = source
    try:
        projection = stored_parts(as_all, {part: shapes[part]})
    except UserError:  # all but its width has been found to fit
        width = shapes[part]["bias"].shape[0]
        stored.lacking.setdefault(source, []).append(f"{part} to width {width}")
        return stored
    stored.params.update(projection.params)
    stored.references.update(projection.references)
    return stored


def _select_like(params: Any, like: Any) -> Any:
    """The leaves of `params` that `like` has, with its dtypes."""
    flat = flatten_dict(params)
    return unflatten_dict(
        {path: flat[path].astype(leaf.dtype) for path, leaf in flatten_dict(like).items()}
    )
