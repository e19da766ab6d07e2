"""`jaxblip data prepare` on synthetic pairs: throughput, memory, duplicates found, Beam's share.

    python benchmarks/prepare.py --folder=/tmp --pairs=100000 --workers=2

draws JPEGs of 640 x 480 (about 71 KB each) into WebDataset shards, prepares them, and checks what
is left. Of every hundred pairs one is a copy of another, byte for byte, and one is the same picture
in another size and quality; these and no others should be found. With --bare the passes also run
without Beam, in plain processes: what that saves is Beam's own cost. Needs twice the pairs on disk:
15 GB for 100,000.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from functools import cache, partial
from pathlib import Path

SHARD = 1000  # pairs a tar
PERIOD, BACK = 100, 50
COPY, NEAR = 98, 99  # places in each PERIOD of copies of what stands BACK before
QUALITY, NEAR_QUALITY, NEAR_SIZE = 92, 75, (480, 360)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=100_000, help="in hundreds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="where the files go; by default the system's for such")
    parser.add_argument("--bare", action="store_true", help="run the passes without Beam, too")
    parser.add_argument("--draw", action="store_true", help="draw the pairs, for another time")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--option", action="append", default=[], help="of data prepare, such as "
                        "--option=--resize=384")  # fmt: skip
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.gettempdir(), f"prepare_{args.pairs}")
    folder.mkdir(exist_ok=True)
    try:
        source = generate(folder, args.pairs, args.workers)
        if args.draw:
            return
        prepare(folder, source, args)
        check(folder / "prepared", args.pairs)
        if args.bare:
            bare(folder, source, args.workers)
    finally:
        if not (args.draw or args.keep):
            shutil.rmtree(folder)


def generate(folder: Path, pairs: int, workers: int) -> str:
    """Writes the shards that are not there yet; returns their pattern."""
    begin = time.monotonic()
    shards = -(-pairs // SHARD)
    with multiprocessing.Pool(workers) as pool:
        for _ in pool.imap_unordered(partial(write_tar, folder, pairs), range(shards)):
            pass
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    seconds = time.monotonic() - begin
    print(f"drawn: {pairs:,} pairs, {size / 1e9:.2f} GB, {seconds:.0f} s", flush=True)
    return f"{folder}/pairs-{{00000..{shards - 1:05}}}.tar"


def write_tar(folder: Path, pairs: int, number: int) -> None:
    path = folder / f"pairs-{number:05}.tar"
    if path.exists():
        return
    with tarfile.open(f"{path}.new", "w") as archive:
        for index in range(number * SHARD, min(pairs, (number + 1) * SHARD)):
            contents = {".jpg": picture(index), ".txt": f"picture {index}".encode()}
            for ending, content in contents.items():
                member = tarfile.TarInfo(f"{index:08}{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    os.replace(f"{path}.new", path)


def picture(index: int) -> bytes:
    """Two crops of the base pictures, one shining through the other."""
    import numpy as np
    from PIL import Image

    if index % PERIOD == COPY:
        return picture(index - BACK)
    near = index % PERIOD == NEAR
    rng = np.random.default_rng(index - BACK * near)
    crops = []
    for base in rng.choice(len(bases()), 2, replace=False):
        left, top = rng.integers(0, 1024 - 640), rng.integers(0, 1024 - 480)
        crops.append(bases()[base].crop((left, top, left + 640, top + 480)))
    image = Image.blend(*crops, rng.uniform(0.2, 0.8))
    if near:
        image = image.resize(NEAR_SIZE, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=NEAR_QUALITY if near else QUALITY)
    return buffer.getvalue()


@cache
def bases():
    """Sixteen textured pictures: noise of all sizes, from large patches to single pixels."""
    import numpy as np
    from PIL import Image

    rng, found = np.random.default_rng(0), []
    for _ in range(16):
        total = 0
        for level in range(1, 11):
            noise = Image.fromarray(rng.integers(0, 256, (2**level, 2**level, 3), np.uint8))
            wide = np.asarray(noise.resize((1024, 1024), Image.Resampling.BICUBIC), np.float32)
            total = total + (wide - 128) * 2 ** (-0.45 * level)
        found.append(Image.fromarray(np.clip(128 + 1.1 * total, 0, 255).astype(np.uint8)))
    return found


def prepare(folder: Path, source: str, args) -> None:
    command = [
        sys.executable, "-m", "jaxblip.cli", "data", "prepare", source, f"--to={folder}/prepared",
        f"--workers={args.workers}", *args.option,
    ]  # fmt: skip
    begin, cpu = time.monotonic(), cpu_seconds()
    process = subprocess.Popen(command)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            peak[0] = max(peak[0], memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    ended.set()
    watcher.join()
    if status:
        sys.exit("The preparation failed.")
    seconds = time.monotonic() - begin
    print(
        f"prepared: {args.pairs:,} pairs in {seconds:.0f} s, {args.pairs / seconds:.0f} a second; "
        f"{cpu_seconds() - cpu:.0f} s of CPU; peak memory of all processes "
        f"{peak[0] / 2**30:.2f} GiB",
        flush=True,
    )


def cpu_seconds() -> float:
    """Of all child processes that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory(root: int) -> int:
    """Bytes that a process and all below it hold, shared pages counted once (PSS)."""
    total, open_ = 0, [root]
    while open_:
        pid = open_.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if "Pss:" in line)
            for task in Path(f"/proc/{pid}/task").iterdir():
                open_ += map(int, (task / "children").read_text().split())
        except (OSError, StopIteration):  # it has ended meanwhile
            continue
    return total * 1024


def check(folder: Path, pairs: int) -> None:
    """Whether what is left is what should be, and nothing else."""
    import tensorflow_datasets as tfds

    report = json.loads((folder / "report.json").read_text())["train"]
    found = {reason: each["examples"] for reason, each in report["dropped"].items()}
    planted = {"exact duplicate": pairs // PERIOD, "near duplicate": pairs // PERIOD}
    print(f"planted: {planted}\nfound:   {found}")
    data = tfds.builder_from_directory(folder).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    expected = {index: [f"picture {index}"] for index in range(pairs)}
    for index in range(COPY, pairs, PERIOD):
        expected[index - BACK] += expected.pop(index)
    near = set(range(NEAR, pairs, PERIOD))
    left = {}
    for example in data:
        texts = [text.decode() for text in example["captions"]]
        left[int(texts[0].split()[1])] = texts
    if list(left) != sorted(left) or any(texts != expected.get(i) for i, texts in left.items()):
        sys.exit("The examples that are left are not as they should be.")
    others = sorted(expected.keys() - left.keys() - near)
    print(
        f"checked: {len(left):,} examples are left, in order, with the texts that they should "
        f"have; {len(near & left.keys()):,} near duplicates were missed, and "
        f"{len(others):,} other pictures were taken for such: {others[:10]}"
    )


def bare(folder: Path, source: str, workers: int) -> None:
    """The passes with the same functions, in the processes of a pool."""
    from jaxblip.data.prepare import run
    from jaxblip.data.prepare.engine import Engine
    from jaxblip.data.prepare.settings import Settings

    def each(engine, numbers, task, job, doing):
        with multiprocessing.Pool(workers) as pool:
            for _ in pool.imap_unordered(partial(task, job=job), numbers):
                pass

    run._each = each
    settings, engine = Settings(source), Engine(1)
    begin, cpu = time.monotonic(), cpu_seconds()
    process = multiprocessing.Process(
        target=run.prepare, args=(settings, f"{folder}/bare", engine), daemon=False
    )
    process.start()
    process.join()
    print(
        f"without Beam, but for the duplicates: {time.monotonic() - begin:.0f} s, "
        f"{cpu_seconds() - cpu:.0f} s of CPU"
    )
    same = subprocess.run(["diff", "-r", folder / "prepared", folder / "bare"]).returncode == 0
    print(f"the same bytes: {same}")


if __name__ == "__main__":
    main()
