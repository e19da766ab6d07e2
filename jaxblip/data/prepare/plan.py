"""The second pass: which examples are duplicates, what becomes of their texts, what is written.

Rows of all blocks that may be equal meet in a bucket, by their digests or by a band of the bits of
their perceptual hashes: two hashes that differ in n bits agree in one of n + 1 bands. So no pass
looks at all pairs, and none needs more of the source in memory than a bucket. Of the duplicates the
one that stands first in the source is kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxblip.data.prepare.scan import Job, read_lines, read_traces

SAME, NEAR = "exact duplicate", "near duplicate"
_BUCKET_ROWS = 500_000
# Near duplicates look alike in 16 x 16, too: by so many of 255 levels at most in any channel. The
# hash alone takes drawings on plain ground for each other.
_MAX_LEVELS = 10
# Of a band's rows, sorted by hash, each is compared with so many before it, until so many of them
# are near: a set with a million blank pages must end as well.
_WINDOW, _MAX_NEAR = 1000, 16
# What a bucket needs of a trace.
_SAME = np.dtype([("same", np.uint64, 2), ("index", np.int64)])
_NEAR = np.dtype([
    ("band", np.uint64), ("asked", np.uint64), ("hash", np.uint64), ("index", np.int64),
])  # fmt: skip


def bucket_traces(number: int, job: Job) -> Iterator[tuple[str, bytes]]:
    """(bucket, rows) of a block, where rows that may be equal come into the same bucket."""
    traces = read_traces(number, job)
    buckets = -(-(job.blocks[-1].start + job.blocks[-1].count) // _BUCKET_ROWS)
    if job.settings.duplicates != "keep":
        rows = np.empty(len(traces), _SAME)
        rows["same"], rows["index"] = traces["same"], traces["index"]
        yield from _split(SAME, rows, rows["same"][:, 0], buckets)
    bands = job.settings.near_bits + 1 if job.settings.duplicates == "near" else 0
    edges = [64 * band // bands for band in range(bands + 1)] if bands else []
    for low, high in zip(edges, edges[1:]):
        rows = np.empty(len(traces), _NEAR)
        for name in ("asked", "hash", "index"):
            rows[name] = traces[name]
        mask = np.uint64(2 ** (high - low) - 1)
        rows["band"] = rows["hash"] >> np.uint64(low) & mask
        mixed = (rows["band"] ^ rows["asked"]) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
        yield from _split(f"{NEAR} {low}", rows, mixed, buckets)


def _split(name: str, rows: np.ndarray, keys: np.ndarray, buckets: int):
    places = keys % np.uint64(buckets)
    for place in np.unique(places).tolist():
        yield f"{name}/{place}", rows[places == place].tobytes()


def find_duplicates(bucket: tuple[str, Iterable[bytes]], job: Job) -> Iterator[tuple[int, tuple]]:
    """(block, what is asked of it) for the pairs of a bucket.

    - ("drop", index): the example is an exact duplicate.
    - ("texts", index, first): its texts belong to example `first` as well.
    - ("look", index, later): example `later` may be the same picture.
    """
    name, rows = bucket[0], b"".join(bucket[1])
    if name.startswith(SAME):
        for first, index in _same(np.frombuffer(rows, _SAME)):
            yield job.block_of(index), ("drop", index)
            yield job.block_of(index), ("texts", index, first)
    else:
        for earlier, later in _near(np.frombuffer(rows, _NEAR), job.settings.near_bits):
            yield job.block_of(earlier), ("look", earlier, later)


def _same(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, later) example for each whose digest occurred before."""
    first, second = rows["same"].T
    rows = rows[np.lexsort((rows["index"], second, first))]
    is_new = np.ones(len(rows), bool)
    is_new[1:] = (rows["same"][1:] != rows["same"][:-1]).any(axis=1)
    firsts = rows["index"][np.flatnonzero(is_new)][np.cumsum(is_new) - 1]
    yield from zip(firsts[~is_new].tolist(), rows["index"][~is_new].tolist())


def _near(rows: np.ndarray, max_bits: int) -> Iterator[tuple[int, int]]:
    """(earlier, later) for pairs of examples of one band whose hashes differ in few bits."""
    order = ("index", "hash", "asked", "band")  # the last one first
    rows = rows[np.lexsort([rows[name] for name in order])]
    found = np.zeros(len(rows), np.int64)
    for shift in range(1, min(_WINDOW, len(rows) - 1) + 1):
        one, other = rows[:-shift], rows[shift:]
        together = (one["band"] == other["band"]) & (one["asked"] == other["asked"])
        if not together.any():
            break
        near = np.bitwise_count(one["hash"] ^ other["hash"]) <= max_bits
        places = np.flatnonzero(together & near & (found[shift:] < _MAX_NEAR))
        found[places + shift] += 1
        pair = np.sort([one["index"][places], other["index"][places]], axis=0)
        yield from zip(*pair.tolist())


def answer(block: tuple[int, Iterable[tuple]], job: Job) -> Iterator[tuple[int, tuple]]:
    """(block, what it is told) for what was asked of a block.

    - ("drop", index)
    - ("texts", first, index, texts): example `first` gets the texts of example `index`.
    - ("look", later, thumbnail): of an example before it that may be the same picture.
    """
    number, asked = block[0], sorted(set(block[1]))
    kinds = {kind for kind, *_ in asked}
    texts = _texts(number, job) if "texts" in kinds else {}
    thumbnails = _thumbnails(number, job) if "look" in kinds else {}
    for kind, index, *receiver in asked:
        match kind:
            case "drop":
                yield number, (kind, index)
            case "texts":
                yield job.block_of(*receiver), (kind, *receiver, index, tuple(texts[index]))
            case "look":
                yield job.block_of(*receiver), (kind, *receiver, thumbnails[index].tobytes())


def plan_block(block: tuple[int, Iterable[tuple]], job: Job) -> None:
    """Notes what is dropped of a block, which texts are added, and what is left.

    Writes plan/000007.json with `dropped` (index -> reason), `added` (index -> texts), `reasons`
    (reason -> `examples` and what is said of the `first`), and the sums of what is left: `kept`
    (examples), `texts` and `bytes`.
    """
    number, told = block[0], sorted({each for each in block[1] if each})
    lines = {line["index"]: line for line in read_lines(number, job)}
    dropped = {index: line["dropped"] for index, line in lines.items() if "dropped" in line}
    added = defaultdict(list)
    thumbnails = _thumbnails(number, job) if told else {}
    for kind, index, *rest in told:  # "drop" before "look"
        match kind:
            case "drop":
                dropped[index] = SAME
            case "look" if index not in dropped:
                other = np.frombuffer(rest[0], np.uint8)
                levels = np.abs(thumbnails[index].astype(np.int16) - other)
                if levels.max() <= _MAX_LEVELS:
                    dropped[index] = NEAR
            case "texts":
                known = {*lines[index]["texts"], *added[index]}
                added[index] += [text for text in rest[1] if text not in known]
    reasons: dict[str, dict[str, Any]] = {}
    for index in sorted(dropped):
        detail = lines[index].get("detail", "")
        said = f"example {index}" + f": {detail}" * bool(detail)
        reasons.setdefault(dropped[index], {"examples": 0, "first": said})["examples"] += 1
    kept = [line for index, line in lines.items() if index not in dropped]
    texts = [text for line in kept for text in line["texts"] + added.get(line["index"], [])]
    size = sum(line["bytes"] for line in kept) + sum(len(text.encode()) for text in texts)
    (job.work / "plan").write_json(f"{job.blocks[number].name}.json", {
        "dropped": dropped, "added": {index: found for index, found in added.items() if found},
        "reasons": reasons, "kept": len(kept), "texts": len(texts), "bytes": size,
    })  # fmt: skip


def read_plan(number: int, job: Job) -> dict[str, Any]:
    """What `plan_block` wrote of a block."""
    return (job.work / "plan").read_json(f"{job.blocks[number].name}.json")


def _texts(number: int, job: Job) -> dict[int, list[str]]:
    return {line["index"]: line.get("texts", []) for line in read_lines(number, job)}


def _thumbnails(number: int, job: Job) -> dict[int, np.ndarray]:
    traces = read_traces(number, job)
    return dict(zip(traces["index"].tolist(), traces["thumbnail"]))


def totals(plans: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sums of what `plan_block` wrote, of blocks in their order."""
    sums, dropped = Counter(kept=0, texts=0, bytes=0), {}
    for plan in plans:
        sums.update({name: plan[name] for name in sums})
        for reason, found in plan["reasons"].items():
            known = dropped.setdefault(reason, {"examples": 0, "first": found["first"]})
            known["examples"] += found["examples"]
    return dict(sums) | {"dropped": dict(sorted(dropped.items()))}
