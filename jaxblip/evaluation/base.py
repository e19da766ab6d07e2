"""What all evaluations have in common: a set, and results of it."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxblip.data import inputs, run_sources
from jaxblip.data.heldout import heldout_count
from jaxblip.data.samples import counts_as_text
from jaxblip.evaluation.batching import RowMap
from jaxblip.evaluation.kept import Kept
from jaxblip.tasks import Task
from jaxblip.training.state import Params

Metrics = dict[str, float]


class Parts(NamedTuple):
    """What is evaluated, but for its parameters."""

    task: Task
    tokenizer: Any
    mesh: Mesh
    qformer_tokenizer: Any = None  # of the Q-Former, for the task `instruct`


class Evaluation(abc.ABC):
    """One evaluation: its set, read once, and its compiled functions.

    Attributes:
      config: of this evaluation (`data.eval_sections`).
      name: of its section; "" for the only one.
      metric_names: what `run` gives, but for METEOR and SPICE.
      set: what is evaluated.
      predictions: of each entry of the set, after `run`; empty where nothing is predicted.
      details: tables of further numbers after `run`, such as the accuracy by type of question.
      notes: sentences about how it was measured.
    """

    metric_names: tuple[str, ...]
    handed_in: ClassVar[tuple[str, str] | None] = None  # fields of the benchmark's submission

    def __init__(
        self, config: ConfigDict, parts: Parts | None, name: str = "", java: bool = False
    ):
        """Reads the evaluation set.

        Args:
          parts: None where predictions are scored that are there already: no image is read.
          java: whether captions are also scored by programs in Java.

        Raises:
          UserError: it cannot be read, or a setting does not fit.
        """
        self.config, self.name, self.java = config, name, java
        self.kind, self.source = config.eval.kind, config.eval.source
        if not self.source:
            self.source = f"the last {heldout_count(config)} examples of {config.data.train.source}"
        self._check()
        self.set = run_sources.read_eval_set(config, images=parts is not None)
        self.predictions: list[str] = []
        self.details: dict[str, dict[str, float | dict[str, float]]] = {}
        self.notes: list[str] = []
        if parts is not None:
            self.task, self._mesh = parts.task, parts.mesh
            self._map = RowMap(parts.mesh, config.eval.batch_size)
            self._encode = inputs.text_encoder(config, parts.tokenizer)
            self._prepare(parts)

    def _check(self) -> None:
        """Raises UserError for settings that do not fit, before anything is read."""

    def _prepare(self, parts: Parts) -> None:
        """Makes what only this kind of evaluation needs of a model."""

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
        """The predictions in the form in which the benchmark takes them; empty without one."""
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
        images = (image if image.ndim == 3 else image[len(image) // 2] for image in images)
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
