"""What is evaluated, and that it is what is trained."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest

from jaxblip import sharding
from jaxblip.data import inputs
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.sources import open_source
from jaxblip.data.tokenizers import train_wordpiece
from jaxblip.errors import UserError
from jaxblip.evaluation.evaluate import Evaluations
from jaxblip.tasks import make_task
from tiny_tasks import fast_jit, random_params, tiny_config

IMAGES = 3


class Turned:
    """A generator in whose permutation everything is turned by some places."""

    def __init__(self, places: int):
        self.places = places

    def permutation(self, count: int) -> np.ndarray:
        return np.roll(np.arange(count), -self.places)

    def integers(self, count: int) -> int:
        raise AssertionError("nothing else is random")


@pytest.mark.parametrize("name, captions_per_text, prompt", [
    ("language_model", 1, ""),
    ("language_model", 3, "a picture of "),
    ("language_model", 9, ""),  # more than there are
    ("language_model_t5", 3, "a picture of "),
])  # fmt: skip
def test_a_language_model_is_evaluated_on_texts_as_in_training(
    monkeypatch, name, captions_per_text, prompt
):
    monkeypatch.setattr(jax, "jit", fast_jit)
    config = tiny_config(name)
    config.eval.source, config.eval.max_images, config.eval.batch_size = "shapes:heldout", IMAGES, 5
    config.data.captions_per_text, config.data.prompt = captions_per_text, prompt
    config.data.max_text_tokens = 64
    if "prefix_lm" in config.loss:
        config.loss.prefix_lm = False  # the encoder reads the prompt alone
    source = open_source("shapes:heldout", image_size_px=8)
    examples = [source[index] for index in range(IMAGES)]
    tokenizer = train_wordpiece((c for example in examples for c in example["captions"]), 200)
    language_model = config.model.language_model
    language_model.vocab_size = len(tokenizer)
    if "max_positions" in language_model:
        language_model.max_positions = 64
    task = make_task(config)
    params = random_params(task)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    found = Evaluations(task, tokenizer, mesh).run(params, {})

    preprocess = Preprocess(
        task.fields,
        encoder=inputs.text_encoder(config, tokenizer),
        prompt=prompt,
        captions_per_text=captions_per_text,
        max_input_tokens=config.data.get("max_input_tokens", 0),
    )
    rows = [
        preprocess(example, Turned(places), Counter())
        for example in examples
        for places in range(len(example["captions"]))
    ]
    batch = {field: np.stack([row[field] for row in rows]) for field in task.fields}
    trained = task.loss(params, batch, None)
    assert found["loss"] == pytest.approx(float(trained.loss), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(float(trained.loss)), rel=1e-5)
    accuracy = float(trained.metrics["token_accuracy"])
    assert found["token_accuracy"] == pytest.approx(accuracy, rel=1e-5)


def test_re_ranking_needs_a_candidate_before_anything_is_read():
    config = tiny_config("stage1")
    config.eval.source, config.eval.rerank_top_k = "no_such_source", 0
    with pytest.raises(UserError, match="eval.rerank_top_k=0 leaves nothing to re-rank"):
        Evaluations(make_task(config), tokenizer=None, mesh=None)
