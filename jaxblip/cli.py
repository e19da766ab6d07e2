"""The `jaxblip` command: its verbs and their help. Every error of the user's is one sentence."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence

from jaxblip import __version__, help_texts
from jaxblip.errors import RunStopped, UnreadableImages, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0, 1 for a run that had to stop, 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # captions of any script, on a terminal that has fewer
        sys.stdout.reconfigure(errors="backslashreplace")
    parser, verbs = _parser()
    arguments, beam = _without_beam(arguments, verbs["data", "prepare"])
    for name, verb in verbs.items():
        if arguments[: len(name)] == [*name]:
            _check_options(verb, arguments[len(name) :])
    _check_verb(parser, verbs, arguments)
    options, rest = parser.parse_known_args(arguments)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown argument {unknown[0]!r}; `jaxblip {options.verb} --help` lists them")
    if options.run is _prepare:
        options.beam = beam
    try:
        options.run(options, [override.removeprefix("--") for override in overrides])
    except UserError as error:
        for line in _by_options(str(error), options).splitlines():
            print(f"jaxblip: error: {line}", file=sys.stderr)
        return _failed(options, 1 if isinstance(error, RunStopped) else 2)
    except KeyboardInterrupt:
        print("jaxblip: interrupted", file=sys.stderr)
        return _failed(options, 130)
    return 0


def _failed(options: argparse.Namespace, status: int) -> int:
    """The exit status, unless this is one of several processes, which ends here."""
    if options.run in (_train, _evaluate, _generate, _cache_features):
        from jaxblip.runtime import leave_peers

        leave_peers(status)
    return status


def _without_beam(
    arguments: Sequence[str], prepare: argparse.ArgumentParser
) -> tuple[list[str], list[str]]:
    """The arguments, and apart from them those of `data prepare` that are options of Beam's."""
    if list(arguments[:2]) != ["data", "prepare"]:
        return list(arguments), []
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, behind = arguments[:end], arguments[end + 1 :]
    known = prepare._option_string_actions
    names = {word.partition("=")[0] for word in own if word.startswith("--")} - set(known)
    if names:
        from jaxblip.data.prepare.engine import option_names

        try:
            names &= option_names()
        except UserError:  # Beam is not installed, which the verb says
            names = set()
    beam = [word for word in own if word.partition("=")[0] in names]
    return [word for word in own if word not in beam], [*beam, *behind]


def _check_verb(
    parser: argparse.ArgumentParser, verbs: Iterable[tuple[str, ...]], arguments: Sequence[str]
) -> None:
    """Ends with a hint at the verb that is meant."""
    for depth, word in enumerate(arguments[:2]):
        before = tuple(arguments[:depth])
        known = {words[depth] for words in verbs if words[:depth] == before and words[depth:]}
        near = difflib.get_close_matches(word, known, n=1)
        if near and word not in known:
            parser.error(f"there is no verb {word!r}: did you mean {near[0]}?")


def _by_options(message: str, options: argparse.Namespace) -> str:
    """A message that names settings of Python's `generate` as the command line does."""
    if options.run is not _generate:
        return message
    names = "|".join(name if "_" in name else f"{name}(?==)" for name in vars(options))
    option = re.compile(rf"(?:decoding )?(?<![\w.])({names})\b(=True)?")
    return option.sub(lambda found: f"--{found[1].replace('_', '-')}", message)


def _check_options(verb: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Ends with a hint at what is meant, where argparse would miss something else."""
    known = verb._option_string_actions
    takes_fields = verb.get_default("run") in (_train, _evaluate, _generate, _plan, _cache_features)
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        name, equals, _ = argument.partition("=")
        has_value = bool(equals) or not following.startswith("--")
        if not name.startswith("--"):
            continue
        if name.startswith("--config."):
            if not takes_fields:
                verb.error(f"{name} is a field of a config, and this verb takes none: leave it out")
            if not equals:
                value = following if has_value else "VALUE"
                verb.error(f"{name} needs its value in the same word: write {name}={value}")
        elif name not in known:
            option, dot, field = name.partition(".")
            names = [*known, "--config"] if takes_fields and dot else known
            near = difflib.get_close_matches(option, names, n=1)
            hint = f"did you mean {near[0]}{dot}{field}?" if near else f"see `{verb.prog} --help`"
            verb.error(f"there is no option {name}: {hint}")
        elif known[name].nargs != 0 and not has_value:
            value = known[name].metavar or "|".join(known[name].choices or "N")
            verb.error(f"{name} has no value: write {name}={value}")


def _parser() -> tuple[
    argparse.ArgumentParser, dict[tuple[str, ...], argparse.ArgumentParser]
]:
    """The parser, and that of each verb by the words that call it."""
    parser = argparse.ArgumentParser(
        prog="jaxblip", description="Training of BLIP-2-style vision-language models in JAX."
    )
    by_words = {}
    parser.add_argument("--version", action="version", version=f"jaxblip {__version__}")
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
        if run is not None:
            by_words[tuple(verb.prog.split()[1:])] = verb
        return verb

    verb = add("train", _train, "train what a config describes", help_texts.TRAIN)
    verb.add_argument("--config", required=True, metavar="FILE", help="FILE.py or FILE.py:ARG")
    verb.add_argument("--workdir", required=True, metavar="DIR", help="where everything is written")

    verb = add("evaluate", _evaluate, "evaluate a checkpoint", help_texts.EVALUATE)
    verb.add_argument("--workdir", metavar="DIR", help="that of a training")
    verb.add_argument("--step", type=int, help="which checkpoint; by default the latest")
    verb.add_argument(
        "--follow", action="store_true", help="each checkpoint of a run that goes on, as it comes"
    )
    verb.add_argument(
        "--predictions", metavar="FILE.json", help="score these, without a checkpoint; see above"
    )

    verb = add("generate", _generate, "write captions of images, or answers", help_texts.GENERATE)
    verb.add_argument("--checkpoint", required=True, metavar="DIR", help="work directory of a run")
    verb.add_argument("--image", required=True, nargs="+", metavar="FILE", help="image files")
    verb.add_argument(
        "--video", action="store_true",
        help="they are the frames of one video, of which --config.data.frames=N are read",
    )  # fmt: skip
    verb.add_argument("--step", type=int, help="which checkpoint; by default the latest")
    _add_generation(verb)

    verb = add("convert", _convert, "convert weights from and to Hugging Face", help_texts.CONVERT)
    verb.add_argument("--from", required=True, metavar="SOURCE", dest="source", help="see above")
    verb.add_argument("--to", required=True, metavar="DIR", dest="target", help="a new folder")
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="by default the source's"
    )
    verb.add_argument(
        "--tokenizer", metavar="NAME", help="name or folder, for weights without a tokenizer"
    )
    verb.add_argument(
        "--qformer-tokenizer", metavar="NAME", help="likewise, of the Q-Former of InstructBLIP"
    )
    verb.add_argument(
        "--vision", metavar="SOURCE", help="image encoder, for files of LAVIS without one"
    )
    verb.add_argument(
        "--language-model", metavar="SOURCE", help="likewise the language model"
    )
    verb.add_argument("--step", type=int, help="checkpoint of a run; by default the latest")

    verb = add("plan", _plan, "does it fit, and how long will it take?", help_texts.PLAN)
    verb.add_argument("--config", required=True, metavar="FILE", help="FILE.py or FILE.py:ARG")
    verb.add_argument(
        "--topology", required=True, metavar="NAME,NAME", help="v5e:16x16, h100:4x8, local, …"
    )
    verb.add_argument("--mesh", metavar="AXIS=N,…", help="data=16,fsdp=16, for the config's own")
    verb.add_argument("--json", metavar="FILE", help="write all figures there as well")
    verb.add_argument(
        "--tries", type=int, default=3, metavar="N", help="other settings to try, if need be (3)"
    )

    verb = add("data", None, "look at data, make data sets", "Looks at data, and makes data sets.")
    data = verb.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    verb = add("openmoji", _openmoji, "emoji with their names", help_texts.OPENMOJI, to=data)
    verb.add_argument("--out", required=True, metavar="DIR", help="where to write it")
    verb.add_argument("--size", type=int, default=96, metavar="PX", help="side of the images (96)")

    verb = add("inspect", _inspect, "what is in a source", help_texts.INSPECT, to=data)
    verb.add_argument("source", metavar="SOURCE", help="a file, a pattern, a folder, shapes:train")
    verb.add_argument("--sheet", default="", metavar="FILE.png", help="pictures with captions")
    verb.add_argument("--images", type=int, default=1000, metavar="N", help="images to read (1000)")
    verb.add_argument("--image-folder", default="", metavar="DIR", help="of relative paths")
    verb.add_argument(
        "--field", action="append", default=[], metavar="FIELD=COLUMN", help="a column's other name"
    )

    verb = add("prepare", _prepare, "a source into a TFDS data set", help_texts.PREPARE, to=data)
    _add_preparation(verb)

    verb = add(
        "cache-features", _cache_features, "image features, computed once",
        help_texts.CACHE_FEATURES, to=data,
    )  # fmt: skip
    verb.add_argument("--config", required=True, metavar="FILE", help="of a training, as FILE.py")
    verb.add_argument("--to", required=True, metavar="DIR", help="the folder that is written")
    verb.add_argument(
        "--views", type=int, default=1, metavar="N", help="random views of each image (default: 1)"
    )
    verb.add_argument(
        "--shard-mb", type=float, default=1000.0, metavar="MB", help="size of a shard (1000)"
    )

    verb = add("demo", _demo, "train a small BLIP-2 from nothing", help_texts.DEMO)
    verb.add_argument("--out", default="runs/demo", metavar="DIR", help="default: runs/demo")
    verb.add_argument("--quick", action="store_true", help="a few steps of each run: does it work?")
    return parser, by_words


def _add_generation(verb: argparse.ArgumentParser) -> None:
    """What `Model.caption`, `answer` and `rank` take."""
    what = verb.add_argument_group("what is written")
    what.add_argument(
        "--prompt",
        metavar="TEXT",
        help="words that the caption goes on from, by default those of the training, if any; with "
        "--question a text in which {} stands for it, such as 'Question: {} Answer:'",
    )
    what.add_argument(
        "--question", metavar="TEXT", help="to be answered about each image, in up to 10 tokens"
    )
    what.add_argument("--context", default="", metavar="TEXT", help="stands before the question")
    what.add_argument(
        "--candidates",
        metavar="FILE|A,B,C",
        help="texts to rank: a file with one a line, or separated by commas",
    )
    what.add_argument("--stream", action="store_true", help="write words as they are generated")
    how = verb.add_argument_group("how it is generated (defaults: the run's config.eval)")
    how.add_argument("--num-beams", type=int, metavar="N", help="of beam search; 1 is greedy")
    how.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest text, without image and prompt"
    )
    how.add_argument("--min-new-tokens", type=int, metavar="N", help="shortest text")
    how.add_argument(
        "--length-penalty", type=float, metavar="X", help="of beams; below 0 favours short texts"
    )
    how.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1 avoids words said before"
    )
    how.add_argument(
        "--num-captions", type=int, default=1, metavar="N", help="texts an image, drawn by sampling"
    )
    how.add_argument("--sample", action="store_true", default=None, help="draw tokens at random")
    how.add_argument("--temperature", type=float, metavar="X", help="of sampling; default 1")
    how.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the likeliest tokens with this sum"
    )
    how.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default 0")


def _add_preparation(verb: argparse.ArgumentParser) -> None:
    """The fields of `prepare.settings.Settings`, with its defaults."""
    verb.add_argument("source", metavar="SOURCE", help="a file, a pattern, a folder, shapes:train")
    verb.add_argument("--to", required=True, metavar="DIR", help="the data set, a folder or a URL")
    verb.add_argument("--split", default="train", metavar="NAME", help="name of the split (train)")
    verb.add_argument("--image-folder", default="", metavar="DIR", help="of relative paths")
    verb.add_argument(
        "--field", action="append", default=[], metavar="FIELD=COLUMN", help="a column's other name"
    )
    how = verb.add_argument_group("how it runs; no bytes depend on it")
    how.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    what = verb.add_argument_group("steps")

    def add(name, metavar, help, default, type=int):
        what.add_argument(
            name, type=type, default=default, metavar=metavar, help=f"{help} (default: {default})"
        )

    add("--min-side", "PX", "shorter side that an image needs", 32)
    add("--max-aspect", "X", "times that an image may be as long as wide", 10.0, float)
    add("--max-pixels", "N", "pixels that are decoded; the header says how many", 100_000_000)
    add("--min-chars", "N", "of a text; shorter ones are left out", 1)
    add("--max-chars", "N", "of a text; longer ones are left out", 2000)
    what.add_argument(
        "--duplicates", default="near", choices=("near", "exact", "keep"),
        help="what is dropped: images of the same bytes, whose texts go to the first one (exact), "
        "and also pictures that were saved twice (near); default: near",
    )  # fmt: skip
    add("--near-bits", "N", "bits of 64 in which perceptual hashes of near ones may differ", 4)
    add("--resize", "PX", "shorter side of larger images on disk; 0: kept as they are", 0)
    add("--jpeg-quality", "Q", "of images that are resized", 90)
    add("--shard-mb", "MB", "size of a shard, in millions of bytes", 256.0, float)
    add("--block", "N", "examples that are checked as one piece of work", 1000)


# The verbs import what they need themselves, so that `--help` answers at once.


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.config import load_config
    from jaxblip.runtime import join_peers, keep_compilations
    from jaxblip.training.loop import train

    config = load_config(options.config, overrides)
    join_peers()
    keep_compilations()
    train(config, options.workdir)


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.config import load_config
    from jaxblip.planning import report, topologies
    from jaxblip.planning.plan import mesh_of, plan, write_json

    wanted = list(topologies.names(options.topology))
    config = load_config(options.config, overrides)
    if options.mesh:
        config.mesh.update(mesh_of(options.mesh))
    is_asked_mesh = bool(options.mesh) or any("config.mesh." in each for each in overrides)
    plans = []
    for topology in wanted:
        plans.append(plan(config, topology, tries=options.tries, is_asked_mesh=is_asked_mesh))
        for line in report.lines(plans[-1]):
            print(line, flush=True)
    if options.json:
        write_json(options.json, [report.as_json(each) for each in plans])


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.evaluation import verbs
    from jaxblip.runtime import join_peers, keep_compilations
    from jaxblip.training.restore import check_overrides

    chosen = [name for name in ("step", "follow", "predictions") if getattr(options, name)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other: leave out one.")
    if (options.workdir is None) != (options.predictions is not None):
        raise UserError(
            "evaluate needs --workdir=DIR of a training, or else --predictions=FILE.json: give one."
        )
    if options.predictions is not None:
        verbs.score_predictions(options.predictions, overrides)
        return
    check_overrides(options.workdir, overrides, options.step, by="evaluation")
    join_peers()
    keep_compilations()
    if options.follow:
        verbs.follow(options.workdir, overrides)
    else:
        verbs.evaluate(options.workdir, overrides, options.step)


def _generate(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.evaluation.verbs import generate, say, stream
    from jaxblip.runtime import join_peers, keep_compilations
    from jaxblip.training.restore import check_overrides

    check_overrides(options.checkpoint, overrides, options.step, by="generation")
    join_peers()
    keep_compilations()
    other = ("verb", "run", "checkpoint", "image", "video", "step", "stream")
    settings = {name: value for name, value in vars(options).items() if name not in other}
    settings |= {"overrides": overrides, "step": options.step}
    images = [options.image] if options.video else options.image
    unreadable = []  # what is said of them when all others have their texts
    if options.stream:
        for image, pieces in stream(options.checkpoint, images, **settings):
            try:
                first = next(pieces, "")
            except UnreadableImages as error:
                unreadable.append(str(error))
                continue
            say(f"{_named(image)}: {first}", end="")
            for piece in pieces:
                say(piece, end="")
            say("")
    else:
        for image, text in generate(options.checkpoint, images, **settings):
            say(f"{_named(image)}: {text}")
    if unreadable:
        raise UserError("\n".join(unreadable))


def _named(image: str | list[str]) -> str:
    return image if isinstance(image, str) else f"{image[0]} to {image[-1]}"


def _convert(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.interop.convert import convert

    for line in convert(
        options.source,
        options.target,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        qformer_tokenizer=options.qformer_tokenizer,
        vision=options.vision,
        language_model=options.language_model,
        step=options.step,
    ):
        print(line)


def _openmoji(options: argparse.Namespace, overrides: list[str]) -> None:
    from rich.progress import Progress

    from jaxblip.data.openmoji import build_openmoji, describe_openmoji

    with Progress() as bar:
        task = bar.add_task("drawing", total=None)
        summary = build_openmoji(
            options.out,
            image_size_px=options.size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(describe_openmoji(summary, options.out))


def _inspect(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.data.inspect import inspect_source
    from jaxblip.data.sources import open_source

    fields = _fields(options.field)
    source = open_source(
        options.source, image_size_px=96, fields=fields, image_folder=options.image_folder
    )
    for line in inspect_source(source, sheet=options.sheet, max_images=options.images):
        print(line)


def _prepare(options: argparse.Namespace, overrides: list[str]) -> None:
    import dataclasses

    from jaxblip.data.prepare.engine import Engine
    from jaxblip.data.prepare.settings import Settings, absolute_source
    from jaxblip.machine import available_cores

    chosen = vars(options) | {
        "source": absolute_source(options.source),
        "image_folder": absolute_source(options.image_folder) if options.image_folder else "",
        "fields": tuple(sorted(_fields(options.field).items())),
    }
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: chosen[name] for name in names})
    workers = available_cores() if options.workers is None else options.workers
    engine = Engine(workers, options.beam)
    from jaxblip.data.prepare.run import describe, prepare  # behind the check for Beam

    for line in describe(prepare(settings, options.to, engine), options.to):
        print(line)


def _cache_features(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.config import load_config
    from jaxblip.runtime import join_peers, keep_compilations
    from jaxblip.training.cache_features import cache_features

    config = load_config(options.config, overrides)
    join_peers()
    keep_compilations()
    cache_features(config, options.to, options.views, options.shard_mb)


def _fields(pairs: Sequence[str]) -> dict[str, str]:
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"--field={bad[0]} names no column: write --field=image=file, for example.")
    return dict(pair.split("=", 1) for pair in pairs)


def _demo(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxblip.demo import run_demo

    run_demo(options.out, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
