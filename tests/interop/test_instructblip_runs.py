"""Runs of the task instruct against transformers: ranked candidates, losses, frames of videos."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from published_folders import IMAGE_TOKEN, INSTRUCTBLIP, pixels, publish
from reference_t5 import with_own_head
from tiny_checkpoints import QUERIES
from tiny_tasks import fast_jit

import jaxblip
from jaxblip.cli import main
from jaxblip.data import inputs
from jaxblip.errors import UserError
from jaxblip.interop.convert import convert

PROMPTS, CANDIDATES = ["w3 w1 w4", "w2 w5"], ["w2", "w1 w5", "w0 w0 w2"]
PROMPT = PROMPTS[0]
VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
IN_FLOAT32 = ("config.compute_dtype=float32", "config.frozen_dtype=float32")


@pytest.fixture(scope="module", params=["llama", "t5"])
def published(request, tmp_path_factory):
    """InstructBLIP in transformers, and the work directory that was made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = publish(folder / "hf", INSTRUCTBLIP, request.param)
    convert(str(folder / "hf"), str(folder / "run"))
    saved = folder / "run" / "config.json"
    config = json.loads(saved.read_text())
    config["data"]["max_text_tokens"] = 16  # so that there is room for the tokens of three frames
    saved.write_text(json.dumps(config))
    return reference, str(folder / "run")


def loaded(workdir, monkeypatch, frames):
    monkeypatch.setattr(jax, "jit", fast_jit)
    overrides = (*IN_FLOAT32, f"config.data.frames={frames}")
    return jaxblip.load(workdir, overrides=overrides)


def of_videos(reference):
    """The class of transformers that reads several frames, with the same weights."""
    config = reference.config.to_dict() | {"video_token_index": IMAGE_TOKEN}
    config = transformers.InstructBlipVideoConfig(
        **{name: config[name] for name in (
            "vision_config", "qformer_config", "text_config", "num_query_tokens",
            "video_token_index",
        )}
    )  # fmt: skip
    model = transformers.InstructBlipVideoForConditionalGeneration(config).eval()
    if config.text_config.is_encoder_decoder:
        with_own_head(model.language_model)
    model.load_state_dict(reference.state_dict())
    return model


def log_likelihood(reference, model, images, prompt, candidate):
    """Of a candidate, by transformers; `images` of one example."""
    text, queries = model._text.encoder, len(images) * QUERIES
    prompt, said = model._text.prompt(prompt), [*text.prompt_ids(candidate), text.stop_id]
    if not reference.config.text_config.is_encoder_decoder:
        said = said[1:]  # without BOS
    behind = [] if reference.config.text_config.is_encoder_decoder else said
    ids = torch.tensor([[IMAGE_TOKEN] * queries + prompt.tokens + behind])
    asked = torch.tensor([prompt.instruction])
    given = pixels(images)
    if len(images) > 1:
        reference, given = of_videos(reference), given[None]
    inputs = dict(
        pixel_values=given, input_ids=ids, attention_mask=torch.ones_like(ids),
        qformer_input_ids=asked, qformer_attention_mask=torch.ones_like(asked),
    )  # fmt: skip
    if not behind:
        inputs["labels"] = torch.tensor([said])
    with torch.no_grad():
        scores = torch.log_softmax(reference(**inputs).logits[0], dim=-1)
    if behind:
        scores = scores[-len(said) - 1 : -1]
    return float(scores[range(len(said)), said].sum())


@pytest.mark.parametrize("frames", [1, 3])
def test_candidates_are_ranked_as_in_transformers(published, frames, monkeypatch):
    reference, workdir = published
    model = loaded(workdir, monkeypatch, frames)
    videos = VIDEOS[:, :frames]
    images = videos[:, 0] if frames == 1 else videos
    found = model.rank(images, CANDIDATES, PROMPTS)
    expected = [
        [log_likelihood(reference, model, video, prompt, text) for text in CANDIDATES]
        for video, prompt in zip(videos, PROMPTS, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_loss_of_an_example_is_that_of_transformers(published, frames, monkeypatch):
    """From the frames and the words: what training reads, and what it makes of it."""
    reference, workdir = published
    model = loaded(workdir, monkeypatch, frames)
    task = model.task
    config = task.config.copy_and_resolve_references()
    config.data.prompt = PROMPT
    config.data.crop_scale = config.data.crop_aspect = (1.0, 1.0)
    config.data.flip_probability = 0.0
    tokenizers = model._run.tokenizer, model._run.qformer_tokenizer
    preprocess = inputs.make_preprocess(config, task.fields, *tokenizers)
    video, said = VIDEOS[0, :frames], CANDIDATES[1]
    example = {"image": list(video) if frames > 1 else video[0], "captions": [said]}
    arrays = preprocess(example, np.random.default_rng(0), {})
    assert arrays["image"].shape == task.batch_shapes(1)["image"].shape[1:]
    batch = {field: array[None] for field, array in arrays.items()}
    output = fast_jit(task.loss)(model._params, batch, None)
    expected = -log_likelihood(reference, model, video, PROMPT, said) / float(output.weight)
    assert float(output.loss) == pytest.approx(expected, rel=1e-4)
    assert int(output.weight) == 3  # two words and the stop token


def test_a_video_on_the_command_line(published, tmp_path, monkeypatch, capsys):
    _, workdir = published
    model = loaded(workdir, monkeypatch, 3)
    files = [str(tmp_path / f"{number}.png") for number in range(5)]
    for file, number in zip(files, (0, 0, 1, 2, 2), strict=True):
        Image.fromarray(VIDEOS[0, number]).save(file)
    # Of five frames the first, the third and the last stand for the video.
    (found,) = model.rank([files], CANDIDATES, PROMPT)
    np.testing.assert_allclose(found, model.rank(VIDEOS[:1], CANDIDATES, PROMPT)[0], rtol=1e-5)
    (alone,) = model.rank(files[2], CANDIDATES, PROMPT)  # of which every frame is the same
    still = VIDEOS[:1, [1, 1, 1]]
    np.testing.assert_allclose(alone, model.rank(still, CANDIDATES, PROMPT)[0], rtol=1e-5)
    verb = ["generate", f"--checkpoint={workdir}", "--video", "--image", *files]
    verb += [f"--prompt={PROMPT}", f"--candidates={','.join(CANDIDATES)}"]
    capsys.readouterr()
    assert main([*verb, *(f"--{each}" for each in IN_FLOAT32), "--config.data.frames=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = CANDIDATES[int(found.argmax())]
    assert len(lines) == 3 and lines[0].startswith(f"{files[0]} to {files[-1]}: ")
    assert lines[0].endswith(best)
    assert main(verb) == 2
    assert "not the frames of a video: " in capsys.readouterr().err


def test_a_video_for_a_model_of_images(published, monkeypatch):
    model = loaded(published[1], monkeypatch, 1)
    with pytest.raises(UserError, match="one image at a time.*set config.data.frames"):
        model.rank(VIDEOS, CANDIDATES, PROMPT)
