"""Every task at a size that compiles in seconds: config, parameters, batches, a whole run."""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.config import default_config
from jaxblip.tasks import TASKS, make_task
from jaxblip.tasks.base import Task
from jaxblip.training.optimizer import learning_rate, make_optimizer
from jaxblip.training.state import TrainState, cast_frozen, split_params
from jaxblip.training.step import jit_step, make_train_step

# Tasks with another language model than the default.
OTHER_LANGUAGE_MODELS = {
    "instruct_t5": ("instruct", "t5"),
    "language_model_t5": ("language_model", "t5"),
    "stage2_llama": ("stage2", "llama"),
    "stage2_t5": ("stage2", "t5"),
}
TASK_NAMES = (*TASKS, *OTHER_LANGUAGE_MODELS)
ROWS, TEXT, INPUT, VOCAB, QUERIES = 8, 6, 5, 24, 4
DEC, ENC = VOCAB - 1, VOCAB - 2
# Sizes divide by 8, for the meshes; the hidden widths differ, so that a kernel's shape names it.
HEADS, VISION_WIDTH, WIDTH = 8, 24, 16
VISION_MLP, LANGUAGE_MODEL_MLP = 40, 56


def _is_known(option: str, value: int | bool) -> bool:
    """Whether the installed XLA has a compiler option: they come and go."""
    try:
        jax.jit(jax.numpy.negative, compiler_options={option: value})(1.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


# Tiny models compile for far longer than they run: four to five times longer without these.
COMPILER_OPTIONS = {
    option: value
    for option, value in [
        ("xla_backend_optimization_level", 0),
        ("xla_llvm_disable_expensive_passes", True),
        ("xla_cpu_use_fusion_emitters", False),
    ]
    if _is_known(option, value)
}
fast_jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


def tiny_config(name: str) -> ConfigDict:
    """One of TASK_NAMES in float32 throughout, without dropout."""
    task, language_model = OTHER_LANGUAGE_MODELS.get(name, (name, "opt"))
    config = default_config(task, language_model=language_model)
    config.compute_dtype = config.frozen_dtype = "float32"
    config.batch_size, config.steps = ROWS, 10
    config.optimizer.warmup_steps = 1
    config.optimizer.peak_lr = 1e-2
    config.data.image_size_px, config.data.max_text_tokens = 8, TEXT
    for field in ("max_input_tokens", "max_instruction_tokens"):
        if field in config.data:
            config.data[field] = INPUT
    blocks = dict(num_layers=2, num_heads=HEADS)
    if "vision" in config.model:
        config.model.vision.update(
            patch_size_px=4, width=VISION_WIDTH, mlp_width=VISION_MLP, **blocks
        )
    if "qformer" in config.model:
        config.model.qformer.update(
            num_query_tokens=QUERIES, width=WIDTH, mlp_width=32, hidden_dropout=0.0,
            attention_dropout=0.0, num_heads=HEADS, num_layers=4,
        )  # fmt: skip
    for part in ("text", "language_model"):
        if part in config.model:
            config.model[part].update(width=WIDTH, mlp_width=LANGUAGE_MODEL_MLP, **blocks)
    if "hidden_dropout" in config.model.get("text", {}):
        config.model.text.hidden_dropout = config.model.text.attention_dropout = 0.0
    if language_model == "llama":
        config.model.language_model.num_kv_heads = HEADS // 2
    if language_model == "t5":
        config.model.language_model.update(num_decoder_layers=3, head_width=3, start_token_id=0)
    for part in ("text", "language_model", "qformer"):
        if "vocab_size" in config.model.get(part, {}):
            config.model[part].vocab_size = VOCAB
        if "max_positions" in config.model.get(part, {}):
            config.model[part].max_positions = 16
    if "embed_dim" in config.model:
        config.model.embed_dim = 8
    if "vocab_chunk" in config.loss:
        config.loss.vocab_chunk = 4  # of the 6 positions
    for field, token_id in ("dec_token_id", DEC), ("enc_token_id", ENC):
        if field in config.model:
            config.model[field] = token_id
    return config.lock()


def shallow(config: ConfigDict) -> ConfigDict:
    """`config` with as few layers as have all kinds of parameters: half the time to compile."""
    for part in config.model.values():
        for field in ("num_layers", "num_decoder_layers"):
            if isinstance(part, ConfigDict) and field in part:
                part[field] = part.get("cross_attention_frequency", 1)
    return config


def random_params(task: Task, seed: int | None = None):
    """The whole tree, with every parameter but the scalars random: none is without effect."""
    if seed is None:  # of InstructBLIP over T5, seed 0 has gradients that cancel to rounding
        seed = int({"input_ids", "instruction_ids"} <= set(task.fields))
    flat = flatten_dict(jax.eval_shape(task.init, jax.random.key(0)), sep="/")
    rng = np.random.default_rng(seed)
    scalars = {"temperature": 0.1, "logit_scale": 2.0}

    def value(path, leaf):
        if not leaf.shape:
            return np.float32(scalars[path])
        mean = float(path.endswith("/scale"))
        # T5 does not divide its attention scores by sqrt(head width): its queries are small.
        of_t5 = path.startswith(("language_model/encoder/", "language_model/decoder/"))
        deviation = 0.15 if of_t5 and path.endswith("query/kernel") else 0.3
        return rng.normal(mean, deviation, leaf.shape).astype(np.float32)

    return unflatten_dict({path: value(path, leaf) for path, leaf in flat.items()}, sep="/")


def random_batch(task: Task, seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Texts of all lengths from 2 on, prompts of 0 to 2 tokens, inputs of all lengths from 1 on,
    and two rows of one image.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, TEXT + 1, rows)
    image_id = rng.permutation(rows).astype(np.int32)
    image_id[1] = image_id[0]
    size = task.config.data.image_size_px
    fields = {
        "image": rng.integers(0, 256, (rows, size, size, 3), np.uint8),
        "text_ids": rng.integers(0, DEC, (rows, TEXT), np.int32),
        "text_mask": np.arange(TEXT) < lengths[:, None],
        "prompt_length": rng.integers(0, 3, rows, np.int32),
        "image_id": image_id,
        "input_ids": rng.integers(0, DEC, (rows, INPUT), np.int32),
        "input_mask": np.arange(INPUT) < rng.integers(1, INPUT + 1, (rows, 1)),
        "instruction_ids": rng.integers(0, ENC, (rows, INPUT), np.int32),
        "instruction_mask": np.arange(INPUT) < rng.integers(1, INPUT + 1, (rows, 1)),
    }
    return {field: fields[field] for field in task.fields}


@functools.cache
def made(name: str) -> tuple[Task, dict, dict[str, np.ndarray]]:
    """One of TASK_NAMES, random parameters and a batch; each part of its loss has its weight."""
    config = shallow(tiny_config(name))
    for part, weight in {"itc": 2.0, "itm": 0.5, "itg": 3.0}.items():
        if f"{part}_weight" in config.loss:
            config.loss[f"{part}_weight"] = weight
    task = make_task(config)
    return task, random_params(task), random_batch(task)


def start(config: ConfigDict, sizes: dict[str, int]):
    """(compiled step, state, frozen parameters, mesh, task) before the first step."""
    task = make_task(config)
    count = int(np.prod(list(sizes.values()), dtype=int))
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    trainable, frozen = split_params(random_params(task), config.frozen, config.trainable)
    frozen = cast_frozen(jax.tree.map(jax.numpy.asarray, frozen), config.frozen_dtype)
    optimizer = make_optimizer(config)
    state = TrainState.create(trainable, optimizer, jax.random.key(0))
    state_shardings = sharding.tree_shardings(state, mesh)
    frozen_shardings = sharding.tree_shardings(frozen, mesh)
    step = jit_step(
        make_train_step(task, optimizer, learning_rate(config)),
        state_shardings,
        frozen_shardings,
        sharding.batch_sharding(mesh),
    )
    state = jax.device_put(state, state_shardings, may_alias=False)
    return step, state, jax.device_put(frozen, frozen_shardings), mesh, task


def run(config: ConfigDict, sizes: dict[str, int], steps: int = 2):
    """(state, metrics of each step, frozen parameters) after some steps."""
    step, state, frozen, mesh, task = start(config, sizes)
    batches = [sharding.put_batch(random_batch(task, i), mesh) for i in range(steps)]
    step = step.lower(state, frozen, batches[0]).compile(compiler_options=COMPILER_OPTIONS)
    history = []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        history.append(jax.device_get(metrics))
    return state, history, frozen
