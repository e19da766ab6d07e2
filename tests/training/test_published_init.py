"""A run that starts from published weights: sizes, pixels and tokenizer come with them."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
from published_folders import (
    BERT,
    INSTRUCTBLIP,
    MEAN,
    STD,
    pixels,
    publish,
    random_model,
    tokenizer_of,
)
from reference_blip import ANSWERING, CAPTIONING, DEC, RETRIEVAL, random_texts
from reference_blip import VOCAB as BLIP_VOCAB
from tiny_checkpoints import QUERIES, VOCAB, WORDS
from tiny_tasks import fast_jit

from jaxblip import sharding
from jaxblip.config import default_config
from jaxblip.overrides import apply_overrides
from jaxblip.data import run_tokenizers
from jaxblip.errors import UserError
from jaxblip.interop.convert import convert
from jaxblip.interop.processors import ImageProcessing
from jaxblip.models.vit import VisionTransformer
from jaxblip.tasks import make_task
from jaxblip.training import initialize
from jaxblip.training.adopt import adopt_sources
from jaxblip.training.checkpoints import load_frozen_references
from jaxblip.training.loop import train
from jaxblip.training.restore import load_run

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
ENC = BLIP_VOCAB - 1


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)


def make_config(task="stage2", overrides=(), **init):
    config = default_config(task)
    config.compute_dtype = "float32"
    config.steps, config.batch_size, config.log_every_steps = 2, 8, 1
    config.optimizer.warmup_steps = 1
    config.data.train.source = "shapes:train"
    config.data.num_workers, config.data.image_size_px, config.data.max_text_tokens = 0, 24, 6
    if "max_instruction_tokens" in config.data:
        config.data.max_instruction_tokens = 4
    if task == "instruct":
        config.data.prompt = "what"
    if "qformer" in config.model:
        config.model.qformer.update(
            num_query_tokens=4, width=16, num_layers=2, num_heads=2, mlp_width=24,
            cross_attention_frequency=1,
        )  # fmt: skip
    config.init.update({part: str(source) for part, source in init.items()})
    config.lock()
    apply_overrides(config, overrides)
    return config


def params_of(config):
    """All parameters of a run before its first step."""
    adopted = adopt_sources(config)
    tokenizers = (
        run_tokenizers.run_tokenizer(adopted.config, "nowhere", (), adopted.tokenizer),
        run_tokenizers.run_qformer_tokenizer(
            adopted.config, "nowhere", (), adopted.qformer_tokenizer
        ),
    )
    task = make_task(run_tokenizers.with_vocabulary(adopted.config, *tokenizers))
    mesh = sharding.make_mesh({"data": 8})
    params = initialize.initial_trainable(task, mesh)
    frozen, references = initialize.frozen_params(task, mesh)
    return task, params | frozen, references


def test_any_encoder_with_any_language_model(tmp_path, capfd):
    publish(tmp_path / "clip", "CLIPVisionModel")
    publish(tmp_path / "llama", "LlamaForCausalLM")
    config = make_config(vision=tmp_path / "clip", language_model=tmp_path / "llama")
    config.eval.source = ""
    train(config, str(tmp_path / "run"))
    saved = json.loads((tmp_path / "run/config.json").read_text())
    vision, language_model = saved["model"]["vision"], saved["model"]["language_model"]
    assert (vision["width"], vision["num_layers"], vision["pre_norm"]) == (20, 2, True)
    assert language_model["architecture"] == "llama" and language_model["vocab_size"] == VOCAB
    assert (saved["data"]["pixel_mean"], saved["data"]["pixel_std"]) == (list(MEAN), list(STD))
    printed = capfd.readouterr().out
    assert "Its last block of 3 is left out" in printed
    references = load_frozen_references(tmp_path / "run")
    assert {p: r["source"] for p, r in references.items()} == {
        "vision": str(tmp_path / "clip"), "language_model": str(tmp_path / "llama"),
    }  # fmt: skip
    run = load_run(str(tmp_path / "run"))
    assert len(run.tokenizer) == VOCAB and run.frozen["vision"]["cls_token"].dtype == "bfloat16"
    # Started again it goes on; with other weights it does not.
    config = make_config(vision=tmp_path / "clip", language_model=tmp_path / "llama")
    train(config, str(tmp_path / "run"))
    random_model("LlamaForCausalLM", seed=1).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="frozen part 'language_model'"):
        load_run(str(tmp_path / "run"))


def test_all_parts_at_another_image_size(tmp_path):
    name = "Blip2ForConditionalGeneration"
    reference = publish(tmp_path / "blip2", name)
    config = make_config(all=tmp_path / "blip2")
    with config.unlocked():
        config.frozen_dtype = "float32"
    task, params, references = params_of(config)
    assert task.config.model.qformer.num_query_tokens == QUERIES
    assert task.config.model.vision_norm_epsilon == reference.config.vision_config.layer_norm_eps
    assert references["vision"]["source"] == str(tmp_path / "blip2")

    ids = np.random.default_rng(1).integers(4, VOCAB - 1, (2, 5))
    images = task.normalize_images(IMAGES)
    logits = fast_jit(lambda p: task.apply(p, images, ids, np.ones((2, 5), bool)))(params)
    with torch.no_grad():
        expected = reference(
            pixel_values=pixels(IMAGES),
            input_ids=torch.tensor(np.concatenate([np.full((2, QUERIES), VOCAB - 1), ids], axis=1)),
            interpolate_pos_encoding=True,
        ).logits[:, QUERIES - 1 : -1]
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_an_image_encoder_at_another_image_size(name, tmp_path):
    reference = publish(tmp_path / "vision", name)
    overrides = ["config.model.vision.num_layers=2", "config.frozen_dtype=float32"]
    config = make_config("stage1", overrides, vision=tmp_path / "vision")
    adopted = adopt_sources(config)
    assert "Of its 3 blocks the first 2 are used" in adopted.lines[0]
    with adopted.config.unlocked():
        adopted.config.model.qformer.vocab_size = WORDS
    task = make_task(adopted.config)
    params, _ = initialize.frozen_params(task, sharding.make_mesh({"data": 8}))
    encoder = VisionTransformer(task.model.vision_config)
    images = task.normalize_images(IMAGES)
    features = fast_jit(encoder.apply)({"params": params["vision"]}, images)
    with torch.no_grad():
        states = reference(
            pixels(IMAGES), interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
    np.testing.assert_allclose(features, states[2].numpy(), rtol=1e-4, atol=1e-4)


def test_instructblip_starts_from_instructblip(tmp_path, capfd):
    """Published, or as `convert` wrote it: all parts, both tokenizers, and pixels."""
    reference = publish(tmp_path / "hf", INSTRUCTBLIP, "llama")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    state = reference.state_dict()
    for source in ("hf", "run"):
        task, params, references = params_of(make_config("instruct", all=tmp_path / source))
        model = task.config.model
        assert (model.qformer.vocab_size, model.language_model.vocab_size) == (WORDS, VOCAB)
        assert model.language_model.architecture == "llama"
        assert task.config.data.pixel_mean == MEAN
        assert {references[part]["source"] for part in ("vision", "language_model")} == {
            str(tmp_path / source)
        }
        for path, name in {
            "qformer/text_embeddings/token_embedding/embedding": "qformer.embeddings."
            "word_embeddings.weight",
            "projection/bias": "language_projection.bias",
        }.items():
            leaf = params
            for part in path.split("/"):
                leaf = leaf[part]
            np.testing.assert_array_equal(leaf, state[name].numpy())
    assert "random" not in capfd.readouterr().out


def test_instructblip_starts_from_a_blip2_of_stage2(tmp_path, capfd):
    """But for the text side of the Q-Former, which a run of stage 1 has, or BERT."""
    publish(tmp_path / "hf", "Blip2ForConditionalGeneration", "t5")
    publish(tmp_path / "stage1", "Blip2ForImageTextRetrieval", seed=1)
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    tokenizer_of("bert").save_pretrained(tmp_path / "bert")
    made = {}
    for source in ("hf", "run"):
        config = make_config("instruct", all=tmp_path / source)
        with config.unlocked():
            config.data.qformer_tokenizer = str(tmp_path / "bert")
        task, params, _ = params_of(config)
        assert task.config.model.qformer.vocab_size == WORDS  # with [DEC]
        assert task.config.data.max_input_tokens == 128 and "prefix_lm" not in task.config.loss
        printed = capfd.readouterr().out
        assert "text_embeddings" in printed and "start at random" in printed
        assert "projection" not in printed and "query" not in printed
        made[source] = params
    jax.tree.map(np.testing.assert_array_equal, made["hf"], made["run"])
    config = make_config("instruct", all=tmp_path / "hf", qformer=tmp_path / "stage1")
    task, params, _ = params_of(config)
    assert "random" not in capfd.readouterr().out
    for part in ("projection", "language_model"):
        jax.tree.map(np.testing.assert_array_equal, params[part], made["hf"][part])
    assert not np.array_equal(
        params["qformer"]["query_tokens"], made["hf"]["qformer"]["query_tokens"]
    )


def test_blip_starts_from_blip(tmp_path, capfd):
    """All of it, at another image size; texts are read with [ENC], unlike in transformers."""
    reference = publish(tmp_path / "hf", RETRIEVAL)
    adopted = adopt_sources(make_config("blip_retrieval", all=tmp_path / "hf"))
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    for source in ("hf", "run"):
        task, params, _ = params_of(make_config("blip_retrieval", all=tmp_path / source))
        model = task.config.model
        assert (model.text.vocab_size, model.text.width, model.embed_dim) == (BLIP_VOCAB, 16, 8)
        assert model.enc_token_id == ENC
        assert task.config.data.pixel_mean == MEAN
    assert "has no temperature: these parameters start at random" in capfd.readouterr().out
    assert len(adopted.tokenizer()) == BLIP_VOCAB - 2  # to which the run adds [DEC] and [ENC]

    ids, valid = random_texts((5, 3))
    images = task.normalize_images(IMAGES)
    *_, image, text = fast_jit(task.apply)(params, images, ids, valid)
    with torch.no_grad():
        expected = reference(
            torch.tensor(ids), pixels(IMAGES), use_itm_head=False, interpolate_pos_encoding=True,
            attention_mask=torch.tensor(valid).long(),
        ).itm_score  # fmt: skip
    np.testing.assert_allclose(image @ text.T, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("task", "own"), [("blip_caption", "decoder"), ("blip_retrieval", "text")])
def test_blip_tasks_give_each_other_what_they_share(task, own, tmp_path):
    publish(tmp_path / "hf", ANSWERING)
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    source = load_run(str(tmp_path / "run"), ["config.mesh.data=8"]).params
    for folder in ("hf", "run"):
        made, params, _ = params_of(make_config(task, all=tmp_path / folder))
        config = made.config.model
        assert (config.text.width, config.text.vocab_size) == (16, BLIP_VOCAB)
        assert config.get("dec_token_id", DEC) == DEC and config.get("enc_token_id", ENC) == ENC
        for part in ("vision_norm", own):
            jax.tree.map(np.testing.assert_array_equal, params[part], source[part])
        # The positions are those of another image size.
        ours, theirs = (tree["vision"]["layers"] for tree in (params, source))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_other_tasks_take_the_image_encoder_of_blip(tmp_path):
    publish(tmp_path / "hf", CAPTIONING)
    for field in ("vision", "all"):
        config = make_config("stage1", **{field: tmp_path / "hf"})
        with config.unlocked():
            config.frozen_dtype, config.model.qformer.vocab_size = "float32", WORDS
        adopted = adopt_sources(config)
        assert adopted.tokenizer is None and adopted.config.data.pixel_std == STD
        vision = adopted.config.model.vision
        assert (vision.width, vision.num_layers) == (20, 2)
        frozen, _ = initialize.frozen_params(
            make_task(adopted.config), sharding.make_mesh({"data": 8})
        )
        up = frozen["vision"]["layers"]["mlp"]["up"]["kernel"][1]
        expected = random_model(CAPTIONING).vision_model.encoder.layers[1].mlp.fc1.weight
        np.testing.assert_array_equal(up, expected.detach().numpy().T)


@pytest.mark.parametrize("source", ["hf", "run"])
def test_blip_takes_of_clip_the_image_encoder_alone(source, tmp_path):
    """Not its texts, nor its heads, although both have parts of these names."""
    publish(tmp_path / "hf", "CLIPModel")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    config = make_config("blip_retrieval", all=tmp_path / source)
    with config.unlocked():
        config.model.text.update(vocab_size=9, width=16, num_layers=1, num_heads=2, mlp_width=24)
    adopted = adopt_sources(config)
    model = adopted.config.model
    assert adopted.tokenizer is None and (model.vision.width, model.text.width) == (20, 16)
    task = make_task(adopted.config)
    params = initialize.initial_trainable(task, sharding.make_mesh({"data": 8}))
    random = fast_jit(task.init)(jax.random.key(adopted.config.seed))
    for part, tree in params.items():
        same = jax.tree.map(np.array_equal, tree, random[part])
        assert all(jax.tree.leaves(same)) == (part != "vision"), part


@pytest.mark.parametrize("source", ["hf", "run"])
def test_how_images_become_squares_goes_with_the_whole_model(source, tmp_path):
    """BLIP-2 squashes the images of CLIP's encoder; a filter is the encoder's own."""
    publish(tmp_path / "hf", "CLIPModel")
    processing = ImageProcessing(8, "shortest_edge", "bilinear").to_hf()
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(processing))
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))

    def adopted(task, *overrides, **init):
        data = adopt_sources(make_config(task, overrides, **init)).config.data
        return data.resize, data.interpolation

    squash = "config.data.resize=squash"
    assert adopted("clip", all=tmp_path / source) == ("shortest_edge", "bilinear")
    assert adopted("clip", squash, all=tmp_path / source) == ("squash", "bilinear")
    assert adopted("stage1", vision=tmp_path / source) == ("squash", "bilinear")


def test_stage1_from_stage1(tmp_path, capfd):
    publish(tmp_path / "itm", "Blip2ForImageTextRetrieval")
    task, params, references = params_of(make_config("stage1", all=tmp_path / "itm"))
    assert task.config.model.dec_token_id == WORDS - 1 and task.config.model.embed_dim == 8
    printed = capfd.readouterr().out
    assert f"{tmp_path / 'itm'} has no itg_head, temperature: these" in printed
    assert params["temperature"] == np.float32(0.07)
    assert params["vision"]["cls_token"].dtype == "bfloat16"
    assert params["qformer"]["query_tokens"].dtype == "float32"


def test_a_qformer_starts_from_bert(tmp_path, capfd):
    reference = publish(tmp_path / "bert", "BertModel")
    overrides = ["config.model.qformer.cross_attention_frequency=1", "config.init.vision=random"]
    config = make_config("stage1", overrides, qformer=tmp_path / "bert")
    with config.unlocked():
        config.model.vision.update(patch_size_px=12, width=20, num_layers=1, num_heads=2)
    task, params, _ = params_of(config)
    qformer = task.config.model.qformer
    assert (qformer.num_query_tokens, qformer.cross_attention_frequency) == (4, 1)
    assert (qformer.num_layers, qformer.vocab_size) == (BERT["num_hidden_layers"], WORDS)
    assert task.config.model.dec_token_id == WORDS - 1
    up = params["qformer"]["groups"]["block_0"]["query_mlp"]["up"]["kernel"][3]
    expected = reference.encoder.layer[3].intermediate.dense.weight.detach().numpy().T
    np.testing.assert_array_equal(up, expected)
    printed = capfd.readouterr().out
    assert "qformer/query_tokens" in printed and "cross_attention" in printed


def test_what_convert_wrote_brings_its_sizes(tmp_path):
    publish(tmp_path / "hf", "CLIPModel")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    config = make_config("stage1", vision=tmp_path / "run")
    with config.unlocked():
        config.data.image_size_px = 8
        config.model.qformer.vocab_size = WORDS
    adopted = adopt_sources(config)
    assert adopted.config.model.vision.width == 20 and adopted.tokenizer is None
    assert adopted.config.data.pixel_mean == MEAN
    task = make_task(adopted.config)
    frozen, references = initialize.frozen_params(task, sharding.make_mesh({"data": 8}))
    assert references["vision"]["revision"] == "0"
    assert frozen["vision"]["layers"]["mlp"]["up"]["kernel"].shape[0] == 2


def test_revisions_are_written_out(tmp_path, monkeypatch):
    publish(tmp_path / "0123abcd", "CLIPVisionModel")
    asked = []

    def fetch(name, revision):
        asked.append((name, revision))
        return tmp_path / "0123abcd"

    monkeypatch.setattr("jaxblip.interop.files._fetch", fetch)
    adopted = adopt_sources(make_config("stage1", vision="hf:some/clip@main"))
    assert adopted.config.init.vision == "hf:some/clip@0123abcd"
    with adopted.config.unlocked():
        adopted.config.model.qformer.vocab_size = WORDS
    task = make_task(adopted.config)
    _, references = initialize.frozen_params(task, sharding.make_mesh({"data": 8}))
    assert asked == [("some/clip", "main"), ("some/clip", "0123abcd")]
    assert references["vision"]["source"] == "hf:some/clip@0123abcd"
    assert references["vision"]["revision"] == "0123abcd"


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["config.model.vision.width=64"], ["model.vision.width=64", "CLIPVisionModel", "has 20"]),
        (["config.data.pixel_mean=0,0,0"], ["data.pixel_mean", "0.5"]),
        (["config.model.vision.num_layers=4"], ["num_layers=4", "has 3"]),
    ],
)
def test_a_field_that_disagrees(overrides, expected, tmp_path):
    publish(tmp_path / "clip", "CLIPVisionModel")
    with pytest.raises(UserError) as error:
        adopt_sources(make_config("stage1", overrides, vision=tmp_path / "clip"))
    for part in expected:
        assert part in str(error.value)


def test_a_part_that_the_source_has_not(tmp_path):
    publish(tmp_path / "clip", "CLIPVisionModel")
    with pytest.raises(UserError, match="has no language_model: it has vision"):
        adopt_sources(make_config(language_model=tmp_path / "clip"))


def test_the_recipes_number_of_blocks_counts(tmp_path):
    publish(tmp_path / "clip", "CLIPVisionModel")
    config = make_config("stage1", vision=tmp_path / "clip")
    with config.unlocked():
        config.model.vision.num_layers = 1
    adopted = adopt_sources(config)
    assert adopted.config.model.vision.num_layers == 1
    assert config.model.vision.width != 20  # the config that was given stays


def test_an_architecture_brings_its_fields(tmp_path):
    publish(tmp_path / "t5", "T5ForConditionalGeneration")
    overrides = ["config.init.vision=random", "config.model.vision.patch_size_px=12"]
    config = make_config(overrides=overrides, language_model=tmp_path / "t5")
    assert "max_input_tokens" not in config.data
    adopted = adopt_sources(config).config
    assert adopted.model.language_model.architecture == "t5"
    assert (adopted.data.max_input_tokens, adopted.loss.prefix_lm) == (32, True)
    initialize.abstract_params(make_task(adopted))
    message = "architecture=opt disagrees"
    with pytest.raises(UserError, match=message):
        overrides += ["config.model.language_model.architecture=opt"]
        adopt_sources(make_config(overrides=overrides, language_model=tmp_path / "t5"))
