"""MED in its three roles against transformers; who sees whom; its cache against the full pass."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec as P

from jaxblip import sharding
from jaxblip.errors import UserError
from jaxblip.interop.entries import Layout
from jaxblip.interop.families.blip import med_config, med_decoder_entries, med_entries
from jaxblip.models.attention import causal_mask, padding_mask
from jaxblip.models.layers import empty_cache
from jaxblip.models.med import MedConfig, MedDecoder
from reference import randomized
from reference_blip import TEXT, VOCAB, as_tree, random_texts
from tiny_checkpoints import shapes_of
from tiny_tasks import fast_jit

ROWS, TOKENS, WIDTH, SOURCE_WIDTH = 3, 5, 16, 20
SIZES = dict(
    hidden_size=WIDTH, encoder_hidden_size=SOURCE_WIDTH, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, vocab_size=VOCAB, max_position_embeddings=12,
)  # fmt: skip
CONFIG = med_config(SIZES)
MODEL = MedDecoder(CONFIG)
IDS, VALID = random_texts((6, 3, 4))
SOURCE = np.random.default_rng(1).normal(size=(ROWS, TOKENS, SOURCE_WIDTH)).astype(np.float32)
SOURCE_VALID = np.arange(TOKENS) < np.array([5, 2, 4])[:, None]
MASKS = {"encoder": padding_mask(jnp.array(VALID)), "decoder": causal_mask(jnp.array(VALID))}


@functools.cache
def reference() -> transformers.BlipTextLMHeadModel:
    return randomized(transformers.BlipTextLMHeadModel(transformers.BlipTextConfig(**SIZES)))


def run_all(module, ids, mask, source, source_valid, positions=None):
    source = None if source is None else module.read_source(source)
    hidden, _ = module(ids, mask, source, source_valid, positions=positions)
    return hidden, module.logits(hidden)


@functools.cache
def params():
    inputs = IDS, MASKS["decoder"], SOURCE, None
    shapes = shapes_of(MODEL, *inputs, method=run_all)
    arrays = {key: tensor.numpy() for key, tensor in reference().state_dict().items()}
    return as_tree(Layout(med_decoder_entries(CONFIG)), arrays, shapes)


def forward(params, *inputs):
    return MODEL.apply({"params": params}, *inputs, method=run_all)


run = fast_jit(forward)


def theirs(is_decoder, rows=slice(None), source=None):
    with torch.no_grad():
        return reference()(
            torch.tensor(IDS[rows]),
            torch.tensor(VALID[rows]).long(),
            encoder_hidden_states=None if source is None else torch.tensor(source),
            is_decoder=is_decoder,
            output_hidden_states=True,
        )


def assert_same(actual, expected, valid):
    hidden, logits = actual
    states = expected.hidden_states[-1].numpy()
    np.testing.assert_allclose(hidden[valid], states[valid], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[valid], expected.logits.numpy()[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("role", MASKS)
@pytest.mark.parametrize("source", [None, SOURCE])
def test_every_role_gives_the_states_and_scores_of_transformers(role, source):
    actual = run(params(), IDS, MASKS[role], source, None)
    assert_same(actual, theirs(role == "decoder", source=source), VALID)


@pytest.mark.parametrize("role", MASKS)
def test_padding_of_a_source_is_not_seen(role):
    # Row by row, for transformers 5 ignores the mask of a source.
    hidden, logits = run(params(), IDS, MASKS[role], SOURCE, SOURCE_VALID)
    for row in range(ROWS):
        rows = slice(row, row + 1)
        expected = theirs(role == "decoder", rows, SOURCE[rows][:, SOURCE_VALID[row]])
        assert_same((hidden[rows], logits[rows]), expected, VALID[rows])


def test_the_roles_and_sources_differ():
    """Else the comparisons above could not tell them apart."""
    results = [
        run(params(), IDS, mask, source, valid)[0]
        for mask in MASKS.values()
        for source, valid in ((None, None), (SOURCE, None), (SOURCE, SOURCE_VALID))
    ]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert np.abs(one - other)[1:][VALID[1:]].max() > 0.05


@pytest.mark.parametrize("role", MASKS)
def test_gradients_show_who_sees_whom(role):
    def hidden(offset):
        table = jnp.asarray(params()["text_embeddings"]["position_embedding"]["embedding"])
        moved = params()["text_embeddings"] | {
            "position_embedding": {"embedding": table.at[:TEXT].add(offset)}
        }
        tree = params() | {"text_embeddings": moved}
        return forward(tree, IDS[1:2], MASKS[role][1:2], SOURCE[1:2], None)[0][0]

    jacobian = fast_jit(jax.jacobian(hidden))(jnp.zeros((TEXT, WIDTH)))
    depends = np.abs(jacobian).sum(axis=(1, 3)) > 0
    seen = np.broadcast_to(MASKS[role][1, 0], (TEXT, TEXT))
    np.testing.assert_array_equal(depends, seen | np.eye(TEXT, dtype=bool))


@pytest.mark.parametrize("chunks", [(6,), (1, 1, 1, 1, 1, 1), (3, 1, 2)])
def test_cache_gives_the_same_as_the_full_pass(chunks):
    expected, _ = run(params(), IDS, MASKS["decoder"], SOURCE, SOURCE_VALID)
    capacity = 9
    mask = jnp.pad(MASKS["decoder"], ((0, 0),) * 3 + ((0, capacity - TEXT),))

    @fast_jit
    def read(params):
        def parts(module):
            source, start, outputs = module.read_source(SOURCE), 0, []
            # What stands in places not written yet must not matter.
            cache = jax.tree.map(lambda x: x + 7.0, empty_cache(CONFIG, ROWS, capacity))
            for size in chunks:
                part = slice(start, start + size)
                hidden, cache = module(
                    IDS[:, part],
                    mask[:, :, part],
                    source,
                    SOURCE_VALID,
                    positions=jnp.arange(TEXT)[None, part],
                    cache=cache,
                    cache_position=start,
                )
                outputs.append(hidden)
                start += size
            return jnp.concatenate(outputs, axis=1)

        return MODEL.apply({"params": params}, method=parts)

    np.testing.assert_allclose(read(params())[VALID], expected[VALID], rtol=1e-4, atol=1e-5)


def test_adjacent_rows_may_share_a_source():
    ids, valid = random_texts((6, 3, 4, 5, 1, 6), seed=2)
    mask = causal_mask(jnp.array(valid))
    shared, _ = run(params(), ids, mask, SOURCE, SOURCE_VALID)
    repeated = [np.repeat(x, 2, axis=0) for x in (SOURCE, SOURCE_VALID)]
    expected, _ = run(params(), ids, mask, *repeated)
    np.testing.assert_allclose(shared, expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_active_exactly_with_a_key():
    model = MedDecoder(dataclasses.replace(CONFIG, hidden_dropout=0.1, attention_dropout=0.1))

    @fast_jit
    def hidden(rngs):
        inputs = IDS, MASKS["decoder"], SOURCE, None
        return model.apply({"params": params()}, *inputs, method=run_all, rngs=rngs)[0]

    plain, _ = run(params(), IDS, MASKS["decoder"], SOURCE, None)
    np.testing.assert_allclose(hidden(None), plain, rtol=1e-5, atol=1e-5)
    dropped = [hidden({"dropout": jax.random.key(seed)}) for seed in (0, 1)]
    assert np.abs(dropped[0] - plain).max() > 0.1
    assert np.abs(dropped[0] - dropped[1]).max() > 0.1


def test_embeddings_are_dropped_too():
    """Seen where the blocks add nothing, so that nothing shows of their own dropout."""
    model = MedDecoder(dataclasses.replace(CONFIG, hidden_dropout=0.5))

    def silenced(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf * 0 if re.search("(out|down)/", name) else leaf

    @fast_jit
    def hidden(rngs):
        variables = {"params": jax.tree.map_with_path(silenced, params())}
        inputs = IDS, MASKS["decoder"], SOURCE, None
        return model.apply(variables, *inputs, method=run_all, rngs=rngs)[0]

    assert np.abs(hidden({"dropout": jax.random.key(0)}) - hidden(None)).max() > 0.1


def test_every_parameter_has_its_place_on_the_mesh():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    specs = jax.tree.map(lambda x: x.spec, sharding.tree_shardings(params(), mesh))
    assert specs["source_key_values"]["key"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["layers"]["cross_attention"]["out"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["layers"]["cross_attention_norm"]["scale"] == P(None, None)
    assert specs["itg_head"]["dense"]["kernel"] == P("fsdp", None)


def test_defaults_are_bert_base_with_a_cross_attention_in_every_block():
    config = MedConfig()
    inputs = IDS, MASKS["decoder"], jnp.zeros((ROWS, 1, 768)), None
    shapes = shapes_of(MedDecoder(config), *inputs, method=run_all)
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    attention, norm = 4 * (768 * 768 + 768), 2 * 768
    mlp = 2 * 768 * 3072 + 3072 + 768
    assert sizes["text_embeddings"] == (30524 + 512) * 768
    blocks = sizes["layers"] + sizes["source_key_values"]
    assert blocks == 12 * (2 * attention + mlp + 3 * norm)
    assert len(med_entries(config)) == 4 + 12 * (2 * 10 + 6)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="num_heads=5 does not divide width=16"):
        MedConfig(width=16, num_heads=5)
