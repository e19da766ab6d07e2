"""The evaluations of a run, each with its set, and what all of them say together."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxblip.data.eval_sections import KINDS, configs_of_evaluations
from jaxblip.errors import UserError
from jaxblip.evaluation.base import Evaluation, Metrics, Parts
from jaxblip.evaluation.linear_probe import LinearProbeEvaluation
from jaxblip.evaluation.losses import InBatchEvaluation, LossEvaluation
from jaxblip.evaluation.matching import ClassificationEvaluation, RetrievalEvaluation
from jaxblip.evaluation.texts import AnswerEvaluation, CaptionEvaluation
from jaxblip.tasks import Task, make_task
from jaxblip.training.state import Params

_KINDS: dict[str, type[Evaluation]] = {
    "captions": CaptionEvaluation,
    "vqa": AnswerEvaluation,
    "okvqa": AnswerEvaluation,
    "gqa": AnswerEvaluation,
    "retrieval": RetrievalEvaluation,
    "classification": ClassificationEvaluation,
    "linear_probe": LinearProbeEvaluation,
    "loss": LossEvaluation,
}


def _kind(config: ConfigDict) -> type[Evaluation]:
    """Losses of texts are of each; those of a contrast are of a batch."""
    contrasts = config.eval.kind == "loss" and "retrieval" in KINDS[config.task]
    return InBatchEvaluation if contrasts else _KINDS[config.eval.kind]


class Evaluations:
    """Those that a run's config names, by name: "" is the only one of a run without sections."""

    def __init__(
        self, task: Task, tokenizer: Any, mesh: Mesh, qformer_tokenizer: Any = None,
        java: bool = False,
    ):  # fmt: skip
        """Reads the evaluation sets.

        Args:
          qformer_tokenizer: of the Q-Former, for the task `instruct`.
          java: whether captions are also scored by programs in Java.

        Raises:
          UserError: a set cannot be read, or a setting does not fit the task.
        """
        self.by_name = {}
        for name, config in configs_of_evaluations(task.config).items():
            parts = Parts(make_task(config), tokenizer, mesh, qformer_tokenizer)
            self.by_name[name] = _kind(config)(config, parts, name, java)

    def __bool__(self) -> bool:
        return bool(self.by_name)

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self.by_name.values())

    def run(self, params: Params, frozen: Params) -> Metrics:
        """Metrics of all, those of a named one as NAME/METRIC."""
        return prefixed([(each, each.run(params, frozen)) for each in self])

    def check_metric(self, wanted: str) -> None:
        """Raises UserError where none of them gives what `config.checkpoint.best_metric` names."""
        if not wanted:
            return
        known = [
            f"{each.name}/{metric}" if each.name else metric
            for each in self
            for metric in each.metric_names
        ]
        if not known:
            raise UserError(
                f"checkpoint.best_metric={wanted!r} is of an evaluation, and there is none: set "
                "--config.eval.source."
            )
        if wanted not in known:
            near = difflib.get_close_matches(wanted, known, 1, cutoff=0.0)
            raise UserError(
                f"checkpoint.best_metric={wanted!r} is measured by no evaluation of this run: did "
                f"you mean {near[0]}?"
            )

    def describe(self) -> list[str]:
        """Each set in one line."""
        return [evaluation.describe() for evaluation in self]


def prefixed(found: Sequence[tuple[Evaluation, Metrics]]) -> Metrics:
    """The metrics of several evaluations as NAME/METRIC; of the only one as METRIC."""
    return {
        f"{evaluation.name}/{metric}" if evaluation.name else metric: value
        for evaluation, metrics in found
        for metric, value in metrics.items()
    }


def make_scorer(config: ConfigDict) -> Evaluation:
    """The only evaluation of a config, for predictions that are there already.

    Raises:
      UserError: there is none, or several, or its kind scores no predictions.
    """
    configs = configs_of_evaluations(config)
    if list(configs) != [""]:
        raise UserError(
            "Predictions are scored against one source: name it by --config.eval.source."
        )
    config = configs[""]
    kind = _kind(config)
    if not issubclass(kind, CaptionEvaluation):
        raise UserError(
            f"config.eval.kind={config.eval.kind!r} has no predictions to score: set it to "
            "captions, vqa, okvqa or gqa."
        )
    return kind(config, None, java=True)


def make_evaluation(
    task: Task, tokenizer: Any, mesh: Mesh, qformer_tokenizer: Any = None
) -> Evaluation:
    """The only evaluation of a run, or the first of several; arguments as of `Evaluations`."""
    return next(iter(Evaluations(task, tokenizer, mesh, qformer_tokenizer)))
