"""Images a second of the input pipeline, beside the pipelines that users have today.

    python benchmarks/input_pipeline.py --json=input_pipeline.json

writes photo-like JPEGs of 640x480 into a temporary folder, and lets each pipeline make batches of
them: decoded, random crop to 224x224 (bicubic, antialiased), mirrored half of the time, caption
tokenized. All have the same number of worker processes. They take turns for some seconds each, in
several rounds, there and back, while the others are stopped. The figures are medians of the rounds,
and ratios those of the ratios in each round. What else the machine does makes them worse, and CPU
time least: the share of the cores that others took is among the figures.

| name | |
|---|---|
| jaxblip | `TrainBatches` over a JSONL file |
| jaxblip_threads | the same with `num_workers=0`: two threads, whatever the number of workers |
| pytorch | a DataLoader with Pillow and the transforms of torchvision, written out |
| webdataset | the same transforms over tar shards |
| bare | the decoder and the resampler of jaxblip in a loop, in as many processes |
| bare_1 | in one process |

With `--memory-examples=1000000`, instead: the memory of all processes over so many small examples.
Needs psutil; torch and webdataset are left out where they are missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageDraw

SIZE_PX, MAX_TOKENS, BATCH_SIZE = 224, 32, 32
SCALE, ASPECT = (0.5, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NUM_SHARDS = 8
START_S, START_BATCHES = 120, 8  # before the turns: so many batches, within this time
WARM_UP_S = 1.0  # of each turn, not counted
MEMORY_STEP = 50_000  # examples
OTHERS = 0.05  # share of the cores that others may take before a line says so
PEERS = {  # each with the package that it needs
    "jaxblip_threads": "",
    "pytorch": "torch",
    "webdataset": "webdataset",
    "bare": "",
    "bare_1": "",
}
PACKAGES = (
    "jaxblip", "grain", "numpy", "pillow", "simplejpeg", "cykooz_resizer", "torch", "webdataset"
)  # fmt: skip
WORDS = "a the dog cat man woman street red small with on near sitting holding green table".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--images", type=int, default=2000, help="number of different images")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of each pipeline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="of each turn of a pipeline")
    parser.add_argument("--memory-examples", type=int, default=0, help="measure memory over these")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="input_pipeline_") as folder:
        folder = Path(folder)
        if args.memory_examples:
            write_images(folder, args.images, size=(48, 64))
            figures = memory_over_examples(folder, args.workers, args.memory_examples)
        else:
            mean_bytes = write_images(folder, args.images)
            figures = take_turns(folder, args.workers, args.rounds, args.seconds)
            figures["image_bytes"] = round(mean_bytes)
    figures |= {"workers": args.workers, "images": args.images} | machine()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def machine() -> dict:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    installed = {name for name in PACKAGES if importlib.util.find_spec(_module(name))}
    return {
        "machine": f"{os.cpu_count()} x {cpu}, {platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES if name in installed},
    }


def _module(package: str) -> str:
    return {"pillow": "PIL"}.get(package, package)


# Images


def write_images(folder: Path, count: int, size: tuple[int, int] = (480, 640)) -> float:
    """`images/*.jpg` with `pairs.jsonl`, the same as shards, and a tokenizer; mean bytes a JPEG."""
    from jaxblip.data.tokenizers import save_tokenizer, train_wordpiece

    rng = np.random.default_rng(0)
    fields = [random_field(rng, *size) for _ in range(24)]
    captions = [" ".join(rng.choice(WORDS, rng.integers(6, 15))) for _ in range(count)]
    (folder / "images").mkdir()
    lines, total = [], 0
    shards = [tarfile.open(folder / f"{i}.tar", "w") for i in range(NUM_SHARDS)]
    for number, caption in enumerate(captions):
        data = photo(rng, fields)
        total += len(data)
        (folder / "images" / f"{number}.jpg").write_bytes(data)
        lines.append(json.dumps({"image": f"images/{number}.jpg", "caption": caption}))
        for ending, content in (("jpg", data), ("txt", caption.encode())):
            member = tarfile.TarInfo(f"{number:06}.{ending}")
            member.size = len(content)
            shards[number % NUM_SHARDS].addfile(member, io.BytesIO(content))
    for shard in shards:
        shard.close()
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    save_tokenizer(train_wordpiece(captions, 500), folder / "tokenizer")
    print(f"{count} JPEGs of {size[1]}x{size[0]}, {total / count / 1000:.0f} kB on average")
    return total / count


def random_field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise with the spectrum of photographs, mean 0 and standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    field = np.fft.irfft2(spectrum / frequency**1.25, (height, width))
    return (field / field.std()).astype(np.float32)


def photo(rng: np.random.Generator, fields: list[np.ndarray]) -> bytes:
    """A JPEG of texture with weak colours, and of things with sharp edges before it."""
    chosen = [fields[i] for i in rng.choice(len(fields), 3, replace=False)]
    height, width = chosen[0].shape
    shift = tuple(int(rng.integers(side)) for side in (height, width))
    grey, warm, green = (np.roll(field, shift, (0, 1)) for field in chosen)
    colours = np.stack([warm, green, -warm], -1)
    pixels = 120 + rng.uniform(30, 50) * grey[..., None] + 12 * colours
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 10)):
        centre, radius = rng.uniform(0, (width, height)), rng.uniform(0.05, 0.2) * height
        turns = np.sort(rng.uniform(0, 2 * np.pi, 7))
        corners = centre + radius * np.stack([np.cos(turns), np.sin(turns)], -1)
        draw.polygon([tuple(corner) for corner in corners], tuple(rng.integers(256, size=3)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=79)
    return file.getvalue()


# Pipelines: each counts images in `done`, for ever.


def jaxblip_batches(folder: Path, workers: int, batch_size: int = BATCH_SIZE, size_px=SIZE_PX):
    from jaxblip.data.pipeline import Part, TrainBatches
    from jaxblip.data.preprocess import Preprocess
    from jaxblip.data.sources import open_source
    from jaxblip.data.tokenizers import TextEncoder, load_tokenizer

    encoder = TextEncoder(load_tokenizer(folder / "tokenizer"), MAX_TOKENS, "qformer")
    preprocess = Preprocess(
        ("image", "text_ids", "text_mask"),
        size_px,
        encoder=encoder,
        crop_scale=SCALE,
        crop_aspect=ASPECT,
    )
    source = open_source(str(folder / "pairs.jsonl"), image_size_px=size_px)
    return TrainBatches(
        [Part(source, preprocess)], batch_size=batch_size, seed=0, num_workers=workers
    )


def run_jaxblip(folder: Path, workers: int, done) -> None:
    for batch in jaxblip_batches(folder, workers):
        done.value += len(batch["image"])


def run_jaxblip_threads(folder: Path, workers: int, done) -> None:
    del workers
    run_jaxblip(folder, 0, done)


def torch_transform(image: Image.Image):
    """RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, as torchvision does them.

    By hand, because a torchvision without CUDA is in no package index.
    """
    import torch

    width, height = image.size
    log_aspect = torch.log(torch.tensor(ASPECT))
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*SCALE).item()
        ratio = torch.exp(torch.empty(1).uniform_(*log_aspect.tolist())).item()
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if wide <= width and high <= height:
            top = torch.randint(0, height - high + 1, (1,)).item()
            left = torch.randint(0, width - wide + 1, (1,)).item()
            break
    else:
        left, top, wide, high = 0, 0, width, height
    image = image.crop((left, top, left + wide, top + high))
    image = image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return pixels.clone().sub_(mean).div_(std)


class TorchCollate:
    """Images stacked, captions tokenized: one call a batch, which is the fastest way."""

    def __init__(self, folder: Path):
        from jaxblip.data.tokenizers import load_tokenizer

        self.tokenizer = load_tokenizer(folder / "tokenizer")

    def __call__(self, pairs):
        import torch

        images, captions = zip(*pairs)
        options = dict(padding="max_length", truncation=True, max_length=MAX_TOKENS)
        return torch.stack(images), self.tokenizer(list(captions), return_tensors="pt", **options)


class TorchPairs:
    """The map-style data set."""

    def __init__(self, folder: Path):
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        self.rows = [(folder / row["image"], row["caption"]) for row in map(json.loads, lines)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        path, caption = self.rows[index]
        with open(path, "rb") as file:  # as torchvision's loader does it
            return torch_transform(Image.open(file).convert("RGB")), caption


def run_pytorch(folder: Path, workers: int, done) -> None:
    from torch.utils.data import DataLoader

    pairs = TorchPairs(folder)
    endless = (i for _ in itertools.count() for i in random.sample(range(len(pairs)), len(pairs)))
    loader = DataLoader(
        pairs, BATCH_SIZE, sampler=endless, num_workers=workers, collate_fn=TorchCollate(folder)
    )
    for images, _ in loader:
        done.value += len(images)


def run_webdataset(folder: Path, workers: int, done) -> None:
    import webdataset

    dataset = (
        webdataset.WebDataset(
            [str(path) for path in folder.glob("*.tar")], resampled=True, shardshuffle=False
        )
        .shuffle(500)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(torch_transform, str)
        .batched(BATCH_SIZE, collation_fn=TorchCollate(folder))
    )
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        done.value += len(images)


def run_bare(folder: Path, workers: int, done) -> None:
    processes = [
        multiprocessing.Process(target=run_bare_1, args=(folder, seed, done), daemon=True)
        for seed in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def run_bare_1(folder: Path, seed: int, done) -> None:
    from jaxblip.data.decode import decode_jpeg
    from jaxblip.data.images import crop_box
    from jaxblip.data.resample import resample

    rng = np.random.default_rng(seed)
    files = [path.read_bytes() for path in sorted((folder / "images").iterdir())[:500]]
    for number, data in enumerate(itertools.cycle(files), start=1):
        pixels, _ = decode_jpeg(data)
        box = crop_box(*pixels.shape[:2], rng, SCALE, ASPECT)
        resample(pixels, box, SIZE_PX, mirrored=number % 2)
        if number % BATCH_SIZE == 0:
            with done.get_lock():
                done.value += BATCH_SIZE


PIPELINES: dict[str, Callable] = {
    "jaxblip": run_jaxblip,
    "jaxblip_threads": run_jaxblip_threads,
    "pytorch": run_pytorch,
    "webdataset": run_webdataset,
    "bare": run_bare,
    "bare_1": run_bare_1,
}


# Measurement


class Pipeline:
    """One pipeline in processes of its own, which run only in its turns."""

    def __init__(self, name: str, folder: Path, workers: int):
        context = multiprocessing.get_context("spawn")
        self._done = context.Value("q", 0)
        self._process = context.Process(
            target=PIPELINES[name], args=(folder, workers, self._done), name=name
        )
        self._process.start()
        end = time.monotonic() + START_S
        while self._images() < START_BATCHES * BATCH_SIZE:  # all workers have started then
            if not self._process.is_alive() or time.monotonic() > end:
                self.close()
                sys.exit(f"The pipeline {name} gave too few batches in {START_S} s.")
            time.sleep(0.1)
        self._each("suspend")

    def turn(self, seconds: float) -> dict[str, float]:
        self._each("resume")
        time.sleep(WARM_UP_S)
        begin, done, cpu_s, all_s = time.monotonic(), self._images(), self._cpu_s(), _busy_s()
        memory = []
        while time.monotonic() < begin + seconds or self._images() == done:
            time.sleep(seconds / 10)
            memory.append(sum(self._each("memory_info", "rss")))
            if not self._process.is_alive():
                sys.exit(f"The pipeline {self._process.name} has ended.")
        images, seconds = self._images() - done, time.monotonic() - begin
        cpu_s, all_s = self._cpu_s() - cpu_s, _busy_s() - all_s
        measured = {
            "images_per_second": images / seconds,
            "cpu_ms_per_image": 1000 * cpu_s / images,
            "memory_mib": max(memory) / 2**20,
            "others": max(0, all_s - cpu_s) / (seconds * os.cpu_count()),
        }
        self._each("suspend")
        return measured

    def close(self) -> None:
        if self._process.is_alive():
            self._each("kill")
        self._process.join()

    def _images(self) -> int:
        return self._done.get_obj().value  # without the lock, which one that is stopped may hold

    def _cpu_s(self) -> float:
        return sum(times.user + times.system for times in self._each("cpu_times"))

    def _each(self, method: str, attribute: str = "") -> list:
        """What a method of psutil gives for each process of the pipeline."""
        parent = psutil.Process(self._process.pid)
        results = [getattr(each, method)() for each in [parent, *parent.children(recursive=True)]]
        return [getattr(result, attribute) for result in results] if attribute else results


def _busy_s() -> float:
    """Of all cores; what another virtual machine had of them counts too."""
    times = psutil.cpu_times()._asdict()
    # Linux has guests in the time of users already.
    return sum(times[name] for name in times.keys() - {"idle", "iowait", "guest", "guest_nice"})


def take_turns(folder: Path, workers: int, rounds: int, seconds: float) -> dict:
    """The figures of all pipelines, and a table of them."""
    names = ["jaxblip"]
    for name, package in PEERS.items():
        if package and not importlib.util.find_spec(package):
            print(f"Without {name}: the package {package} is not installed.")
        else:
            names.append(name)
    # Of what processes leave behind that are killed, which is their end here.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    pipelines = {}
    try:
        for name in names:
            pipelines[name] = Pipeline(name, folder, workers)
        turns = [
            # There and back, so that nobody always comes behind the same one.
            {name: pipelines[name].turn(seconds) for name in names[:: -1 if number % 2 else 1]}
            for number in range(rounds)
        ]
    finally:
        for pipeline in pipelines.values():
            pipeline.close()

    def median(name: str, figure: str) -> float:
        return statistics.median(turn[name][figure] for turn in turns)

    def ratio(ours: str, peer: str, figure: str = "images_per_second") -> float | None:
        """Of the same round, so that what else the machine does touches both."""
        if peer not in names:
            return None
        ratios = (turn[ours][figure] / turn[peer][figure] for turn in turns)
        return round(statistics.median(ratios), 3)

    others = statistics.median(figures["others"] for turn in turns for figures in turn.values())
    speed = {name: round(median(name, "images_per_second"), 1) for name in names}
    figures = {
        "images_per_second": speed["jaxblip"],
        "peers": {name: speed[name] for name in names[1:]},
        "ratio_torch": ratio("jaxblip", "pytorch"),
        "ratio_webdataset": ratio("jaxblip", "webdataset"),
        "ratio_bare": ratio("jaxblip", "bare"),
        "ratio_torch_threads": ratio("jaxblip_threads", "pytorch"),
        "ratio_bare_threads": ratio("jaxblip_threads", "bare"),
        # Of CPU time it is the other that is divided.
        "ratio_torch_cpu": ratio("pytorch", "jaxblip", "cpu_ms_per_image"),
        "ratio_bare_cpu": ratio("bare", "jaxblip", "cpu_ms_per_image"),
        "others": round(others, 3),
        "cpu_ms_per_image": {name: round(median(name, "cpu_ms_per_image"), 3) for name in names},
        "peak_memory_mib": {
            name: round(max(turn[name]["memory_mib"] for turn in turns)) for name in names
        },
        "turns": turns,
    }
    print("| pipeline | images/s | CPU ms an image | memory, MiB |\n|---|---|---|---|")
    for name in names:
        cpu_ms, memory = (figures[key][name] for key in ("cpu_ms_per_image", "peak_memory_mib"))
        print(f"| {name} | {speed[name]:.0f} | {cpu_ms:.2f} | {memory} |")
    for name in figures:
        if name.startswith("ratio_"):
            print(name, figures[name])
    if others > OTHERS:
        print(f"Other processes took {others:.0%} of the cores meanwhile: of little worth.")
    return figures


def memory_over_examples(folder: Path, workers: int, examples: int) -> dict:
    """MiB of all processes (RSS), every MEMORY_STEP examples."""
    this, seen, begin = psutil.Process(), [], time.monotonic()
    with jaxblip_batches(folder, workers, batch_size=250, size_px=32) as batches:
        for batch in batches:
            if batches.examples_seen % MEMORY_STEP == 0:
                processes = [this, *this.children(recursive=True)]
                mib = round(sum(each.memory_info().rss for each in processes) / 2**20)
                seen.append((batches.examples_seen, mib))
                print(f"{batches.examples_seen} examples: {mib} MiB", flush=True)
            if batches.examples_seen >= examples:
                break
    print(f"{examples / (time.monotonic() - begin):.0f} examples/s")
    return {"memory_mib_over_examples": seen}


if __name__ == "__main__":
    main()
