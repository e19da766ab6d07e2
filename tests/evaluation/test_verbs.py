"""Runs over each kind of language model, from training to a caption."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxblip.api import load
from jaxblip.cli import main
from jaxblip.config import load_config
from jaxblip.data import run_tokenizers
from jaxblip.data.run_sources import prompts_of_entries
from jaxblip.data.tokenizers import load_tokenizer
from jaxblip.decoding.image_to_text import ImageToText
from jaxblip.evaluation import captions
from jaxblip.evaluation.verbs import evaluate, follow, generate
from jaxblip.training.loop import train
from jaxblip.training.metrics import read_metrics
from tiny_tasks import fast_jit

CONFIG = """
from jaxblip.config import default_config

def get_config(arg=""):
    task, language_model = arg.split("-")
    config = default_config(task, language_model=language_model)
    config.compute_dtype = config.frozen_dtype = "float32"
    config.steps, config.batch_size, config.log_every_steps = 2, 8, 1
    config.optimizer.warmup_steps = 1
    config.data.train.source = "shapes:train"
    config.data.num_workers, config.data.image_size_px = 0, 24
    config.data.pixel_mean = config.data.pixel_std = (0.5, 0.5, 0.5)
    config.data.prompt = "a picture of "
    config.eval.max_images, config.eval.batch_size = 8, 8
    sizes = dict(width=16, num_layers=1, num_heads=2, mlp_width=24)
    config.model.language_model.update(sizes)
    if language_model == "t5":
        config.model.language_model.update(num_decoder_layers=1, head_width=8)
    if task == "instruct":
        config.data.prompt, config.eval.min_new_tokens = "{}", 0
        config.data.max_text_tokens, config.data.max_instruction_tokens = 24, 8
    if task in ("instruct", "stage2"):
        config.model.vision.update(patch_size_px=12, **sizes)
        config.model.qformer.update(
            num_query_tokens=4, cross_attention_frequency=1, hidden_dropout=0.0,
            attention_dropout=0.0, **sizes,
        )
        config.init.vision = config.init.language_model = "random"
        config.eval.num_beams, config.eval.max_new_tokens = 1, 5
    return config
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains `task-language_model` and returns the work directory."""
    monkeypatch.setattr(run_tokenizers, "_TOKENIZER_EXAMPLES", 200)
    monkeypatch.setattr(jax, "jit", fast_jit)
    monkeypatch.setattr(captions, "has_java", lambda: False)

    def trained(which, *overrides):
        (tmp_path / "config.py").write_text(CONFIG)
        train(load_config(f"{tmp_path / 'config.py'}:{which}", overrides), str(tmp_path / "run"))
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["model"]["language_model"]["architecture"] == which.partition("-")[2]
        return str(tmp_path / "run"), config

    return trained


@pytest.mark.parametrize("language_model", ["llama", "t5"])
def test_a_run_of_stage2_writes_captions(run, language_model, tmp_path, capsys):
    workdir, config = run(f"stage2-{language_model}")
    assert config["data"]["pixel_mean"] == [0.5, 0.5, 0.5]
    assert config["model"]["language_model"].get("start_token_id", 0) == 0  # [PAD], no longer -1
    pictures = [str(tmp_path / f"{shade}.png") for shade in (90, 180)]
    for path in pictures:
        shade = int(Path(path).stem)
        Image.fromarray(np.full((30, 30, 3), shade, np.uint8)).save(path)
    written = list(generate(workdir, pictures))
    assert [path for path, _ in written] == pictures
    assert all(isinstance(caption, str) for _, caption in written)
    verb = ["generate", f"--checkpoint={workdir}", "--image", pictures[0]]
    capsys.readouterr()
    if language_model == "llama":
        (tmp_path / "texts.txt").write_text("a red circle\n\na blue square\nnothing\n")
        assert main([*verb, f"--candidates={tmp_path / 'texts.txt'}", "--question=what?"]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = [line.removeprefix(f"{pictures[0]}: ").split(" ", 1) for line in lines]
        assert {text for _, text in found} == {"a red circle", "a blue square", "nothing"}
        probabilities = [float(probability) for probability, _ in found]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-3)
    if language_model == "t5":
        assert main([*verb, "--stream", "--num-beams=1"]) == 0
        assert capsys.readouterr().out == f"{pictures[0]}: {written[0][1]}\n"
        assert main([*verb, "--num-captions=3", "--question=what?", "--max-new-tokens=4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and all(line.startswith(f"{pictures[0]}:") for line in lines)
        metrics = evaluate(workdir, ["config.eval.source=shapes:heldout"])
        assert {"caption_exact", "bleu4", "cider"} <= metrics.keys()
        lines = (Path(workdir) / "predictions.jsonl").read_text().splitlines()
        assert len(lines) == 8
        predicted = [json.loads(line) for line in lines]
        assert json.loads((Path(workdir) / "submission.json").read_text()) == [
            {"image_id": row["image_id"], "caption": row["caption"]} for row in predicted
        ]


def test_a_run_with_instructions_answers_each_examples_own(run, tmp_path, capsys):
    pictures, lines = [], []
    for shade in (40, 90, 140, 200):
        pictures.append(str(tmp_path / f"{shade}.png"))
        Image.fromarray(np.full((30, 30, 3), shade, np.uint8)).save(pictures[-1])
        for question, answers in (("How Dark?", [f"It is {shade}."]), ("Why?", ["no", "no", "so"])):
            lines.append({"image": pictures[-1], "question": question, "answers": answers})
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workdir, config = run("instruct-llama", f"data.train.source={data}", f"eval.source={data}")
    sizes = [config["model"][part]["vocab_size"] for part in ("qformer", "language_model")]
    for folder, size in zip(("qformer_tokenizer", "tokenizer"), sizes, strict=True):
        assert len(load_tokenizer(f"{workdir}/{folder}")) == size
    last = read_metrics(workdir)[-1]  # of the evaluation at the end of the run
    metrics = evaluate(workdir)
    assert {"caption_exact", "bleu4", "cider"} <= metrics.keys()
    assert all(last[f"eval/{name}"] == pytest.approx(metrics[name]) for name in metrics)
    written = (Path(workdir) / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert [row["instruction"] for row in rows] == ["How Dark?", "Why?"] * 4
    ids = [row["image_id"] for row in rows]  # each of two questions
    assert ids[::2] == ids[1::2] and len(set(ids)) == 4
    assert rows[2]["references"] == ["It is 90."] and rows[3]["references"] == ["no", "so"]
    page = (Path(workdir) / "results.html").read_text()
    assert "<h4>asked</h4>How Dark?<" in page and "<h4>asked</h4>Why?<" in page
    # Beside the answers: the training's curves, and what it ran on.
    assert "<h1>Instruction tuning (InstructBLIP)</h1>" in page and "LM loss by step" in page
    for words in (f"of {workdir} on {data}", "CPU, ", f"jax {jax.__version__}", "evaluation</th>"):
        assert words in page
    check_several_evaluations(workdir, data, rows, tmp_path)
    # What a user asks is answered as it is in the evaluation.
    as_evaluated = dict(max_new_tokens=5, min_new_tokens=0, length_penalty=1.0)
    answers = list(generate(workdir, pictures, question="Why?", **as_evaluated))
    assert [text for _, text in answers] == [row["caption"] for row in rows[1::2]]
    verb = ["generate", f"--checkpoint={workdir}", "--image", pictures[0], "--num-beams=1"]
    capsys.readouterr()
    assert main([*verb, "--prompt=Why?", "--stream"]) == 0
    assert capsys.readouterr().out == f"{pictures[0]}: {rows[1]['caption']}\n"


def check_several_evaluations(workdir, data, rows, tmp_path):
    """Beside each other, killed between two batches, and of each checkpoint of the run."""
    (tmp_path / "answers.txt").write_text("no\nso\nIt is 90.\n")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines += [line | {"question": "Who?"} for line in lines[::2]]  # 12, which are two batches
    data = tmp_path / "more.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [f"config.eval.set.{setting}" for setting in (
        f"open.source={data}", "open.kind=vqa",
        "ranked.kind=vqa", f"ranked.answers={tmp_path / 'answers.txt'}", "words.kind=loss",
    )]  # fmt: skip
    batches, made = ImageToText.generate_batches, []

    def dies(self, *args, **settings):
        for batch in batches(self, *args, **settings):
            made.append(batch)
            if len(made) == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageToText, "generate_batches", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate(workdir, overrides)
        found = follow(workdir, overrides)  # goes on where that one was
    (metrics,) = found.values()
    assert [len(batch) for batch in made] == [8, 4, 4]
    assert {"open/vqa_accuracy", "ranked/vqa_accuracy", "words/perplexity"} <= metrics.keys()
    folder = Path(workdir)
    results = json.loads((folder / "results.json").read_text())["evaluations"]
    assert results.keys() == {"open", "ranked", "words"}
    assert results["open"]["vqa_accuracy"] == metrics["open/vqa_accuracy"]
    assert "by answer type" in results["ranked"]["details"]
    said = json.loads((folder / "submission-open.json").read_text())
    assert [entry["answer"] for entry in said[:8]] == [row["caption"] for row in rows]
    assert [entry["question_id"] for entry in said] == list(range(12))
    said = json.loads((folder / "submission-ranked.json").read_text())
    assert {entry["answer"] for entry in said} <= {"no", "so", "It is 90."}
    assert "<h3>by answer type</h3>" in (folder / "results-open.html").read_text()
    assert not list((folder / ".evaluation").iterdir())
    assert follow(workdir, overrides) == found  # from evaluations.jsonl


def test_a_t5_learns_language_alone(run):
    workdir, _ = run("language_model-t5")
    metrics = evaluate(workdir, ["config.eval.source=shapes:heldout"])
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    page = (Path(workdir) / "results.html").read_text()  # the curves, and no captions
    assert "<h1>Language model, on the captions alone</h1>" in page and "LM loss by step" in page
    assert "Held-out images" not in page and not (Path(workdir) / "predictions.jsonl").exists()


BAD_ARGUMENTS = {
    "--num-captions=3 --num-beams=5": "--num-captions=3 and --num-beams=5 exclude each other",
    "--sample --num-beams=5": "--sample and --num-beams=5 exclude each other",
    "--candidates=a,b --stream": "nothing to stream",
    "--candidates=a,b --max-new-tokens=5": "--max-new-tokens=5 has no effect",
    "--candidates=a,b,a": "candidates='a,b,a' has 'a' twice: leave one out",
    "--candidates=no_such_file.txt": "candidates='no_such_file.txt' are 1 text(s)",
    "--stream --num-beams=5": "--num-beams=5 cannot be streamed",
    "--stream --num-captions=2": "--num-captions=2 cannot be streamed",
    "--context=rain": "A context stands before a question",
    "--top-p=0.9": "--top-p=0.9 is about sampling",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_arguments_that_exclude_each_other(arguments, capfd):
    # The run does not exist, but that is not looked at before.
    assert main(["generate", "--checkpoint=no/run", "--image=a.png", *arguments.split()]) == 2
    message = capfd.readouterr().err
    assert BAD_ARGUMENTS[arguments] in message
    assert message.startswith("jaxblip: error: ") and message.count("\n") == 1


def test_the_help_of_generate_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = capsys.readouterr().out
    assert "--candidates=\"a cat,a dog,a cow\"" in shown and "--max-new-tokens" in shown


def test_instructions_by_templates_and_by_others_at_test_time(run, tmp_path, monkeypatch):
    picture, questions = tmp_path / "1.png", [f"is it {shade}?" for shade in ("red", "blue")]
    Image.fromarray(np.full((30, 30, 3), 90, np.uint8)).save(picture)
    lines = [{"image": str(picture), "question": text, "answer": "no"} for text in questions] * 4
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workdir, config = run(
        "instruct-llama", f"data.train.source={data}", "data.templates=vqa:train",
        "data.max_text_tokens=64", "data.max_instruction_tokens=32",
    )  # fmt: skip
    answers = tmp_path / "answers.txt"
    answers.write_text("no\nyes\nred\n")
    metrics = evaluate(workdir, [
        f"eval.set.open.source={data}", "eval.set.open.kind=vqa",
        "eval.set.open.templates=vqa:heldout",
        f"eval.set.listed.source={data}", "eval.set.listed.kind=vqa",
        "eval.set.listed.templates=vqa:heldout", f"eval.set.listed.answers={answers}",
        f"eval.set.seen.source={data}", "eval.set.seen.kind=loss",
        "eval.set.seen.templates=vqa:train",
        f"eval.set.plain.source={data}", "eval.set.plain.kind=loss",
    ])  # fmt: skip
    assert metrics["seen/loss"] != metrics["plain/loss"]  # whose prompt is the question alone
    model = load(workdir, overrides=["eval.templates=vqa:heldout"])
    templates = prompts_of_entries(model.task.config, len(questions))
    for name in "open", "listed":
        written = (Path(workdir) / f"predictions-{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["instruction"] for line in written] == questions
        for line, question, template in zip(written, questions, templates, strict=True):
            prompt = template.replace("{}", question)
            if name == "open":
                (expected,) = model.caption(picture, prompt, num_beams=1, max_new_tokens=5)
            else:
                scores = model.rank(picture, ["no", "yes", "red"], prompt)
                expected = ["no", "yes", "red"][int(scores.argmax())]
            assert json.loads(line)["caption"] == expected
