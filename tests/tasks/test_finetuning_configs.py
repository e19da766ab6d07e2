"""Each way of fine-tuning with each connector, LoRA and layer-wise decay, by the config alone.

Shapes only: what trains is differentiated and updated, and nothing is compiled. That losses fall is
in other tests (`tests/models/test_connectors.py`, `tests/integration/test_lora_run.py`,
`tests/training/test_optimizer.py`).
"""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from flax.traverse_util import flatten_dict

from jaxblip.config import load_config
from jaxblip.tasks import make_task
from jaxblip.training.data_defaults import with_schedule
from jaxblip.training.initialize import abstract_params
from jaxblip.training.optimizer import learning_rate, make_optimizer
from jaxblip.training.state import TrainState
from jaxblip.training.step import make_train_step

FOLDER = Path(__file__).parents[2] / "configs" / "finetune"
TINY = [
    "config.batch_size=4",
    "config.data.image_size_px=28",
    *(
        f"config.model.{part}.{field}={size}"
        for part in ("vision", "qformer", "language_model")
        for field, size in (("width", 16), ("num_layers", 2), ("num_heads", 2), ("mlp_width", 24))
    ),
    "config.model.perceiver.num_heads=2",
    "config.model.language_model.vocab_size=40",
]
WAYS = {
    "linear": ["config.model.connector=linear"],
    "mlp": ["config.model.connector=mlp"],
    "perceiver": ["config.model.connector=perceiver"],
    "LoRA": ["config.lora.rank=2", "config.lora.parts=language_model,vision"],
    "layer-wise decay": [
        "config.frozen=language_model", "config.optimizer.layer_decay.vision=0.9",
        "config.optimizer.layer_decay.qformer=0.9",
    ],
    "several frames": ["config.data.frames=2"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("caption", way) for way in WAYS),
        # Two configs of one task, `instruct`.
        *(("vqa" if number % 2 else "instruct", way) for number, way in enumerate(WAYS)),
    ],
)
def test_what_the_config_says_is_trained(name, way):
    own = ["config.model.qformer.vocab_size=40"] if name != "caption" else []
    config = load_config(str(FOLDER / f"{name}.py"), [*TINY, *own, *WAYS[way]])
    config, _ = with_schedule(config, 100)
    task, optimizer = make_task(config), make_optimizer(config)
    trainable, frozen = abstract_params(task)
    paths = flatten_dict(trainable, sep="/")
    connector = config.model.connector
    assert ("qformer" in trainable) == (connector == "qformer")
    assert ("connector" in trainable) == (connector in ("mlp", "perceiver"))
    assert ("vision" in trainable) == (way in ("LoRA", "layer-wise decay"))
    of_frozen = [path for path in paths if path.split("/")[0] in frozen]
    assert bool(of_frozen) == (way == "LoRA") and all("lora_" in path for path in of_frozen)

    state = jax.eval_shape(
        lambda params, key: TrainState.create(params, optimizer, key), trainable, jax.random.key(0)
    )
    step = make_train_step(task, optimizer, learning_rate(config))
    after, metrics = jax.eval_shape(step, state, frozen, task.batch_shapes(config.batch_size))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"loss", "lm", "token_accuracy"} <= set(metrics)
