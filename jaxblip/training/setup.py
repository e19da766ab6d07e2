"""What a training run consists of, before its first step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.config import MAY_CHANGE_ON_RESUME
from jaxblip.data import mixture, run_sources, run_tokenizers
from jaxblip.data.features import with_features
from jaxblip.data.mixture import TrainSource
from jaxblip.errors import UserError
from jaxblip.tasks import Task, make_task
from jaxblip.training import checkpoints, environment
from jaxblip.training.adopt import adopt_sources, has_sizes
from jaxblip.training.checkpoints import Checkpoints
from jaxblip.training.data_defaults import with_schedule
from jaxblip.training.initialize import abstract_params, initial_trainable
from jaxblip.training.metrics import EVENTS_FOLDER, METRICS_FILE
from jaxblip.training.optimizer import learning_rate, make_optimizer
from jaxblip.training.sources import is_converted
from jaxblip.training.state import Params, TrainState
from jaxblip.training.step import Step, jit_step, make_train_step

# What a run writes into its work directory.
FILES = (
    checkpoints.CONFIG_FILE,
    checkpoints.FOLDER,
    environment.ENVIRONMENT_FILE,
    run_tokenizers.TOKENIZER_FOLDER,
    run_tokenizers.QFORMER_TOKENIZER_FOLDER,
    METRICS_FILE,
    EVENTS_FOLDER,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run that follow from its config."""

    config: ConfigDict  # with the fields that the tokenizer decides
    workdir: str
    mesh: Mesh
    sources: list[TrainSource]
    tokenizer: Any
    qformer_tokenizer: Any  # where the Q-Former has another one, else None
    task: Task
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation


def prepare(config: ConfigDict, workdir: str) -> Setup:
    """Checks all that can be wrong, the cheapest first; compiles and writes nothing.

    Raises:
      UserError: config, data source, tokenizer or work directory cannot be used.
    """
    if is_converted(workdir):
        raise UserError(
            f"{workdir!r} was written by `jaxblip convert` and has no state of a training to go on "
            f"with: name it in --config.init.all, and another --workdir."
        )
    _check_writable(workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.optimizer.accumulation_steps)
    optimizer = make_optimizer(config)
    adopts_sizes = any(map(has_sizes, config.init.values()))
    if not adopts_sizes:
        _check_model(config, mesh)
    sources = run_sources.open_train_sources(config)
    examples = sum(len(each.source) for each in sources)
    config, schedule_lines = with_schedule(config, examples)
    schedule = learning_rate(config)
    adopted = adopt_sources(config)
    config = adopted.config
    if adopts_sizes:  # they are known only now, after a download perhaps
        _check_model(config, mesh)
    tokenizer = run_tokenizers.run_tokenizer(config, workdir, sources, adopted.tokenizer)
    qformer_tokenizer = run_tokenizers.run_qformer_tokenizer(
        config, workdir, sources, adopted.qformer_tokenizer
    )
    config = run_tokenizers.with_vocabulary(config, tokenizer, qformer_tokenizer)
    checkpoints.check_same_config(workdir, config.to_dict(), ignore=MAY_CHANGE_ON_RESUME)
    task = make_task(config)
    if config.data.get("features"):
        sources = with_features(config, sources)
    if jax.process_index() == 0:
        for line in (*schedule_lines, *adopted.lines, *mixture.lines(sources)):
            print(line)
    tokenizers = tokenizer, qformer_tokenizer
    return Setup(config, workdir, mesh, sources, *tokenizers, task, schedule, optimizer)


def _check_writable(workdir: str) -> None:
    existing = next(path for path in (Path(workdir), *Path(workdir).parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"The work directory {workdir!r} cannot be written: {str(existing)!r} is "
            f"{'read-only' if existing.is_dir() else 'no folder'}; choose another --workdir."
        )


def _check_model(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for shapes that do not fit each other, frozen parts that do not exist, and
    axes of the mesh that split nothing.
    """
    params = abstract_params(make_task(run_tokenizers.with_some_vocabulary(config)))
    trainable, _ = params
    if not trainable:
        raise UserError(
            f"config.frozen={','.join(config.frozen)} freezes the whole model, so that nothing is "
            "left to train: take a part out of it, or name one in config.trainable."
        )
    jax.eval_shape(make_optimizer(config).init, trainable)  # checks layer-wise decay
    sharding.check_axes_are_used(params, mesh)


def write_description(setup: Setup) -> None:
    """Config, environment and tokenizer into the work directory, by process 0."""
    if jax.process_index() == 0:
        checkpoints.save_config(setup.workdir, setup.config.to_dict())
        environment.save_environment(setup.workdir)
        run_tokenizers.save_tokenizers(setup.tokenizer, setup.qformer_tokenizer, setup.workdir)


@contextlib.contextmanager
def files_undone_unless_kept(workdir: str) -> Iterator[Callable[[], None]]:
    """Removes what a run has written if it ends in an error before the function yielded is called.

    A tokenizer that was left behind would be taken for that of the next start. What was there
    before stays, and so does what is no file of a run.
    """
    folder, kept = Path(workdir), []
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    written = [folder / name for name in FILES if not (folder / name).exists()]
    try:
        yield lambda: kept.append(True)
    except BaseException:
        if not kept and jax.process_index() == 0:
            for path in filter(Path.exists, written):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            with contextlib.suppress(OSError):  # not empty: somebody else's
                for path in made:
                    path.rmdir()
        raise


def begin_or_resume(setup: Setup, saved: Checkpoints) -> tuple[TrainState, dict[str, Any] | None]:
    """The state on the mesh, and the position in the data (None at the beginning)."""

    def create(params: Params) -> TrainState:
        return TrainState.create(params, setup.optimizer, jax.random.key(setup.config.seed))

    shapes = jax.eval_shape(create, abstract_params(setup.task)[0])
    shardings = sharding.tree_shardings(shapes, setup.mesh)
    if saved.latest_step() is None:
        params = initial_trainable(setup.task, setup.mesh)
        return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params), None
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    return saved.restore(abstract)


def compiled_step(setup: Setup, state: TrainState, frozen: Params) -> Step:
    """The training step for this state on this mesh; it compiles at its first call."""
    return jit_step(
        make_train_step(
            setup.task, setup.optimizer, setup.schedule, setup.config.optimizer.accumulation_steps
        ),
        sharding.tree_shardings(state, setup.mesh),
        sharding.tree_shardings(frozen, setup.mesh),
        sharding.batch_sharding(setup.mesh),
    )
