"""`jaxblip data prepare`: passes over a source, each of which may be killed and started again."""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import apache_beam as beam
import fsspec

from jaxblip.data import storage
from jaxblip.data.prepare.engine import Engine
from jaxblip.data.prepare.folder import Folder
from jaxblip.data.prepare.plan import (
    answer,
    bucket_traces,
    find_duplicates,
    plan_block,
    read_plan,
    totals,
)
from jaxblip.data.prepare.scan import Block, Job, count_part, scan_block
from jaxblip.data.prepare.settings import Settings, parts_of
from jaxblip.data.prepare.shards import plan_shards, splits_of, write_info, write_shard
from jaxblip.data.samples import counts_as_text
from jaxblip.errors import UserError

REPORT = "report.json"
_PROGRESS_S = 10.0
_READERS = 16  # threads that read small files


def prepare(
    settings: Settings, to: str, engine: Engine, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Writes a source as a split of a TFDS data set in array_record; see `Settings` for the steps.

    The same settings and source give the same bytes, on any engine, killed and started again or
    not. What is in the folder meanwhile is no data set, or has the splits that it had before.

    Args:
      to: the folder, which may hold other splits made in the same way.
      say: gets lines of progress.

    Returns:
      What `report.json` says of the split.

    Raises:
      UserError: the source or the folder cannot be used, or nothing is left of the source.
    """
    began = time.monotonic()
    job = Job(settings, Folder(storage.absolute(to)), uuid.uuid4().hex)
    if done := _done(job):
        job.work.remove()
        say(f"{job.folder.path} has the split {settings.split} already, made in the same way.")
        return done
    is_new = _begin(job)
    say(f"Steps: {settings.steps}.")
    try:
        job, problems = _index(job, engine)
    except UserError:
        if is_new:  # so that another source may be named
            job.work.remove()
        raise
    examples = sum(block.count for block in job.blocks)
    checked = _scan(job, engine, say)
    found = _plan(job, engine)
    if not found["kept"]:
        job.work.remove()
        counts = Counter({name: each["examples"] for name, each in found["dropped"].items()})
        raise UserError(f"nothing is left of {examples:,} examples: {counts_as_text(counts)}.")
    lengths, size = _write(job, engine, found, say)
    report = {
        **_signature(job), "columns": job.columns, "read": examples, **found, "bytes": size,
        "problems": problems, "shard_lengths": lengths,
    }  # fmt: skip
    reports = _reports(job) | {settings.split: report}
    job.folder.write_json(REPORT, dict(sorted(reports.items())))
    write_info(job.folder, job.columns, reports)
    job.work.remove()
    seconds = time.monotonic() - began
    say(f"{seconds:.0f} s, {checked / seconds:,.0f} examples a second.")
    return report


def describe(report: dict[str, Any], to: str) -> list[str]:
    """A report as lines, the commonest reason first."""
    read, kept, shards = report["read"], report["kept"], len(report["shard_lengths"])
    share = f"{kept:,} kept ({kept / read:.1%})"
    lines = [f"{read:,} examples read, {share} with {report['texts']:,} texts"]
    for reason, found in sorted(report["dropped"].items(), key=lambda item: -item[1]["examples"]):
        count = found["examples"]
        lines.append(f"  {reason}: {count:,} ({count / read:.2%}), such as {found['first']}")
    lines += [f"  {problem}" for problem in report["problems"]]
    return [*lines, f"Written: {to}, {report['bytes']:,} bytes in {_shards(shards)}."]


def _reports(job: Job) -> dict[str, Any]:
    """Those of the splits that the data set has."""
    splits = splits_of(job.folder)
    reports = job.folder.read_json(REPORT) if REPORT in job.folder.names() else {}
    if not reports.keys() >= set(splits):
        raise UserError(f"{job.folder.path} has a data set of another origin: name another folder.")
    return {name: reports[name] for name in splits}


def _done(job: Job) -> dict[str, Any] | None:
    """The report of the split where it is finished, and made in the same way."""
    report = _reports(job).get(job.settings.split)
    if report is not None:
        _check_same(job, report, "has")
    return report


def _begin(job: Job) -> bool:
    """Checks the folder, and notes there what is to be written, where it is not yet."""
    job.folder.sweep()
    there = job.folder.names()
    if there and not any(name == REPORT or name.startswith(".prepare-") for name in there):
        raise UserError(f"{job.folder.path} has other files in it: name an empty folder with --to.")
    if "settings.json" in job.work.names():
        _check_same(job, job.work.read_json("settings.json"), "has an unfinished")
        return False
    for name in ("parts", "scan", "plan", "shards"):
        (job.work / name).make()
    job.work.write_json("parts.json", parts_of(job.settings.source))
    job.work.write_json("settings.json", _signature(job))
    return True


def _signature(job: Job) -> dict[str, Any]:
    """What must be the same where a preparation goes on."""
    sizes = [_size(part) for part in parts_of(job.settings.source)]
    return dataclasses.asdict(job.settings) | {"fields": dict(job.settings.fields), "sizes": sizes}


def _size(part: str) -> int | None:
    """The bytes of a file; None where a source is none."""
    try:
        files, path = fsspec.core.url_to_fs(part)
        return files.size(path) if files.isfile(path) else None
    except (OSError, ImportError, ValueError):
        return None


def _check_same(job: Job, before: dict[str, Any], has: str) -> None:
    for name, value in _signature(job).items():
        if before[name] != value:
            what = f"of --{name.replace('_', '-')}={before[name]}, not {value}"
            if name in ("source", "sizes"):
                what = f"of {before['source']}" + " as it was then" * (name == "sizes")
            raise UserError(
                f"{job.folder.path} {has} split {job.settings.split} {what}: name another folder "
                "with --to, another --split, or remove what is there."
            )


def _index(job: Job, engine: Engine) -> tuple[Job, list[str]]:
    """Counts the examples and divides them into blocks; also what is wrong with the source."""
    folder, count = job.work / "parts", len(job.parts)
    _each(engine, _left(count, folder), count_part, job, "opening the source")
    parts = _read_all(folder.read_json, [f"{number:06}.json" for number in range(count)])
    job = job._replace(columns=tuple(parts[0]["columns"]))
    for name, report in _reports(job).items():
        if tuple(report["columns"]) != job.columns:
            raise UserError(
                f"{job.folder.path} has split {name} with {_named(report['columns'])}, and the "
                f"source has {_named(job.columns)}: name another folder with --to."
            )
    blocks, start, size = [], 0, job.settings.block
    for part, found in enumerate(parts):
        for first in range(0, found["examples"], size):
            count = min(size, found["examples"] - first)
            blocks.append(Block(len(blocks), part, first, count, start + first))
        start += found["examples"]
    job.work.write_json("blocks.json", blocks)
    return job, [problem for found in parts for problem in found["problems"]]


def _scan(job: Job, engine: Engine, say: Callable[[str], None]) -> int:
    """The pass over all examples; returns how many of them were left to check."""
    todo = _left(len(job.blocks), job.work / "scan", ".jsonl")
    sizes = [block.count for block in job.blocks]
    examples, left = sum(sizes), sum(sizes[number] for number in todo)
    done = f", {examples - left:,} are checked already" if left < examples else ""
    say(f"{examples:,} examples, on {engine.name}{done}.")
    with _progress("checked", job.work / "scan", sizes, say, ".jsonl"):
        _each(engine, todo, scan_block, job, "checking the examples")
    return left


def _plan(job: Job, engine: Engine) -> dict[str, Any]:
    """Finds the duplicates; returns the sums of what is dropped and left."""
    if "shards.json" not in job.work.names():
        run = partial(_find_duplicates, job=job)
        engine.run(run, doing="finding duplicates", tasks=1)
    plans = _read_all(partial(read_plan, job=job), range(len(job.blocks)))
    found = totals(plans)
    if found["kept"]:
        plan_shards([plan["kept"] for plan in plans], found.pop("bytes"), job)
    return found


def _find_duplicates(pipeline: beam.Pipeline, job: Job) -> None:
    numbers = pipeline | beam.Create(range(len(job.blocks)))
    told = (
        numbers
        | beam.Reshuffle()
        | "traces" >> beam.FlatMap(bucket_traces, job)
        | "buckets" >> beam.GroupByKey()
        | "duplicates" >> beam.FlatMap(find_duplicates, job)
        | "asked" >> beam.GroupByKey()
        | "answers" >> beam.FlatMap(answer, job)
    )
    nothing = numbers | "all blocks" >> beam.Map(lambda number: (number, ()))
    (
        (told, nothing)
        | beam.Flatten()
        | "told" >> beam.GroupByKey()
        | "plan" >> beam.Map(plan_block, job)
    )


def _write(
    job: Job, engine: Engine, found: dict[str, Any], say: Callable[[str], None]
) -> tuple[list[int], int]:
    """Writes the shards; returns the examples in each, and the bytes of all."""
    shards = job.work.read_json("shards.json")["shards"]
    todo = _left(shards, job.work / "shards")
    done = f", {shards - len(todo):,} are written already" if len(todo) < shards else ""
    say(f"{found['kept']:,} examples are left, for {_shards(shards)}{done}.")
    edges = [found["kept"] * number // shards for number in range(shards + 1)]
    sizes = [end - first for first, end in zip(edges, edges[1:])]
    with _progress("written", job.work / "shards", sizes, say):
        _each(engine, todo, write_shard, job, "writing the shards")
    written = _read_all((job.work / "shards").read_json, [f"{n:06}.json" for n in range(shards)])
    return [each["examples"] for each in written], sum(each["bytes"] for each in written)


def _each(engine: Engine, numbers: Sequence[int], task: Callable, job: Job, doing: str) -> None:
    """Runs `task(number, job)` for all numbers, in any order and place."""

    def build(pipeline: beam.Pipeline) -> None:
        pipeline | beam.Create(numbers) | beam.Reshuffle() | beam.Map(task, job)

    if numbers:
        engine.run(build, doing=doing, tasks=len(numbers))


def _left(count: int, folder: Folder, ending: str = ".json") -> list[int]:
    """The numbers below `count` of which no file is in a folder."""
    there = folder.names()
    return [number for number in range(count) if f"{number:06}{ending}" not in there]


def _read_all(read: Callable, names: Sequence) -> list[Any]:
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(read, names))


def _shards(count: int) -> str:
    return f"{count:,} shard" + "s" * (count != 1)


def _named(columns: Sequence[str | None]) -> str:
    return " and ".join(column for column in columns if column)


@contextmanager
def _progress(
    what: str,
    folder: Folder,
    sizes: Sequence[int],
    say: Callable[[str], None],
    ending: str = ".json",
) -> Iterator[None]:
    """Says now and then how far it is, by the files that are there: it works for any engine.

    Args:
      sizes: examples that each file stands for.
    """

    def done() -> int:
        return sum(sizes) - sum(sizes[number] for number in _left(len(sizes), folder, ending))

    def watch(before: int, began: float) -> None:
        while not ended.wait(_PROGRESS_S):
            now = done()
            rate = (now - before) / (time.monotonic() - began)
            if rate:
                left = (sum(sizes) - now) / rate / 60
                say(f"{what} {now:,} of {sum(sizes):,}  {rate:,.0f} a second  left {left:.0f} min")

    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(done(), time.monotonic()), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
