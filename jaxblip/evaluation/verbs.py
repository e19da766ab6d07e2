"""`jaxblip evaluate` and `jaxblip generate`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxblip.api import ANSWER_DECODING, Decoding, Model, load
from jaxblip.errors import UnreadableImages, UserError
from jaxblip.evaluation.base import Evaluation, Metrics
from jaxblip.evaluation.evaluate import make_evaluation
from jaxblip.evaluation.labels import TASK_TITLES
from jaxblip.evaluation.report import write_report
from jaxblip.training.environment import describe_environment
from jaxblip.training.metrics import METRICS_FILE
from jaxblip.training.restore import load_run

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
REPORT_FILE = "results.html"


def evaluate(workdir: str, overrides: Sequence[str] = (), step: int | None = None) -> Metrics:
    """Evaluates a checkpoint, prints and saves its metrics.

    Writes `results.json`, `results.html`, and, where images are captioned or captions retrieved,
    `predictions.jsonl` (image id, instruction, caption, references).
    """
    begin = time.perf_counter()
    run = load_run(workdir, overrides, step)
    config, folder = run.task.config, Path(workdir)
    if not config.eval.source:
        raise UserError(
            "The run has no evaluation source: add --config.eval.source=shapes:heldout or the path "
            "of a .jsonl file."
        )
    evaluation = make_evaluation(run.task, run.tokenizer, run.mesh, run.qformer_tokenizer)
    what = f"Step {run.step} of {workdir} on {config.eval.source}. {evaluation.describe()}"
    print(what, flush=True)
    metrics = evaluation.run(run.params, run.frozen)
    for name, value in metrics.items():
        print(f"{name:>15} {value:.4f}")
    results = {"step": run.step, "source": config.eval.source, **metrics}
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
    if evaluation.predictions:
        _write_predictions(folder / PREDICTIONS_FILE, evaluation)
    environment = describe_environment()
    recorded = folder / METRICS_FILE  # published weights have none
    write_report(
        folder / REPORT_FILE,
        title=TASK_TITLES[config.task],
        phases=[{"name": "Training", "metrics_jsonl": recorded}] if recorded.is_file() else [],
        results={
            **metrics,
            "seconds": {"evaluation": time.perf_counter() - begin},
            "versions": environment["versions"],
            "device": environment["devices"],
            "cpu_count": environment["cpu_count"],
        },
        gallery=evaluation.gallery(),
        notes=[what],
    )
    predictions = [PREDICTIONS_FILE] if evaluation.predictions else []
    print(f"Written to {workdir}: {', '.join([RESULTS_FILE, *predictions, REPORT_FILE])}")
    return metrics


def _write_predictions(path: Path, evaluation: Evaluation) -> None:
    rows = zip(
        evaluation.set.image_ids.tolist(),
        evaluation.set.instructions,
        evaluation.predictions,
        evaluation.set.captions,
        strict=True,
    )
    with path.open("w", encoding="utf-8") as file:
        for image_id, asked, caption, references in rows:
            row = {"image_id": image_id, **({"instruction": asked} if asked else {})}
            row |= {"caption": caption, "references": references}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def generate(
    checkpoint: str,
    images: Sequence[str],
    overrides: Sequence[str] = (),
    step: int | None = None,
    *,
    prompt: str | None = None,
    question: str | None = None,
    context: str = "",
    candidates: str | None = None,
    **decoding: Any,
) -> Iterator[tuple[str, str]]:
    """Texts about image files by a run that can make some: (file, text), one or several of each.

    Args:
      prompt: words that the captions go on from; with a question, a text in which {} stands for it.
      question: to be answered about each image.
      context: what to know before the question.
      candidates: a file with a text a line, or texts separated by commas. Each is returned with its
        probability before it, the most probable first.
      decoding: as in `Model.caption`.

    Raises:
      UserError: settings exclude each other (before the run is read), or the run's task is another.
      UnreadableImages: from the iterator, behind the texts about the images that can be read.
    """
    settings = _settings(question, context, decoding)
    if candidates is not None:
        texts = _read_candidates(candidates)
        if changed := settings.changed():
            name, value = next(iter(changed.items()))
            raise UserError(
                f"Candidates are ranked and nothing is generated, so {name}={value} has no effect: "
                "leave it out, or the candidates."
            )
    model = load(checkpoint, step=step, overrides=overrides)

    def describe(images: Sequence[str]) -> list[tuple[str, str]]:
        if candidates is not None:
            return _ranked(model, images, texts, _prompt(model, prompt, question, context))
        if question is None:
            found = model.caption(images, prompt, **decoding)
        else:
            found = model.answer(images, question, context, prompt, **decoding)
        listed = ([text] if isinstance(text, str) else text for text in found)
        return [(path, text) for path, of_image in zip(images, listed) for text in of_image]

    return _of_readable(describe, images)


def _ranked(
    model: Model, images: Sequence[str], texts: list[str], prompt: str | None
) -> list[tuple[str, str]]:
    lines = []
    for path, row in zip(images, model.rank(images, texts, prompt).astype(np.float64), strict=True):
        probabilities = np.exp(row - np.logaddexp.reduce(row))
        for best in np.argsort(-row, kind="stable"):
            lines.append((path, f"{probabilities[best]:.4f} {texts[best]}"))
    return lines


def _of_readable(
    describe: Callable[[Sequence[str]], list[tuple[str, str]]], images: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """What is described of the readable images; behind it `UnreadableImages` of the others."""
    try:
        yield from describe(images)
    except UnreadableImages as error:
        readable = [image for place, image in enumerate(images) if place not in error.places]
        yield from describe(readable) if readable else ()
        raise


def stream(
    checkpoint: str,
    images: Sequence[str],
    overrides: Sequence[str] = (),
    step: int | None = None,
    *,
    prompt: str | None = None,
    question: str | None = None,
    context: str = "",
    candidates: str | None = None,
    **decoding: Any,
) -> Iterator[tuple[str, Iterator[str]]]:
    """As `generate`, but each text in pieces, as they come; without candidates and beams."""
    settings = _settings(question, context, decoding)
    settings.check_stream()
    if candidates is not None:
        raise UserError(
            "Candidates are ranked and nothing is generated, so there is nothing to stream: leave "
            "out one of them."
        )
    model = load(checkpoint, step=step, overrides=overrides)
    text = _prompt(model, prompt, question, context)
    defaults = {} if question is None else ANSWER_DECODING
    given = {name: value for name, value in decoding.items() if value is not None}
    return ((path, model.stream(path, text, **(defaults | given))) for path in images)


def _settings(question: str | None, context: str, decoding: dict[str, Any]) -> Decoding:
    if context and question is None:
        raise UserError("A context stands before a question: give one, or a prompt with both.")
    return Decoding(**decoding)


def _prompt(model: Model, prompt: str | None, question: str | None, context: str) -> str | None:
    return prompt if question is None else model.question_prompt(question, context, prompt)


def _read_candidates(candidates: str) -> list[str]:
    """The lines of a file that are not empty, or what stands between commas."""
    path = Path(candidates)
    try:
        parts = path.read_text(encoding="utf-8").splitlines() if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The candidates {candidates!r} cannot be read: {error}.") from error
    texts = candidates.split(",") if parts is None else parts
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if len(texts) < 2:
        found = f"has {len(texts)} text(s)" if parts else f"are {len(texts)} text(s) and no file"
        raise UserError(
            f"candidates={candidates!r} {found}, but ranking needs two texts or more: name a file "
            "with one a line, or separate them with commas."
        )
    return texts
