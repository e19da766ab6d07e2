"""`jaxblip convert`: published weights become a run that computes the same, and come back whole."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from published_folders import (
    INSTRUCTBLIP,
    MEAN,
    STD,
    assert_close,
    compute,
    pixels,
    publish,
    random_model,
    tokenizer_of,
)
from reference_blip import (
    ANSWERING,
    CAPTIONING,
    DEC,
    RETRIEVAL,
    SEP,
    SMOOTHING,
    random_texts,
)
from reference_blip import CLASSES as BLIP
from tiny_checkpoints import IMAGE_TOKEN, QUERIES, TEXT, WORDS, read_all, same_bits
from tiny_tasks import fast_jit
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import jaxblip
from jaxblip.data.run_sources import read_eval_set
from jaxblip.interop.convert import convert
from jaxblip.training.restore import load_run

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
IDS, INPUT = RNG.integers(3, IMAGE_TOKEN, (2, TEXT)), RNG.integers(3, IMAGE_TOKEN, (2, 4))
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
INPUT_VALID = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
MESH = ["config.mesh.data=1", "config.mesh.fsdp=4", "config.mesh.tensor=2"]


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)


def run_of(folder):
    """The run in a folder, on a mesh that divides its parameters."""
    run = load_run(str(folder), MESH)
    assert run.frozen == {} and run.step == 0
    return run


@torch.no_grad()
def blip2_logits(reference, is_encoder_decoder, **instruction):
    text, valid = (INPUT, INPUT_VALID) if is_encoder_decoder else (IDS, VALID)
    prefix = np.full((2, QUERIES), IMAGE_TOKEN)
    mask = np.concatenate([prefix > 0, valid], axis=1)
    logits = reference(
        pixel_values=pixels(IMAGES),
        input_ids=torch.tensor(np.concatenate([prefix, text], axis=1)),
        attention_mask=torch.tensor(mask).long(),
        labels=torch.tensor(IDS) if is_encoder_decoder else None,
        **instruction,
    ).logits
    return logits if is_encoder_decoder else logits[:, QUERIES - 1 : -1]


def back(run_folder, folder, original, *left):
    """Exports a run; transformers must find the bits of the original and nothing else."""
    lines = "\n".join(convert(str(run_folder), str(folder)))
    assert all(part in lines for part in left)
    same_bits(folder, original)
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_blip2(language_model, tmp_path):
    name, is_t5 = "Blip2ForConditionalGeneration", language_model == "t5"
    reference = publish(tmp_path / "hf", name, language_model)
    lines = "\n".join(convert(str(tmp_path / "hf"), str(tmp_path / "run")))
    assert f"{name}: written as a run of the task stage2" in lines and "float32" in lines
    run = run_of(tmp_path / "run")
    data = run.task.config.data
    assert (data.image_size_px, data.pixel_mean, data.pixel_std) == (8, MEAN, STD)
    images = run.task.normalize_images(jnp.asarray(IMAGES))
    expected = blip2_logits(reference, is_t5)
    logits = compute(run, images, IDS, VALID, *((INPUT, INPUT_VALID) if is_t5 else ()))
    assert_close(logits[VALID], expected[torch.tensor(VALID)])

    again = back(tmp_path / "run", tmp_path / "again", tmp_path / "hf")
    assert again.config.image_token_index == IMAGE_TOKEN
    np.testing.assert_array_equal(blip2_logits(again, is_t5), expected)
    processor = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert processor.convert_tokens_to_ids("<image>") == IMAGE_TOKEN


def test_biases_of_the_keys_are_kept(tmp_path):
    """Those of EVA-CLIP are zeros, but a run of another encoder, exported, has them."""
    reference = publish(tmp_path / "hf", "Blip2ForConditionalGeneration", "opt")
    with torch.no_grad():
        for layer in reference.vision_model.encoder.layers:
            torch.nn.init.normal_(layer.self_attn.qkv.bias)
    reference.save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    run = run_of(tmp_path / "run")
    images = run.task.normalize_images(jnp.asarray(IMAGES))
    expected = blip2_logits(reference, False)
    assert_close(compute(run, images, IDS, VALID)[VALID], expected[torch.tensor(VALID)])
    back(tmp_path / "run", tmp_path / "again", tmp_path / "hf")


@pytest.mark.parametrize("language_model", ["llama", "t5"])
def test_instructblip(language_model, tmp_path):
    reference = publish(tmp_path / "hf", INSTRUCTBLIP, language_model)
    lines = "\n".join(convert(str(tmp_path / "hf"), str(tmp_path / "run")))
    assert f"{INSTRUCTBLIP}: written as a run of the task instruct" in lines
    run = run_of(tmp_path / "run")
    data, qformer = run.task.config.data, run.task.config.model.qformer
    assert (qformer.vocab_size, qformer.max_positions, data.max_instruction_tokens) == (WORDS, 8, 8)
    assert len(run.qformer_tokenizer) == WORDS and "[DEC]" in run.qformer_tokenizer.get_vocab()
    asked, valid = np.clip(INPUT, 0, WORDS - 1), INPUT_VALID
    batch = {
        "image": jnp.asarray(IMAGES), "text_ids": IDS, "text_mask": VALID, "input_ids": INPUT,
        "input_mask": INPUT_VALID, "instruction_ids": asked, "instruction_mask": valid,
    }  # fmt: skip
    logits = compute(run, *run.task.model_inputs(batch))
    instruction = {
        "qformer_input_ids": torch.tensor(asked),
        "qformer_attention_mask": torch.tensor(valid).long(),
    }
    is_t5 = language_model == "t5"
    expected = blip2_logits(reference, is_t5, **instruction)
    assert_close(logits[VALID], expected[torch.tensor(VALID)])

    again = back(tmp_path / "run", tmp_path / "again", tmp_path / "hf")
    np.testing.assert_array_equal(blip2_logits(again, is_t5, **instruction), expected)
    processor = transformers.InstructBlipProcessor.from_pretrained(tmp_path / "again")
    assert processor.num_query_tokens == QUERIES and again.config.image_token_index == IMAGE_TOKEN
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / folder / "qformer_tokenizer")
        for folder in ("hf", "again")
    )
    assert processor.qformer_tokenizer.get_vocab() == ours.get_vocab() == theirs.get_vocab()
    assert_close(processor(images=list(IMAGES), return_tensors="pt").pixel_values, pixels(IMAGES))


def test_retrieval(tmp_path):
    reference = publish(tmp_path / "hf", "Blip2ForImageTextRetrieval")
    lines = "\n".join(convert(str(tmp_path / "hf"), str(tmp_path / "run")))
    assert "It has no temperature, itg_head" in lines or "itg_head, temperature" in lines
    run = run_of(tmp_path / "run")
    assert run.task.config.model.dec_token_id == WORDS - 1
    ids = np.clip(IDS, 5, WORDS - 2)
    matched = compute_match(run, ids)
    with torch.no_grad():
        expected = reference(
            pixel_values=pixels(IMAGES),
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(VALID).long(),
            use_image_text_matching_head=True,
        ).logits_per_image
    assert_close(matched, expected)
    back(tmp_path / "run", tmp_path / "again", tmp_path / "hf", "itg_head", "left behind")


def compute_match(run, ids):
    def match(params):
        features = run.task.image_features(params, jnp.asarray(IMAGES))
        image = run.task.apply(params, features, method="read_image")
        return run.task.apply(params, image, ids, VALID, method="match")

    return np.asarray(fast_jit(match)(run.params))


BLIP_IDS, BLIP_VALID = random_texts((6, 3))
BLIP_QUESTIONS, FULL = random_texts((5, 5), seed=1, length=5)


def blip_inputs(name):
    """A batch, and what transformers takes for it; it sees all of the questions in any case."""
    ids = np.concatenate([np.full((2, 1), DEC), BLIP_IDS[:, 1:]], axis=1)
    labels = torch.tensor(np.where(BLIP_VALID, ids, -100))
    mask = torch.tensor(BLIP_VALID).long()
    batch = {"image": IMAGES, "text_ids": BLIP_IDS, "text_mask": BLIP_VALID}
    theirs = {"pixel_values": pixels(IMAGES)}
    if name == CAPTIONING:
        batch["prompt_length"] = np.zeros(2, np.int32)
        texts = {"input_ids": torch.tensor(ids), "attention_mask": mask, "labels": labels}
        return batch, theirs | texts
    if name == RETRIEVAL:
        return batch, theirs | {"input_ids": torch.tensor(BLIP_IDS), "attention_mask": mask}
    batch |= {"instruction_ids": BLIP_QUESTIONS, "instruction_mask": FULL}
    return batch, theirs | {
        "input_ids": torch.tensor(BLIP_QUESTIONS),
        "attention_mask": torch.tensor(FULL).long(),
        "decoder_input_ids": torch.tensor(ids),
        "decoder_attention_mask": mask,
        "labels": labels,
    }


def assert_same_blip(run, reference, name):
    batch, theirs = blip_inputs(name)
    with torch.no_grad():
        if name == RETRIEVAL:
            match, images, texts = compute(run, *run.task.model_inputs(batch))
            assert_close(match, reference(**theirs, use_itm_head=True).itm_score)
            assert_close(images @ texts.T, reference(**theirs, use_itm_head=False).itm_score)
        else:
            loss = fast_jit(lambda params: run.task.loss(params, batch, None).loss)(run.params)
            np.testing.assert_allclose(loss, reference(**theirs).loss, rtol=1e-5)


@pytest.mark.parametrize("name", BLIP)
def test_blip(name, tmp_path):
    reference = publish(tmp_path / "hf", name)
    lines = "\n".join(convert(str(tmp_path / "hf"), str(tmp_path / "run")))
    task = {RETRIEVAL: "blip_retrieval", CAPTIONING: "blip_caption"}.get(name, "blip_vqa")
    assert f"{name}: written as a run of the task {task}" in lines
    assert ("It has no temperature" in lines) == (name == RETRIEVAL)
    run = run_of(tmp_path / "run")
    data, model = run.task.config.data, run.task.config.model
    assert (data.image_size_px, data.pixel_mean, data.pixel_std) == (8, MEAN, STD)
    assert run.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [DEC, DEC + 1]
    assert (model.get("dec_token_id", DEC), model.get("enc_token_id", 0)) == (DEC, 0)
    assert_same_blip(run, reference, name)

    left = ("temperature", "left behind") if name == RETRIEVAL else ()
    again = back(tmp_path / "run", tmp_path / "again", tmp_path / "hf", *left)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "again")
    assert type(processor).__name__ == "BlipProcessor"
    inputs = processor(images=list(IMAGES), return_tensors="pt")
    assert_close(inputs["pixel_values"], pixels(IMAGES))
    if name != RETRIEVAL:  # what ends, begins and fills a text is in the config, too
        inputs = {"pixel_values": pixels(IMAGES), "max_new_tokens": 9}
        if name == ANSWERING:
            inputs["input_ids"] = torch.tensor(BLIP_QUESTIONS)
        expected = reference.generate(**inputs)
        assert (expected == SEP).any()
        torch.testing.assert_close(again.generate(**inputs), expected)
        assert again.config.text_config.label_smoothing == SMOOTHING


def test_blip_that_reads_texts_with_enc_says_so_when_it_is_exported(tmp_path):
    publish(tmp_path / "hf", RETRIEVAL)
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["model"]["enc_token_id"] = DEC + 1
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    lines = "\n".join(convert(str(tmp_path / "run"), str(tmp_path / "out")))
    assert f"begins here with the token {DEC + 1} (model.enc_token_id)" in lines


def test_clip(tmp_path):
    reference = publish(tmp_path / "hf", "CLIPModel")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    run = run_of(tmp_path / "run")
    ids = np.where(VALID, IDS, 1)
    ids[[0, 1], [4, 2]] = 12  # the end token
    images = run.task.normalize_images(jnp.asarray(IMAGES))
    image, text = compute(run, images, ids, VALID)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), pixel_values=pixels(IMAGES))
    assert_close(image, expected.image_embeds)
    assert_close(text, expected.text_embeds)
    again = back(tmp_path / "run", tmp_path / "again", tmp_path / "hf")
    assert again.config.text_config.eos_token_id == 12


PROCESSORS = {
    "CLIPModel": CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=MEAN,
        image_std=STD,
    ),
    CAPTIONING: BlipImageProcessorPil(size={"height": 8, "width": 8}, resample=2),  # bilinear
}  # fmt: skip
SIZES = [(31, 17), (17, 31), (8, 8), (5, 3), (3, 5), (9, 64), (640, 480)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_converted_run_sees_images_as_its_processor_makes_them(name, tmp_path):
    reference, processor = publish(tmp_path / "hf", name), PROCESSORS[name]
    processor.save_pretrained(tmp_path / "hf")
    files = [str(tmp_path / f"{width}x{height}.png") for width, height in SIZES]
    for file, size in zip(files, SIZES, strict=True):
        coarse = Image.fromarray(RNG.integers(0, 256, (4, 5, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(file)
    lines = [{"image": file, "caption": "w1"} for file in files]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pictures = [Image.open(file) for file in files]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]

    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    source = f"config.eval.source={tmp_path / 'lines.jsonl'}"
    model = jaxblip.load(tmp_path / "run", overrides=[*MESH, source])
    seen = read_eval_set(model.task.config).images  # by `jaxblip evaluate`
    np.testing.assert_array_equal(model._pixels(files), seen)  # by `jaxblip generate`
    pixels = model.task.normalize_images(seen).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-5)
    if name == "CLIPModel":
        with torch.no_grad():
            features = reference.get_image_features(expected).pooler_output
        assert_close(model.embed_images(files), torch.nn.functional.normalize(features, dim=-1))

    convert(str(tmp_path / "run"), str(tmp_path / "again"))
    again = type(processor).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(pictures, return_tensors="pt")["pixel_values"], expected)


def test_t5(tmp_path):
    reference = publish(tmp_path / "hf", "T5ForConditionalGeneration")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    logits = compute(run_of(tmp_path / "run"), IDS, VALID, INPUT, INPUT_VALID)
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(INPUT),
            attention_mask=torch.tensor(INPUT_VALID).long(),
            labels=torch.tensor(IDS),
        ).logits
    assert_close(logits, expected)
    back(tmp_path / "run", tmp_path / "again", tmp_path / "hf")


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_language_model(name, tmp_path):
    reference = publish(tmp_path / "hf", name)
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    assert_same_language(reference, run_of(tmp_path / "run"))
    again = back(tmp_path / "run", tmp_path / "again", tmp_path / "hf")
    assert (again.config.eos_token_id, again.config.pad_token_id) == (2, 1)


def assert_same_language(reference, run):
    logits = compute(run, IDS, np.ones_like(VALID))
    with torch.no_grad():
        assert_close(logits, reference(torch.tensor(IDS)).logits)


def test_gguf(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from test_gguf import gguf, write

    reference = random_model("LlamaForCausalLM")
    file, target = tmp_path / "tiny.gguf", str(tmp_path / "run")
    write(file, reference, gguf.GGMLQuantizationType.F16)
    tokenizer_of("llama").save_pretrained(tmp_path / "tokenizer")
    # Matrices are of 16 bits there, norms of 32; a run may have both.
    lines = convert(str(file), target, tokenizer=str(tmp_path / "tokenizer"), dtype="float32")
    assert "language_model" in "\n".join(lines)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.half().float())
    assert_same_language(reference, run_of(tmp_path / "run"))


def test_dtype(tmp_path):
    publish(tmp_path / "hf", "OPTForCausalLM")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"), dtype="bfloat16")
    run = run_of(tmp_path / "run")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.params)} == {"bfloat16"}
    assert run.task.config.compute_dtype == "bfloat16"
    convert(str(tmp_path / "run"), str(tmp_path / "again"))
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"
    convert(str(tmp_path / "run"), str(tmp_path / "wide"), dtype="float32")
    theirs, wide = read_all(tmp_path / "hf"), read_all(tmp_path / "wide")
    for key, tensor in wide.items():
        assert torch.equal(tensor, theirs[key].bfloat16().float()), key
