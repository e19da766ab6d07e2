"""Damaged files of every kind: nothing comes out but UserError and BadSample, soon.

A process of its own tries one after the other, so that a crash, a hang or a lack of memory is seen.
`python tests/data/test_fuzz.py SEED` tries one again; JAXBLIP_FUZZ_SECONDS=600 takes more time.
"""

import contextlib
import io
import itertools
import json
import os
import random
import re
import resource
import select
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from jaxblip.data.decode import decode_image
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import SKIP_REASONS, BadSample
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError

SECONDS = float(os.environ.get("JAXBLIP_FUZZ_SECONDS", 60))
SECONDS_TO_START = 90
SECONDS_EACH = 20  # where the machine has other work; alone they take a few milliseconds
MEMORY_BYTES = 2 << 30  # beside what the libraries take
MAX_PIXELS = 1_000_000

PREPROCESS = Preprocess(("image",), 8, max_image_pixels=MAX_PIXELS)
RNG, DRAWS = np.random.default_rng(0), np.random.default_rng(1)
PHOTO = Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48))
LINES = [
    {"image": "1.png", "caption": "a cät on a mat", "id": 3},
    {"image": "1.png", "captions": ["one", "two"], "id": "x"},
    {"image": "data:image/png;base64,iVBORw0KGgo=", "question": "what?", "answers": ["a", "b"]},
    {"images": ["1.png"], "messages": [
        {"role": "user", "content": "<image>?"},
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]}]},
]  # fmt: skip
DOCUMENTS = [
    {"images": [{"id": 9, "file_name": "1.png"}, {"id": 4, "file_name": "2.png"}],
     "annotations": [{"image_id": 4, "caption": "b"}, {"image_id": 9, "caption": "a"}]},
    {"images": [{"filename": "1.png", "filepath": "x", "split": "train", "cocoid": 9,
                 "sentences": [{"raw": "a"}, {"raw": "b"}]}]},
    [{"image": "2.png", "caption": "b", "id": 4}],
    [{"id": "1", "image": "1.png", "conversations": [
        {"from": "system", "value": "Be kind."}, {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A square."}, {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."}]}],
]  # fmt: skip
QUESTIONS = {"data_subtype": "val2014", "questions": [
    {"image_id": 42, "question": "how many?", "question_id": 420}]}  # fmt: skip
ANSWERS = {"annotations": [{"question_id": 420, "answers": [{"answer": "2"}, {"answer": "two"}]}]}
OTHERS = ("AVIF", "JPEG2000", "PPM", "TGA", "PCX", "DDS", "SGI", "ICO", "ICNS", "IM", "EPS")
IN_PLACE = ("jsonl", "csv", "parquet", "tar", "tfds")
FIELDS = {"tfds": {"captions": "captions.text", "image_id": "image/id"}}
ODD = [None, True, -1, 0, 2**70, 1e400, 0.5, "", "\ud800", "\0", "x" * 5000, [], {}, [[]], [None]]
BITS = [
    b"[" * 3000, b'"', b"{", b"}", b",", b"\n", b"\r", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN",
    b"1" * 5000, b"-1", b"\\ud800", b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"0" * 600,
]  # fmt: skip


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def images():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "upright"
    frames = dict(save_all=True, append_images=[PHOTO.rotate(90), PHOTO.rotate(180)])
    grey16 = Image.fromarray(RNG.integers(0, 65536, (20, 30), np.uint16))
    clear = PHOTO.convert("RGBA")
    clear.putalpha(PHOTO.convert("L"))
    return {
        "jpeg": [
            encoded(PHOTO, "JPEG", exif=exif),
            encoded(PHOTO, "JPEG", progressive=True, subsampling=0),
            encoded(PHOTO.convert("CMYK"), "JPEG"),
            encoded(PHOTO.convert("L"), "JPEG"),
            encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO]),
        ],
        "png": [
            encoded(PHOTO, "PNG", exif=exif), encoded(PHOTO.convert("P"), "PNG", transparency=3),
            encoded(grey16, "PNG"), encoded(clear, "PNG"), encoded(PHOTO, "PNG", **frames),
        ],
        "webp": [
            encoded(PHOTO, "WEBP", exif=exif), encoded(clear, "WEBP", lossless=True),
            encoded(PHOTO, "WEBP", **frames),
        ],
        "gif": [
            encoded(PHOTO, "GIF", **frames), encoded(PHOTO.convert("P"), "GIF", transparency=1),
        ],
        "tiff": [
            *(
                encoded(PHOTO, "TIFF", compression=compression)
                for compression in ("raw", "tiff_lzw", "jpeg", "tiff_deflate", "packbits")
            ),
            encoded(PHOTO.convert("1"), "TIFF", compression="group4"), encoded(grey16, "TIFF"),
        ],
        "bmp": [encoded(PHOTO, "BMP"), encoded(PHOTO.convert("P"), "BMP")],
        "others": [encoded(PHOTO, kind) for kind in OTHERS],
    }  # fmt: skip


def parquet() -> list[bytes]:
    table = pyarrow.table({
        "image": [{"bytes": b"abc", "path": None}, {"bytes": None, "path": "1.png"}] * 3,
        "captions": pyarrow.array([["one"], ["two", "three"], None] * 2),
        "id": [5, 6, 7, 8, 9, None],
        "kind": pyarrow.array(["a", "b"] * 3).dictionary_encode(),
        "when": pyarrow.array([1] * 6, pyarrow.timestamp("ns")),
    })  # fmt: skip
    files = []
    for codec, version in itertools.product(("none", "snappy", "zstd", "gzip"), ("1.0", "2.0")):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(
            table, buffer, row_group_size=2, compression=codec, data_page_version=version
        )
        files.append(buffer.getvalue())
    return files


def tars() -> list[bytes]:
    files = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name, content in [
                ("a/1.png", encoded(PHOTO.resize((4, 4)), "PNG")), ("a/1.txt", b"one"),
                ("2.json", json.dumps(LINES[1]).encode()),
                ("y" * 90 + "/" + "x" * 60 + ".jpg", b"no image"), ("ü3.txt", b"three"),
            ]:  # fmt: skip
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        files.append(buffer.getvalue())
    return files


def tables() -> list[bytes]:
    text = 'image,caption,id\r\n1.png,"a cat, or two\nof ""them""",7\r\n2.png,bé,8\r\n'
    return [text.encode(), b"\xef\xbb\xbf" + text.encode()]


def tfds_files(folder: str) -> dict[str, bytes]:
    from toy_tfds import COCO_CAPTIONS, coco_example, write

    with contextlib.redirect_stdout(sys.stderr):  # for it tells what it does
        made = Path(write(folder, COCO_CAPTIONS, {"train": [coco_example(i) for i in range(5)]}))
    return {path.name: path.read_bytes() for path in made.iterdir()}


class Inputs:
    """Damaged files, each a function of its seed."""

    def __init__(self, folder: Path):
        self._folder = folder / "damaged"
        self._bases = {
            **images(),
            "jsonl": ["\n".join(map(json.dumps, LINES)).encode()],
            "csv": tables(),
            "parquet": parquet(),
            "tar": tars(),
            "json": [json.dumps(document).encode() for document in DOCUMENTS],
        }
        self._tfds = tfds_files(f"{folder}/good")
        self._kinds = [*self._bases, "vqa", "tfds", "twisted", "twisted lines"]

    def attempt(self, seed: int) -> None:
        """Raises where anything else comes out than an error of the two kinds."""
        rng, kind = random.Random(seed), self._kinds[seed % len(self._kinds)]
        if kind in ("jpeg", "png", "webp", "gif", "tiff", "bmp", "others"):
            data = mutated(rng.choice(self._bases[kind]), self._bases[kind], rng)
            data = fitted(data, rng)
            tried(lambda: decode_image(data, MAX_PIXELS))
            tried(lambda: PREPROCESS({"image": data, "captions": ["a"]}, DRAWS, Counter()))
            return
        spec, good, bad = self._files(kind, rng)
        # Half of those that are read in place are damaged when they are open already.
        first = good if kind in IN_PLACE and rng.random() < 0.5 else bad
        self._write(first)
        source = tried(lambda: open_source(spec, image_size_px=8, fields=FIELDS.get(kind)))
        if source is None:
            return
        self._write(bad)
        for index in {0, len(source) // 2, len(source) - 1}:
            assert isinstance(source.place(index), str)
            example = tried(lambda: source[index])
            if example is not None:
                assert {"image", "image_id", "captions"} <= set(example)
                "\n".join(example["captions"]).encode()
                tried(lambda: decode_image(example["image"], MAX_PIXELS))

    def _write(self, files: dict[str, bytes]) -> None:
        self._folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (self._folder / name).write_bytes(content)

    def _files(
        self, kind: str, rng: random.Random
    ) -> tuple[str, dict[str, bytes], dict[str, bytes]]:
        """What to open, and its files before and after they were damaged."""
        if kind == "tfds":
            name = rng.choice(sorted(self._tfds))
            content = self._tfds[name]
            if name.endswith("json") and rng.random() < 0.5:
                content = json.dumps(twisted(json.loads(content), rng)).encode()
            else:
                content = mutated(content, [content], rng)
            return str(self._folder), self._tfds, {**self._tfds, name: content}
        if kind == "vqa":
            documents = {"q.json": QUESTIONS, "a.json": ANSWERS}
            spec = ",".join(str(self._folder / name) for name in documents)
            texts = {name: json.dumps(twisted(each, rng)) for name, each in documents.items()}
            return spec, {}, {name: text.encode() for name, text in texts.items()}
        if kind == "twisted":
            name, data = "file.json", json.dumps(twisted(rng.choice(DOCUMENTS), rng)).encode()
            return str(self._folder / name), {}, {name: data}
        if kind == "twisted lines":
            name, lines = "file.jsonl", twisted([LINES[0], twisted(rng.choice(LINES), rng)], rng)
            data = "\n".join(map(json.dumps, lines if isinstance(lines, list) else [lines]))
            return str(self._folder / name), {}, {name: data.encode()}
        name, good = f"file.{kind}", rng.choice(self._bases[kind])
        data = mutated(good, self._bases[kind], rng)
        data = summed(data) if kind == "tar" and rng.random() < 0.7 else data
        split = ":train" if kind == "json" and rng.random() < 0.1 else ""
        return f"{self._folder / name}{split}", {name: good}, {name: data}


def tried(make):
    """What `make` returns, None where it raises as it may."""
    try:
        return make()
    except BadSample as bad:
        assert bad.reason in SKIP_REASONS and bad.detail.isprintable()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    return None


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Up to eight times: bits turned, pieces lost, doubled, or replaced by others'."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        start, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 100, 1000))
        match rng.randrange(7):
            case 0:
                for _ in range(rng.choice((1, 1, 10))):
                    if data:
                        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[start:]
            case 2:
                del data[start : start + length]
            case 3:
                data[start:start] = data[start : start + length] * rng.choice((1, 2, 50))
            case 4:
                data[start : start + length] = rng.randbytes(length)
            case 5:
                piece = rng.choice(BITS)
                data[start : start + rng.choice((0, len(piece)))] = piece
            case 6:
                other = rng.choice(others)
                data[start:] = other[rng.randrange(len(other)) :]
    return bytes(data)


def twisted(value, rng: random.Random):
    """A JSON value in which one or a few are replaced by odd ones."""
    if rng.random() < 0.12:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {k: twisted(v, rng) for k, v in value.items() if rng.random() > 0.03}
    if isinstance(value, list):
        return [twisted(each, rng) for each in value] * rng.choice((1, 1, 1, 2))
    return value


def fitted(data: bytes, rng: random.Random) -> bytes:
    """Half of the PNGs with right check sums, so that more than those is looked at."""
    if not data.startswith(b"\x89PNG") or rng.random() < 0.5:
        return data
    made, start = data[:8], 8
    while start + 12 <= len(data):
        [length] = struct.unpack(">I", data[start : start + 4])
        body = data[start + 4 : start + 8 + length]
        made += data[start : start + 4] + body + struct.pack(">I", zlib.crc32(body))
        start += 12 + length
    return made


def summed(data: bytes) -> bytes:
    """A tar whose headers have right check sums where they begin as before."""
    data = bytearray(data)
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def work(folder: Path, seeds) -> None:
    warnings.simplefilter("ignore")
    inputs = Inputs(folder)
    [held] = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_AS, (int(held) * 1024 + MEMORY_BYTES,) * 2)
    for seed in seeds:
        print(seed, flush=True)
        inputs.attempt(seed)


def test_only_the_two_errors_come_out_of_damaged_files(tmp_path):
    errors = tmp_path / "errors"
    command = [sys.executable, __file__, str(tmp_path), str(SECONDS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with errors.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=environment)
    lines, limit = b"-1\n", SECONDS_TO_START
    with process:
        while True:
            waiting, _, _ = select.select([process.stdout], [], [], limit)
            printed = os.read(process.stdout.fileno(), 1 << 16) if waiting else b""
            if not printed:
                break
            lines, limit = lines[-100:] + printed, SECONDS_EACH
        if not waiting:
            process.kill()
    seed, said = int(lines.split()[-1]), errors.read_text(errors="replace")[-3000:]
    assert waiting, f"seed {seed} takes longer than {limit} s\n{said}"
    assert process.returncode == 0, f"seed {seed} ends with status {process.returncode}\n{said}"
    assert seed > 100


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if len(sys.argv) == 2:
        with tempfile.TemporaryDirectory() as scratch:
            work(Path(scratch), [int(sys.argv[1])])
    else:
        end = time.monotonic() + float(sys.argv[2])
        in_time = itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())
        work(Path(sys.argv[1]), in_time)
