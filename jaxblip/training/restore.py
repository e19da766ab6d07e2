"""A finished (or unfinished) run, back from its work directory, for evaluation and generation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxblip import sharding
from jaxblip.config import apply_overrides, config_from_dict
from jaxblip.data import inputs
from jaxblip.errors import UserError
from jaxblip.tasks import Task, make_task
from jaxblip.training.checkpoints import (
    CONFIG_FILE,
    check_frozen,
    load_frozen_references,
    load_params,
    saved_steps,
)
from jaxblip.training.initialize import frozen_params
from jaxblip.training.state import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """A run at one of its checkpoints."""

    task: Task
    tokenizer: Any
    mesh: Mesh
    params: Params  # trainable
    frozen: Params
    step: int


def load_run(workdir: str, overrides: Sequence[str] = (), step: int | None = None) -> Run:
    """Reads config, tokenizer and parameters of a run; its frozen parts come from their sources.

    Args:
      overrides: `config.field=value`, such as another evaluation source or mesh.
      step: which checkpoint, by default the latest.

    Raises:
      UserError: no complete run is there, or a frozen part is not the one it was trained with.
    """
    path, steps = Path(workdir) / CONFIG_FILE, saved_steps(workdir)
    if not path.is_file() or not steps:
        raise UserError(
            f"There is no run with a checkpoint in {workdir!r}: name the --workdir of a training."
        )
    step = steps[-1] if step is None else step
    config = config_from_dict(json.loads(path.read_text()))
    apply_overrides(config, overrides)
    task = make_task(config)
    mesh = sharding.make_mesh(config.mesh)
    tokenizer = inputs.run_tokenizer(config, workdir, source=None)

    params = load_params(workdir, step=step)
    params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    frozen, references = frozen_params(task, mesh)
    check_frozen(load_frozen_references(workdir, step), references, where=workdir)
    return Run(task, tokenizer, mesh, params, frozen, step)
