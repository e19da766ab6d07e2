"""The T5 language model against transformers; its cache against the full pass."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P
from transformers.models.t5.modeling_t5 import T5Attention as TorchT5Attention

from jaxblip.errors import UserError
from jaxblip.interop.families.t5 import t5_config
from jaxblip.losses.language_modeling import token_cross_entropy
from jaxblip.models.attention import causal_mask
from jaxblip.models.layers import empty_cache
from jaxblip.models.t5 import T5Config, T5LanguageModel, position_buckets, shift_right
from jaxblip.sharding import make_mesh, tree_shardings
from reference_t5 import VARIANTS, random_t5, t5_params, t5_shapes, with_own_head

BATCH, INPUT, LENGTH, WIDTH = 3, 7, 6, 16
INPUT_LENGTHS, LENGTHS = np.array([7, 3, 5]), np.array([4, 6, 2])


@partial(jax.jit, static_argnames=("model", "method"))
def compiled(model, *inputs, method, **kwargs):
    return model.apply(*inputs, method=method, **kwargs)


class Example:
    """A model of transformers, the same in jaxblip, and inputs for both."""

    def __init__(self, variant, padding="right", dtype=jnp.float32, **changes):
        rng = np.random.default_rng(0)
        self.reference = random_t5(variant)
        config = t5_config(self.reference.config.to_dict())
        self.model = T5LanguageModel(dataclasses.replace(config, **changes), dtype)
        self.params = jax.tree.map(lambda x: jnp.asarray(x, dtype), t5_params(self.reference))
        self.embeddings = rng.normal(size=(BATCH, INPUT, WIDTH)).astype(np.float32)
        valid = np.arange(INPUT) < INPUT_LENGTHS[:, None]
        self.valid = valid if padding == "right" else valid[:, ::-1].copy()
        self.targets = rng.integers(1, 13, (BATCH, LENGTH))
        self.counts = np.arange(LENGTH) < LENGTHS[:, None]

    def apply(self, method, *inputs, **kwargs):
        return compiled(self.model, {"params": self.params}, *inputs, method=method, **kwargs)

    def decoder_embeddings(self):
        return self.apply("embed", shift_right(jnp.asarray(self.targets), 0))

    def logits(self, embeddings):
        mask = causal_mask(jnp.asarray(self.counts))
        hidden = self.apply(
            "__call__", embeddings, jnp.asarray(self.valid), self.decoder_embeddings(), mask
        )
        return self.apply("logits", hidden)

    def loss(self, embeddings):
        logits = self.logits(embeddings)
        loss = token_cross_entropy(logits, self.targets, jnp.asarray(self.counts)).loss
        return loss, logits

    def torch_output(self, embeddings):
        """Of transformers, with its own way from labels to decoder inputs."""
        counts = torch.tensor(self.counts)
        return self.reference(
            inputs_embeds=embeddings,
            attention_mask=torch.tensor(self.valid).long(),
            labels=torch.tensor(self.targets).masked_fill(~counts, -100),
            decoder_attention_mask=counts.long(),
        )


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_output_is_that_of_transformers(variant, padding):
    example = Example(variant, padding)
    with torch.no_grad():
        expected = example.reference.encoder(
            inputs_embeds=torch.tensor(example.embeddings),
            attention_mask=torch.tensor(example.valid).long(),
        ).last_hidden_state.numpy()
    hidden = example.apply("encode", example.embeddings, jnp.asarray(example.valid))
    valid = example.valid
    np.testing.assert_allclose(hidden[valid], expected[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradient_are_those_of_transformers(variant):
    example = Example(variant)
    embeddings = torch.tensor(example.embeddings, requires_grad=True)
    output = example.torch_output(embeddings)
    output.loss.backward()

    loss_and_gradient = jax.jit(jax.value_and_grad(example.loss, has_aux=True))
    (loss, logits), gradient = loss_and_gradient(example.embeddings)
    counts = example.counts
    expected = output.logits.detach().numpy()
    np.testing.assert_allclose(logits[counts], expected[counts], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, output.loss.item(), rtol=1e-5)
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(gradient, embeddings.grad, rtol=1e-3, atol=1e-5 * scale)
    assert not np.asarray(gradient)[~example.valid].any()


def test_activations_differ():
    """Else the comparisons above could not tell the variants apart."""
    hidden = [Example(variant) for variant in ("flan_t5", "blip2")]
    one, other = (x.apply("encode", x.embeddings, jnp.asarray(x.valid)) for x in hidden)
    assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("chunks", [(6,), (1, 1, 1, 1, 1, 1), (3, 1, 2)])
def test_cache_gives_the_same_as_the_full_pass(chunks):
    example, capacity = Example("flan_t5"), 9
    valid = jnp.asarray(example.valid)
    encoder = example.apply("read_encoder", example.apply("encode", example.embeddings, valid))
    embeddings, causal = example.decoder_embeddings(), causal_mask(jnp.asarray(example.counts))
    expected, none = example.apply("decode", embeddings, causal, encoder, valid)
    assert none is None

    mask = jnp.pad(causal, ((0, 0),) * 3 + ((0, capacity - LENGTH),))
    # What stands in places not written yet must not matter.
    empty = empty_cache(example.model.config, BATCH, capacity)
    cache = jax.tree.map(lambda x: x + 7.0, empty)
    outputs, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        output, cache = example.apply(
            "decode", embeddings[:, part], mask[:, :, part], encoder, valid, cache, start
        )
        outputs.append(output)
        start += size
    counts = example.counts
    outputs = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(outputs[counts], expected[counts], rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, empty)


def test_adjacent_rows_may_share_an_input():
    example, copies = Example("flan_t5"), 2
    valid = jnp.asarray(example.valid)
    encoder = example.apply("read_encoder", example.apply("encode", example.embeddings, valid))
    ids = np.random.default_rng(1).integers(0, 13, (BATCH * copies, LENGTH))
    mask = causal_mask(jnp.ones(ids.shape, bool))
    embeddings = example.apply("embed", ids)
    shared, _ = example.apply("decode", embeddings, mask, encoder, valid)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), encoder)
    expected, _ = example.apply(
        "decode", embeddings, mask, repeated, jnp.repeat(valid, copies, axis=0)
    )
    np.testing.assert_allclose(shared, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 5), (16, 20), (64, 256)])
def test_position_buckets(bidirectional, num_buckets, max_distance):
    # A key behind the query counts as distance 0 where the decoder looks back only.
    offset = np.arange(-400, 401)[None]
    expected = TorchT5Attention._relative_position_bucket(
        torch.tensor(offset), bidirectional, num_buckets, max_distance
    )
    buckets = position_buckets(
        jnp.asarray(offset),
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    np.testing.assert_array_equal(buckets, expected)
    assert set(np.unique(buckets)) <= set(range(num_buckets))


def test_shift_right():
    example = Example("flan_t5")
    expected = example.reference._shift_right(torch.tensor(example.targets))
    np.testing.assert_array_equal(shift_right(jnp.asarray(example.targets), 0), expected)
    assert (shift_right(jnp.asarray(example.targets), 5)[:, 0] == 5).all()


def lookups(jaxpr, table_shape):
    """Number of look-ups in tables of a shape, each as often as its loop runs."""
    found = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "gather":
            found += equation.invars[0].aval.shape == table_shape
        for inner in jaxprs_in_params(equation.params):
            found += times * lookups(inner, table_shape)
    return found


@pytest.mark.parametrize("num_layers", [2, 6])
def test_the_position_bias_of_a_stack_is_computed_once_for_all_layers(num_layers):
    config = T5Config(
        vocab_size=13, width=WIDTH, num_layers=num_layers, num_decoder_layers=num_layers,
        num_heads=3, head_width=4, mlp_width=8,
    )  # fmt: skip
    model = T5LanguageModel(config)
    inputs = jnp.zeros((BATCH, INPUT, WIDTH)), jnp.ones((BATCH, INPUT), bool)
    targets = jnp.zeros((BATCH, LENGTH, WIDTH)), causal_mask(jnp.ones((BATCH, LENGTH), bool))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs, *targets)
    jaxpr = jax.make_jaxpr(model.apply)(params, *inputs, *targets).jaxpr
    assert lookups(jaxpr, (config.num_position_buckets, config.num_heads)) == 2  # a stack each


def test_remat_changes_nothing():
    gradients = []
    for example in Example("flan_t5"), Example("flan_t5", remat="full"):
        gradients.append(jax.jit(jax.grad(example.loss, has_aux=True))(example.embeddings)[0])
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_dropout_is_active_with_a_key_alone():
    example = Example("flan_t5", dropout=0.5)
    inputs = "encode", example.embeddings, jnp.asarray(example.valid)
    without = example.apply(*inputs)
    one, other = (example.apply(*inputs, rngs={"dropout": jax.random.key(i)}) for i in range(2))
    np.testing.assert_allclose(without, Example("flan_t5").apply(*inputs), rtol=1e-6)
    assert np.abs(one - other).max() > 0.1 and np.abs(one - without).max() > 0.1


def test_bfloat16_is_as_close_to_float32_as_that_of_transformers():
    example = Example("flan_t5")
    expected = example.logits(example.embeddings)
    logits = Example("flan_t5", dtype=jnp.bfloat16).logits(example.embeddings)
    assert logits.dtype == jnp.float32
    with torch.no_grad():
        example.reference.bfloat16()
        reference = example.torch_output(torch.tensor(example.embeddings).bfloat16()).logits

    def error(logits):
        return np.abs(logits - expected)[example.counts].mean()

    assert error(logits.astype(jnp.float32)) < 1.5 * error(reference.float().numpy())


@pytest.mark.parametrize(
    "width, heads, mlp_width, millions", [(2048, 32, 5120, 2849.757), (4096, 64, 10240, 11135.332)]
)
def test_parameter_counts_of_flan_t5_xl_and_xxl(width, heads, mlp_width, millions):
    sizes = dict(num_layers=24, num_heads=heads)
    shapes = t5_shapes(T5Config(width=width, num_decoder_layers=24, mlp_width=mlp_width, **sizes))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    config = transformers.T5Config(d_model=width, d_ff=mlp_width, **sizes, **VARIANTS["flan_t5"])
    with torch.device("meta"):
        reference = with_own_head(transformers.T5ForConditionalGeneration(config))
    assert count == sum(p.numel() for p in reference.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialization_makes_the_parameters_of_the_weights(variant):
    reference = random_t5(variant)
    shapes = t5_shapes(t5_config(reference.config.to_dict()))
    expected = jax.tree.map(np.shape, t5_params(reference))
    assert jax.tree.map(jnp.shape, shapes) == expected


def test_initial_scales():
    """Those of transformers' `_init_weights`; the norm before the head makes up for its width."""
    config = T5Config(
        vocab_size=50, width=64, num_layers=1, num_decoder_layers=1, num_heads=8, head_width=16,
        mlp_width=96,
    )  # fmt: skip
    valid, embeddings = jnp.ones((1, 2), bool), jnp.zeros((1, 2, 64))
    inputs = embeddings, valid, embeddings, causal_mask(valid)
    params = jax.jit(T5LanguageModel(config).init)(jax.random.key(0), *inputs)["params"]
    attention, mlp = params["decoder"]["layers"]["attention"], params["encoder"]["layers"]["mlp"]
    for kernel, expected in [
        (params["token_embedding"]["embedding"], 1.0),
        (attention["query"]["kernel"], (64 * 16) ** -0.5),
        (attention["key"]["kernel"], 64**-0.5),
        (attention["out"]["kernel"], (8 * 16) ** -0.5),
        (params["encoder_key_values"]["value"]["kernel"], 64**-0.5),
        (mlp["gate"]["kernel"], 64**-0.5),
        (mlp["down"]["kernel"], 96**-0.5),
        (params["encoder"]["relative_position_bias"], 64**-0.5),
        (params["lm_head"]["kernel"], 64**-0.5),
    ]:
        assert np.std(kernel) == pytest.approx(expected, rel=0.15)


def test_every_parameter_has_a_place_on_a_mesh():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    shapes = t5_shapes(T5Config())
    specs = jax.tree.map(lambda x: x.spec, tree_shardings(shapes, mesh))
    layers = specs["decoder"]["layers"]
    assert specs["encoder"]["relative_position_bias"] == P(None, "tensor")
    assert specs["encoder_key_values"]["key"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert layers["cross_attention"]["out"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert layers["mlp"]["gate"]["kernel"] == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(activation="swish"), "activation='swish'"),
        (dict(num_position_buckets=7), "num_position_buckets=7"),
        (dict(max_position_distance=16), "max_position_distance=16"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(UserError, match=message):
        T5Config(**fields)
