"""`jaxblip evaluate` and `jaxblip generate`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxblip.api import Decoding, Model, load
from jaxblip.config import default_config
from jaxblip.data.text import ANSWER_DECODING
from jaxblip.errors import UnreadableImages, UserError
from jaxblip.evaluation.base import Evaluation, Metrics
from jaxblip.evaluation.evaluate import Evaluations, make_scorer, prefixed
from jaxblip.evaluation.kept import complete_lines
from jaxblip.evaluation.results import (
    HISTORY_FILE,
    detail_lines,
    kept_in,
    read_predictions,
    write_results,
)
from jaxblip.overrides import apply_overrides
from jaxblip.training.checkpoints import CONFIG_FILE, saved_steps
from jaxblip.training.restore import Run, at_step, load_run

Picture = str | Sequence[str]  # an image file, or the files of a video's frames
_POLL_S = 30  # between two looks for a new checkpoint


def evaluate(workdir: str, overrides: Sequence[str] = (), step: int | None = None) -> Metrics:
    """Evaluates a checkpoint, prints and saves its metrics.

    Writes `results.json`, and for each evaluation `results.html`, `predictions.jsonl` where
    something is predicted (image id, instruction, caption, references), and `submission.json`
    where a benchmark has a form; all but the first with the evaluation's name in theirs, where it
    has one. One that was killed goes on where it was.

    Raises:
      UserError: there is no such checkpoint, no evaluation, or one that does not fit.
    """
    run = load_run(workdir, overrides, step)
    return _evaluate_step(workdir, run, _evaluations(run))


def follow(workdir: str, overrides: Sequence[str] = ()) -> dict[int, Metrics]:
    """Evaluates each checkpoint of a run that is still going on, until that of its last step.

    Beside what `evaluate` writes of the newest, `evaluations.jsonl` has a line of metrics for each;
    the checkpoints in it are not evaluated again, by whatever evaluations.

    Returns:
      Metrics by step.
    """
    history = Path(workdir) / HISTORY_FILE
    found = {line.pop("step"): line for line in complete_lines(history)}
    while (Path(workdir) / CONFIG_FILE).is_file() and not saved_steps(workdir):
        time.sleep(_POLL_S)  # it has just begun
    run = load_run(workdir, overrides)
    evaluations, last = _evaluations(run), run.task.config.steps
    while last not in found:
        waiting = [step for step in saved_steps(workdir) if step not in found]
        for step in waiting:
            try:
                run = at_step(run, workdir, step)
            except (UserError, OSError, ValueError):
                if step in saved_steps(workdir):
                    raise
                continue  # the training has removed it, since it has newer ones
            found[step] = _evaluate_step(workdir, run, evaluations)
            if jax.process_index() == 0:
                with history.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **found[step]}) + "\n")
        if not waiting:
            time.sleep(_POLL_S)
    return found


def score_predictions(file: str, overrides: Sequence[str] = ()) -> Metrics:
    """Scores predictions in a benchmark's form against a source, without any model.

    Args:
      overrides: `config.eval.source=...`, and perhaps `config.eval.kind=vqa` and field maps.

    Raises:
      UserError: the source or the predictions cannot be read, or do not fit each other.
    """
    config = default_config("stage2")
    config.lock()
    apply_overrides(config, overrides)
    scorer = make_scorer(config)
    metrics = scorer.score(read_predictions(file, scorer))
    print(f"{file} on {scorer.source}. {scorer.describe()}")
    _print(scorer, metrics)
    return metrics


def _evaluations(run: Run) -> Evaluations:
    parts = run.task, run.tokenizer, run.mesh, run.qformer_tokenizer
    if evaluations := Evaluations(*parts, java=True):
        return evaluations
    raise UserError(
        "The run has no evaluation source: add --config.eval.source=shapes:heldout or the path "
        "of a .jsonl file."
    )


def _evaluate_step(workdir: str, run: Run, evaluations: Evaluations) -> Metrics:
    begin, folder, found, kept = time.perf_counter(), Path(workdir), [], []
    what = [f"Step {run.step} of {workdir} on {each.source}. {each.describe()}"
            for each in evaluations]  # fmt: skip
    for evaluation, line in zip(evaluations, what, strict=True):
        say(line)
        kept.append(kept_in(folder, evaluation, run.step))
        metrics = evaluation.run(run.params, run.frozen, kept[-1])
        _print(evaluation, metrics)
        found.append((evaluation, metrics))
    names = write_results(folder, run.step, found, what, time.perf_counter() - begin)
    for results in kept:
        results.remove()
    say(f"Written to {workdir}: {', '.join(names)}")
    return prefixed(found)


def _print(evaluation: Evaluation, metrics: Metrics) -> None:
    for name, value in metrics.items():
        say(f"{name:>15} {value:.4f}")
    for line in (*detail_lines(evaluation), *evaluation.notes):
        say(line)


def say(text: str, end: str = "\n") -> None:
    """Prints, where one process of several speaks for all."""
    if jax.process_index() == 0:
        print(text, end=end, flush=True)


def generate(
    checkpoint: str,
    images: Sequence[Picture],
    overrides: Sequence[str] = (),
    step: int | None = None,
    *,
    prompt: str | None = None,
    question: str | None = None,
    context: str = "",
    candidates: str | None = None,
    **decoding: Any,
) -> Iterator[tuple[Picture, str]]:
    """Texts about image files by a run that can make some: (file, text), one or several of each.

    Args:
      images: files, or lists of files, which are the frames of a video.
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

    def describe(images: Sequence[Picture]) -> list[tuple[Picture, str]]:
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
    model: Model, images: Sequence[Picture], texts: list[str], prompt: str | None
) -> list[tuple[Picture, str]]:
    lines = []
    for path, row in zip(images, model.rank(images, texts, prompt).astype(np.float64), strict=True):
        probabilities = np.exp(row - np.logaddexp.reduce(row))
        for best in np.argsort(-row, kind="stable"):
            lines.append((path, f"{probabilities[best]:.4f} {texts[best]}"))
    return lines


def _of_readable(
    describe: Callable[[Sequence[Picture]], list[tuple[Picture, str]]], images: Sequence[Picture]
) -> Iterator[tuple[Picture, str]]:
    """What is described of the readable images; behind it `UnreadableImages` of the others."""
    try:
        yield from describe(images)
    except UnreadableImages as error:
        readable = [image for place, image in enumerate(images) if place not in error.places]
        yield from describe(readable) if readable else ()
        raise


def stream(
    checkpoint: str,
    images: Sequence[Picture],
    overrides: Sequence[str] = (),
    step: int | None = None,
    *,
    prompt: str | None = None,
    question: str | None = None,
    context: str = "",
    candidates: str | None = None,
    **decoding: Any,
) -> Iterator[tuple[Picture, Iterator[str]]]:
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
    return ((path, model.stream([path], text, **(defaults | given))) for path in images)


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
    texts = [text.strip() for text in texts if text.strip()]
    if twice := [text for place, text in enumerate(texts) if text in texts[:place]]:
        raise UserError(f"candidates={candidates!r} has {twice[0]!r} twice: leave one out.")
    if len(texts) < 2:
        found = f"has {len(texts)} text(s)" if parts else f"are {len(texts)} text(s) and no file"
        raise UserError(
            f"candidates={candidates!r} {found}, but ranking needs two texts or more: name a file "
            "with one a line, or separate them with commas."
        )
    return texts
