"""The files of BLIP's authors: written from models of transformers, read as those models."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from published_folders import AUTHORS_VIT_NAMES, tokenizer_of
from reference import randomized
from reference_blip import ANSWERING, CAPTIONING, CLASSES, DEC, PAD, RETRIEVAL, SEP, random_texts
from reference_blip import VOCAB as WORDS
from tiny_tasks import fast_jit

from jaxblip.config import default_config
from jaxblip.data import run_tokenizers
from jaxblip.errors import UserError
from jaxblip.interop.convert import convert
from jaxblip.interop.published import ORIGINAL_BLIP, open_published
from jaxblip.sharding import make_mesh
from jaxblip.tasks import make_task
from jaxblip.tasks.base import normalize_images
from jaxblip.training.adopt import adopt_sources
from jaxblip.training.initialize import initial_trainable
from jaxblip.training.restore import load_run

TASKS = {RETRIEVAL: "blip_retrieval", CAPTIONING: "blip_caption", ANSWERING: "blip_vqa"}
ENC = DEC + 1
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
PIXELS = torch.tensor(np.array(normalize_images(IMAGES)).transpose(0, 3, 1, 2).copy())
IDS, VALID = random_texts((6, 3))
QUESTIONS, FULL = random_texts((5, 5), seed=1, length=5)


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)


def random_model(name, dtype=torch.float32):
    """A tiny model with what their code has and no file says: heads of width 64, and epsilons."""
    config = transformers.BlipConfig(
        vision_config=dict(
            hidden_size=128, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4, layer_norm_eps=1e-6,
        ),
        text_config=dict(
            hidden_size=128, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=WORDS, max_position_embeddings=24, bos_token_id=DEC, sep_token_id=SEP,
            pad_token_id=PAD, label_smoothing=0.1,
        ),
        image_text_hidden_size=8,
    )  # fmt: skip
    model = randomized(getattr(transformers, name)(config), scale=0.1)
    return model.to(dtype).to(torch.float32)  # values that `dtype` can hold


def as_original(model):
    """The state of a model by the authors' names, with all that training left beside it."""
    state = {}
    for name, tensor in model.state_dict().items():
        for theirs, original in [
            ("vision_model.post_layernorm", "visual_encoder.norm"),
            *AUTHORS_VIT_NAMES,
        ]:
            name = name.replace(theirs, original)
        state[name] = tensor.clone()
    for part in ("text_encoder", "text_decoder.bert"):
        if any(name.startswith(part) for name in state):
            state[f"{part}.embeddings.position_ids"] = torch.arange(24)[None]
    if "itm_head.weight" in state:
        state |= {  # as of training: nothing of it is read
            name.replace(".", "_m.", 1): torch.zeros_like(tensor)
            for name, tensor in state.items()
            if not name.startswith("itm_head")
        }
        state |= {
            "temp": torch.tensor(0.05),
            "image_queue": torch.randn(8, 6),
            "text_queue": torch.randn(8, 6),
            "idx_queue": torch.full((1, 6), -100),
            "ptr_queue": torch.zeros(1, dtype=torch.long),
        }
    return state


def write(file, state, dtype=torch.float32):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": state, "epoch": 4, "config": {"vit": "base"}}, file)
    return str(file)


def tokenizer(folder):
    tokenizer_of("blip").save_pretrained(folder / "bert")  # [DEC] and [ENC] are added
    return str(folder / "bert")


def batch_of(name):
    batch = {"image": IMAGES, "text_ids": IDS, "text_mask": VALID}
    if name == CAPTIONING:
        batch["prompt_length"] = np.zeros(2, np.int32)
    if name == ANSWERING:
        batch |= {"instruction_ids": QUESTIONS, "instruction_mask": FULL}
    return batch


def begun_with(token, ids):
    return torch.tensor(np.concatenate([np.full((2, 1), token), ids[:, 1:]], axis=1))


@torch.no_grad()
def assert_same(task, params, reference, name):
    """Scores, or the loss; a text that is read with its image begins with [ENC], as in theirs."""
    batch, mask = batch_of(name), torch.tensor(VALID).long()
    if name == RETRIEVAL:
        function = fast_jit(lambda p: task.apply(p, *task.model_inputs(batch)))
        match, images, texts = map(np.asarray, function(params))
        texts_of = dict(pixel_values=PIXELS, attention_mask=mask)
        expected = reference(begun_with(ENC, IDS), **texts_of, use_itm_head=True).itm_score
        np.testing.assert_allclose(match, expected, rtol=1e-4, atol=1e-4)
        expected = reference(torch.tensor(IDS), **texts_of, use_itm_head=False).itm_score
        np.testing.assert_allclose(images @ texts.T, expected, rtol=1e-4, atol=1e-4)
        return
    text = dict(labels=torch.tensor(np.where(VALID, begun_with(DEC, IDS), -100)))
    if name == CAPTIONING:
        text |= dict(input_ids=begun_with(DEC, IDS), attention_mask=mask)
    else:
        text |= dict(
            input_ids=begun_with(ENC, QUESTIONS), attention_mask=torch.tensor(FULL).long(),
            decoder_input_ids=begun_with(DEC, IDS), decoder_attention_mask=mask,
        )  # fmt: skip
    loss = fast_jit(lambda p: task.loss(p, batch, None).loss)(params)
    expected = reference(pixel_values=PIXELS, **text).loss
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_convert(name, dtype, tmp_path):
    reference = random_model(name, dtype)
    file = write(tmp_path / "model.pth", as_original(reference), dtype)
    run = str(tmp_path / "run")
    lines = convert(file, run, tokenizer=tokenizer(tmp_path), dtype="float32")
    assert lines[0] == f"{file} holds {ORIGINAL_BLIP}: written as a run of the task {TASKS[name]}."
    assert "random" not in lines[1] and "left behind" not in lines[1]
    loaded = load_run(run)
    model = loaded.task.config.model
    assert (model.get("dec_token_id", DEC), model.get("enc_token_id", ENC)) == (DEC, ENC)
    assert (model.vision.layer_norm_epsilon, model.text.layer_norm_epsilon) == (1e-6, 1e-12)
    assert_same(loaded.task, loaded.params, reference, name)
    if name == RETRIEVAL:
        assert loaded.params["temperature"] == np.float32(torch.tensor(0.05, dtype=dtype))


def start(name, source, folder):
    """The task of a run that starts from `source`, and its parameters before the first step."""
    config = default_config(TASKS[name])
    config.compute_dtype = "float32"
    config.data.image_size_px, config.data.max_text_tokens = 8, 6
    if name == ANSWERING:
        config.data.max_instruction_tokens = 5
    config.data.tokenizer, config.init.all = tokenizer(folder), source
    adopted = adopt_sources(config.lock()).config
    own = run_tokenizers.run_tokenizer(adopted, "", ())
    task = make_task(run_tokenizers.with_vocabulary(adopted, own))
    return task, initial_trainable(task, make_mesh({"data": 8}))


@pytest.mark.parametrize("name", CLASSES)
def test_a_training_starts_from_it(name, tmp_path):
    reference = random_model(name)
    file = write(tmp_path / "model.pth", as_original(reference))
    assert_same(*start(name, file, tmp_path), reference, name)


def test_a_pretrained_one_starts_every_task(tmp_path, capfd):
    retrieval, answering = random_model(RETRIEVAL), random_model(ANSWERING)
    state = as_original(answering) | as_original(retrieval)  # of the second, the shared parts
    state["queue_ptr"] = state.pop("ptr_queue")
    file = write(tmp_path / "model_base.pth", state)
    answering.vision_model.load_state_dict(retrieval.vision_model.state_dict())
    answering.text_encoder.load_state_dict(retrieval.text_encoder.state_dict())
    captioning = random_model(CAPTIONING)
    captioning.vision_model.load_state_dict(retrieval.vision_model.state_dict())
    captioning.text_decoder.load_state_dict(answering.text_decoder.state_dict())
    for name, reference in zip(CLASSES, (retrieval, captioning, answering), strict=True):
        assert_same(*start(name, file, tmp_path), reference, name)
    assert "start at random" not in capfd.readouterr().out
    lines = convert(file, str(tmp_path / "run"), tokenizer=tokenizer(tmp_path))
    assert "written as a run of the task blip_retrieval" in lines[0]
    assert lines[1] == "A run of blip_retrieval has no place for decoder: left behind."


def test_the_large_image_encoder_may_be_wider_than_texts(tmp_path):
    state = as_original(random_model(CAPTIONING))
    for name, tensor in state.items():
        if name.startswith("text_decoder.bert.encoder") and "crossattention.self" in name:
            if name.endswith(("key.weight", "value.weight")):
                state[name] = torch.zeros(128, 192)
        if name.startswith("visual_encoder."):
            shape = [{128: 192, 384: 576}.get(size, size) for size in tensor.shape]
            state[name] = torch.zeros(shape)
    published = open_published(write(tmp_path / "large.pth", state))
    vision = published.configs["vision"]
    assert (vision.width, vision.num_heads, vision.key_bias) == (192, 3, True)
    assert published.configs["text"].width == 128


# What does not fit


def test_missing_left_over_and_wrong_tensors_are_one_grouped_error(tmp_path):
    state = as_original(random_model(ANSWERING))
    for i in range(2):
        at = f"text_encoder.encoder.layer.{i}.crossattention.self"
        state[f"{at}0.query.weight"] = state.pop(f"{at}.query.weight")  # as in their NLVR
        state[f"visual_encoder.blocks.{i}.attn.qkv.bias"] = torch.zeros(380)
    del state["text_decoder.cls.predictions.transform.dense.bias"]
    with pytest.raises(UserError) as error:
        convert(
            write(tmp_path / "bad.pth", state), str(tmp_path / "run"), tokenizer=tokenizer(tmp_path)
        )
    for line in [
        "Missing in the file:\n  text_encoder.encoder.layer.{0-1}.crossattention.self.query.weight "
        "(the file has text_encoder.encoder.layer.{0-1}.crossattention.self0.query.weight)",
        "  text_decoder.cls.predictions.transform.dense.bias",
        "Left over in the file:\n  text_encoder.encoder.layer.{0-1}.crossattention.self0.query.",
        "Of another shape:\n  visual_encoder.blocks.{0-1}.attn.qkv.bias: 380 in the file, 384 in "
        "the model",
    ]:
        assert line in str(error.value)


def test_a_head_that_is_not_there_is_missing(tmp_path):
    state = as_original(random_model(RETRIEVAL))
    del state["itm_head.weight"]
    file = write(tmp_path / "bad.pth", state)
    with pytest.raises(UserError, match="Missing in the file:\n  itm_head.weight"):
        convert(file, str(tmp_path / "run"), tokenizer=tokenizer(tmp_path))
    del state["vision_proj.weight"]
    with pytest.raises(UserError, match="has no 'vision_proj.weight', by which the model's sizes"):
        open_published(write(tmp_path / "bad.pth", state))


def test_a_file_that_needs_more_than_the_weights_only_loader_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    state = as_original(random_model(CAPTIONING))
    torch.save({"model": state, "config": Code()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth' holds more than weights.*refused"):
        convert(str(tmp_path / "bad.pth"), str(tmp_path / "run"))
    assert not (tmp_path / "mark").exists()


def test_without_a_tokenizer_a_sentence_says_how_to_name_one(tmp_path):
    file = write(tmp_path / "model.pth", as_original(random_model(CAPTIONING)))
    with pytest.raises(UserError, match="no tokenizer beside its weights: name one .*--tokenizer"):
        convert(file, str(tmp_path / "run"))
