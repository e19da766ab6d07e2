"""Texts about images by BLIP-2 and InstructBLIP: word for word those of transformers.

Each goes the whole way: weights and tokenizers as published become a run, which is asked in plain
text, and is exported; transformers asks its model by the processor of the export.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from published_folders import INSTRUCTBLIP, publish
from tiny_checkpoints import QUERIES
from tiny_tasks import fast_jit

from jaxblip.api import Model
from jaxblip.interop.convert import convert
from jaxblip.sharding import make_mesh
from jaxblip.training.checkpoints import load_params
from jaxblip.training.restore import Run, load_run

BLIP2 = "Blip2ForConditionalGeneration"
# Each with the seed of a random model that says much, and comes to its end early, late or never.
CASES = {
    (BLIP2, "opt"): 4, (BLIP2, "t5"): 7, (INSTRUCTBLIP, "llama"): 3, (INSTRUCTBLIP, "t5"): 0,
}  # fmt: skip
# With a penalty for words that were said, transformers counts the placeholder of the image as one,
# which matters where it is among the best of many beams.
SEARCHES = (
    dict(num_beams=1, repetition_penalty=1.5),
    dict(num_beams=5, length_penalty=-1.0),
)
MESH = ["config.mesh.data=1", "config.mesh.fsdp=4", "config.mesh.tensor=2"]
NEW = 7
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
PROMPTS = ("w1 w3", "w2", "w0 w4 w1 w2", "w3 w3 w6 w5 w1")
PAIRS = [(image, prompt) for image in IMAGES for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)


@functools.cache
def example(name, language_model):
    """The model of transformers, its processor as it is exported, and the run as an object."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, exported = (Path(folder) / part for part in ("hf", "run", "exported"))
        reference = publish(theirs, name, language_model, seed=CASES[name, language_model])
        convert(str(theirs), str(ours))
        convert(str(ours), str(exported))
        processor = transformers.AutoProcessor.from_pretrained(exported)
        run = load_run(str(ours), MESH)
        device, params = jax.devices()[0], load_params(ours)
    mesh = make_mesh({}, [device])
    alone = Run(
        run.task, run.tokenizer, mesh, jax.device_put(params, device), {}, 0, run.qformer_tokenizer
    )
    return reference, processor, Model(alone, "somewhere")


@torch.no_grad()
def of_transformers(name, language_model, **settings):
    """The words of each pair, one by one, so that nothing is padded."""
    reference, processor, model = example(name, language_model)
    texts = []
    for image, prompt in PAIRS:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        settings = dict(max_new_tokens=NEW, early_stopping=False, do_sample=False) | settings
        ids = reference.generate(**inputs, **settings)[0]
        # A decoder-only model repeats its input, and a decoder begins with its start token.
        begin = 1 if language_model == "t5" else inputs["input_ids"].shape[1]
        texts.append(model._text._text(ids[begin:].tolist()).strip())
    return texts


@pytest.mark.parametrize(("name", "language_model"), CASES)
@pytest.mark.parametrize("search", SEARCHES, ids=["greedy", "5 beams"])
def test_same_words_as_transformers(name, language_model, search):
    _, processor, model = example(name, language_model)
    assert type(processor).__name__ == name.removesuffix("ForConditionalGeneration") + "Processor"
    expected = of_transformers(name, language_model, **search)
    images, prompts = zip(*PAIRS, strict=True)
    lengths = dict(max_new_tokens=NEW, min_new_tokens=0)
    ours = model.caption(images, prompts, **lengths, **search)
    assert ours == expected
    assert len(set(ours)) > 4 and len({len(text.split()) for text in ours}) > 2
    if search["num_beams"] == 1:
        stream = model.stream(IMAGES[1], PROMPTS[2], **lengths, **search)
        assert "".join(stream) == ours[len(PROMPTS) + 2]


@pytest.mark.parametrize("language_model", ["llama", "t5"])
def test_both_tokenizers_read_the_prompt_as_the_processor_does(language_model):
    _, processor, model = example(INSTRUCTBLIP, language_model)
    for text in (*PROMPTS, "", "w1 </s> w2"):
        inputs, prompt = processor(images=IMAGES[0], text=text), model._text.prompt(text)
        (theirs,), (asked,) = inputs["input_ids"], inputs["qformer_input_ids"]
        assert prompt.instruction == asked
        if "</s>" not in text:  # which in a prompt of ours is no end
            assert prompt.tokens == theirs[QUERIES:]


def test_the_q_former_of_instructblip_is_asked():
    _, _, model = example(INSTRUCTBLIP, "llama")
    text, config = model._text, model._text.decoding_config(num_beams=1, max_new_tokens=NEW)
    one, other = map(text.prompt, PROMPTS[:2])
    mixed = one._replace(instruction=other.instruction)
    told = [
        text.generate(model._params, IMAGES, [prompt] * len(IMAGES), config)
        for prompt in (one, mixed)
    ]
    assert told[0] != told[1]
