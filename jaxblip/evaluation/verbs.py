"""`jaxblip evaluate` and `jaxblip generate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxblip.data.images import decode_image, resize_square
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError
from jaxblip.evaluation.evaluate import Captioner, Evaluation, Metrics
from jaxblip.evaluation.report import write_report
from jaxblip.training.restore import load_run

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
REPORT_FILE = "results.html"


def evaluate(workdir: str, overrides: Sequence[str] = (), step: int | None = None) -> Metrics:
    """Evaluates a checkpoint, prints and saves its metrics.

    Writes `results.json`; where images are captioned or captions retrieved also
    `predictions.jsonl` (image id, caption, references) and `results.html`, which shows them.
    """
    run = load_run(workdir, overrides, step)
    config = run.task.config
    if not config.eval.source:
        raise UserError(
            "The run has no evaluation source: add --config.eval.source=shapes:heldout or the path "
            "of a .jsonl file."
        )
    evaluation = Evaluation(run.task, run.tokenizer, run.mesh)
    metrics = evaluation.run(run.params, run.frozen)
    for name, value in metrics.items():
        print(f"{name:>15} {value:.4f}")
    results = {"step": run.step, "source": config.eval.source, **metrics}
    (Path(workdir) / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
    if evaluation.predictions:
        write_report(
            Path(workdir) / REPORT_FILE,
            title=f"{workdir} after {run.step} steps, on {config.eval.source}",
            phases=[],
            results=metrics,
            gallery=evaluation.gallery(),
        )
        rows = zip(
            evaluation.set.image_ids.tolist(),
            evaluation.predictions,
            evaluation.set.captions,
            strict=True,
        )
        with (Path(workdir) / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
            for image_id, caption, references in rows:
                row = {"image_id": image_id, "caption": caption, "references": references}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return metrics


def generate(
    checkpoint: str,
    images: Sequence[str],
    overrides: Sequence[str] = (),
    step: int | None = None,
) -> list[tuple[str, str]]:
    """Captions image files with a run of stage 2: (file, caption) of each.

    Raises:
      UserError: the run is of another task, or an image cannot be read.
    """
    run = load_run(checkpoint, overrides, step)
    if run.task.config.task != "stage2":
        raise UserError(
            f"{checkpoint!r} is a run of the task {run.task.config.task!r}, which writes no "
            "captions: name a run of stage2."
        )
    data = run.task.config.data
    pixels = [_read_image(path, data.image_size_px, data.max_image_pixels) for path in images]
    captioner = Captioner(run.task, run.tokenizer, run.mesh)
    captions = captioner(run.params, run.frozen, np.stack(pixels))
    return list(zip(images, captions, strict=True))


def _read_image(path: str, size_px: int, max_pixels: int) -> np.ndarray:
    try:
        return resize_square(decode_image(Path(path).read_bytes(), max_pixels), size_px)
    except OSError as error:
        raise UserError(f"The image {path!r} cannot be read: {error.strerror}.") from error
    except BadSample as bad:
        raise UserError(
            f"The image {path!r} cannot be used: {bad.reason}"
            f"{f' ({bad.detail})' if bad.detail else ''}; give another one."
        ) from bad
