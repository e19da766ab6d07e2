"""What a loaded run says about images: `jaxblip.load`."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from ml_collections import ConfigDict
from PIL import Image

import jaxblip
from jaxblip.api import Decoding, Model
from jaxblip.cli import main
from jaxblip.config import default_config
from jaxblip.overrides import field_names
from jaxblip.data import inputs, run_tokenizers
from jaxblip.data.user_images import read_image
from jaxblip.errors import UserError
from jaxblip.sharding import make_mesh
from jaxblip.tasks import make_task
from jaxblip.training.loop import train
from jaxblip.training.restore import READ_AGAIN, Run
from jaxblip.training.state import merge_params
from tiny_tasks import fast_jit, random_params

SIZE, NEW = 24, 6
# What transformers logs when it is imported without PyTorch, as most users have it.
ADVICE = "PyTorch was not found. Models won't be available"
BLOCKS = dict(width=16, num_layers=1, num_heads=2, mlp_width=24)


def tiny_config(task, language_model="opt"):
    config = default_config(task, language_model=language_model)
    config.compute_dtype = config.frozen_dtype = "float32"
    config.steps, config.batch_size, config.log_every_steps = 2, 8, 1
    config.optimizer.warmup_steps = 1
    config.data.train.source = "shapes:train"
    config.data.num_workers, config.data.image_size_px = 0, SIZE
    config.eval.batch_size = 32
    config.model.vision.update(patch_size_px=12, initializer_range=0.3, **BLOCKS)
    if "qformer" in config.model:
        config.model.qformer.update(
            num_query_tokens=4, cross_attention_frequency=1, hidden_dropout=0.0,
            attention_dropout=0.0, initializer_range=0.3, **BLOCKS,
        )  # fmt: skip
        config.init.vision = "random"
    if "language_model" in config.model:
        config.model.language_model.update(BLOCKS)
        config.init.language_model = "random"
        config.eval.num_beams, config.eval.max_new_tokens = 1, NEW
    if task == "instruct":
        config.data.max_text_tokens, config.data.max_instruction_tokens = 32, 16
        config.eval.min_new_tokens, config.eval.length_penalty = 0, 0.0
    if task in ("instruct", "stage2") and language_model == "opt":
        config.model.language_model.update(max_positions=64, initializer_range=0.3)
    if language_model == "t5":
        config.model.language_model.update(num_decoder_layers=1, head_width=8)
    return config.lock()


@pytest.fixture(scope="module", autouse=True)
def fast_compiler():
    """Tiny models compile for far longer than they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", fast_jit)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Stage 2 with OPT as a run of two steps on 8 devices; the others untrained on one."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_tokenizers, "_TOKENIZER_EXAMPLES", 200)
        train(tiny_config("stage2"), str(folder))
    opt = jaxblip.load(folder)
    return {
        "opt": opt,
        "t5": untrained("stage2", opt, "t5"),
        "instruct": untrained("instruct", opt),
        "stage1": untrained("stage1", opt),
    }


def untrained(task, other, language_model="opt"):
    """A model with random parameters, and the tokenizer of another one."""
    tokenizer = other._run.tokenizer
    other = tokenizer if task == "instruct" else None  # one that serves both
    config = run_tokenizers.with_vocabulary(tiny_config(task, language_model), tokenizer, other)
    task = make_task(config.lock())
    mesh = make_mesh({}, jax.devices()[:1])
    params = jax.device_put(random_params(task), jax.devices()[0])
    return Model(Run(task, tokenizer, mesh, params, {}, 0, other), "somewhere")


@pytest.fixture(params=["opt", "t5", "instruct"])
def model(models, request):
    return models[request.param]


@pytest.fixture
def compilations():
    """Counts what XLA compiles."""
    seen = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(count)]


def log_likelihoods(model, images, prompts, candidates):
    """Every image with every candidate as a row of its own, by the model as it is trained."""
    text, task = model._text, model.task
    pairs = [(i, p, c) for i, p in zip(images, prompts, strict=True) for c in candidates]
    pixels = task.normalize_images(np.stack([image for image, _, _ in pairs]))
    before = [text.prompt(prompt).tokens for _, prompt, _ in pairs]
    asked = [text.prompt(prompt).instruction for _, prompt, _ in pairs]
    instruction = padded(asked) if any(asked) else ()
    after = [text.candidate_tokens(prompt, candidate) for _, prompt, candidate in pairs]
    if inputs.has_encoder(task.config):
        arrays, starts = (*padded(after), *padded(before)), [0] * len(pairs)
    else:
        both = [first + second for first, second in zip(before, after, strict=True)]
        arrays, starts = padded(both), map(len, before)
    params = merge_params(model._run.params, model._run.frozen)
    arrays = (*arrays, *(None,) * (4 - len(arrays)), *instruction)
    logits = jax.jit(task.model.apply)({"params": params}, pixels, *arrays)
    scores = np.asarray(jax.nn.log_softmax(logits))
    sums = [
        row[start : start + len(tokens)][np.arange(len(tokens)), tokens].sum()
        for row, start, tokens in zip(scores, starts, after, strict=True)
    ]
    return np.array(sums).reshape(len(images), -1)


def padded(rows):
    lengths = np.array([len(tokens) for tokens in rows])
    ids = np.zeros((len(rows), max(lengths)), np.int32)
    valid = np.arange(max(lengths)) < lengths[:, None]
    ids[valid] = np.concatenate(rows)
    return ids, valid


def test_import_is_light():
    code = "import jaxblip, sys; assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_that_there_is_no_pytorch_is_no_news(caplog):
    with open(transformers.__file__, encoding="utf-8") as file:
        assert ADVICE in file.read()
    logger = logging.getLogger("transformers")
    with caplog.at_level(logging.WARNING, "transformers"):
        caplog.handler.setLevel(logging.WARNING)
        logger.addHandler(caplog.handler)
        try:
            logger.warning(f"{ADVICE} and only tokenizers can be used.")
            logger.warning("Something else.")
        finally:
            logger.removeHandler(caplog.handler)
    assert "PyTorch" not in caplog.text and "Something else." in caplog.text


def test_the_same_words_as_later(model, compilations):
    first, second = pictures(2)
    captions = model.caption([first, second])
    assert len(captions) == 2 and all(isinstance(caption, str) for caption in captions)
    assert captions == model.caption(np.stack([first, second]))
    assert captions[0:1] == model.caption(first)
    searched = model.caption([first, second], num_beams=3, min_new_tokens=NEW)
    assert len(searched) == 2
    questions = ["what is left?", "is it a very large red circle?"]
    answers = model.answer([first, second], questions)
    model.rank([first], ["a red circle", "a blue square"])

    compiled = len(compilations)
    model.caption(pictures(2, seed=1))
    model.caption(pictures(2, seed=2), num_beams=3, min_new_tokens=NEW)
    model.answer(pictures(2, seed=3), "is this a small green triangle right of it?")
    model.rank(pictures(1, seed=4), ["a green circle", "blue"])
    assert len(compilations) == compiled
    assert answers == [
        *model.answer(first, questions[0]),
        *model.answer(second, questions[1]),
    ]


def test_several_captions_are_drawn(model):
    images = pictures(2)
    drawn = model.caption(images, num_captions=4, seed=3)
    assert [len(captions) for captions in drawn] == [4, 4]
    assert len(set(drawn[0])) > 1
    assert drawn == model.caption(images, num_captions=4, seed=3)
    assert drawn != model.caption(images, num_captions=4, seed=4)
    (first,) = model.caption(images[:1], sample=True, seed=3)
    assert first == drawn[0][0]
    greedy = model.caption(images, num_captions=3, top_k=1)
    assert greedy == [[caption] * 3 for caption in model.caption(images, num_beams=1)]


def test_lengths_count_text_only(model, monkeypatch):
    lengths = []
    monkeypatch.setattr(model._text, "_text", lambda ids: lengths.append(len(ids)) or "")
    for prompt in ("", "a small red circle left of"):
        model.caption(pictures(1), prompt, min_new_tokens=9, max_new_tokens=9)
    assert lengths == [9, 9]


@pytest.mark.parametrize(
    "settings",
    [{}, dict(sample=True, top_p=0.9, temperature=1.5, seed=7, repetition_penalty=1.8)],
    ids=["greedy", "sampled"],
)
def test_a_stream_is_the_caption_in_pieces(model, settings, compilations):
    (image,) = pictures(1)
    settings = {"min_new_tokens": 4, **settings}
    pieces = list(model.stream(image, "a red", **settings))
    assert len(pieces) > 1
    assert ["".join(pieces)] == model.caption(image, "a red", num_beams=1, **settings)
    compiled = len(compilations)
    list(model.stream(image, "two blue", **settings))
    assert len(compilations) == compiled


def test_ranking_is_that_of_one_candidate_at_a_time(model, monkeypatch):
    monkeypatch.setattr("jaxblip.decoding.image_to_text.RANKED_TOKENS", 8 * 8 * 2)
    images = pictures(2)
    candidates = ["a red circle", "blue", "a large yellow square above it"]
    prompts = ["a picture of", "this is a very small picture of an old"]
    scores = model.rank(images, candidates, prompts)
    expected = log_likelihoods(model, images, prompts, candidates)
    np.testing.assert_allclose(scores, expected, rtol=2e-5)
    counts = [len(model._text.candidate_tokens(prompts[0], text)) for text in candidates]
    means = model.rank(images, candidates, prompts, mean=True)
    np.testing.assert_allclose(means, scores / np.array(counts), rtol=1e-6)


def test_an_image_is_encoded_once_for_all_questions(model, monkeypatch):
    encoded = []
    encode = model._text._encode

    def counted(params, images):
        encoded.append(len(np.unique(images, axis=0)))
        return encode(params, images)

    monkeypatch.setattr(model._text, "_encode", counted)
    (image,) = pictures(1)
    questions = ["what is left?", "what is right?", "what is it?"]
    assert len(model.answer(image, questions)) == 3
    model.rank(image, ["a circle", "a square"], questions)
    assert encoded == [1, 1]


def test_questions_have_the_prompts_of_blip2(models):
    opt, t5 = models["opt"], models["t5"]
    assert opt.question_prompt("why?") == "Question: why? Answer:"
    assert t5.question_prompt("why?") == "Question: why? Short answer:"
    assert opt.question_prompt(["{a}?", "b?"], "It rains. ") == [
        "Context: It rains. Question: {a}? Answer:",
        "Context: It rains. Question: b? Answer:",
    ]
    assert opt.question_prompt("who?", prompt="{} Say") == "who? Say"


def test_a_run_with_instructions_is_asked_as_it_was_trained(models):
    model = models["instruct"]
    assert model.question_prompt(" Why? ") == "Why?"
    images, asked = pictures(2), ["what is left?", "a small red circle"]
    assert model.caption(images) == model.caption(images, "A short image description.")
    together = model.caption(images * 2, [text for text in asked for _ in images])
    assert together == [*model.caption(images, asked[0]), *model.caption(images, asked[1])]
    assert len(set(together)) > 2
    # The Q-Former reads the prompt, whatever the language model reads.
    text, params = model._text, model._params
    prompts = [text.prompt(words) for words in asked]
    candidates = [[text.candidate_tokens(asked[0], words) for words in ("a red circle", "blue")]]
    given = [prompts[0]._replace(instruction=prompt.instruction) for prompt in prompts]
    scores = [text.rank(params, np.stack(images[:1]), [prompt], candidates) for prompt in given]
    np.testing.assert_array_equal(
        scores[0], model.rank(images[:1], ["a red circle", "blue"], asked[0])
    )
    assert np.abs(scores[0] - scores[1]).max() > 1e-2
    # Of more words than the Q-Former has positions, and the run was trained on, the last ones stay.
    long, last = "red " * 600 + "blue", text.prompt("red blue").instruction[1:]
    of_user, of_example = text.prompt(long).instruction, text.prompt_of_example(long).instruction
    assert (len(of_user), len(of_example)) == (512, 16)
    assert of_user[0] == of_example[0] and of_user[-3:] == of_example[-3:] == last
    assert len(text.prompt_of_example(long).tokens) == 16 < len(text.prompt(long).tokens)


def test_images_of_every_form(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    picture = Image.fromarray(pixels)
    for image in (path, str(path), path.read_bytes(), Image.open(path), pixels, picture):
        np.testing.assert_array_equal(read_image(image, 10**6), pixels)
    clear = np.concatenate([pixels, np.zeros((20, 30, 1), np.uint8)], axis=2)
    for image in (clear, Image.fromarray(clear), Image.fromarray(clear).convert("RGBa")):
        assert (read_image(image, 10**6) == 255).all()
    grey = np.repeat(pixels[:, :, :1], 3, axis=2)
    for image in (pixels[:, :, 0], pixels[:, :, :1], Image.fromarray(pixels[:, :, 0])):
        np.testing.assert_array_equal(read_image(image, 10**6), grey)
    assert read_image(Image.fromarray(pixels).convert("CMYK"), 10**6).shape == pixels.shape
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6
    assert read_image(turned, 10**6).shape == (30, 20, 3)


BAD_CALLS = {
    "no image": (lambda m: m.caption("no/such.png"), "'no/such.png' cannot be read"),
    "no picture": (lambda m: m.caption(b"abc"), "cannot be used: corrupt image"),
    "float pixels": (lambda m: m.caption(np.zeros((8, 8, 3))), "float64 and shape (8, 8, 3)"),
    "no images": (lambda m: m.caption([]), "empty"),
    "beams and samples": (
        lambda m: m.caption(pictures(1), num_captions=3, num_beams=2),
        "num_captions=3 and num_beams=2",
    ),
    "several without samples": (
        lambda m: m.caption(pictures(1), num_captions=3, sample=False), "set sample to True",
    ),
    "temperature of a search": (
        lambda m: m.caption(pictures(1), temperature=2.0), "temperature=2.0",
    ),
    "too few tokens": (lambda m: m.caption(pictures(1), max_new_tokens=0), "max_new_tokens=0"),
    "top_p": (lambda m: m.caption(pictures(1), sample=True, top_p=1.5), "top_p=1.5"),
    "seed": (lambda m: m.caption(pictures(1), seed=-1), "seed=-1"),
    "a beam stream": (
        lambda m: m.stream(pictures(1)[0], num_beams=4), "num_beams=4 cannot be streamed",
    ),
    "a stream of many": (lambda m: m.stream(pictures(2)), "one at a time"),
    "a prompt without its place": (
        lambda m: m.answer(pictures(1), "why?", prompt="Q:"), "'Q:' has it 0 times",
    ),
    "other numbers": (lambda m: m.caption(pictures(2), ["a"] * 3), "2 images and 3 texts"),
    "no candidate": (lambda m: m.rank(pictures(1), []), "must be a list"),
    "an empty candidate": (lambda m: m.rank(pictures(1), ["a", " "]), "number 1 of 2 is empty"),
    "no embeddings": (
        lambda m: m.embed_images(pictures(1)), "run of stage1 or blip_retrieval or clip"
    ),  # fmt: skip
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_one_sentence_and_nothing_compiled(models, case, compilations):
    call, expected = BAD_CALLS[case]
    with pytest.raises(UserError) as error:
        call(models["opt"])
    assert expected in str(error.value)
    assert not compilations


def test_an_image_that_cannot_be_read_costs_no_other_its_caption(models, tmp_path, capfd):
    model, files = models["opt"], [str(tmp_path / f"{name}.png") for name in "abcd"]
    for place in (0, 2):
        Image.fromarray(pictures(1, seed=place)[0]).save(files[place])
    Path(files[1]).write_bytes(b"no picture")
    settings = ["--min-new-tokens=2", "--max-new-tokens=2", "--config.mesh.data=8"]
    verb = ["generate", f"--checkpoint={model.workdir}", "--image", *files, *settings]
    captions = model.caption([files[0], files[2]], min_new_tokens=2, max_new_tokens=2)
    lines = [f"{file}: {caption}" for file, caption in zip(files[::2], captions, strict=True)]
    for form in ([], ["--stream", "--num-beams=1"]):
        capfd.readouterr()
        assert main([*verb, *form]) == 2
        printed = capfd.readouterr()
        assert printed.out.splitlines() == lines
        corrupt, missing = printed.err.splitlines()
        assert corrupt.startswith(f"jaxblip: error: The image '{files[1]}' cannot be used: corrupt")
        assert missing == (
            f"jaxblip: error: The image '{files[3]}' cannot be read: No such file or directory."
        )
    assert main([*verb[:2], "--image", files[3]]) == 2
    assert capfd.readouterr() == ("", missing + "\n")
    with pytest.raises(UserError, match="corrupt(.|\n)*No such file"):  # in Python no caption
        model.caption(files)
    with pytest.raises(UserError, match="No such file"):
        next(model.stream(files[3]))


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_fields_without_an_effect_are_refused(models, verb, capfd):
    model = models["opt"]
    where = "workdir" if verb == "evaluate" else "checkpoint"
    arguments = [verb, f"--{where}={model.workdir}"]
    arguments += ["--image=a.png"] if verb == "generate" else []
    fields = ["steps=3", "data.train.source=x.jsonl", "data.image_size_px=48", "eval.every_steps=2"]
    fields += ["model.qformer.width=8", "optimizer.peak_lr=1.0", "data.tokenizer=x"]
    fields += ["eval.max_images=3", "data.max_text_tokens=9"] if verb == "generate" else []
    for field in fields:
        assert main([*arguments, f"--config.{field}"]) == 2
        message = capfd.readouterr().err
        assert f"--config.{field} has no effect on the {verb[:-1]}ion" in message
        assert "eval.num_beams" in message and "mesh.*" in message and message.count("\n") == 1
        assert ("eval.source" in message) == (verb == "evaluate")
    assert main([*arguments, "--config.eval.num_beam=3"]) == 2
    assert "no field 'eval.num_beam'; the nearest is --config.eval.num_beams" in (
        capfd.readouterr().err
    )


def test_fields_with_an_effect_are_those_that_generation_reads(model, monkeypatch):
    """But for the sizes of the model, which are those of its weights."""
    read = set()

    def recorded(method):
        def get(config, name, *default):
            read.update(f"{path}{name}" for path, part in parts.items() if part is config)
            return method(config, name, *default)

        return get

    config = model.task.config
    sections = ((f"{name}.", part) for name, part in config.items())
    parts = {"": config} | {n: part for n, part in sections if isinstance(part, ConfigDict)}
    for method in ("__getattr__", "__getitem__", "get"):
        monkeypatch.setattr(ConfigDict, method, recorded(getattr(ConfigDict, method)))
    images = pictures(1, seed=9)
    model.caption(images)
    model.answer(images, "what?")
    model.rank(images, ["a", "b"])
    monkeypatch.undo()
    read &= {name for name in field_names(config) if not name.startswith("model.")}
    assert {"data.prompt", "eval.batch_size", "eval.num_beams", "data.resize"} <= read
    assert read - {"task", "data.image_size_px"} <= set(READ_AGAIN["generation"])


def test_texts_that_are_too_long(models):
    model, long = models["opt"], "red " * 70
    with pytest.raises(UserError, match="64"):
        model.caption(pictures(1), long)
    with pytest.raises(UserError, match="60 positions"):
        model.rank(pictures(1), ["a", "b"], long)
    # Padding alone does not make them too long.
    fitting = "red " * (64 - 4 - NEW - 1)
    assert len(model.caption(pictures(1), fitting)) == 1
    assert model.rank(pictures(1), ["red", "blue"], fitting).shape == (1, 2)


def test_stage1_embeds_and_matches(models):
    model, texts = models["stage1"], ["A red circle.", "blue square", "it"]
    images = pictures(2)
    assert model.embed_images(images).shape == (2, 4, 256)
    embeddings = model.embed_texts(texts)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, rtol=1e-5)
    cleaned = model.embed_texts("a red circle")
    np.testing.assert_allclose(cleaned, embeddings[:1], rtol=1e-5, atol=1e-6)
    probabilities = model.match(images, texts)
    assert probabilities.shape == (2, 3) and ((0 < probabilities) & (probabilities < 1)).all()
    swapped = model.match(images[::-1], texts[::-1])
    np.testing.assert_allclose(swapped[::-1, ::-1], probabilities, rtol=1e-4)
    with pytest.raises(UserError, match="'stage1', which has no `caption`: name a run of stage2"):
        model.caption(images)


def test_settings_that_are_left_out_are_the_defaults():
    assert Decoding().changes() == {}
    assert Decoding(num_beams=3).changes() == {"num_beams": 3}
    assert Decoding(num_captions=2, top_k=5).changes() == {
        "sample": True, "num_beams": 1, "top_k": 5,
    }  # fmt: skip
