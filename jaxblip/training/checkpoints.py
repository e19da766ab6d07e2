"""Checkpoints over Orbax: what is trained is saved, what is frozen is saved as a reference.

A work directory holds `config.json` and `checkpoints/<step>/` with the items `params` (trainable
parameters), `train` (the rest of the train state), `data` (position of the data iterator), `frozen`
(references to the frozen parts) and, where the step was evaluated, `metrics`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32
from orbax.checkpoint import checkpoint_managers as policies

from jaxblip.errors import UserError
from jaxblip.training.piecewise import layer_chunks
from jaxblip.training.state import Params, TrainState

FOLDER = "checkpoints"
_SHOWN = 5  # differing fields that an error lists
CONFIG_FILE = "config.json"


class Checkpoints:
    """The checkpoints of one run, written in the background.

    A checkpoint appears under its step number only when it is complete: one that was being written
    when the process died is never listed, and is removed when the run starts again.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 2,
        best_metric: str = "",
        best_mode: str = "max",
        keep_best: int = 1,
        frozen: Mapping[str, Mapping[str, str]] | None = None,
    ):
        """Opens, or begins, the checkpoints of a work directory. All processes must call this.

        Args:
          workdir: the run's directory, local or of a cloud bucket.
          keep_last: number of newest checkpoints to keep, at least 1.
          best_metric: metric (as given to `save`) whose best checkpoints are kept too; "" for none.
          best_mode: "max" or "min": which values of `best_metric` are good.
          keep_best: number of best checkpoints to keep.
          frozen: reference of each frozen part: its "source", "revision" and "fingerprint".
        """
        if keep_last < 1:
            raise UserError(f"keep_last={keep_last} must be at least 1: a run resumes from it.")
        if best_mode not in ("max", "min"):
            raise UserError(f"best_mode={best_mode!r} must be 'max' or 'min'.")
        self._frozen = {part: dict(reference) for part, reference in (frozen or {}).items()}
        self._best_metric, self._best_mode = best_metric, best_mode
        kept = [policies.LatestN(keep_last)]
        if best_metric and keep_best:
            kept.append(
                policies.BestN(
                    n=keep_best, get_metric_fn=self._score, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = _manager(
            workdir,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=self._score if best_metric else None,  # without it no metrics are written
            cleanup_tmp_directories=True,
        )

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: Any,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Saves in the background; `state` may be donated as soon as this returns.

        Args:
          step: number of steps done.
          state: the train state after that step.
          data_state: position of the data iterator, as JSON.
          metrics: evaluation results at this step, for keep-best. A step is saved once, so
            evaluate before saving.

        Returns:
          False, having written nothing, where this step or a later one is saved already.
        """
        params, train = _divide(state)
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params, save_args=layer_chunks(params)),
                train=ocp.args.PyTreeSave(train),
                data=ocp.args.JsonSave(data_state),
                frozen=ocp.args.JsonSave(self._frozen),
            ),
            metrics=None if metrics is None else _finite(metrics),
        )

    def restore(
        self, abstract_state: TrainState, step: int | None = None
    ) -> tuple[TrainState, Any]:
        """Reads (state, data state), onto the devices that `abstract_state` names.

        Args:
          abstract_state: a train state whose leaves have shape, dtype and sharding: arrays or
            `jax.ShapeDtypeStruct`. The mesh need not be the one that saved.
          step: which checkpoint, by default the latest.

        Raises:
          UserError: when there is no such checkpoint, its frozen parts are not those of this run,
            or its parameters have other names or shapes.
        """
        step = _existing_step(self._manager, step)
        saved = self._manager.restore(step, args=ocp.args.Composite(frozen=ocp.args.JsonRestore()))
        check_frozen(saved["frozen"], self._frozen, where=str(self._manager.directory / str(step)))

        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_state)
        params, train = _divide(abstract)
        self._check_shapes(step, params)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=_onto_devices(params),
                train=_onto_devices(train),
                data=ocp.args.JsonRestore(),
            ),
        )
        state = abstract_state.replace(params=restored["params"], **restored["train"])
        return state, restored["data"]

    def _check_shapes(self, step: int, expected: Params) -> None:
        saved, wanted = (
            {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
             for path, leaf in jax.tree.leaves_with_path(tree)}
            for tree in (self._manager.item_metadata(step)["params"].tree, expected)
        )  # fmt: skip
        for path in sorted(set(saved) | set(wanted)):
            if saved.get(path) != wanted.get(path):
                raise UserError(
                    f"The checkpoint {self._manager.directory / str(step)} does not fit the model: "
                    f"parameter {path!r} is {saved.get(path, 'absent')} there and "
                    f"{wanted.get(path, 'absent')} here. Use the config that made it, or another "
                    "--workdir."
                )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Kept step with the best `best_metric`; None where no kept step has it."""
        scores = {step: self._score(self._manager.metrics(step)) for step in self.all_steps()}
        scores = {step: score for step, score in scores.items() if score > -math.inf}
        return max(scores, key=scores.__getitem__) if scores else None

    def all_steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def reached_preemption(self, step: int) -> bool:
        """True where the cluster has announced, through `jax.distributed`, that it stops this run.

        All processes agree on the step. Without `jax.distributed` always False.
        """
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything handed to `save` is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _score(self, metrics: Mapping[str, float] | None) -> float:
        """Larger is better; a missing metric, or one that was not finite, is the worst."""
        value = (metrics or {}).get(self._best_metric)
        if value is None:
            return -math.inf
        return value if self._best_mode == "max" else -value


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a work directory, ascending; reads only."""
    folder = epath.Path(workdir) / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def load_params(
    workdir: str | os.PathLike, part: str | None = None, step: int | None = None
) -> Params:
    """Trained parameters of any run, as numpy arrays on the host; nothing else is read.

    Args:
      workdir: the work directory of the run, which may still be going on.
      part: a path such as "vision" or "qformer/layers", by default all that was trained.
      step: which checkpoint, by default the latest.

    Returns:
      The subtree at `part`: `load_params(w, "vision")` is `load_params(w)["vision"]`.

    Raises:
      UserError: when there is no such checkpoint, or `part` was not trained there. A part that was
        frozen is not in the checkpoint: its origin is in `load_frozen_references(workdir)`.
    """
    with _manager(workdir, read_only=True) as manager:
        step = _existing_step(manager, step)
        tree = manager.item_metadata(step)["params"].tree
        names = part.split("/") if part else []
        found = tree
        for name in names:
            if not isinstance(found, Mapping) or name not in found:
                raise UserError(
                    f"The checkpoint {manager.directory / str(step)} has no trained part {part!r}. "
                    f"Trained there: {', '.join(sorted(tree))}; frozen: "
                    f"{', '.join(sorted(load_frozen_references(workdir, step))) or 'nothing'}."
                )
            found = found[name]
        for name in reversed(names):
            found = {name: found}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
        args = ocp.args.PyTreeRestore(found, restore_args=as_numpy, partial_restore=True)
        params = manager.restore(step, args=ocp.args.Composite(params=args))["params"]
    for name in names:
        params = params[name]
    return params


def load_frozen_references(
    workdir: str | os.PathLike, step: int | None = None
) -> dict[str, dict[str, str]]:
    """References (source, revision, fingerprint) of the parts that were frozen in a run, by part.

    Raises:
      UserError: when there is no such checkpoint.
    """
    with _manager(workdir, read_only=True) as manager:
        step = _existing_step(manager, step)
        args = ocp.args.Composite(frozen=ocp.args.JsonRestore())
        return manager.restore(step, args=args)["frozen"]


def fingerprint(tree: Any) -> str:
    """Hexadecimal digest of a tree's paths, shapes, dtypes and bits.

    It depends on nothing else: not on the sharding, the mesh or the number of processes. Sums run
    where the shards are, so that no array is gathered. A guard against mix-ups, not forgery.
    """
    leaves = jax.tree.leaves_with_path(tree)
    meshes = [
        leaf.sharding.mesh
        for _, leaf in leaves
        if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    ]
    # Whole on every device, so that each process can read it.
    whole = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    checksums = jax.jit(
        lambda arrays: jnp.stack([_checksum(array) for array in arrays]), out_shardings=whole
    )([leaf for _, leaf in leaves]) if leaves else []  # fmt: skip
    return _digest(leaves, np.asarray(checksums))


def stored_fingerprint(tree: Any) -> str:
    """As `fingerprint`, of parameters that are still in files; memory is one layer of one.

    Args:
      tree: as `interop.load.put_params` takes it.
    """
    leaves = jax.tree.leaves_with_path(tree)
    checksum = jax.jit(_checksum)

    def of(leaf: Any) -> int:
        if not leaf.is_stacked:
            return int(checksum(leaf[()], 0))
        return sum(int(checksum(leaf[layer], layer)) for layer in range(leaf.shape[0])) % 2**32

    return _digest(leaves, [of(leaf) for _, leaf in leaves])


def _digest(leaves: Sequence[tuple[Any, Any]], checksums: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for (path, leaf), checksum in zip(leaves, checksums, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {tuple(leaf.shape)} {leaf.dtype} {checksum}\n".encode())
    return digest.hexdigest()


def check_frozen(
    saved: Mapping[str, Mapping[str, str]],
    current: Mapping[str, Mapping[str, str]],
    where: str = "the checkpoint",
) -> None:
    """Raises UserError where a frozen part differs from the one the checkpoint was trained against.

    Args:
      saved: references of the checkpoint, by part.
      current: references of this run: "source", "revision" and "fingerprint" of each part.
      where: names the checkpoint in the message.
    """
    for part in sorted(set(saved) | set(current)):
        if part not in current or part not in saved:
            there, here = ("frozen", "not") if part in saved else ("not", "frozen")
            raise UserError(
                f"Part {part!r} is {there} in {where} and {here} in this run: freeze the same "
                "parts, or choose another --workdir."
            )
        if saved[part]["fingerprint"] != current[part]["fingerprint"]:
            raise UserError(
                f"The frozen part {part!r} of this run, from {_origin(current[part])}, is not the "
                f"one that {where} was trained with, from {_origin(saved[part])}: name that "
                "source in the config, or choose another --workdir."
            )


def save_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes the resolved config as `config.json`, replacing an older one in one move."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{CONFIG_FILE}.new"
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    new.replace(folder / CONFIG_FILE)


def check_same_config(
    workdir: str | os.PathLike, config: Mapping[str, Any], ignore: tuple[str, ...] = ()
) -> None:
    """Raises UserError where the work directory holds checkpoints of another config.

    Args:
      workdir: the run's directory.
      config: the resolved config: nested dicts of JSON values.
      ignore: fields, or groups of fields, that may change when a run resumes, such as "mesh" or
        "data.num_workers".
    """
    if not saved_steps(workdir):
        return
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise UserError(
            f"The work directory {workdir} holds checkpoints but no {CONFIG_FILE}, so it cannot be "
            "told whose they are: choose another --workdir."
        )
    saved = _flat_fields(json.loads(path.read_text()))
    current = _flat_fields(json.loads(json.dumps(config)))  # tuples become lists, as in the file
    differing = [
        f"{field} was {json.dumps(saved[field]) if field in saved else 'absent'}, "
        f"is now {json.dumps(current[field]) if field in current else 'absent'}"
        for field in sorted(set(saved) | set(current))
        if (field in saved, saved.get(field)) != (field in current, current.get(field))
        and not any(field == name or field.startswith(name + ".") for name in ignore)
    ]
    if saved.get("task") != current.get("task"):
        raise UserError(
            f"The work directory {workdir} holds a checkpoint of the task {saved.get('task')}, and "
            f"the config is of {current.get('task')}: choose another --workdir."
        )
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"The work directory {workdir} holds a checkpoint of another config: "
            f"{'; '.join(differing[:_SHOWN])}{more}. Choose the old values, or another --workdir, "
            f"where --config.init.all={workdir} trains on from this one."
        )


def _manager(workdir: str | os.PathLike, **options: Any) -> ocp.CheckpointManager:
    logging.getLogger("absl").addFilter(_not_chatter)
    folder = epath.Path(workdir).resolve() / FOLDER
    if options.get("read_only") and not folder.exists():
        raise UserError(f"There is no checkpoint in {workdir}: {folder} does not exist.")
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={
            "params": ocp.PyTreeCheckpointHandler(),
            "train": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "frozen": ocp.JsonCheckpointHandler(),
        },
    )


def _not_chatter(record: logging.LogRecord) -> bool:
    """Orbax tells absl's logger every file that it touches; what goes wrong it raises as well."""
    return "orbax" not in record.pathname or record.levelno >= logging.ERROR


def _existing_step(manager: ocp.CheckpointManager, step: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps:
        raise UserError(f"There is no complete checkpoint in {manager.directory}.")
    if step is not None and step not in steps:
        raise UserError(
            f"There is no checkpoint of step {step} in {manager.directory}: it has {steps}."
        )
    return steps[-1] if step is None else step


def _onto_devices(abstract: Any) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=restore_args)


def _divide(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """Parameters by themselves, so that others can read them without the optimizer state."""
    train = {name: getattr(state, name) for name in state.__dataclass_fields__ if name != "params"}
    return state.params, train


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    values = {name: float(value) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _flat_fields(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat_fields(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _origin(reference: Mapping[str, str]) -> str:
    revision = f" revision {reference['revision']}" if reference.get("revision") else ""
    return f"{reference['source']!r}{revision} (fingerprint {reference['fingerprint'][:12]})"


def _checksum(array: Array, number: Array | int = 0) -> UInt32[Array, ""]:
    """Sum modulo 2**32 of a hash of (position, bits) of each element.

    The order of an integer sum does not matter, so neither does the sharding; and the sum of a
    stack is that of its layers.

    Args:
      number: of the layer that `array` is in its stack.
    """
    array = jnp.asarray(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = jnp.dtype(array.dtype).itemsize * 8
    bits = jax.lax.bitcast_convert_type(array, f"uint{width}").astype(jnp.uint32)
    position = jnp.full(array.shape, number, jnp.uint32)
    for axis, size in enumerate(array.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, array.shape, axis
        )
    return jnp.sum(_mix(bits ^ _mix(position)), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """An integer hash without collisions: each step can be undone."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
