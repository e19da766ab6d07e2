"""Predictions scored against a source, without a model: what is right, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from jaxblip.cli import main

QUESTIONS = [
    ("What animal?", ["cat"] * 8 + ["dog"] * 2, {"answer_type": "other", "question_type": "what"}),
    ("How many?", ["2"] * 3 + ["3"] * 7, {"answer_type": "number", "question_type": "how many"}),
    ("Is it red?", ["yes"] * 10, {"answer_type": "yes/no", "question_type": "is"}),
]


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": question, "answers": texts, "question_id": 7 + row, **types}
        for row, (question, texts, types) in enumerate(QUESTIONS)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = [
        {"image": f"no_such_{row}.png", "id": row, "domain": domain,
         "captions": [f"a {what} on a mat", f"the {what}"]}
        for row, (what, domain) in enumerate([("cat", "in-domain"), ("dog", "in-domain"),
                                              ("zebra", "out-domain"), ("gnu", "out-domain")])
    ]  # fmt: skip
    (tmp_path / "nocaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    return tmp_path


def score(folder, predictions, kind="vqa", source="asked.jsonl", more=()):
    (folder / "said.json").write_text(json.dumps(predictions))
    return main([
        "evaluate", f"--predictions={folder / 'said.json'}",
        f"--config.eval.source={folder / source}", f"--config.eval.kind={kind}", *more,
    ])  # fmt: skip


def answers(*texts):
    return [{"question_id": 7 + row, "answer": text} for row, text in enumerate(texts)]


def test_answers_are_scored_in_all_and_by_type(folder, capsys):
    assert score(folder, answers("The cat.", "two", "no")[::-1]) == 0
    shown = capsys.readouterr().out
    assert "vqa_accuracy 0.6333" in shown  # 1, 0.9 and 0
    for line in ("        other 1.0000", "       number 0.9000", "       yes/no 0.0000"):
        assert line in shown
    assert "     how many 0.9000" in shown


def test_answers_to_gqa_are_exact_or_wrong(folder, capsys):
    said = [{"questionId": 7 + row, "prediction": t} for row, t in enumerate(("dog", "3", "no"))]
    assert score(folder, said, kind="gqa") == 0
    assert "gqa_accuracy 0.6667" in capsys.readouterr().out


def test_captions_are_scored_by_domain_without_their_images(folder, capsys, monkeypatch):
    monkeypatch.setattr("jaxblip.evaluation.captions.has_java", lambda: False)
    said = [{"image_id": row, "caption": f"the {what}"} for row, what in
            enumerate(("cat", "dog", "zebra", "lion"))]  # fmt: skip
    assert score(folder, said, kind="captions", source="nocaps.jsonl") == 0
    shown = capsys.readouterr().out
    assert "caption_exact 0.7500" in shown and "METEOR and SPICE are left out" in shown
    assert "words by jaxblip.evaluation.ptb" in shown
    domains = {line.split()[0]: line for line in shown.splitlines() if "-domain" in line}
    assert domains.keys() == {"in-domain", "out-domain"}
    assert "bleu1 100.0000" in domains["in-domain"]
    assert "bleu1 100.0000" not in domains["out-domain"]


REFUSED = {
    "1 of 3 entries of": lambda: answers("cat", "2"),
    "about a question_id that": lambda: answers("a", "b", "c", "d"),
    "entry 3 has the question_id 7 again": lambda: answers("a", "b", "c") + answers("d"),
    'entry 0 is {"question_id": 7}': lambda: [{"question_id": 7}],
    "not a list": lambda: {"7": "cat"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_predictions_that_do_not_fit_are_one_sentence(folder, message, capsys):
    assert score(folder, REFUSED[message]()) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("jaxblip: error: ")


@pytest.mark.parametrize("lines, status, message", [
    ([], 2, "bad.jsonl is empty"),
    ([{"image": "a.png", "question": "what?", "answer": "cat"}, {"image": "a.png", "answer": "a"}],
     2, "bad.jsonl:2: no \"question\""),
    ([{"image": "a.png", "question": "what?", "answers": ["..."]}], 1,
     "none of 1 examples can be evaluated: empty caption 1"),
    ([{"image": "a.png", "caption": "a cat"}], 2, "have no instruction, which data.prompt="),
])  # fmt: skip
def test_a_source_that_cannot_be_evaluated_is_one_sentence(folder, lines, status, message, capsys):
    (folder / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert score(folder, answers("cat"), source="bad.jsonl") == status
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    (["--step=3", "--follow", "--workdir=x"], "--step and --follow exclude each other"),
    ([], "needs --workdir=DIR of a training, or else --predictions"),
    (["--predictions=x.json"], "scored against one source"),
    (["--predictions=x.json", "--config.eval.source=s", "--config.eval.kind=loss"],
     "has no predictions to score"),
    (["--predictions=x.json", "--config.eval.source=s", "--config.eval.kind=vca"],
     "did you mean vqa?"),
    (["--predictions=x.json", "--config.eval.source=s", "--config.eval.kind=retrieval"],
     "cannot be measured of a checkpoint of stage2: name one of blip_retrieval, clip, stage1"),
])  # fmt: skip
def test_arguments_of_evaluate_that_do_not_fit(arguments, message, capsys):
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
