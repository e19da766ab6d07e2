"""`jaxblip data cache-features`, and training with what it wrote."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxblip.cli import main
from jaxblip.config import load_config
from jaxblip.overrides import apply_overrides
from jaxblip.data import features, inputs, run_sources, run_tokenizers
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError
from jaxblip.models.vit import VisionTransformer
from jaxblip.sharding import make_mesh
from jaxblip.tasks import make_task
from jaxblip.training.initialize import frozen_params
from jaxblip.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TIMED = ("images_per_s", "seconds_per_step", "data_wait_share")  # differ from run to run
SIDE, ROWS, MISSING, CORRUPT = 16, 40, 5, 11
CONFIG = f"""
from jaxblip.config import default_config

def get_config(arg=""):
    config = default_config(arg or "stage1")
    config.compute_dtype = "bfloat16"
    config.batch_size, config.steps, config.log_every_steps = 8, 2, 1
    config.optimizer.warmup_steps = 1
    config.init.vision = "random"
    if "language_model" in config.model:
        config.init.language_model = "random"
        config.model.language_model.update(
            width=16, num_layers=1, num_heads=2, mlp_width=32, max_positions=32
        )
    config.data.image_size_px, config.data.max_text_tokens = {SIDE}, 12
    config.data.crop_scale, config.data.flip_probability = (1.0, 1.0), 0.0
    config.data.num_workers, config.eval.batch_size = 0, 8
    config.data.max_bad_share = 0.2
    config.model.vision.update(patch_size_px=8, width=16, num_layers=2, num_heads=2, mlp_width=32)
    config.model.qformer.update(
        num_query_tokens=4, width=16, num_layers=2, num_heads=2, mlp_width=32,
    )
    return config
"""
# Shards of 9 images: of 5 tokens of 16 values each.
SMALL = "--shard-mb=0.00145"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with two examples each, one of them missing and one corrupt, and a config."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    lines = []
    for number in range(ROWS // 2):
        shape = (SIDE + number % 3, SIDE + number % 4, 3)
        if number != MISSING:
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{number}.png")
        texts = [f"picture {number} of {'red green blue'.split()[number % 3]}", "a thing"]
        lines += [{"image": f"{number}.png", "captions": [text, f"here {text}"]} for text in texts]
    (folder / f"{CORRUPT}.png").write_bytes(b"no picture")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.py").write_text(CONFIG)
    return folder


def overrides_of(folder, *overrides):
    return [f"--config.data.train.source={folder / 'pairs.jsonl'}", *overrides]


def cache(folder, to, *arguments, task="stage1"):
    config = f"--config={folder / 'config.py'}:{task}"
    return main(["data", "cache-features", config, f"--to={to}", *overrides_of(folder, *arguments)])


def train(folder, workdir, *arguments):
    config = f"--config={folder / 'config.py'}:stage2"  # which compiles in less time than stage 1
    return main(["train", config, f"--workdir={workdir}", *overrides_of(folder, *arguments)])


def config_of(folder, *overrides, task="stage1"):
    config = load_config(f"{folder / 'config.py'}:{task}")
    overrides = overrides_of(folder, *overrides)
    apply_overrides(config, [override.removeprefix("--") for override in overrides])
    return config


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("cached") / "features"
    assert cache(folder, made, SMALL) == 0
    return made


@pytest.fixture(scope="module")
def views(folder, tmp_path_factory):
    """Three random views of each image."""
    made = tmp_path_factory.mktemp("views") / "features"
    assert cache(folder, made, "--views=3", "--config.data.crop_scale=0.3,0.9") == 0
    return made


def batches(config, count, start=0):
    """Batches, and what was counted."""
    sources = run_sources.open_train_sources(config)
    tokenizer = run_tokenizers.run_tokenizer(config, "nowhere", sources)
    task = make_task(run_tokenizers.with_vocabulary(config, tokenizer))
    position = None
    if config.data.features:
        sources = features.with_features(config, sources)
    with inputs.train_batches(config, task.fields, sources, tokenizer, (0, 1), position) as found:
        made = list(itertools.islice(found, start + count))[start:]
        return made, {**found.skipped}


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def encode(folder):
    """Images to features, eight at a time."""
    task = make_task(run_tokenizers.with_some_vocabulary(config_of(folder)))
    params, _ = frozen_params(task, make_mesh({"data": 1}, jax.devices()[:1]), ["vision"])
    encoder = jax.jit(VisionTransformer(task.model.vision_config, task.dtype).apply)

    def encode(images):
        tokens = encoder({"params": params["vision"]}, task.normalize_images(images))
        return np.asarray(tokens)

    return encode


def test_batches_are_those_of_the_images_and_so_are_bad_examples(folder, cached, encode):
    of_images, skipped = batches(config_of(folder), 15)
    found, counted = batches(config_of(folder, f"--config.data.features={cached}"), 15)
    assert counted == skipped and set(skipped) == {"missing image", "corrupt image"}
    for batch, other in zip(found, of_images, strict=True):
        np.testing.assert_array_equal(batch.pop("image_features"), encode(other.pop("image")))
        for field in other:
            np.testing.assert_array_equal(batch[field], other[field], err_msg=field)
        assert batch.keys() == other.keys()


def test_each_image_is_encoded_once(cached):
    header = features.read_header(str(cached))
    assert (header["examples"], header["images"]) == (ROWS, ROWS // 2)
    assert header["shard_lengths"] == [9, 9, 2]
    assert header["skipped"] == {"missing image": 1, "corrupt image": 1}
    assert (header["tokens"], header["width"], header["dtype"]) == (5, 16, "bfloat16")
    assert header["encoder"]["source"] == "random" and len(header["encoder"]["fingerprint"]) == 64


def test_training_has_the_losses_of_the_images(folder, cached, tmp_path, capsys):
    assert train(folder, tmp_path / "images") == 0
    of_images = capsys.readouterr().out
    assert train(folder, tmp_path / "features", f"--config.data.features={cached}") == 0
    of_features = capsys.readouterr().out
    wanted, found = (
        [{name: value for name, value in line.items() if name not in TIMED}
         for line in read_metrics(tmp_path / name)]
        for name in ("images", "features")
    )  # fmt: skip
    assert len(found) == len(wanted) == 2 and "train/lm" in found[0]
    for line, other in zip(found, wanted):
        # Not to the bit: the compiler rounds the rest of the step in other places.
        assert line == pytest.approx(other, rel=1e-3)
    frozen = [int(re.search(r"train, ([\d,]+) are", out)[1].replace(",", ""))
              for out in (of_images, of_features)]  # fmt: skip
    assert frozen[0] > frozen[1] > 0  # the encoder is not in memory any more


def test_other_weights_of_the_encoder(folder, cached, tmp_path, capsys):
    argument = f"--config.data.features={cached}"
    assert train(folder, tmp_path / "run", argument, "--config.seed=7") == 2
    said = capsys.readouterr().err
    assert "other weights of the image encoder (random, seed 42)" in said and "seed 7" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size_px=24", "data.image_size_px=16, and this run has 24: set --config.data"),
        ("data.crop_scale=0.5,1", "data.crop_scale=1.0,1.0, and this run has 0.5,1.0: set"),
        ("data.interpolation=lanczos", "data.interpolation=bicubic, and this run has lanczos"),
        ("data.pixel_mean=0.5,0.5,0.5", "data.pixel_mean=0.48145466"),
        ("frozen_dtype=float32", "frozen_dtype=bfloat16, and this run has float32"),
        ("model.vision.activation=quick_gelu", "model.vision.activation=gelu, and this run"),
    ],
)
def test_features_of_another_config(folder, cached, override, message):
    config = config_of(folder, f"--config.data.features={cached}", f"--config.{override}")
    sources = run_sources.open_train_sources(config)
    with pytest.raises(UserError, match=re.escape(message)):
        features.with_features(config, sources)


def test_features_of_other_examples(folder, cached, tmp_path):
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:30]))
    fewer = f"--config.data.train.source={tmp_path / 'fewer.jsonl'}"
    config = config_of(folder, f"--config.data.features={cached}", fewer)
    with pytest.raises(UserError, match="with 40 examples, and .*fewer.jsonl has 30: name "):
        features.with_features(config, run_sources.open_train_sources(config))


def test_texts_may_change_and_an_image_without_features_is_a_bad_example(folder, cached):
    rewritten = folder / "rewritten.jsonl"
    lines = list(map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()))
    for number, line in enumerate(lines):
        line["captions"] = [f"another text {number}", "and one more"]
    lines[0]["image"] = "another.png"
    rewritten.write_text("\n".join(map(json.dumps, lines)))
    for captions in ("sample", "all"):
        config = config_of(
            folder, f"--config.data.features={cached}", f"--config.data.train.source={rewritten}",
            f"--config.data.captions={captions}",
        )  # fmt: skip
        _, skipped = batches(config, 10)
        assert skipped["no features"] >= 1


def test_a_folder_without_features(folder, tmp_path):
    for name, message in (("no", "has no image features: `jaxblip data cache"), ("", "unfinished")):
        config = config_of(folder, f"--config.data.features={tmp_path / name}")
        (tmp_path / ".unfinished").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            features.with_features(config, run_sources.open_train_sources(config))
    (tmp_path / "features.json").write_text('{"tokens": 3}')
    with pytest.raises(UserError, match="is no header of image features"):
        features.read_header(str(tmp_path))


def copied(cached, tmp_path):
    made = tmp_path / "copy"
    made.mkdir()
    for path in cached.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made, sorted(made.glob("*.array_record"))


def test_damaged_shards_cost_what_they_damage(folder, cached, tmp_path):
    made, (first, second, third) = copied(cached, tmp_path)
    config = config_of(folder, f"--config.data.features={made}", "--config.data.max_bad_share=0.9")
    [each] = features.with_features(config, run_sources.open_train_sources(config))
    [of_first] = each.source[0]["image_features"]
    damaged = first.read_bytes().replace(of_first.tobytes(), of_first[::-1].tobytes())
    first.write_bytes(damaged)
    second.unlink()
    [each] = features.with_features(config, run_sources.open_train_sources(config))
    assert any("1 of 3 shards are bad, such as" in line for line in each.source.problems)
    _, skipped = batches(config, 10)
    assert skipped["unreadable row"] > 1
    with pytest.raises(BadSample, match="unreadable row"):
        each.source[0]["image_features"][0]
    np.save(made / "images.npy", np.zeros((3, 4)))
    with pytest.raises(UserError, match=r"images.npy that can be read \(float64 \(3, 4\)\): write"):
        features.FeatureSource(each.source, str(made))
    first.unlink(), third.unlink()
    with pytest.raises(UserError, match="3 of 3 shards are bad.*write them again with"):
        features.with_features(config, run_sources.open_train_sources(config))


def test_one_of_the_views_is_drawn_each_time(folder, views, tmp_path):
    config = config_of(
        folder, f"--config.data.features={views}", "--config.data.crop_scale=0.3,0.9"
    )
    straight, _ = batches(config, 30)
    seen = {}
    for batch in straight:
        for image_id, rows in zip(batch["image_id"].tolist(), batch["image_features"], strict=True):
            seen.setdefault(image_id, set()).add(rows.tobytes())
    assert len(seen) == ROWS // 2 - 2 and {len(found) for found in seen.values()} == {3}
    # The draws follow from the place in the run.
    config.data.num_workers = 1
    again, _ = batches(config, 2, start=28)
    for one, other in zip(again, straight[28:], strict=True):
        np.testing.assert_array_equal(one["image_features"], other["image_features"])


def test_killed_and_started_again_it_ends_with_the_same_bytes(folder, cached, tmp_path):
    made = tmp_path / "made"
    code = """
import sys, time
from jaxblip.data.prepare.folder import Folder
write = Folder.write_json
def slow(self, name, content):
    write(self, name, content)
    if name == "000001.json":
        print("stopped", flush=True)
        time.sleep(60)
Folder.write_json = slow
from jaxblip.cli import main
main(sys.argv[1:])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "data", "cache-features", f"--config={folder / 'config.py'}",
         f"--to={made}", SMALL, *overrides_of(folder)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert any("stopped" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in made.glob("*-of-00003.array_record")}
    assert len(finished) == 2 and not (made / "features.json").exists()
    assert cache(folder, made, SMALL, "--config.data.num_workers=1") == 0
    assert digests(made) == digests(cached)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_what_is_there_is_not_written_again(folder, cached, capsys, monkeypatch):
    before = digests(cached)
    monkeypatch.setattr("jaxblip.training.cache_features._write", None)
    assert cache(folder, cached, SMALL) == 0
    assert "has these features already" in capsys.readouterr().out
    for argument, message in [
        ("--shard-mb=1", "has features of shard_mb=0.00145, not 1.0: name another folder"),
        ("--config.data.interpolation=lanczos", "of data.interpolation=bicubic, not lanczos"),
        ("--config.seed=3", "of seed=42, not 3"),
    ]:
        assert cache(folder, cached, SMALL, argument) == 2
        assert message in capsys.readouterr().err
    assert digests(cached) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.flip_probability=0.5"], "set --config.data.crop_scale=1,1 "),
        (["--views=2"], "All 2 views of an image would be the same"),
        (["--views=0"], "--views=0 is no number of views: give 1 or more"),
        (["--config.frozen="], "The image encoder trains"),
        (["--to=gs://somewhere"], "--to=gs://somewhere is a URL: name a folder, local"),
        (["--config.init.vision="], "'vision' is frozen but has no weights"),
    ],
)
def test_what_cannot_be_cached(folder, tmp_path, capsys, arguments, message):
    assert cache(folder, tmp_path / "made", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_task_without_a_frozen_encoder(tmp_path, capsys):
    (tmp_path / "config.py").write_text("from jaxblip.config import default_config\n"
                                        "def get_config(arg=''):\n"
                                        "    return default_config('clip')\n")  # fmt: skip
    config = f"--config={tmp_path / 'config.py'}"
    assert main(["data", "cache-features", config, f"--to={tmp_path}/made"]) == 2
    assert "The task clip does not train from image features" in capsys.readouterr().err


def test_a_full_disk_and_a_folder_with_other_files(folder, tmp_path, capsys, monkeypatch):
    def full(*_):  # as ArrayRecordWriter says it
        raise RuntimeError("write() failed: No space left on device; writing x; at byte 9")

    module = "jaxblip.training.cache_features"
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.ArrayRecordWriter", full)
        assert cache(folder, tmp_path / "made") == 2
    assert "no space is left for " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        assert cache(folder, tmp_path / "made") == 2
    out, err = capsys.readouterr()
    assert "20 images of 40 examples, 1 view of 5 x 16 values each: 3.2 kB in 1 shard" in out
    assert "has 1.0 kB free, and the features that are left need 3.2 kB: make room" in err
    assert cache(folder, folder) == 2
    assert "has other files in it, such as 0.png: name an empty folder" in capsys.readouterr().err


def test_too_many_bad_images_stop_it(folder, tmp_path, capsys):
    assert cache(folder, tmp_path / "made", "--config.data.max_bad_share=0.05") == 1
    said = capsys.readouterr().err
    assert "2 of 20 images were bad: " in said and "above data.max_bad_share=0.05; one of" in said


def test_a_mixture_has_a_folder_for_each_source(folder, tmp_path, capsys):
    mixture = [
        "--config.data.train.source=",
        f"--config.data.mixture.plain.train.source={folder / 'pairs.jsonl'}",
        f"--config.data.mixture.other.train.source={folder / 'pairs.jsonl'}",
        "--config.data.mixture.other.interpolation=lanczos",
    ]
    made = tmp_path / "made"
    assert cache(folder, made, *mixture) == 0
    headers = {name: features.read_header(str(made / name)) for name in ("plain", "other")}
    assert headers["other"]["fields"]["data.interpolation"] == "lanczos"
    config = config_of(folder, *mixture, f"--config.data.features={made}")
    [batch], _ = batches(config, 1)
    assert batch["image_features"].shape == (8, 5, 16)
    (made / "plain").rename(made / "renamed")
    with pytest.raises(UserError, match="plain has no image features"):
        features.with_features(config, run_sources.open_train_sources(config))
