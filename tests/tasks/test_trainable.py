"""Trainable parts by path: the counts that are published, and single parameters."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_tasks import run, shallow, tiny_config

from jaxblip.config import load_config
from jaxblip.tasks import make_task
from jaxblip.training.initialize import abstract_params

CONFIGS = Path(__file__).parents[2] / "configs"


def test_caption_finetuning_with_the_encoder_has_the_published_number_of_parameters():
    """1,093,619,584, as the training log of BLIText has it (364 px, OPT-2.7B)."""
    overrides = ["config.frozen=language_model", "config.data.image_size_px=364"]
    config = load_config(str(CONFIGS / "blip2/stage2_vit_g_opt_2_7b.py"), overrides)
    trainable, frozen = abstract_params(make_task(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 1_093_619_584
    assert set(frozen) == {"language_model"}


def test_nothing_but_the_query_tokens():
    config = shallow(tiny_config("stage2"))
    config.frozen = ("vision", "vision_norm", "qformer", "projection", "language_model")
    config.trainable = ("qformer/query_tokens",)
    state, history, frozen = run(config, {}, steps=1)
    assert list(flatten_dict(state.params, sep="/")) == ["qformer/query_tokens"]
    assert "query_tokens" not in frozen["qformer"] and np.isfinite(history[0]["loss"])


@pytest.mark.parametrize("prefix", ["qformer/groups", "vision/layers"])
def test_a_part_of_a_part_may_be_frozen(prefix):
    config = tiny_config("stage1")
    config.frozen = (prefix,)
    trainable, frozen = (flatten_dict(tree, sep="/") for tree in abstract_params(make_task(config)))
    assert frozen and all(path.startswith(f"{prefix}/") for path in frozen)
    assert not any(path.startswith(f"{prefix}/") for path in trainable)
