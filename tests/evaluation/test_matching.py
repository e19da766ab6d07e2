"""Retrieval, classification and losses of tiny models, against all pairs one by one."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxblip import sharding
from jaxblip.data import inputs
from jaxblip.data.run_sources import open_train_sources
from jaxblip.data.sources import open_source
from jaxblip.data.tokenizers import train_wordpiece
from jaxblip.errors import UserError
from jaxblip.evaluation.evaluate import Evaluations
from jaxblip.evaluation.kept import Kept
from jaxblip.evaluation.linear_probe import fit
from jaxblip.tasks import make_task
from jaxblip.training.state import split_params
from tiny_tasks import fast_jit, random_params, shallow, tiny_config

IMAGES, K = 6, 5


@pytest.fixture(scope="module")
def tokenizer():
    source = open_source("shapes:heldout", image_size_px=8)
    return train_wordpiece((c for index in range(60) for c in source[index]["captions"]), 200)


def evaluation(name, tokenizer, **settings):
    """(the only evaluation of a tiny task on six images, its random parameters)."""
    config = shallow(tiny_config(name))
    config.eval.source, config.eval.max_images, config.eval.batch_size = "shapes:heldout", IMAGES, 4
    config.data.max_text_tokens = 12
    for part in ("text", "language_model", "qformer"):
        if "vocab_size" in config.model.get(part, {}):
            config.model[part].vocab_size = len(tokenizer)
    config.eval.update(settings)
    task = make_task(config)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    (found,) = Evaluations(task, tokenizer, mesh)
    return found, random_params(task)


def brute_force(found, params, size):
    """Recalls of galleries of `size` images by scores of all pairs, each computed alone."""
    task, data, encode = found.task, found.set, found._encode
    features = task.image_features(params, data.images)
    embeds = np.asarray(task.embed_images(params, features), np.float64)
    image = task.apply(params, features, method="read_image")
    totals = {}
    for first in range(0, len(data.images), size):
        captions = [(row, c) for row in range(first, first + size) for c in data.captions[row]]
        ids, mask = encode([caption for _, caption in captions])
        owner = np.array([row - first for row, _ in captions])
        words = np.asarray(task.embed_texts(params, ids, mask), np.float64)
        of_fold = embeds[first : first + size]
        itc = np.stack([(queries @ words.T).max(axis=0) for queries in of_fold])
        pairs = np.indices(itc.shape).reshape(2, -1)
        itm = task.match(params, image, ids, mask, pairs[0] + first, pairs[1])
        itm = np.asarray(itm, np.float64).reshape(itc.shape)
        own = owner == np.arange(size)[:, None]
        for way, scores, logits, mine in (("i2t", itc, itm, own), ("t2i", itc.T, itm.T, own.T)):
            chosen = np.zeros(scores.shape, bool)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
            np.put_along_axis(chosen, best, True, axis=1)
            reranked = np.where(chosen, scores + logits, scores - 99)
            for prefix, final in (("itc_", scores), ("", reranked)):
                best_own = np.where(mine, final, -np.inf).max(axis=1, keepdims=True)
                ranks = ((final >= best_own) & ~mine).sum(axis=1)
                for k in (1, 5, 10):
                    totals.setdefault(f"{prefix}{way}_r{k}", []).append((ranks < k).mean())
    return {name: np.mean(values) for name, values in totals.items()}


def test_retrieval_of_stage1_is_that_of_all_pairs(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "jit", fast_jit)
    found, params = evaluation("stage1", tokenizer, rerank_top_k=K, folds=2)
    trained, frozen = split_params(params, ("vision",))
    metrics = found.run(trained, frozen)
    expected = brute_force(found, params, IMAGES // 2)
    assert metrics == pytest.approx(expected) and set(metrics) == set(found.metric_names)
    of_fold = {caption for captions in found.set.captions[:3] for caption in captions}
    assert set(found.predictions[:3]) <= of_fold

    # Killed while pairs are matched, it goes on behind them, and ends alike.
    calls, match, path = [], found._map, tmp_path / "kept.jsonl"

    def counted(function, *args, **settings):
        if function == found.task.match:
            calls.append(len(args[2]))
            if len(calls) == 2:
                raise KeyboardInterrupt
        return match(function, *args, **settings)

    counted.batch_size, counted.place, counted.whole_array = 2, match.place, match.whole_array
    found._map = counted
    with pytest.raises(KeyboardInterrupt):
        found.run(trained, frozen, Kept(path))
    done, calls[:] = calls[0], ["begins anew", "with another count"]
    assert found.run(trained, frozen, Kept(path)) == pytest.approx(metrics)
    assert sum(calls[2:]) + done == pairs_in_all(found)


def pairs_in_all(found):
    return len(found.set.images) // 2 * sum(len(c) for c in found.set.captions[:3]) * 2


@pytest.mark.parametrize("name", ["clip", "stage1"])
def test_a_list_of_classes_with_templates_is_compared_by_hand(
    name, tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setattr(jax, "jit", fast_jit)
    names, rng = ["red circle", "blue square", "green ring", "large star", "small cross", "tree"], 0
    rows = []
    for row in range(5):
        rng = np.random.default_rng(row)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{row}.png")
        rows.append({"image": f"{row}.png", "caption": names[row]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    templates = ("a photo of {}", "a {}")
    settings = {"kind": "classification", "source": str(tmp_path / "a.jsonl"),
                "classes": str(tmp_path / "classes.txt"), "templates": templates}  # fmt: skip
    found, params = evaluation(name, tokenizer, **settings)
    metrics = found.run(params, {})
    if name == "stage1":  # the nearest of several queries counts
        features = found.task.image_features(params, found.set.images)
        images = np.asarray(found.task.embed_images(params, features))
        assert images.shape[1] > 1
    else:
        images = np.asarray(found.task.embed_images(params, found.set.images))[:, None]
    of_classes = []
    for each in names:
        ids = found._encode([template.replace("{}", each) for template in templates])
        words = np.asarray(found.task.embed_texts(params, *ids))
        mean = np.mean([w / np.linalg.norm(w) for w in words], axis=0)
        of_classes.append(mean / np.linalg.norm(mean))
    order = np.argsort(-(images @ np.array(of_classes).T).max(axis=1), axis=1)
    for k in (1, 5):
        hits = [row in order[row][:k] for row in range(5)]
        assert metrics[f"top{k}_accuracy"] == np.mean(hits)
    assert found.predictions == [names[row[0]] for row in order]

    lists = {
        "red circle\nblue square\nred circle\n": ":3 has 'red circle' again, which line 1",
        "red circle\n\nblue square\n": "classes.txt:2 is empty",
        "red circle\n": "has 1 line",
        "red circle\nblue square\n": "3 of 5 images of .* are of no class of .*'green ring'",
    }
    for text, message in lists.items():
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            evaluation("clip", tokenizer, **settings)
    with pytest.raises(UserError, match="'a photo' of eval.templates has {} 0 times"):
        (tmp_path / "classes.txt").write_text("\n".join(names))
        evaluation("clip", tokenizer, **(settings | {"templates": ("a photo",)}))


@pytest.mark.parametrize("name", ["clip", "stage1"])
def test_a_linear_probe_finds_what_is_there_and_trains_nothing_else(
    name, tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setattr(jax, "jit", fast_jit)
    colours, rng = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}, 0
    for split, count in (("train", 24), ("test", 9)):
        rows = []
        for row in range(count):
            rng = np.random.default_rng((row, count))
            colour = list(colours)[row % 3]
            pixels = np.clip(colours[colour] + rng.normal(0, 20, (8, 8, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{split}{row}.png")
            rows.append({"image": f"{split}{row}.png", "caption": colour})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    (tmp_path / "classes.txt").write_text("\n".join(colours))
    settings = {"kind": "linear_probe", "source": str(tmp_path / "test.jsonl"), "max_images": 0,
                "classes": str(tmp_path / "classes.txt")}  # fmt: skip
    with pytest.raises(UserError, match="config.eval.probe_source is empty"):
        evaluation(name, tokenizer, **settings)
    settings["probe_source"] = str(tmp_path / "train.jsonl")
    found, params = evaluation(name, tokenizer, **settings)
    assert found.run(params, {}) == {"top1_accuracy": 1.0, "top5_accuracy": 1.0}
    assert found.predictions == [list(colours)[row % 3] for row in range(9)]
    assert found.notes == [f"The classifier was fitted to 24 images of {tmp_path}/train.jsonl."]
    with pytest.raises(UserError, match="8 of 24 images of .*train.jsonl are of no class"):
        (tmp_path / "classes.txt").write_text("red\ngreen\nyellow")
        evaluation(name, tokenizer, **(settings | {"source": settings["probe_source"]}))


def test_the_classifier_of_a_linear_probe_is_the_best_one():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(40, 5)), np.eye(3)[rng.integers(3, size=40)]

    def loss(weights, l2):
        logits = jax.nn.log_softmax(features @ weights[:-1] + weights[-1])
        return -(targets * logits).sum(1).mean() + l2 / 2 * (weights[:-1] ** 2).sum()

    for l2 in (0.01, 1.0):
        slope = np.asarray(jax.grad(loss)(fit(features, targets, l2), l2))
        np.testing.assert_allclose(slope, 0, atol=1e-4)
    strong, weak = (np.abs(fit(features, targets, l2)[:-1]).sum() for l2 in (1.0, 0.01))
    assert strong < weak / 3


@pytest.mark.parametrize("name", ["stage2", "blip_caption"])
def test_the_loss_of_captions_counts_each_word_once(name, tokenizer, monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)
    found, params = evaluation(name, tokenizer, kind="loss")
    metrics = found.run(params, {})
    config = found.config.copy_and_resolve_references()
    if "label_smoothing" in config.loss:
        config.loss.label_smoothing = 0.0
    task = make_task(config)
    preprocess = inputs.make_preprocess(config, task.fields[1:], tokenizer, None)
    rows = [
        preprocess.texts({"captions": [caption]}, np.random.default_rng(0)) | {"image": image}
        for image, captions in zip(found.set.images, found.set.captions, strict=True)
        for caption in captions
    ]
    batch = {field: np.stack([row[field] for row in rows]) for field in task.fields}
    whole = task.loss(params, batch, None)  # 24 rows, where the evaluation has batches of 4
    assert metrics["loss"] == pytest.approx(float(whole.loss), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(float(whole.loss)), rel=1e-5)
    accuracy = float(whole.metrics["token_accuracy"])
    assert metrics["token_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_examples_that_are_held_out_are_measured_as_the_training_log(tokenizer, monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)
    config = shallow(tiny_config("stage1"))
    config.data.train.source, config.eval.heldout_examples = "shapes:heldout", 6
    config.data.max_text_tokens, config.batch_size = 12, 4
    config.eval.batch_size, config.eval.rerank_top_k = 4, 2
    config.model.qformer.vocab_size = len(tokenizer)
    (whole,) = open_train_sources(config)
    source = open_source("shapes:heldout", image_size_px=8)
    assert len(whole.source) == len(source) - 6
    task = make_task(config)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    both = Evaluations(task, tokenizer, mesh)
    last = [source[len(source) - 6 + row]["image_id"] for row in range(6)]
    assert [each.kind for each in both] == ["retrieval", "loss"]
    assert both.by_name[""].set.image_ids.tolist() == last
    found, params = both.by_name["in_batch"], random_params(task)
    metrics = found.run(params, {})
    assert set(metrics) == set(found.metric_names)
    # one batch of four: two of the six are left over
    ids, mask = found._encode([captions[0] for captions in found.set.captions[:4]])
    images = found.set.images[:4]
    batch = {"image": images, "text_ids": ids, "text_mask": mask, "image_id": np.arange(4)}
    expected = fast_jit(lambda params, batch: task.loss(params, batch, None))(params, batch)
    assert metrics["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert metrics["itm_accuracy"] == pytest.approx(float(expected.metrics["itm_accuracy"]))
    embeds = np.asarray(task.embed_images(params, task.image_features(params, images)))
    words = np.asarray(task.embed_texts(params, ids, mask))
    scores = np.stack([(queries @ words.T).max(axis=0) for queries in embeds])
    hits = [scores.argmax(axis=axis) == np.arange(4) for axis in (0, 1)]
    assert metrics["itc_accuracy"] == pytest.approx(np.mean(hits))
    with pytest.raises(UserError, match="leaves nothing of the 500 examples"):
        config.eval.heldout_examples = 500
        open_train_sources(config)


def test_settings_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(UserError, match="eval.folds=4 does not divide the 6 images"):
        evaluation("clip", tokenizer, folds=4)
    with pytest.raises(UserError, match="config.eval.classes is empty"):
        evaluation("clip", tokenizer, kind="classification")
    found, _ = evaluation("clip", tokenizer)
    evaluations = Evaluations(found.task, tokenizer, found._mesh)
    evaluations.check_metric("t2i_r5")
    with pytest.raises(UserError, match="did you mean t2i_r5"):
        evaluations.check_metric("t2i_r2")
