"""InstructBLIP against transformers: outputs, gradients, and weights there and back."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from reference import randomized
from reference_t5 import VARIANTS, with_own_head
from reference_weights import assert_exports, params_in, params_of
from tiny_checkpoints import QFORMER, QUERIES, VISION, WORDS, config_of, same_bits, save, shapes_of
from tiny_tasks import fast_jit

from jaxblip.errors import UserError
from jaxblip.interop.families.instructblip import (
    hf_instructblip_config,
    instructblip_layout,
    instructblip_model,
)
from jaxblip.interop.files import TensorInfo, Weights
from jaxblip.interop.load import check
from jaxblip.losses.language_modeling import token_cross_entropy
from jaxblip.models.attention import bidirectional_mask

VOCAB, ROWS, PROMPT, TEXT, INSTRUCTION = 40, 20, 5, 6, 5
IMAGE_TOKEN, BOS, PAD = VOCAB - 1, 2, 1
LANGUAGE_MODELS = {
    "Vicuna": dict(
        model_type="llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=BOS,
        eos_token_id=25, pad_token_id=PAD,
    ),
    "FlanT5": dict(
        model_type="t5", vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=3,
        num_decoder_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=17, pad_token_id=0,
    ) | VARIANTS["blip2"],
}  # fmt: skip
TRAINED = ("vision_norm", "qformer", "projection")
RNG = np.random.default_rng(0)


def valid_of(lengths, width):
    """Padding on the right."""
    return np.arange(width) < np.array(lengths)[:, None]


IMAGES = RNG.normal(size=(ROWS, 8, 8, 3)).astype(np.float32)
INSTRUCTION_VALID = valid_of(1 + np.arange(ROWS) % INSTRUCTION, INSTRUCTION)
INSTRUCTION_IDS = RNG.integers(1, WORDS, (ROWS, INSTRUCTION)).astype(np.int32) * INSTRUCTION_VALID
PROMPT_IDS = RNG.integers(4, IMAGE_TOKEN, (ROWS, PROMPT)).astype(np.int32)
PROMPT_VALID = valid_of(1 + np.arange(ROWS) * 3 % PROMPT, PROMPT)
TEXT_IDS = RNG.integers(4, IMAGE_TOKEN, (ROWS, TEXT)).astype(np.int32)
TEXT_VALID = valid_of(2 + np.arange(ROWS) % (TEXT - 1), TEXT)
# Of a decoder-only model the text begins with the prompt, which is no target.
TARGETS = TEXT_VALID & (np.arange(TEXT) >= (np.arange(ROWS) % 2)[:, None])


def random_instructblip(name):
    config = transformers.InstructBlipConfig(
        vision_config=VISION | dict(layer_norm_eps=0.01),  # large enough to matter
        qformer_config=QFORMER,
        text_config=LANGUAGE_MODELS[name],
        image_token_index=IMAGE_TOKEN,
        num_query_tokens=QUERIES,
    )
    model = transformers.InstructBlipForConditionalGeneration(config)
    if name == "FlanT5":
        with_own_head(model.language_model)
    model = randomized(model, scale=0.3)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("qkv.bias"):  # published checkpoints have no key bias
                value[len(value) // 3 : 2 * len(value) // 3] = 0
            if parameter.endswith("Attention.q.weight"):  # of T5, which does not scale its scores
                value /= 2
        model.language_model.lm_head.weight[IMAGE_TOKEN] = 0  # nothing says the placeholder
    return model


@functools.cache
def example(name):
    """The model of transformers, ours, how its weights stand, and our parameters."""
    reference = random_instructblip(name)
    model = instructblip_model(reference.config.to_dict())
    layout, shapes = instructblip_layout(model), shapes_in(model)
    return reference, model, layout, shapes, params_of(reference, layout, shapes)


def shapes_in(model):
    ids, valid = jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
    image = jnp.zeros((1, *2 * (model.vision_config.image_size_px,), 3))
    return shapes_of(model, image, *2 * (ids, valid), instruction_ids=ids)


def tensor(array):
    return torch.tensor(np.asarray(array)).to(
        torch.long if array.dtype != np.float32 else torch.float32
    )


def of_transformers(ids, valid, rows=slice(None)):
    """The inputs of the class: the visual tokens' placeholders stand before the text."""
    placeholders = np.full((len(ids), QUERIES), IMAGE_TOKEN)
    return dict(
        pixel_values=tensor(IMAGES[rows].transpose(0, 3, 1, 2).copy()),
        qformer_input_ids=tensor(INSTRUCTION_IDS[rows]),
        qformer_attention_mask=tensor(INSTRUCTION_VALID[rows]),
        input_ids=tensor(np.concatenate([placeholders, ids], axis=1)),
        attention_mask=tensor(np.concatenate([placeholders > 0, valid], axis=1)),
    )


@functools.cache
def run_transformers(name):
    """The class's outputs with labels, and by our paths the gradients of what trains."""
    reference, model, layout, shapes, _ = example(name)
    is_encoder_decoder = model.language_model_config.is_encoder_decoder
    labels = np.where(TEXT_VALID if is_encoder_decoder else TARGETS, TEXT_IDS, -100)
    if is_encoder_decoder:
        inputs = of_transformers(PROMPT_IDS, PROMPT_VALID)
    else:
        inputs = of_transformers(TEXT_IDS, TEXT_VALID)
        labels = np.concatenate([np.full((ROWS, QUERIES), -100), labels], axis=1)
    output = reference(**inputs, labels=tensor(labels))
    reference.zero_grad()
    output.loss.backward()
    gradients = copy.deepcopy(reference)
    with torch.no_grad():
        pairs = zip(gradients.parameters(), reference.parameters(), strict=True)
        for place, parameter in pairs:
            place.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    trained = {part: shapes[part] for part in TRAINED}
    return output, params_of(gradients, layout, trained)


@functools.cache
def run_ours(name):
    """((loss, (Q-Former's hidden states, logits)), gradients of what trains)."""
    _, model, _, _, params = example(name)
    is_encoder_decoder = model.language_model_config.is_encoder_decoder
    instruction = dict(instruction_ids=INSTRUCTION_IDS, instruction_valid=INSTRUCTION_VALID)

    def hidden(module):
        image = module.qformer.read_image(module.vision_norm(module.vision(IMAGES)))
        mask = bidirectional_mask(QUERIES, jnp.asarray(INSTRUCTION_VALID))
        return module.qformer(image, INSTRUCTION_IDS, mask)

    @fast_jit
    def run(trained, frozen):
        def loss(trained):
            given = {"params": frozen | trained}
            texts = TEXT_IDS, TEXT_VALID, PROMPT_IDS, PROMPT_VALID
            logits = model.apply(given, IMAGES, *texts, **instruction)
            targets = TEXT_VALID if is_encoder_decoder else TARGETS
            aux = model.apply(given, method=hidden), logits
            return token_cross_entropy(logits, TEXT_IDS, targets).loss, aux

        return jax.value_and_grad(loss, has_aux=True)(trained)

    trained = {part: params[part] for part in TRAINED}
    return run(trained, {part: params[part] for part in params if part not in TRAINED})


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_query_outputs_logits_and_loss(name):
    expected, _ = run_transformers(name)
    (loss, (hidden, logits)), _ = run_ours(name)
    states = expected.qformer_outputs.last_hidden_state
    assert_close(hidden[:, :QUERIES], states[:, :QUERIES])
    text = slice(QUERIES, None)
    assert_close(hidden[:, text][INSTRUCTION_VALID], states[:, text][INSTRUCTION_VALID])
    scores = expected.logits if name == "FlanT5" else expected.logits[:, QUERIES - 1 : -1]
    assert_close(logits[TEXT_VALID], scores[TEXT_VALID])
    assert float(loss) == pytest.approx(expected.loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_gradients_of_everything_that_trains(name):
    _, expected = run_transformers(name)
    _, gradients = run_ours(name)

    actual, expected = (flatten_dict(tree, sep="/") for tree in (gradients, expected))
    assert actual.keys() == expected.keys()
    for path, wanted in expected.items():
        size = np.abs(wanted).max()
        if path.endswith("key/bias"):  # changes no softmax, so only rounding is left
            assert max(size, np.abs(actual[path]).max()) < 1e-6, path
            continue
        assert size > 1e-5, path
        np.testing.assert_allclose(actual[path], wanted, 1e-3, 1e-3 * size, err_msg=path)
    # What becomes of the text in the last block goes nowhere.
    last_mlp = expected["qformer/groups/block_1/text_mlp/up/kernel"]
    assert last_mlp[0].any() and not last_mlp[-1].any()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_there_and_back(name, tmp_path):
    reference, model, layout, shapes, params = example(name)
    folder = save(reference, tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, params_in(folder, layout, shapes), params)
    assert instructblip_model(config_of(folder)) == model

    tokens = {
        key: LANGUAGE_MODELS[name][key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if key in LANGUAGE_MODELS[name]
    }
    written = hf_instructblip_config(model, image_token_index=IMAGE_TOKEN, **tokens)
    again = assert_exports(params, layout, written, tmp_path / "ours", reference)
    same_bits(tmp_path / "ours", folder)
    assert instructblip_model(config_of(tmp_path / "ours")) == model
    # Of what transformers makes of it, only what the model does not know may differ.
    ours, theirs = flattened(again.config.to_dict()), flattened(reference.config.to_dict())
    differing = {key.split(".")[-1] for key in theirs if ours.get(key) != theirs[key]}
    unknown = {"_name_or_path", "dtype", "initializer_range", "architectures", "dropout_rate"}
    assert differing <= unknown
    with torch.no_grad():
        inputs = of_transformers(PROMPT_IDS, PROMPT_VALID)
        if name == "FlanT5":
            inputs["labels"] = tensor(TEXT_IDS)
        assert torch.equal(again(**inputs).logits, reference(**inputs).logits)


def flattened(config, prefix=""):
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        fields |= flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return fields


def test_defaults_are_those_of_transformers():
    model = instructblip_model({})
    assert model == instructblip_model(transformers.InstructBlipConfig().to_dict())
    assert model.qformer_config.has_text and not model.vision_config.key_bias


def test_a_qformer_without_text_side_is_refused():
    model = instructblip_model({})
    fields = {**vars(model.qformer_config), "has_text": False}
    model = model.clone(qformer_config=type(model.qformer_config)(**fields))
    for function in (instructblip_layout, hf_instructblip_config):
        with pytest.raises(UserError, match="has_text=False.*export it as BLIP-2"):
            function(model)


def test_other_language_models_are_named():
    with pytest.raises(UserError, match="it has opt, t5, llama"):
        instructblip_model({"text_config": {"model_type": "gpt2"}})


# What stage 2 of BLIP-2 drops: words, positions, and the texts' networks of 12 blocks.
TEXT_SIDE = (30_523 + 512) * 768 + 12 * (2 * 768 * 3072 + 3072 + 3 * 768)


@pytest.mark.parametrize(
    ("text", "trained", "millions"),
    [
        (
            dict(
                model_type="llama", vocab_size=32001, hidden_size=4096, num_hidden_layers=32,
                num_attention_heads=32, intermediate_size=11008,
            ),
            108_314_880 + TEXT_SIDE,
            188.84,
        ),
        (
            dict(
                model_type="t5", vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120,
                num_layers=24, num_heads=32, feed_forward_proj="gated-gelu", dense_act_fn="gelu",
                tie_word_embeddings=False,
            ),
            106_739_968 + TEXT_SIDE,
            187.26,
        ),
    ],
    ids=["Vicuna-7B", "FlanT5-XL"],
)  # fmt: skip
def test_full_size(text, trained, millions):
    """ViT-g, the Q-Former and the language model: every tensor has its place, and no memory."""
    hf = transformers.InstructBlipConfig(
        text_config=text, qformer_config=dict(vocab_size=30523), image_token_index=32000
    )
    with torch.device("meta"):
        state = transformers.InstructBlipForConditionalGeneration(hf).state_dict()
    model = instructblip_model(hf.to_dict())
    layout, shapes = instructblip_layout(model), shapes_in(model)
    tensors = {key: TensorInfo(tuple(x.shape), np.dtype("float32")) for key, x in state.items()}
    check(Weights("InstructBLIP", tensors, None, {}, None), layout, shapes)
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    assert sizes["vision"] == 985_894_528
    ours = sum(sizes[part] for part in TRAINED)
    assert ours == trained and round(ours / 1e6, 2) == millions
