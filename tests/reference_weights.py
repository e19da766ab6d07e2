"""Weights of transformers through the layouts of `jaxblip.interop`: in memory, and by files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jaxblip.interop.entries import Layout
from jaxblip.interop.files import TensorInfo, Weights, open_weights
from jaxblip.interop.load import stored_params
from jaxblip.interop.save import save_params


def params_of(module: torch.nn.Module, layout: Layout, shapes: dict) -> dict:
    """The parameters `shapes` of a module in memory, as numpy arrays."""
    arrays = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    weights = Weights(type(module).__name__, tensors, arrays.__getitem__, {}, Path())
    return _read(weights, layout, shapes)


def params_in(folder: Path, layout: Layout, shapes: dict) -> dict:
    """The parameters `shapes` of a folder, as numpy arrays."""
    return _read(open_weights(folder), layout, shapes)


def _read(weights: Weights, layout: Layout, shapes: dict) -> dict:
    return jax.tree.map(lambda param: param[()], stored_params(weights, layout, shapes))


def assert_exports(
    params: dict,
    layout: Layout,
    config: Mapping[str, Any],
    folder: Path,
    expected: transformers.PreTrainedModel,
) -> transformers.PreTrainedModel:
    """Asserts that transformers reads the weights of `expected` from the export in `folder`.

    No tensor may be missing, left over or different in a single bit.

    Returns:
      The model that was read, of the class that `config` names.
    """
    assert save_params(params, layout, folder, config, dtype=np.float32) == ()
    (name,) = config["architectures"]
    read = getattr(transformers, name).from_pretrained
    model, info = read(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors, state = expected.state_dict(), model.state_dict()
    assert sorted(state) == sorted(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(state[key], tensor), key
    return model
