"""Bad input gets one clear sentence and an exit status, before anything is compiled."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxblip
from jaxblip.cli import main
from jaxblip.data import run_tokenizers
from tiny_tasks import fast_jit

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
TINY_TEXTS = {
    "vision": {"model.text.num_layers": 1, "model.text.width": 32},
    "stage1": {"model.qformer.num_layers": 2, "model.qformer.width": 32},
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Tiny models compile for far longer than they run; tokenizers need no 30,000 scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", fast_jit)
        patch.setattr(run_tokenizers, "_TOKENIZER_EXAMPLES", 200)
        yield


def train(workdir, config="vision", **fields):
    fields = {**TINY, **TINY_TEXTS[config], **fields}
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


def write_pairs(folder, count=40, captions=None):
    """A JSONL of noise pictures."""
    rng, lines = np.random.default_rng(0), []
    for index in range(count):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "caption": f"picture number {index}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory):
    """A run on pictures of which some are bad: its work directory, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = write_pairs(folder)
    (folder / "3.png").write_bytes(b"no picture")
    Image.open(folder / "4.png").convert("CMYK").save(folder / "4.png", format="JPEG")
    fields = {"data.train.source": pairs, "steps": 4, "data.max_bad_share": 0.2}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train(folder / "vision", **fields) == 0
    return folder / "vision", printed.getvalue()


def few_pairs(folder):
    return {"data.train.source": write_pairs(folder, count=15)}


def bad_lines(text):
    def make(folder):
        path = folder / "pairs.jsonl"
        path.write_text(text)
        return {"data.train.source": path}

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
    "no such source": ({"data.train.source": "nothing"}, ["'nothing'", "shapes:train"]),
    "no source": ({"data.train.source": ""}, ["config.data.train.source"]),
    "fewer examples than a batch": (
        few_pairs, ["pairs.jsonl has 15 examples", "batch_size=16", "to 15 or less"],
    ),
    "missing jsonl": ({"data.train.source": "no/such.jsonl"}, ["no/such.jsonl"]),
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
    "resizing": ({"data.resize": "crop"}, ["data.resize='crop'", "squash, shortest_edge"]),
    "filter": ({"data.interpolation": "nearest"}, ["interpolation='nearest'", "bilinear"]),
    "dtype": ({"compute_dtype": "float23"}, ["float23", "bfloat16"]),
    "model before data": (
        {"model.vision.width": 30, "data.train.source": "no/such.jsonl"}, ["width=30"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_before_anything_is_compiled(
    case, tmp_path, capfd, compilations, monkeypatch
):
    monkeypatch.setattr(run_tokenizers, "train_wordpiece", None)  # which takes seconds, or minutes
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


def test_a_work_directory_that_cannot_be_one(tmp_path, capfd, compilations):
    (tmp_path / "file").write_text("mine")
    assert train(tmp_path / "file" / "run") == 2
    message = capfd.readouterr().err
    assert "/file' is no folder; choose another --workdir" in message
    assert not compilations


def test_another_tasks_work_directory(vision_run, capfd, compilations):
    workdir, _ = vision_run
    assert train(workdir, "stage1", **{"init.vision": workdir}) == 2
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
    fields = {"init.vision": vision_run[0], "model.vision.width": 64}
    assert train(tmp_path / "run", "stage1", **fields) == 2
    message = capfd.readouterr().err
    assert "--config.model.vision.width=64 disagrees with" in message and "has 32" in message


def test_another_configs_work_directory(vision_run, capfd, compilations):
    workdir, _ = vision_run
    assert train(workdir, seed=7) == 2
    message = capfd.readouterr().err
    assert "seed was 42, is now 7" in message
    assert f"--config.init.all={workdir} trains on" in message
    assert not compilations


def test_a_frozen_part_that_was_trained_again(vision_run, tmp_path, capfd):
    source, workdir = tmp_path / "vision", tmp_path / "run"
    shutil.copytree(vision_run[0], source)
    fields = {"init.vision": source, "frozen": "vision", "steps": 1, "optimizer.warmup_steps": 0}
    assert train(workdir, **fields) == 0
    shutil.rmtree(source)
    assert train(source, seed=7) == 0
    capfd.readouterr()
    assert train(workdir, **fields) == 2
    message = capfd.readouterr().err
    assert "frozen part 'vision'" in message and str(source) in message
    assert main(["evaluate", f"--workdir={workdir}", "--config.eval.source=shapes:heldout"]) == 2
    assert "frozen part 'vision'" in capfd.readouterr().err


def test_bad_samples_are_counted_and_reported(vision_run):
    workdir, printed = vision_run
    assert "Examples skipped: corrupt image" in printed
    assert "Examples converted: converted CMYK" in printed
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/corrupt_image"] > 0 and last["data/converted_CMYK"] > 0


def test_too_many_bad_samples_stop_the_run(tmp_path, capfd):
    pairs = write_pairs(tmp_path)
    for index in range(10):
        (tmp_path / f"{index}.png").unlink()
    assert train(tmp_path / "new" / "run", **{"data.train.source": pairs, "batch_size": 40}) == 1
    message = capfd.readouterr().err
    assert "missing image" in message and "data.max_bad_share=0.05" in message
    assert not (tmp_path / "new").exists()  # for it was the first batch


def test_a_start_that_fails_leaves_what_was_there_before(tmp_path, capfd):
    workdir = tmp_path / "run"
    (workdir / "tensorboard").mkdir(parents=True)
    (workdir / "tensorboard" / "notes.txt").write_text("mine")
    (workdir / "notes.txt").write_text("mine")
    assert train(workdir, **{"checkpoint.keep_last": 0}) == 2  # when the config is written
    assert "keep_last=0" in capfd.readouterr().err
    left = sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*"))
    assert left == ["notes.txt", "tensorboard", "tensorboard/notes.txt"]


def test_losses_that_are_not_finite_stop_the_run(tmp_path, capfd):
    workdir = tmp_path / "run"
    fields = {"steps": 14, "optimizer.peak_lr": 1e30, "optimizer.warmup_init_lr": 1e30}
    assert train(workdir, **fields) == 1
    message = capfd.readouterr().err
    assert "not finite in 10 steps in a row" in message
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped_total"] >= 9


def test_generate_says_what_is_wrong(vision_run, tmp_path, capfd):
    picture = tmp_path / "a.png"
    assert main(["generate", f"--checkpoint={tmp_path}", f"--image={picture}"]) == 2
    assert "no run with a checkpoint" in capfd.readouterr().err
    assert main(["generate", f"--checkpoint={vision_run[0]}", f"--image={picture}"]) == 2
    assert "task 'clip'" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["train"], ["train", "--conifg=x"], ["no-verb"]])
def test_wrong_arguments_exit_with_2(arguments, capfd):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: jaxblip" in capfd.readouterr().err


HINTS = {
    "train --conifg=x": "there is no option --conifg: did you mean --config?",
    "train --confg.steps=5": "did you mean --config.steps?",
    "train --config=x --workdir": "--workdir has no value: write --workdir=DIR",
    "train --workdir --config=x": "--workdir has no value: write --workdir=DIR",
    "train --config.steps 5": "write --config.steps=5",
    "train --config.steps": "write --config.steps=VALUE",
    "evaluate --workdir=x --stp=3": "did you mean --step?",
    "generate --checkpoint=x --image": "--image has no value: write --image=FILE",
    "convert --dtype": "write --dtype=float32|bfloat16|float16",
    "convert --config.steps=3": "this verb takes none",
    "demo --config.steps=3": "this verb takes none",
    "data openmoji --outt=x": "did you mean --out?",
}


@pytest.mark.parametrize("arguments", HINTS)
def test_mistyped_options_get_a_hint(arguments, capfd):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    assert HINTS[arguments] in capfd.readouterr().err


def test_values_that_look_odd_are_no_mistakes(capfd):
    odd = ["--prompt", "", "--length-penalty", "-1", "--question=--what?", "--image", "a", "b"]
    assert main(["generate", "--checkpoint", "no/run", *odd]) == 2
    assert "no run with a checkpoint in 'no/run'" in capfd.readouterr().err


def test_a_missing_file_of_candidates_is_said_to_be_missing(capfd):
    verb = ["generate", "--checkpoint=no/run", "--image=a.png", "--candidates=no/such.txt"]
    assert main(verb) == 2
    message = capfd.readouterr().err
    assert "'no/such.txt' are 1 text(s) and no file, but ranking needs two texts" in message


def test_the_version(capfd):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capfd.readouterr().out == f"jaxblip {jaxblip.__version__}\n"
