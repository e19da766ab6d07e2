"""A run with low-rank factors, all the way: trained, resumed, asked, exported, started from."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from published_folders import pixels, publish
from tiny_checkpoints import QUERIES, read_all
from tiny_tasks import fast_jit
from transformers import Blip2ForConditionalGeneration

from jaxblip.api import load
from jaxblip.config import default_config
from jaxblip.overrides import apply_overrides
from jaxblip.errors import UserError
from jaxblip.interop.convert import convert
from jaxblip.models.lora import is_factor
from jaxblip.training.checkpoints import load_params
from jaxblip.training.initialize import frozen_params, initial_trainable
from jaxblip.training.loop import train
from jaxblip.training.restore import load_run
from jaxblip.training.setup import prepare
from jaxblip.training.state import merge_params

LORA = [
    "config.lora.rank=2",
    "config.lora.alpha=6",
    "config.lora.dropout=0.1",
    "config.lora.targets=query,value,out,up",
    "config.lora.parts=language_model,vision",
    "config.optimizer.layer_decay.vision=0.5",
]
# Of the Q-Former, its queries alone train.
FROZEN = ["config.frozen=vision,qformer,language_model"]
TRAINED = [*LORA, *FROZEN, "config.trainable=qformer/query_tokens"]


def config_from(source, overrides):
    config = default_config("stage2")
    config.steps, config.batch_size, config.optimizer.warmup_steps = 2, 8, 0
    config.compute_dtype = config.frozen_dtype = "float32"
    config.model.vision_norm_epsilon = 1e-6
    config.data.train.source, config.data.num_workers = "shapes:train", 0
    config.data.image_size_px, config.data.max_text_tokens = 8, 6
    config.optimizer.peak_lr, config.optimizer.warmup_init_lr = 0.1, 0.1
    config.checkpoint.every_steps = 1
    config.init.all = str(source)
    config.lock()
    apply_overrides(config, overrides)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", fast_jit)
        publish(folder / "hf", "Blip2ForConditionalGeneration")
        train(config_from(folder / "hf", TRAINED), str(folder / "run"))
    return folder


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)


def flat(tree):
    return flatten_dict(tree, sep="/")


def test_of_adapted_parts_the_checkpoint_has_the_factors_alone(folder):
    trained = flat(load_params(folder / "run"))
    adapted = [path for path in trained if path.startswith(("vision/", "language_model/"))]
    assert len(adapted) == 2 * 2 * 4 and all(map(is_factor, adapted))
    for path in adapted:
        assert np.abs(trained[path]).max() > 0


def test_a_resumed_run_has_the_same_bits(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    train(config_from(folder / "hf", TRAINED), str(tmp_path / "run"))
    expected, resumed = (flat(load_params(root / "run")) for root in (folder, tmp_path))
    assert expected.keys() == resumed.keys()
    for path, leaf in expected.items():
        assert leaf.tobytes() == resumed[path].tobytes(), path


@torch.no_grad()
def test_transformers_computes_the_same_from_the_export(folder, tmp_path):
    lines = convert(str(folder / "run"), str(tmp_path / "out"))
    assert not any("left behind" in line for line in lines)
    before, after = read_all(folder / "hf"), read_all(tmp_path / "out")
    changed = "language_model.model.decoder.layers.0.self_attn.q_proj.weight"
    kept = "language_model.model.decoder.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(before[changed], after[changed])
    assert torch.equal(before[kept], after[kept])

    reference = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    run = load_run(str(folder / "run"))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    ids = rng.integers(3, 9, (2, 4)).astype(np.int32)
    seen = pixels(images)
    words = reference.get_input_embeddings()(torch.tensor(ids).long())
    hidden = reference.vision_model(seen).last_hidden_state
    queries = reference.query_tokens.expand(2, -1, -1)
    queries = reference.qformer(
        query_embeds=queries, encoder_hidden_states=hidden
    ).last_hidden_state
    embeddings = torch.cat([reference.language_projection(queries), words], dim=1)
    expected = reference.language_model(inputs_embeds=embeddings).logits[:, QUERIES - 1 : -1]

    params = merge_params(run.params, run.frozen)
    inputs = run.task.normalize_images(images), ids, np.ones(ids.shape, bool)
    logits = fast_jit(lambda params: run.task.apply(params, *inputs))(params)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-5, atol=1e-5)

    # What is generated is generated with the factors: the run and its export say the same.
    convert(str(tmp_path / "out"), str(tmp_path / "converted"))
    asked = dict(max_new_tokens=5, min_new_tokens=5, num_beams=1)
    texts, of_export = (
        load(str(path)).caption(list(images), "w1", **asked)
        for path in (folder / "run", tmp_path / "converted")
    )
    assert texts == of_export


def test_a_run_starts_from_what_another_trained_and_from_where_that_had_the_rest(folder, tmp_path):
    setup = prepare(config_from(folder / "run", LORA), str(tmp_path / "next"))
    start = flat(initial_trainable(setup.task, setup.mesh))
    saved = flat(load_params(folder / "run"))
    base = prepare(config_from(folder / "hf", LORA), str(tmp_path / "base"))
    base = flat(initial_trainable(base.task, base.mesh))
    assert start.keys() == base.keys() > saved.keys()
    assert (saved["qformer/query_tokens"] != base["qformer/query_tokens"]).any()
    for path, leaf in start.items():
        np.testing.assert_array_equal(leaf, saved.get(path, base[path]))
    frozen, references = frozen_params(setup.task, setup.mesh)
    assert references["language_model"]["source"] == str(folder / "hf")
    assert not any(map(is_factor, flat(frozen)))

    # The Q-Former frozen as a whole: it is named by the run from which both are found.
    setup = prepare(config_from(folder / "run", [*LORA, *FROZEN]), str(tmp_path / "frozen"))
    frozen, references = frozen_params(setup.task, setup.mesh, ["qformer"])
    assert references["qformer"]["source"] == str(folder / "run")
    for path, leaf in flat({"qformer": frozen["qformer"]}).items():
        np.testing.assert_array_equal(leaf, saved.get(path, base[path]))


@pytest.mark.parametrize("overrides", [[], [*LORA, "config.lora.alpha=7"]])
def test_factors_that_would_not_count_are_refused(folder, tmp_path, overrides):
    setup = prepare(config_from(folder / "run", overrides), str(tmp_path / "other"))
    with pytest.raises(UserError, match="has trained low-rank factors for .*alpha=6.0"):
        frozen_params(setup.task, setup.mesh)
