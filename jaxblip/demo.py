"""`jaxblip demo`: the four runs of a small BLIP-2, and a report of what came out."""

from __future__ import annotations

import json
import time
from pathlib import Path

from jaxblip.config import load_config
from jaxblip.errors import UserError
from jaxblip.evaluation.evaluate import make_evaluation
from jaxblip.evaluation.labels import TASK_TITLES
from jaxblip.evaluation.report import write_report
from jaxblip.training.checkpoints import saved_steps
from jaxblip.training.environment import describe_environment
from jaxblip.training.loop import train
from jaxblip.training.metrics import METRICS_FILE
from jaxblip.training.restore import load_run

CONFIGS = Path("configs/demo")
# What each run takes from the runs before it, config field to folder: parts, and one tokenizer for
# all, which each would else train for itself.
PHASES = {
    "vision": {},
    "language_model": {"data.tokenizer": "vision/tokenizer"},
    "stage1": {"data.tokenizer": "vision/tokenizer", "init.vision": "vision"},
    "stage2": {
        "init.vision": "vision",
        "init.language_model": "language_model",
        "init.qformer": "stage1",
    },
}
SECONDS_FILE = "seconds.json"
QUICK = ("config.steps=20", "config.optimizer.warmup_steps=5", "config.eval.max_images=40")


def run_demo(out: str, quick: bool = False) -> dict[str, object]:
    """Trains, evaluates and writes `report.json` and `report.html` into `out`.

    Returns:
      What `report.json` holds: recall at 1 of the re-ranked stage 1 in both directions, the share
      of stage 2's captions that are exactly one of the true ones, and seconds by phase.

    Raises:
      UserError: the demo's configs are not in the current directory.
    """
    if not CONFIGS.is_dir():
        raise UserError(f"There is no {CONFIGS} here: run the demo in the root of the repository.")
    folder = Path(out)
    metrics, titles = {}, {}
    for phase, sources in PHASES.items():
        overrides = list(QUICK) if quick else []
        overrides += [f"config.{field}={folder / source}" for field, source in sources.items()]
        config, workdir = f"{CONFIGS}/{phase}.py", str(folder / phase)
        shown = "".join(f" \\\n    --{override}" for override in overrides)
        print(f"\n$ jaxblip train --config={config} --workdir={workdir}{shown}", flush=True)
        settings = load_config(config, overrides)
        titles[phase] = TASK_TITLES[settings.task]
        begin, steps = time.perf_counter(), saved_steps(workdir)
        metrics[phase] = train(settings, workdir)
        if saved_steps(workdir) != steps:
            _add_seconds(folder, phase, time.perf_counter() - begin)
        if saved_steps(workdir)[-1] < settings.steps:
            return {}  # stopped by SIGTERM; the same command goes on

    begin = time.perf_counter()
    gallery = _gallery(str(folder / "stage2"))
    seconds = _seconds(folder)
    seconds["gallery"] = round(time.perf_counter() - begin, 1)
    seconds["total"] = round(sum(seconds.values()), 1)
    environment = describe_environment()
    report = {
        "i2t_r1": metrics["stage1"]["i2t_r1"],
        "t2i_r1": metrics["stage1"]["t2i_r1"],
        "caption_exact": metrics["stage2"]["caption_exact"],
        "bleu4": metrics["stage2"]["bleu4"],
        "heldout_images": len(gallery),
        "seconds": seconds,
        "versions": environment["versions"],
        "device": environment["devices"],
        "cpu_count": environment["cpu_count"],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _write_page(folder, report, titles, gallery)
    print(
        f"\nRecall@1 on {len(gallery)} held-out images, re-ranked: image to text "
        f"{report['i2t_r1']:.3f}, text to image {report['t2i_r1']:.3f}; captions that are exactly "
        f"one of the true ones: {report['caption_exact']:.3f}; {seconds['total']:.0f} seconds.\n"
        f"Written: {folder}/report.json and {folder}/report.html"
    )
    return report


def _write_page(
    folder: Path,
    report: dict[str, object],
    titles: dict[str, str],
    gallery: list[dict[str, object]],
) -> None:
    """`report.html`, in which the phases have the titles of their tasks."""
    seconds = {titles.get(name, name): value for name, value in report["seconds"].items()}
    write_report(
        folder / "report.html",
        title="A BLIP-2 from nothing",
        phases=[
            {"name": title, "metrics_jsonl": folder / phase / METRICS_FILE}
            for phase, title in titles.items()
        ],
        results={**report, "seconds": seconds},
        gallery=gallery,
        notes=[
            "Images of two coloured shapes with captions. The pairs of objects (size, colour, "
            "shape) below never occurred in training."
        ],
    )


def _seconds(folder: Path) -> dict[str, float]:
    """Time that each phase has taken, over all calls of the demo that ended of themselves."""
    file = folder / SECONDS_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def _add_seconds(folder: Path, phase: str, elapsed: float) -> None:
    seconds = _seconds(folder)
    seconds[phase] = round(seconds.get(phase, 0.0) + elapsed, 1)
    (folder / SECONDS_FILE).write_text(json.dumps(seconds) + "\n")


def _gallery(workdir: str) -> list[dict[str, object]]:
    """Every evaluation image with its caption and the true ones."""
    run = load_run(workdir)
    evaluation = make_evaluation(run.task, run.tokenizer, run.mesh)
    evaluation.run(run.params, run.frozen)
    return evaluation.gallery()
