"""Loss curves of docs/expected.md: a public log of BLIP-2 beside runs of one's own.

    python benchmarks/expected.py --demo=runs/demo --openmoji=runs/openmoji --plot=docs/expected.png

Prints the table of the runs' losses and draws all of them. Steps are shown as shares of the run,
since the runs differ in length by a factor of a hundred.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt

from jaxblip.training.metrics import read_metrics

# The log of yiren-jian/BLIText (training_logs/BLIP2): ViT-g, 4.6 million pairs, batch 1024, epochs
# of 4,498 steps. Single steps of the first epoch, then the means of epochs at their middle.
EPOCH = 4498
STAGE1_STEPS = {0: 17.76, 100: 15.09, 450: 10.26, 950: 8.38, 1950: 7.20, 3600: 6.89}
STAGE1_EPOCHS = [7.93, 6.31, 5.95, 5.75, 5.60, 5.48, 5.38, 5.30, 5.24, 5.20]
STAGE2_STEPS = {0: 6.73, 450: 3.33, 950: 2.83}
STAGE2_EPOCHS = [2.843, 2.480, 2.398, 2.348, 2.306, 2.277, 2.244, 2.220, 2.200, 2.186]
_COLOURS = {"demo": "tab:orange", "OpenMoji": "tab:green"}
SHARES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


def of_log(steps: dict[int, float], epochs: list[float]) -> dict[float, float]:
    """Loss by share of the run."""
    later = {(number + 0.5) * EPOCH: loss for number, loss in enumerate(epochs) if number}
    return {step / (EPOCH * len(epochs)): loss for step, loss in (steps | later).items()}


def of_run(workdir: Path) -> dict[float, dict[str, float]]:
    """Training metrics by share of the run."""
    lines = [line for line in read_metrics(workdir) if "train/loss" in line]
    last = max(line["step"] for line in lines)
    return {line["step"] / last: line for line in lines}


def table(run: dict[float, dict[str, float]], names: list[str]) -> list[str]:
    """Rows of Markdown: the logged line that is nearest to each share of the run."""
    rows = [f"| share of the run | step | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for share in SHARES:
        line = run[min(run, key=lambda at: abs(at - share))]
        values = " | ".join(f"{line[f'train/{name}']:.3f}" for name in names)
        rows.append(f"| {share:g} | {line['step']:,} | {values} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, metavar="DIR")
    parser.add_argument("--openmoji", type=Path, metavar="DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    folders = {"demo": options.demo, "OpenMoji": options.openmoji}
    runs = {
        (stage, name): of_run(folder / stage)
        for name, folder in folders.items()
        if folder is not None
        for stage in ("stage1", "stage2")
        if (folder / stage / "metrics.jsonl").is_file()
    }
    for (stage, name), run in runs.items():
        names = ["loss", "itc", "itm", "itg", "itm_accuracy"] if stage == "stage1" else ["loss"]
        print(f"\n{name}, {stage}\n" + "\n".join(table(run, names)))
    if options.plot:
        draw(runs, options.plot)


def draw(runs: dict[tuple[str, str], dict[float, dict[str, float]]], path: Path) -> None:
    logs = {
        "stage1": of_log(STAGE1_STEPS, STAGE1_EPOCHS),
        "stage2": of_log(STAGE2_STEPS, STAGE2_EPOCHS),
    }
    chance = math.log(30523) + math.log(1024) + 0.6365
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, (stage, log) in zip(axes, logs.items(), strict=True):
        axis.plot(list(log), list(log.values()), "o-", markersize=3, label="BLIP-2, 4.6M pairs")
        for (its_stage, name), run in runs.items():
            if its_stage == stage:
                losses = [line["train/loss"] for line in run.values()]
                axis.plot(list(run), losses, label=name, color=_COLOURS[name])
        axis.set_title(f"{stage}: loss")
        axis.set_xlabel("share of the run")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].axhline(chance, color="grey", linewidth=0.8, linestyle=":")
    axes[0].annotate("BLIP-2 by chance", (1, chance - 0.2), ha="right", va="top", color="grey")
    axes[0].legend(frameon=False, loc=(0.4, 0.5))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
