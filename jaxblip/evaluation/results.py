"""What evaluations leave in a folder: results, predictions, pages; and scores of predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxblip.data.json_text import parse_json, shown_json
from jaxblip.errors import UserError
from jaxblip.evaluation.base import Evaluation, Metrics
from jaxblip.evaluation.kept import Kept
from jaxblip.evaluation.labels import TASK_TITLES
from jaxblip.evaluation.report import write_report
from jaxblip.training.environment import describe_environment
from jaxblip.training.metrics import METRICS_FILE

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
SUBMISSION_FILE = "submission.json"
REPORT_FILE = "results.html"
HISTORY_FILE = "evaluations.jsonl"  # of `jaxblip evaluate --follow`, a line a checkpoint
_KEPT_FOLDER = ".evaluation"


def kept_in(folder: Path, evaluation: Evaluation, step: int) -> Kept:
    """Results that are kept as they are made, until all are written."""
    config = json.dumps(evaluation.config.to_dict(), sort_keys=True, default=str)
    key = {
        "step": step,
        "entries": len(evaluation.set.rows),
        "config": hashlib.sha256(config.encode()).hexdigest(),
    }
    return Kept(folder / _KEPT_FOLDER / f"{evaluation.name or 'only'}.jsonl", key)


def write_results(
    folder: Path, step: int, found: Sequence[tuple[Evaluation, Metrics]], what: Sequence[str],
    seconds: float,
) -> list[str]:  # fmt: skip
    """Writes all files of a checkpoint's evaluations, by process 0; returns their names.

    Args:
      found: each evaluation with its metrics.
      what: notes for the pages.
      seconds: that the evaluations took.
    """
    if jax.process_index() != 0:
        return []
    results: dict[str, Any] = {"step": step}
    for evaluation, metrics in found:
        entry = {"source": evaluation.source, "kind": evaluation.kind, **metrics}
        entry |= {"details": evaluation.details} if evaluation.details else {}
        entry |= {"notes": evaluation.notes} if evaluation.notes else {}
        if evaluation.name:
            results.setdefault("evaluations", {})[evaluation.name] = entry
        else:
            results |= entry
    names = [RESULTS_FILE]
    _replace(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    for evaluation, metrics in found:
        if evaluation.predictions:
            names.append(_named(PREDICTIONS_FILE, evaluation))
            rows = prediction_rows(evaluation)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            _replace(folder / names[-1], "".join(lines))
        if submission := evaluation.submission():
            names.append(_named(SUBMISSION_FILE, evaluation))
            _replace(folder / names[-1], json.dumps(submission, ensure_ascii=False) + "\n")
        names.append(_named(REPORT_FILE, evaluation))
        _write_page(folder, names[-1], evaluation, metrics, what, seconds)
    return names


def read_predictions(file: str, evaluation: Evaluation) -> list[str]:
    """The predictions of a file in the benchmark's form, in the order of the entries.

    Raises:
      UserError: it cannot be read, an entry lacks a field, an id is there twice or belongs to no
        entry of the source, or an entry has no prediction.
    """
    key, value = evaluation.handed_in
    form = f'[{{"{key}": ..., "{value}": "..."}}, ...]'
    try:
        entries = parse_json(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): write it like {form}.") from error
    if not isinstance(entries, list):
        raise UserError(f"{file} is {shown_json(entries)}, not a list: write it like {form}.")
    found: dict[str, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or key not in entry or not isinstance(entry.get(value), str):
            raise UserError(
                f"{file}: entry {number} is {shown_json(entry)}: write the list like {form}."
            )
        which = str(entry[key])
        if which in found:
            raise UserError(f"{file}: entry {number} has the {key} {which} again: leave one out.")
        found[which] = entry[value]
    ids = list(map(str, evaluation.ids()))
    if unknown := [which for which in found if which not in set(ids)]:
        raise UserError(
            f"{len(unknown)} of {len(found)} predictions of {file} are about a {key} that "
            f"{evaluation.source} does not know, such as {unknown[0]}: name the source that was "
            "predicted."
        )
    if missing := [which for which in ids if which not in found]:
        raise UserError(
            f"{len(missing)} of {len(ids)} entries of {evaluation.source} have no prediction in "
            f"{file}, such as {key} {missing[0]}: predict them, too, or name a source with the "
            "others alone."
        )
    return [found[which] for which in ids]


def prediction_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What is known and what was said of each entry, a line of `predictions.jsonl` each."""
    data, rows = evaluation.set, []
    texts = data.instructions, evaluation.predictions, evaluation.references()
    for number, (asked, predicted, references) in enumerate(zip(*texts, strict=True)):
        row = {"image_id": int(data.image_ids[number]), **data.facts[number]}
        row |= {"instruction": asked} if asked else {}
        rows.append(row | {"caption": predicted, "references": references})
    return rows


def detail_lines(evaluation: Evaluation) -> list[str]:
    """Its further numbers, a line a row."""
    lines = []
    for what, table in evaluation.details.items():
        lines.append(f"{what}:")
        for row, value in table.items():
            values = value if isinstance(value, Mapping) else {"": value}
            shown = "  ".join(f"{name} {number:.4f}".strip() for name, number in values.items())
            lines.append(f"  {row:>13} {shown}")
    return lines


def _write_page(folder, name, evaluation, metrics, what, seconds) -> None:
    environment, recorded = describe_environment(), folder / METRICS_FILE
    write_report(
        folder / name,
        title=TASK_TITLES[evaluation.config.task],
        # published weights have no training
        phases=[{"name": "Training", "metrics_jsonl": recorded}] if recorded.is_file() else [],
        results={
            **metrics,
            "seconds": {"evaluation": seconds},
            "versions": environment["versions"],
            "device": environment["devices"],
            "cpu_count": environment["cpu_count"],
        },
        gallery=evaluation.gallery(),
        details=evaluation.details,
        notes=[*what, *evaluation.notes],
    )


def _named(file: str, evaluation: Evaluation) -> str:
    stem, dot, suffix = file.rpartition(".")
    return f"{stem}-{evaluation.name}{dot}{suffix}" if evaluation.name else file


def _replace(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
