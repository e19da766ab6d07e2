"""What all evaluations have in common: a set, and results of it."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from jax.sharding import Mesh

from jaxblip.data import inputs, run_sources
from jaxblip.data.samples import counts_as_text
from jaxblip.evaluation.batching import RowMap
from jaxblip.evaluation.kept import Kept
from jaxblip.tasks import Task
from jaxblip.training.state import Params

Metrics = dict[str, float]


class Evaluation(abc.ABC):
    """One evaluation: its set, read once, and its compiled functions.

    Attributes:
      task: with the config of this evaluation (`data.eval_sections`).
      name: of its section; "" for the only one.
      set: what is evaluated.
      predictions: of each entry of the set, after `run`; empty where nothing is predicted.
      details: tables of further numbers after `run`, such as the accuracy by type of question.
      notes: sentences about how it was measured.
    """

    handed_in: ClassVar[tuple[str, str] | None] = None  # fields of the benchmark's submission

    def __init__(
        self, task: Task, tokenizer: Any, mesh: Mesh, qformer_tokenizer: Any = None, *,
        name: str = "", java: bool = False,
    ):  # fmt: skip
        """Reads the evaluation set; UserError where it cannot."""
        self.task, self.name, self.java = task, name, java
        self.kind, self.source = task.config.eval.kind, task.config.eval.source
        self._check()
        self.set = run_sources.read_eval_set(task.config)
        self.predictions: list[str] = []
        self.details: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._mesh = mesh
        self._map = RowMap(mesh, task.config.eval.batch_size)
        self._encode = inputs.text_encoder(task.config, tokenizer)
        self._prepare(tokenizer, qformer_tokenizer)

    def _check(self) -> None:
        """Raises UserError for settings that do not fit, before anything is read."""

    def _prepare(self, tokenizer: Any, qformer_tokenizer: Any) -> None:
        """Makes what only this kind of evaluation needs."""

    @abc.abstractmethod
    def run(self, params: Params, frozen: Params, kept: Kept | None = None) -> Metrics:
        """Metrics by name, of any parameters; leaves `predictions`, `details` and `notes`.

        Args:
          kept: results as they are made, and those of an earlier process.
        """

    def ids(self) -> list[Any]:
        """What identifies each entry: its question's id, its number where that has none."""
        if self.handed_in and self.handed_in[0] != "image_id":
            return [fact.get("question_id", row) for row, fact in enumerate(self.set.facts)]
        return self.set.image_ids.tolist()

    def submission(self) -> list[dict[str, Any]]:
        """The predictions in the form in which the benchmark takes them; empty where it has none."""
        if self.handed_in is None:
            return []
        key, value = self.handed_in
        pairs = zip(self.ids(), self.predictions, strict=True)
        return [{key: which, value: text} for which, text in pairs]

    def gallery(self) -> list[dict[str, Any]]:
        """Each entry with its prediction and the true texts, as `report.write_report` wants.

        Empty where nothing is predicted.
        """
        if not self.predictions:
            return []
        images = (self.set.images[row] for row in self.set.rows)
        texts = self.set.instructions, self.predictions, self.references()
        return [
            {"image": image, "asked": asked, "predicted": text, "references": references}
            for image, asked, text, references in zip(images, *texts, strict=True)
        ]

    def references(self) -> list[list[str]]:
        """The true texts of each entry."""
        return self.set.captions

    def describe(self) -> str:
        """The set in one line, with what was left out of it."""
        captions = sum(len(captions) for captions in self.set.captions)
        named = f" {self.name} ({self.kind})" if self.name else ""
        images = len(set(self.set.rows.tolist()))
        text = f"Evaluation set{named}: {images} images with {captions} captions"
        for what, counter in (("skipped", self.set.skipped), ("converted", self.set.converted)):
            if counter:
                text += f"; {what}: {counts_as_text(counter)}"
        return text + "."
