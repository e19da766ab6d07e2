"""Bad input gets one clear sentence and an exit status, before anything is compiled."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxblip.cli import main

ROOT = Path(__file__).parents[1]
TINY = {
    "steps": 2,
    "optimizer.name": "adamw",  # compiles faster than Muon
    "batch_size": 16,
    "log_every_steps": 1,
    "optimizer.warmup_steps": 1,
    "eval.source": "",
    "data.image_size_px": 24,
    "model.vision.num_layers": 1,
    "model.vision.width": 32,
}
STAGE1_TINY = {"model.qformer.num_layers": 2, "model.qformer.width": 32}


def train(workdir, config="vision", **fields):
    fields = {**TINY, **(STAGE1_TINY if config == "stage1" else {}), **fields}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return main(
        ["train", f"--config={ROOT}/configs/demo/{config}.py", f"--workdir={workdir}", *overrides]
    )


@pytest.fixture
def compilations(monkeypatch):
    """Counts what XLA compiles."""
    seen = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "vision"
    assert train(workdir) == 0
    return workdir


def write_pairs(folder, count=40, captions=None):
    """A JSONL of noise pictures."""
    rng, lines = np.random.default_rng(0), []
    for index in range(count):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "caption": f"picture number {index}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def bad_lines(text):
    def make(folder):
        path = folder / "pairs.jsonl"
        path.write_text(text)
        return {"data.train": path}

    return make


def no_padding_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]").save_pretrained(folder)
    return {"data.tokenizer": folder}


CASES = {
    "unknown field": ({"optimizer.peek_lr": 1}, ["'optimizer.peek_lr'", "optimizer.peak_lr"]),
    "wrong type": ({"steps": "many"}, ["--config.steps=many", "int"]),
    "batch size": ({"batch_size": 12}, ["batch_size=12", "multiple of 8"]),
    "no batch": ({"batch_size": -8}, ["batch_size=-8", "at least 1"]),
    "negative rate": ({"optimizer.peak_lr": -1.0}, ["optimizer.peak_lr=-1.0", "negative"]),
    "mesh": ({"mesh.data": 3}, ["mesh.data=3", "8 device"]),
    "no such source": ({"data.train": "nothing"}, ["'nothing'", "shapes:train"]),
    "no source": ({"data.train": ""}, ["config.data.train"]),
    "missing jsonl": ({"data.train": "no/such.jsonl"}, ["no/such.jsonl"]),
    "empty jsonl": (bad_lines(""), ["pairs.jsonl", "empty"]),
    "no json": (
        bad_lines('{"image": "a.png", "caption": "a"}\nnot json\n'), ["pairs.jsonl:2"],
    ),
    "missing field": (bad_lines('{"image": "a.png"}\n'), ["pairs.jsonl:1", "caption"]),
    "tokenizer without padding": (no_padding_tokenizer, ["padding token"]),
    "warm-up longer than the run": ({"optimizer.warmup_steps": 9}, ["warmup_steps=9", "steps=2"]),
    "patches that do not fit": ({"data.image_size_px": 20}, ["20", "patch_size_px=12"]),
    "heads that do not fit": ({"model.vision.width": 30}, ["width=30", "num_heads=4"]),
    "text longer than the positions": ({"data.max_text_tokens": 99}, ["99", "max_positions=32"]),
    "shuffled by blocks": ({"data.shuffle_block": 7}, ["shuffle_block=7", "30000 examples"]),
    "frozen path": ({"frozen": "vison"}, ["'vison'", "vision"]),
    "dtype": ({"compute_dtype": "float23"}, ["float23", "bfloat16"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_before_anything_is_compiled(case, tmp_path, capfd, compilations):
    fields, expected = CASES[case]
    if callable(fields):
        fields = fields(tmp_path)
    workdir = tmp_path / "run"
    assert train(workdir, **fields) == 2
    message = capfd.readouterr().err
    for part in expected:
        assert part in message
    assert message.startswith("jaxblip: error: ") and message.count("\n") == 1
    assert not compilations
    assert not workdir.exists()


def test_a_config_file_that_does_not_exist(tmp_path, capfd):
    assert main(["train", "--config=no/such.py", f"--workdir={tmp_path}"]) == 2
    assert "'no/such.py' does not exist" in capfd.readouterr().err


def test_a_config_file_that_is_no_python(tmp_path, capfd):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return (\n")
    assert main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == 2
    message = capfd.readouterr().err
    assert str(file) in message and "line 2" in message and message.count("\n") == 1


def test_another_tasks_work_directory(vision_run, capfd, compilations):
    assert train(vision_run, "stage1", **{"init.vision": vision_run}) == 2
    message = capfd.readouterr().err
    assert "a checkpoint of the task clip, and the config is of stage1: choose another" in message
    assert not compilations


def test_a_frozen_part_without_weights(tmp_path, capfd, compilations):
    assert train(tmp_path / "run", "stage1", **{"init.vision": ""}) == 2
    assert "'vision' is frozen but has no weights" in capfd.readouterr().err
    assert not compilations


def test_a_source_run_that_does_not_exist(tmp_path, capfd, compilations):
    assert train(tmp_path / "run", "stage1", **{"init.vision": tmp_path / "nothing"}) == 2
    assert "train it first" in capfd.readouterr().err
    assert not compilations


def test_a_source_run_of_another_size(vision_run, tmp_path, capfd):
    fields = {"init.vision": vision_run, "model.vision.width": 64}
    assert train(tmp_path / "run", "stage1", **fields) == 2
    message = capfd.readouterr().err
    assert "vision/cls_token is (32,) there and (64,) here" in message


def test_another_configs_work_directory(vision_run, capfd, compilations):
    assert train(vision_run, seed=7) == 2
    message = capfd.readouterr().err
    assert "seed was 42, is now 7" in message
    assert f"--config.init.all={vision_run} trains on" in message
    assert not compilations


def test_a_frozen_part_that_was_trained_again(vision_run, tmp_path, capfd):
    source, workdir = tmp_path / "vision", tmp_path / "stage1"
    shutil.copytree(vision_run, source)
    assert train(workdir, "stage1", **{"init.vision": source}) == 0
    shutil.rmtree(source)
    assert train(source, seed=7) == 0
    capfd.readouterr()
    assert train(workdir, "stage1", **{"init.vision": source}) == 2
    message = capfd.readouterr().err
    assert "frozen part 'vision'" in message and str(source) in message
    assert main(["evaluate", f"--workdir={workdir}", "--config.eval.source=shapes:heldout"]) == 2
    assert "frozen part 'vision'" in capfd.readouterr().err


def test_bad_samples_are_counted_and_reported(tmp_path, capfd):
    pairs = write_pairs(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    picture = Image.open(tmp_path / "4.png")
    picture.convert("CMYK").save(tmp_path / "4.png", format="JPEG")
    fields = {"data.train": pairs, "steps": 8, "data.max_bad_share": 0.2}
    assert train(tmp_path / "run", **fields) == 0
    printed = capfd.readouterr().out
    assert "Examples skipped: corrupt image" in printed
    assert "Examples converted: converted CMYK" in printed
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/corrupt_image"] > 0 and last["data/converted_CMYK"] > 0


def test_too_many_bad_samples_stop_the_run(tmp_path, capfd):
    pairs = write_pairs(tmp_path)
    for index in range(10):
        (tmp_path / f"{index}.png").unlink()
    assert train(tmp_path / "run", **{"data.train": pairs, "steps": 20}) == 1
    message = capfd.readouterr().err
    assert "missing image" in message and "data.max_bad_share=0.05" in message


def test_losses_that_are_not_finite_stop_the_run(tmp_path, capfd):
    workdir = tmp_path / "run"
    fields = {"steps": 60, "optimizer.peak_lr": 1e30, "optimizer.warmup_init_lr": 1e30}
    assert train(workdir, **fields) == 1
    message = capfd.readouterr().err
    assert "not finite in 10 steps in a row" in message
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped_total"] >= 9


def test_generate_says_what_is_wrong(vision_run, tmp_path, capfd):
    picture = tmp_path / "a.png"
    assert main(["generate", f"--checkpoint={tmp_path}", f"--image={picture}"]) == 2
    assert "no run with a checkpoint" in capfd.readouterr().err
    assert main(["generate", f"--checkpoint={vision_run}", f"--image={picture}"]) == 2
    assert "task 'clip'" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["train"], ["train", "--conifg=x"], ["no-verb"]])
def test_wrong_arguments_exit_with_2(arguments, capfd):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: jaxblip" in capfd.readouterr().err
