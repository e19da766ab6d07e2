"""What the benchmarks run: configs of known sizes, random batches, and our compiled step."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.config import default_config
from jaxblip.planning.operations import count_operations
from jaxblip.tasks import Task, make_task
from jaxblip.training.optimizer import learning_rate, make_optimizer
from jaxblip.training.state import TrainState, cast_frozen, split_params
from jaxblip.training.step import jit_step, make_train_step

VIT_S = dict(width=384, num_layers=12, num_heads=6, mlp_width=1536, patch_size_px=16)
VIT_B = dict(width=768, num_layers=12, num_heads=12, mlp_width=3072, patch_size_px=16)
VIT_G = dict(
    width=1408, num_layers=39, num_heads=16, mlp_width=6144, patch_size_px=14, key_bias=False
)
QFORMER_S = dict(width=384, num_layers=6, num_heads=6, mlp_width=1536)
OPT_125M = dict(width=768, num_layers=12, num_heads=12, mlp_width=3072, vocab_size=50272)
OPT_2_7B = dict(width=2560, num_layers=32, num_heads=32, mlp_width=10240, vocab_size=50272)
FLAN_T5_XXL = dict(
    width=4096, num_layers=24, num_decoder_layers=24, num_heads=64, head_width=64,
    mlp_width=10240, vocab_size=32128, start_token_id=0,
)  # fmt: skip
BERT_VOCAB = 30_523
# size -> (image encoder, Q-Former, language model's architecture and size, batch)
SIZES = {
    "tiny": (
        dict(width=32, num_layers=2, num_heads=2, mlp_width=64, patch_size_px=32),
        dict(width=32, num_layers=2, num_heads=2, mlp_width=64),
        ("opt", dict(width=32, num_layers=2, num_heads=2, mlp_width=64, vocab_size=512)),
        4,
    ),
    "small": (VIT_S, QFORMER_S, ("opt", OPT_125M), 16),
    "base": (VIT_B, {}, ("opt", OPT_125M), 16),
    "blip2-opt-2.7b": (VIT_G, {}, ("opt", OPT_2_7B), 128),
    "blip2-flan-t5-xxl": (VIT_G, {}, ("t5", FLAN_T5_XXL), 128),
}
TASKS = ("stage1", "stage2", "clip")


def make_config(task: str, size: str, batch_size: int = 0, dtype: str = "float32") -> ConfigDict:
    """A run of a size; texts of 32 tokens, images of 224 px.

    Args:
      batch_size: 0 for that of the size.
      dtype: of activations and frozen parameters.
    """
    vision, qformer, (architecture, language_model), rows = SIZES[size]
    config = default_config(task, language_model=architecture if task == "stage2" else "opt")
    config.batch_size = batch_size or rows
    config.compute_dtype = config.frozen_dtype = dtype
    config.model.vision.update(vision)
    if task == "clip":
        config.model.text.vocab_size = 49_408
        config.model.text.update({} if size != "tiny" else SIZES["tiny"][1])
    else:
        config.model.qformer.update(qformer)
    if task == "stage1":
        config.model.qformer.vocab_size = BERT_VOCAB
        config.model.dec_token_id = BERT_VOCAB - 1
    if task == "stage2":
        config.model.language_model.update(language_model)
    return config.lock()


def from_features(config: ConfigDict) -> ConfigDict:
    """The run that reads the output of its image encoder in place of images."""
    config = config.copy_and_resolve_references()
    config.data.features = "features"
    return config


def random_batch(task: Task, seed: int = 0) -> dict[str, np.ndarray]:
    """Images of noise, texts of 8 to 32 tokens, each image once."""
    rng = np.random.default_rng(seed)
    shapes = task.batch_shapes(task.config.batch_size)
    rows, length = shapes["text_ids"].shape
    mask = np.arange(length) < rng.integers(length // 4, length + 1, (rows, 1))
    fields = {
        "image": lambda shape: rng.integers(0, 256, shape, np.uint8),
        "image_features": lambda shape: rng.normal(size=shape).astype(jnp.bfloat16),
        "text_ids": lambda shape: rng.integers(3, 500, shape, np.int32),
        "text_mask": lambda shape: mask,
        "input_ids": lambda shape: rng.integers(3, 500, shape, np.int32),
        "input_mask": lambda shape: np.ones(shape, bool),
        "prompt_length": lambda shape: np.zeros(shape, np.int32),
        "image_id": lambda shape: np.arange(rows, dtype=np.int32),
    }
    return {field: fields[field](shape.shape) for field, shape in shapes.items()}


class OurStep:
    """The compiled training step of a config, with random parameters, on all devices at hand.

    Attributes:
      compile_s: seconds of tracing and compilation.
      operations: of the model in a step, forward and backward, without recomputation.
      memory_bytes: that the compiler plans for one device: arguments and temporary values.
    """

    def __init__(self, config: ConfigDict):
        self.task = task = make_task(config)
        mesh = sharding.make_mesh({"data": -1})
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        trainable, frozen = split_params(shapes, config.frozen)
        self.operations = _operations(task, trainable, frozen)
        params = jax.jit(task.init)(jax.random.key(0))
        trainable, frozen = split_params(params, config.frozen)
        frozen = cast_frozen(frozen, config.frozen_dtype)
        optimizer = make_optimizer(config)
        state = TrainState.create(trainable, optimizer, jax.random.key(0))
        places = sharding.tree_shardings(state, mesh), sharding.tree_shardings(frozen, mesh)
        self._state = jax.device_put(state, places[0], may_alias=False)
        self._frozen = jax.device_put(frozen, places[1])
        self._batch = sharding.put_batch(random_batch(task), mesh)
        step = jit_step(
            make_train_step(task, optimizer, learning_rate(config)),
            *places,
            sharding.batch_sharding(mesh),
        )
        begin = time.perf_counter()
        self._step = step.lower(self._state, self._frozen, self._batch).compile()
        self.compile_s = time.perf_counter() - begin
        memory = self._step.memory_analysis()
        self.memory_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def __call__(self) -> dict[str, Any]:
        """One step, finished; its metrics."""
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        return jax.block_until_ready(metrics)


def _operations(task: Task, trainable: Any, frozen: Any) -> int:
    batch = task.batch_shapes(task.config.batch_size)

    def loss(trainable, frozen, batch, rng):
        return task.loss({**trainable, **frozen}, batch, rng).loss

    rng = jax.eval_shape(lambda: jax.random.key(0))
    return count_operations(jax.grad(loss), trainable, frozen, batch, rng)
