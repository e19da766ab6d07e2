"""Every class there and back: transformers' outputs after import, its bits after export."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from jaxblip.errors import UserError
from jaxblip.interop.entries import Layout
from jaxblip.interop.families import blip2, clip, opt
from jaxblip.interop.files import TensorInfo, Weights, open_weights
from jaxblip.interop.load import check, load_params, stored_params
from jaxblip.interop.save import save_params
from jaxblip.models.attention import causal_mask
from jaxblip.models.opt import OptLanguageModel, token_positions
from tiny_checkpoints import (
    IMAGE_TOKEN,
    QUERIES,
    TEXT,
    VOCAB,
    WORDS,
    config_of,
    random_model,
    same_bits,
    save,
    shapes_of,
)
from tiny_tasks import fast_jit

CLASSES = (
    "OPTForCausalLM",
    "CLIPModel",
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
PIXELS = torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy())
IDS = np.random.default_rng(1).integers(3, WORDS, (2, TEXT))
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


@functools.cache
def saved(name: str, root, dtype: str = "float32"):
    """The class's tiny checkpoint on disk."""
    model = random_model(name).to(getattr(torch, dtype))
    return save(model, root / f"{name}-{dtype}")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def ours(name: str, hf: dict) -> tuple:
    """Model, layout, shapes of the parameters, and the config that is written back."""
    if name == "OPTForCausalLM":
        config = opt.opt_config(hf)
        model = OptLanguageModel(config)
        hidden = jnp.zeros((1, 2, config.width))
        inputs = hidden, jnp.zeros((1, 2), int), jnp.ones((1, 1, 2, 2), bool)
        shapes = shapes_of(model, *inputs)
        words = jax.ShapeDtypeStruct((config.vocab_size, config.width), np.float32)
        shapes |= {"token_embedding": {"embedding": words}}
        return model, opt.opt_layout(config), shapes, opt.hf_opt_config(config)
    inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, TEXT), int), jnp.ones((1, TEXT), bool)
    if name == "CLIPModel":
        model = clip.clip_model(hf)
        tokens = {key: hf["text_config"][key] for key in ("bos_token_id", "eos_token_id")}
        written = clip.hf_clip_config(model, **tokens)
        return model, clip.clip_layout(model), shapes_of(model, *inputs), written
    if name == "Blip2ForConditionalGeneration":
        model = blip2.blip2_model(hf)
        written = blip2.hf_blip2_config(model, image_token_index=hf["image_token_index"])
        return model, blip2.blip2_layout(model), shapes_of(model, *inputs), written
    model = blip2.blip2_retrieval_model(hf)
    layout = blip2.blip2_retrieval_layout(model)
    shapes = shapes_of(model, *inputs)
    shapes = {part: tree for part, tree in shapes.items() if layout.holds(part)}
    return model, layout, shapes, blip2.hf_blip2_retrieval_config(model)


def on_one_device(shapes):
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)


def imported(name, folder, dtype=None):
    weights = open_weights(folder)
    model, layout, shapes, written = ours(name, weights.config)
    params = load_params(weights, layout, shapes, on_one_device(shapes), dtype)
    return model, params, layout, written


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-4)


# Outputs


def test_opt_logits(root):
    folder = saved("OPTForCausalLM", root)
    model, params, _, _ = imported("OPTForCausalLM", folder)

    @fast_jit
    def logits(params):
        def run(module):
            hidden, _ = module(module.embed(IDS), token_positions(VALID), causal_mask(VALID))
            return module.logits(hidden)

        return model.apply({"params": params}, method=run)

    reference = transformers.OPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = reference(torch.tensor(IDS), attention_mask=torch.tensor(VALID).long()).logits
    assert_close(logits(params)[VALID], expected[VALID])


def test_clip_similarities(root):
    folder = saved("CLIPModel", root)
    model, params, _, _ = imported("CLIPModel", folder)
    ids = np.where(VALID, IDS, 1)
    ids[np.arange(2), VALID.sum(axis=1) - 1] = 12  # end of text
    reference = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        expected = reference(torch.tensor(ids), PIXELS)
    images, texts = fast_jit(model.apply)({"params": params}, IMAGES, ids, VALID)
    assert_close(images, expected.image_embeds)
    assert_close(texts, expected.text_embeds)
    assert_close(np.exp(params["logit_scale"]) * images @ texts.T, expected.logits_per_image)


def test_blip2_features_queries_and_logits(root):
    folder = saved("Blip2ForConditionalGeneration", root)
    model, params, _, _ = imported("Blip2ForConditionalGeneration", folder)

    @fast_jit
    def run(params):
        def parts(module):
            features = module.vision_norm(module.vision(IMAGES))
            return features, module.qformer(module.qformer.read_image(features))

        bound = {"params": params}
        return *model.apply(bound, method=parts), model.apply(bound, IMAGES, IDS, VALID)

    features, queries, logits = run(params)
    reference = transformers.Blip2ForConditionalGeneration.from_pretrained(folder)
    prefix = np.full((2, QUERIES), IMAGE_TOKEN)
    ids = torch.tensor(np.concatenate([prefix, IDS], axis=1))
    mask = torch.tensor(np.concatenate([prefix > 0, VALID], axis=1)).long()
    with torch.no_grad():
        expected = reference(pixel_values=PIXELS, input_ids=ids, attention_mask=mask)
    assert_close(features, expected.vision_outputs.last_hidden_state)
    assert_close(queries, expected.qformer_outputs.last_hidden_state)
    assert_close(logits[VALID], expected.logits[:, QUERIES - 1 : -1][VALID])


def test_blip2_contrast_and_matching(root):
    folder = saved("Blip2ForImageTextRetrieval", root)
    model, params, _, _ = imported("Blip2ForImageTextRetrieval", folder)

    @fast_jit
    def run(params):
        def parts(module):
            image = module.read_image(module.image_features(IMAGES))
            embeds = module.embed_images(image), module.embed_texts(IDS, VALID)
            return *embeds, module.match(image, IDS, VALID)

        # The temperature of training is no part of such a checkpoint.
        return model.apply({"params": params | {"temperature": 1.0}}, method=parts)

    images, texts, match = run(params)
    reference = transformers.Blip2ForImageTextRetrieval.from_pretrained(folder)
    inputs = PIXELS, torch.tensor(IDS), torch.tensor(VALID).long()
    with torch.no_grad():
        contrast = reference(*inputs)
        expected = reference(*inputs, use_image_text_matching_head=True)
    assert_close(images, contrast.image_embeds)
    assert_close(texts, contrast.text_embeds)
    scores = np.einsum("iqe,te->itq", images, texts).max(axis=-1)
    assert_close(scores, contrast.logits_per_image)
    assert_close(match, expected.logits_per_image)


# Export


@pytest.mark.parametrize("name", CLASSES)
def test_export_is_loaded_by_transformers_without_a_missing_or_unexpected_key(name, root, tmp_path):
    folder = saved(name, root)
    _, params, layout, written = imported(name, folder)
    assert save_params(params, layout, tmp_path, written, dtype=np.float32) == ()
    model, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = getattr(transformers, name).from_pretrained(folder)
    assert_same_state(model, expected)
    same_bits(tmp_path, folder)


def assert_same_state(model, expected):
    state = model.state_dict()
    assert sorted(state) == sorted(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("name", CLASSES)
def test_config_there_and_back(name, root, tmp_path):
    hf = config_of(saved(name, root))
    model, _, _, written = ours(name, hf)
    again, _, _, _ = ours(name, written)
    assert again == model
    # Of what transformers makes of it, only what the model does not know may differ.
    config = getattr(transformers, name).config_class(**written).to_dict()
    expected = getattr(transformers, name).config_class(**hf).to_dict()
    unknown = {"_name_or_path", "dtype", "initializer_range", "text_config.initializer_range"}
    if name == "Blip2ForConditionalGeneration":
        unknown |= {"image_text_hidden_size", "text_config.architectures"}  # without effect
    if name == "Blip2ForImageTextRetrieval":  # which has no language model
        unknown |= {key for key in flattened(expected) if key.startswith("text_config.")}
    differing = {
        key
        for key, value in flattened(expected).items()
        if flattened(config).get(key) != value and key.split(".")[-1] != "projection_dim"
    }
    assert differing <= unknown


def flattened(config, prefix=""):
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        fields |= flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return fields


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16_there_and_back_is_bit_exact(name, dtype, root, tmp_path):
    folder = saved(name, root, "bfloat16")
    weights = open_weights(folder)
    _, layout, shapes, written = ours(name, weights.config)
    kind = np.dtype(dtype or ml_dtypes.bfloat16)
    params = load_params(weights, layout, shapes, on_one_device(shapes), kind)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {kind}
    save_params(params, layout, tmp_path, written, dtype=ml_dtypes.bfloat16)
    same_bits(tmp_path, folder)
    assert config_of(tmp_path)["dtype"] == "bfloat16"


def test_stage1_export_leaves_the_generative_head_behind(root, tmp_path):
    folder = saved("Blip2ForImageTextRetrieval", root)
    _, params, layout, written = imported("Blip2ForImageTextRetrieval", folder)
    head = {"dense": {"kernel": np.ones((16, 16))}, "bias": np.ones(WORDS)}
    whole = params | {"temperature": np.float32(0.07), "itg_head": head}
    behind = save_params(whole, layout, tmp_path, written)
    assert sorted(behind) == ["itg_head/bias", "itg_head/dense/kernel", "temperature"]
    assert not layout.holds("itg_head/dense/kernel") and layout.holds("itm_head/kernel")
    same_bits(tmp_path, folder)


def test_notes_name_the_epsilon_that_transformers_does_not_have(root):
    model = blip2.blip2_model(config_of(saved("Blip2ForConditionalGeneration", root)))
    assert blip2.export_notes(model) == ()
    (note,) = blip2.export_notes(model.clone(vision_norm_epsilon=1e-5))
    assert "1e-05" in note and "1e-06" in note


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Blip2ForConditionalGeneration", dict(hidden_size=2560, num_hidden_layers=32)),
        ("Blip2ForImageTextRetrieval", {}),
    ],
)
def test_full_size(name, text):
    """ViT-g, the 32-query Q-Former and OPT-2.7B: every tensor has its place, and no memory."""
    heads = dict(num_attention_heads=32, ffn_dim=10240, word_embed_proj_dim=2560) if text else {}
    retrieval = name == "Blip2ForImageTextRetrieval"
    hf = transformers.Blip2Config(
        text_config=dict(model_type="opt", **text, **heads),
        qformer_config=dict(vocab_size=30523, use_qformer_text_input=retrieval),
    )
    with torch.device("meta"):
        state = getattr(transformers, name)(hf).state_dict()
    tensors = {key: TensorInfo(tuple(x.shape), np.dtype("float32")) for key, x in state.items()}
    weights = Weights(name, tensors, None, {}, None)
    if retrieval:
        model = blip2.blip2_retrieval_model(hf.to_dict())
        layout = blip2.blip2_retrieval_layout(model)
    else:
        model = blip2.blip2_model(hf.to_dict())
        layout = blip2.blip2_layout(model)
    inputs = jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 32), int), jnp.ones((1, 32), bool)
    shapes = {part: tree for part, tree in shapes_of(model, *inputs).items() if layout.holds(part)}
    check(weights, layout, shapes)
    assert model.vision_config.num_layers == 39
    sizes = {k: sum(x.size for x in jax.tree.leaves(tree)) for k, tree in shapes.items()}
    assert sizes["vision"] == 985_894_528
    trained = sum(size for k, size in sizes.items() if k not in ("vision", "language_model"))
    head = 768 * 768 + 768 + 2 * 768 + 30523  # of ITG
    assert trained + (head + 1) * retrieval == (186_705_470 if retrieval else 107_133_696)


# What files of other versions have


def test_a_tied_head_may_stand_for_the_words_or_beside_them(root, tmp_path):
    folder = saved("OPTForCausalLM", root)
    weights = open_weights(folder)
    _, layout, shapes, _ = ours("OPTForCausalLM", weights.config)
    words = "model.decoder.embed_tokens.weight"
    state = {name: torch.tensor(weights.read(name).copy()) for name in weights.tensors}
    both = state | {"lm_head.weight": state[words]}
    only_head = {name: value for name, value in both.items() if name != words}
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    for number, variant in enumerate((both, only_head, bare)):
        file = tmp_path / f"{number}.bin"
        torch.save(variant, file)
        stored = stored_params(open_weights(file), layout, shapes)
        np.testing.assert_array_equal(stored["token_embedding"]["embedding"][()], state[words])


def test_index_buffers_are_left_over_without_harm(root, tmp_path):
    weights = open_weights(saved("CLIPModel", root))
    _, layout, shapes, _ = ours("CLIPModel", weights.config)
    state = {name: torch.tensor(weights.read(name).copy()) for name in weights.tensors}
    state["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    torch.save(state, tmp_path / "clip.pth")
    stored_params(open_weights(tmp_path / "clip.pth"), layout, shapes)
    with pytest.raises(UserError, match="position_ids"):
        stored_params(open_weights(tmp_path / "clip.pth"), Layout(layout.entries), shapes)


def test_an_encoder_may_leave_out_its_last_blocks(root):
    weights = open_weights(saved("CLIPModel", root))
    model, layout, shapes, _ = ours("CLIPModel", weights.config)
    fewer = dataclasses.replace(model.vision_config, num_layers=2)
    shorter = shapes_of(
        model.clone(vision_config=fewer),
        jnp.zeros((1, 8, 8, 3)),
        jnp.zeros((1, TEXT), int),
        jnp.ones((1, TEXT), bool),
    )
    part = {"vision": shorter["vision"]}
    stored = stored_params(weights, layout, part)["vision"]["layers"]["mlp"]["up"]["kernel"]
    whole = stored_params(weights, layout, shapes)["vision"]["layers"]["mlp"]["up"]["kernel"]
    assert stored.shape[0] == 2 and whole.shape[0] == 3
    np.testing.assert_array_equal(stored[()], whole[:2])


@pytest.mark.parametrize(
    ("read", "hf", "message"),
    [
        (opt.opt_config, {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        (opt.opt_config, {"word_embed_proj_dim": 512}, "word_embed_proj_dim=512"),
        (opt.opt_config, {"activation_function": "gelu"}, "activation_function='gelu'"),
        (opt.opt_config, {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        (clip.clip_text_config, {"hidden_act": "swish"}, "hidden_act='swish'"),
        (blip2.blip2_model, {"qformer_config": {"hidden_act": "relu"}}, "hidden_act='relu'"),
        (blip2.blip2_model, {"text_config": {"model_type": "bert"}}, "model_type='bert'"),
        (blip2.blip2_retrieval_model, {}, "no text side"),
    ],
)
def test_configs_that_are_not_covered_are_refused(read, hf, message):
    with pytest.raises(UserError, match=message):
        read(hf)


def test_defaults_are_those_of_transformers():
    assert blip2.blip2_model({}) == blip2.blip2_model(transformers.Blip2Config().to_dict())
    assert clip.clip_model({}) == clip.clip_model(transformers.CLIPConfig().to_dict())
    assert opt.opt_config({}) == opt.opt_config(transformers.OPTConfig().to_dict())


def test_a_variant_that_the_target_lacks_is_refused(root):
    model = clip.clip_model(config_of(saved("CLIPModel", root)))
    with pytest.raises(UserError, match="pre_norm=True cannot be exported as blip_2_vision_model"):
        blip2.hf_vision_config(model.vision_config, blip2.VISION_TYPE)
    config = dataclasses.replace(opt.opt_config({}), layer_norm_epsilon=1e-6)
    with pytest.raises(UserError, match="1e-06"):
        opt.hf_opt_config(config)
    assert VOCAB == 13  # the tiny ids above are below it
