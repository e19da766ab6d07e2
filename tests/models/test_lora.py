"""Low-rank factors against PyTorch by hand; what they are at the start, in training and merged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from reference import opt_params, random_opt, randomized
from reference_llama import llama_params, random_llama
from reference_t5 import random_t5, t5_params
from reference_vision import siglip_vit_params
from tiny_tasks import fast_jit, random_batch, random_params, run, shallow, tiny_config
from transformers import SiglipVisionConfig, SiglipVisionModel

from jaxblip.errors import UserError
from jaxblip.interop.families.llama import llama_config
from jaxblip.interop.families.opt import opt_config
from jaxblip.interop.families.t5 import t5_config
from jaxblip.models.language_models import answer_hidden, continued_hidden, make_language_model
from jaxblip.models.lora import LoraConfig, adapted, is_factor, merged_kernel, with_factors
from jaxblip.models.t5 import shift_right
from jaxblip.models.vit import VisionTransformer, VitConfig
from jaxblip.tasks import make_task

RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 13, (2, 5)).astype(np.int32)
OTHERS = RNG.integers(3, 13, (2, 4)).astype(np.int32)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
VALID = np.ones(IDS.shape, bool)


def opt():
    model = random_opt()
    ours = make_language_model(opt_config(model.config.to_dict()))
    at, of = "model.decoder.layers.{}.", "layers/"
    names = {
        "attention/query": "self_attn.q_proj",
        "attention/out": "self_attn.out_proj",
        "mlp/up": "fc1",
        "mlp/down": "fc2",
    }
    names = {of + path: at + name for path, name in names.items()}
    return model, ours, opt_params(model), continued, names


def llama():
    model = random_llama("llama")
    ours = make_language_model(llama_config(model.config.to_dict()))
    at, of = "model.layers.{}.", "layers/"
    names = {
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
    }
    names = {of + path: at + name for path, name in names.items()}
    return model, ours, llama_params(model), continued, names


def t5():
    model = random_t5("blip2")
    ours = make_language_model(t5_config(model.config.to_dict()))
    names = {
        "encoder/layers/attention/query": "encoder.block.{}.layer.0.SelfAttention.q",
        "decoder/layers/attention/query": "decoder.block.{}.layer.0.SelfAttention.q",
        "decoder/layers/cross_attention/query": "decoder.block.{}.layer.1.EncDecAttention.q",
        "encoder/layers/attention/value": "encoder.block.{}.layer.0.SelfAttention.v",
        "decoder/layers/attention/value": "decoder.block.{}.layer.0.SelfAttention.v",
        "encoder_key_values/value": "decoder.block.{}.layer.1.EncDecAttention.v",
        "encoder/layers/mlp/up": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        "decoder/layers/mlp/up": "decoder.block.{}.layer.2.DenseReluDense.wi_1",
    }
    return model, ours, t5_params(model), answered, names


def vit():
    config = SiglipVisionConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = randomized(SiglipVisionModel(config))
    ours = VisionTransformer(
        VitConfig(
            image_size_px=8, patch_size_px=4, width=12, num_layers=2, num_heads=2, mlp_width=20,
            activation="gelu_tanh", has_cls_token=False,
        )  # fmt: skip
    )
    encoder = "vision_model.encoder" if hasattr(model, "vision_model") else "encoder"
    names = {
        "layers/attention/query": encoder + ".layers.{}.self_attn.q_proj",
        "layers/mlp/down": encoder + ".layers.{}.mlp.fc2",
    }
    return model, ours, siglip_vit_params(model), seen, names


def continued(model, params, theirs):
    def logits(model, ids):
        return model.logits(continued_hidden(model, model.embed(ids), jnp.asarray(VALID)))

    expected = theirs(torch.tensor(IDS).long()).logits
    return lambda params: model.apply({"params": params}, IDS, method=logits), expected


def answered(model, params, theirs):
    def logits(model, ids, others):
        return model.logits(answer_hidden(model, model.embed(ids), jnp.asarray(VALID), others))

    said = torch.tensor(np.asarray(shift_right(jnp.asarray(OTHERS), 0))).long()
    expected = theirs(input_ids=torch.tensor(IDS).long(), decoder_input_ids=said).logits
    return lambda params: model.apply({"params": params}, IDS, OTHERS, method=logits), expected


def seen(model, params, theirs):
    kept = {}
    inner = getattr(theirs, "vision_model", theirs)
    inner.encoder.register_forward_hook(
        lambda module, inputs, output: kept.update(x=output.last_hidden_state)
    )
    theirs(torch.tensor(IMAGES.transpose(0, 3, 1, 2)))
    return lambda params: model.apply({"params": params}, IMAGES), kept["x"]


class ByHand(torch.nn.Module):
    """A linear map, and beside it alpha / rank times x A B."""

    def __init__(self, linear, a, b, scale):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = (torch.nn.Parameter(torch.tensor(factor)) for factor in (a, b))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.a @ self.b)

    @property
    def weight(self):  # whose dtype T5 looks at
        return self.linear.weight


def random_factors(params, seed=1):
    rng = np.random.default_rng(seed)
    flat = flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if is_factor(path):
            flat[path] = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
    return flat


@pytest.mark.parametrize("make", [opt, llama, t5, vit])
def test_outputs_and_gradients_are_those_of_pytorch_by_hand(make):
    theirs, model, params, outputs, names = make()
    targets = tuple(dict.fromkeys(path.split("/")[-1] for path in names))
    # All of them under one prefix each, which the model has when it is a part of a whole.
    config = LoraConfig(rank=2, alpha=5.0, targets=targets, parts=("part",))
    flat = random_factors(with_factors({"part": params}, config, jax.random.key(0))["part"])
    adapted_here = {path.rpartition("/")[0] for path in flat if is_factor(path)}
    assert adapted_here == set(names)
    by_hand = {}
    for path, name in names.items():
        for layer, (a, b) in enumerate(zip(flat[path + "/lora_a"], flat[path + "/lora_b"])):  # noqa: B905
            owner, _, last = name.format(layer).rpartition(".")
            owner = theirs.get_submodule(owner)
            linear = getattr(owner, last)
            module = ByHand(linear, a.reshape(-1, 2), b.reshape(2, -1), 2.5)
            setattr(owner, last, module)
            by_hand[path, layer] = module

    compute, expected = outputs(adapted(model, config), params, theirs)
    weights = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    loss = (expected * torch.tensor(weights)).sum()
    loss.backward()
    factors = {path: leaf for path, leaf in flat.items() if is_factor(path)}

    def our_loss(factors):
        output = compute(unflatten_dict(flat | factors, sep="/"))
        return jnp.sum(output * weights), output

    (ours, output), gradients = fast_jit(jax.value_and_grad(our_loss, has_aux=True))(factors)
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-4, atol=1e-3)
    for path in names:
        for name in ("a", "b"):
            gradient = gradients[f"{path}/lora_{name}"]
            for layer, of_layer in enumerate(gradient):
                theirs_too = getattr(by_hand[path, layer], name).grad.numpy()
                scale = np.abs(theirs_too).max()
                assert scale > 0
                np.testing.assert_allclose(
                    of_layer.reshape(theirs_too.shape), theirs_too, rtol=1e-3, atol=1e-4 * scale
                )


def lora_config(name, dropout=0.0, **changes):
    """A tiny task with factors beside most maps of its frozen language model and encoder."""
    config = shallow(tiny_config(name))
    parts = [part for part in ("vision", "language_model") if part in config.frozen]
    targets = ("query", "value", "out", "up")
    config.lora.update(rank=2, alpha=3.0, targets=targets, parts=tuple(parts), dropout=dropout)
    config.lora.update(changes)
    return config


@pytest.mark.parametrize("name", ["stage2", "stage2_t5"])
def test_it_starts_as_the_base_model_and_merges_into_it(name):
    """With dropout too: what is dropped is the input of a product that is zero."""
    task = make_task(lora_config(name, dropout=0.5))
    base = make_task(shallow(tiny_config(name)))
    batch = random_batch(task)
    params = flatten_dict(random_params(task), sep="/")
    plain = {path: leaf for path, leaf in params.items() if not is_factor(path)}
    fresh = with_factors(unflatten_dict(plain, sep="/"), task.lora, jax.random.key(0))
    fresh = flatten_dict(fresh, sep="/")
    a = {path: leaf for path, leaf in fresh.items() if path.endswith("lora_a")}
    assert a and all(np.abs(leaf).min() > 0 for leaf in a.values())
    start = plain | {path: leaf for path, leaf in fresh.items() if is_factor(path)}

    loss = fast_jit(lambda p, rng: task.loss(unflatten_dict(p, sep="/"), batch, rng).loss)
    base_loss = fast_jit(lambda p: base.loss(unflatten_dict(p, sep="/"), batch, None).loss)
    expected = base_loss(plain)
    np.testing.assert_allclose(loss(start, None), expected, rtol=1e-6)
    np.testing.assert_allclose(loss(start, jax.random.key(3)), expected, rtol=1e-6)

    merged = dict(plain)
    for path in a:
        at = path.removesuffix("lora_a")
        factors = params[at + "lora_a"], params[at + "lora_b"]
        merged[at + "kernel"] = merged_kernel(plain[at + "kernel"], *factors, task.lora)
    adapted_loss = loss(params, None)
    assert abs(adapted_loss - expected) > 1e-3
    np.testing.assert_allclose(base_loss(merged), adapted_loss, rtol=1e-5)


def test_inputs_are_dropped_in_training():
    """Also those of the keys that the decoder of T5 reads."""
    parts = ("language_model/encoder_key_values",)
    task = make_task(lora_config("stage2_t5", 0.5, targets=("key",), parts=parts))
    params, batch = random_params(task), random_batch(task)
    trained, evaluated = (
        fast_jit(task.loss)(params, batch, key).loss for key in (jax.random.key(0), None)
    )
    assert abs(trained - evaluated) > 1e-4


def test_inputs_of_an_encoder_are_dropped_in_stage_1():
    """With the same draws of negatives, and no other dropout."""
    dropped, kept = (
        make_task(lora_config("stage1", rate, targets=("query",))) for rate in (0.5, 0.0)
    )
    params, batch = random_params(dropped), random_batch(dropped)
    first, second = (
        fast_jit(task.loss)(params, batch, jax.random.key(0)).loss for task in (dropped, kept)
    )
    assert abs(first - second) > 1e-4


def test_two_steps_on_a_mesh_are_those_of_one_device():
    """The factors, and layer-wise decay: each device has its part of both."""
    config = lora_config("stage2", dropout=0.1)
    config.optimizer.update(eps=1.0, peak_lr=1.0)
    config.optimizer.layer_decay.language_model = 0.5
    before = flatten_dict(random_params(make_task(config)), sep="/")
    one, one_history, _ = run(config, {})
    many, history, frozen = run(config, {"data": 2, "fsdp": 2, "tensor": 2})
    for expected, metrics in zip(one_history, history, strict=True):
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    ours = flatten_dict(many.params, sep="/")
    split = 0
    for path, leaf in flatten_dict(one.params, sep="/").items():
        moved = np.asarray(leaf) - before[path]
        np.testing.assert_allclose(ours[path] - before[path], moved, rtol=1e-4, atol=1e-6)
        split += is_factor(path) and not ours[path].is_fully_replicated
    assert split == sum(map(is_factor, ours))
    assert not any(is_factor(path) for path in flatten_dict(frozen, sep="/"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=-1), "lora.rank=-1 must be positive"),
        (dict(alpha=0.0), "lora.alpha=0.0 must be positive"),
        (dict(dropout=1.0), "lora.dropout=1.0 must be"),
        (dict(targets=()), "one of them is empty"),
        (dict(targets=("qurey",)), "'qurey', .* nearest is 'query'"),
        (dict(parts=("qformer",)), "'qformer', which trains itself: add it to config.frozen"),
        (dict(parts=("vision/position_embedding",)), "has no linear maps|no linear maps"),
    ],
)
def test_what_cannot_be_is_said(changes, message):
    with pytest.raises(UserError, match=message):
        task = make_task(lora_config("stage2", **changes))
        jax.eval_shape(task.init, jax.random.key(0))


def test_an_encoder_with_factors_has_no_features_of_before():
    config = lora_config("stage2")
    config.data.features = "features"
    with pytest.raises(UserError, match="here it trains: .* config.lora.parts"):
        make_task(config)
