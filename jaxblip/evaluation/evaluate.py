"""The evaluations of a run, each with its set, and what all of them say together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from jaxblip.data.eval_sections import configs_of_evaluations
from jaxblip.evaluation.base import Evaluation, Metrics
from jaxblip.evaluation.kept import Kept
from jaxblip.evaluation.losses import LossEvaluation
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
    "loss": LossEvaluation,
}


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
        configs = configs_of_evaluations(task.config)
        parts = tokenizer, mesh, qformer_tokenizer
        self.by_name = {
            name: _KINDS[config.eval.kind](make_task(config), *parts, name=name, java=java)
            for name, config in configs.items()
        }

    def __bool__(self) -> bool:
        return bool(self.by_name)

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self.by_name.values())

    def run(
        self, params: Params, frozen: Params, kept: Callable[[Evaluation], Kept] = lambda _: Kept()
    ) -> Metrics:
        """Metrics of all, those of a named one as NAME/METRIC.

        Args:
          kept: where each keeps its results as they are made.
        """
        metrics = {}
        for evaluation in self:
            before = f"{evaluation.name}/" if evaluation.name else ""
            found = evaluation.run(params, frozen, kept(evaluation))
            metrics |= {before + metric: value for metric, value in found.items()}
        return metrics

    def describe(self) -> list[str]:
        """Each set in one line."""
        return [evaluation.describe() for evaluation in self]


def make_evaluation(
    task: Task, tokenizer: Any, mesh: Mesh, qformer_tokenizer: Any = None
) -> Evaluation:
    """The only evaluation of a run, or the first of several; arguments as of `Evaluations`."""
    return next(iter(Evaluations(task, tokenizer, mesh, qformer_tokenizer)))
