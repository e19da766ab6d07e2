"""A finished (or unfinished) run, back from its work directory, for evaluation and generation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.config import config_from_dict
from jaxblip.data import run_tokenizers
from jaxblip.errors import UserError
from jaxblip.interop.load import put_params
from jaxblip.overrides import apply_overrides, field_names
from jaxblip.tasks import Task, make_task
from jaxblip.training.checkpoints import (
    CONFIG_FILE,
    FOLDER,
    check_frozen,
    load_frozen_references,
    saved_steps,
)
from jaxblip.training.initialize import frozen_params
from jaxblip.training.piecewise import saved_params
from jaxblip.training.state import Params

# Fields, and whole sections, of a trained run's config that change what it does. The sizes of the
# model are those of its weights.
_OF_GENERATION = (
    "compute_dtype",
    "frozen_dtype",
    "init",  # where frozen parts lie now
    "mesh",
    "model.dec_token_id",
    "model.enc_token_id",
    "data.prompt",
    "data.max_words",
    "data.stop_token",
    "data.frames",
    "data.resize",
    "data.interpolation",
    "data.pixel_mean",
    "data.pixel_std",
    "data.max_image_pixels",
    "eval.batch_size",
    "eval.num_beams",
    "eval.length_penalty",
    "eval.max_new_tokens",
    "eval.min_new_tokens",
)
READ_AGAIN = {
    "generation": _OF_GENERATION,
    "evaluation": (
        *_OF_GENERATION,
        "data.image_folder",
        "data.fields",
        "data.max_text_tokens",
        "data.max_input_tokens",
        "data.max_instruction_tokens",
        "eval.kind",
        "eval.source",
        "eval.image_folder",
        "eval.fields",
        "eval.set",
        "eval.max_images",
        "eval.rerank_top_k",
        "eval.folds",
        "eval.captions_per_image",
        "eval.classes",
        "eval.templates",
        "eval.answers",
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run at one of its checkpoints."""

    task: Task
    tokenizer: Any
    mesh: Mesh
    params: Params  # trainable
    frozen: Params
    step: int
    qformer_tokenizer: Any = None  # where the Q-Former has another one (`instruct`)


def read_config(workdir: str, step: int | None = None) -> tuple[ConfigDict, int]:
    """The config of a run, and the step of one of its checkpoints.

    Args:
      step: None for the latest.

    Raises:
      UserError: there is no run, or no such checkpoint.
    """
    path, steps = Path(workdir) / CONFIG_FILE, saved_steps(workdir)
    if not path.is_file() or not steps:
        raise UserError(
            f"There is no run with a checkpoint in {workdir!r}: name the --workdir of a training."
        )
    if step is not None and step not in steps:
        raise UserError(f"There is no checkpoint of step {step} in {workdir!r}: it has {steps}.")
    return config_from_dict(json.loads(path.read_text())), steps[-1] if step is None else step


def check_overrides(
    workdir: str, overrides: Sequence[str], step: int | None = None, *, by: str
) -> None:
    """Raises UserError for an override of a run's config that has no effect.

    Args:
      by: what reads the config again, of `READ_AGAIN`.
    """
    if not overrides:
        return
    config, _ = read_config(workdir, step)
    apply_overrides(config, overrides)
    for override in overrides:
        name = override.removeprefix("config.").partition("=")[0]
        if not any(f"{name}.".startswith(f"{field}.") for field in READ_AGAIN[by]):
            known = [field for field in field_names(config) if field in READ_AGAIN[by]]
            sections = ("init", "mesh", "data.fields", "eval.fields", "eval.set.NAME")
            read = READ_AGAIN[by]
            known += [f"{name}.*" for name in sections if name.removesuffix(".NAME") in read]
            raise UserError(
                f"--{override} has no effect on the {by} of a trained run: of its config only "
                f"{', '.join(known)} are read again."
            )


def load_run(workdir: str, overrides: Sequence[str] = (), step: int | None = None) -> Run:
    """Reads config, tokenizer and parameters of a run; its frozen parts come from their sources.

    Args:
      overrides: `config.field=value`, such as another evaluation source or mesh.
      step: which checkpoint, by default the latest.

    Raises:
      UserError: no complete run is there, or a frozen part is not the one it was trained with.
    """
    config, step = read_config(workdir, step)
    apply_overrides(config, overrides)
    task = make_task(config)
    mesh = sharding.make_mesh(config.mesh)
    tokenizer = run_tokenizers.run_tokenizer(config, workdir, sources=())
    qformer_tokenizer = run_tokenizers.run_qformer_tokenizer(config, workdir, sources=())

    params = _trained(workdir, step, mesh)
    frozen, references = frozen_params(task, mesh)
    check_frozen(load_frozen_references(workdir, step), references, where=workdir)
    return Run(task, tokenizer, mesh, params, frozen, step, qformer_tokenizer)


def at_step(run: Run, workdir: str, step: int) -> Run:
    """The same run at another of its checkpoints."""
    return dataclasses.replace(run, params=_trained(workdir, step, run.mesh), step=step)


def _trained(workdir: str, step: int, mesh: Mesh) -> Params:
    saved = saved_params(f"{workdir}/{FOLDER}/{step}")
    return put_params(saved, sharding.tree_shardings(saved, mesh))
