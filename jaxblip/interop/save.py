"""Parameters as safetensors in the Hugging Face layout, one tensor at a time.

The place of every tensor follows from the shapes alone, so each file's header is written first and
the tensors go behind it in turn. No file is ever put together in memory, which a library call that
takes a dict of arrays would need; memory is one of our tensors and a few megabytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxblip.errors import UserError
from jaxblip.interop.entries import Entry, Layout, Shape, Slot
from jaxblip.interop.files import CONFIG_FILE, DTYPES, INDEX_FILE, SINGLE_FILE

Params = dict[str, Any]

NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 16 << 20  # of a tensor, transposed and cast at a time
ALIGNMENT = 8  # of the tensors' bytes, as the safetensors library does


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor to be written."""

    entry: Entry
    shape: Shape
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_params(
    params: Params,
    layout: Layout,
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> tuple[str, ...]:
    """Writes a folder that transformers' `from_pretrained` loads.

    Args:
      params: the full tree, of `jax.Array` (sharded as it may be), numpy arrays or `StoredParam`.
      layout: how the target class names them (`interop.families`).
      folder: made if need be; it must hold no weights yet.
      config: what `config.json` is to say; its `dtype` is added where `dtype` is given.
      dtype: of floating-point tensors; None keeps each as it is.
      metadata: further entries of each file's header.
      max_shard_bytes: largest file; a tensor that is larger has a file of its own.

    Returns:
      Paths of the parameters that the target has no place for: they stay behind.

    Raises:
      UserError: the folder has weights, or the target needs parameters that `params` lacks.
    """
    flat = flatten_dict(params, sep="/")
    shards = _shards(_plan(flat, layout, dtype), max_shard_bytes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted([*folder.glob("*.safetensors"), *folder.glob(INDEX_FILE)]):
        raise UserError(
            f"The folder {os.fspath(folder)!r} has weights already ({old[0].name}), which would be "
            "mixed with new ones: remove them, or name another folder."
        )
    files = [SINGLE_FILE] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    # transformers reads no file whose header does not name the framework it was written for.
    header = {"format": "pt"} | dict(metadata or {})
    for file, tensors in zip(files, shards, strict=True):
        _write_file(folder / file, tensors, flat, header)
    if len(shards) > 1:
        _write_json(folder / INDEX_FILE, _index(files, shards))
    if dtype is not None:
        config = dict(config) | {"dtype": np.dtype(dtype).name}
    _write_json(folder / CONFIG_FILE, config)
    return left_behind(params, layout)


def left_behind(params: Params, layout: Layout) -> tuple[str, ...]:
    """Paths of the parameters that a checkpoint of this layout has no place for."""
    written = {slot.path for entry in layout.entries for slot in entry.ours}
    return tuple(path for path in flatten_dict(params, sep="/") if path not in written)


def _plan(flat: Mapping[str, Any], layout: Layout, dtype: Any) -> list[_Tensor]:
    lacking = sorted(
        {slot.path for entry in layout.entries for slot in entry.ours if not _has(flat, slot)}
    )
    if lacking:
        raise UserError(
            f"The export needs parameters that the model does not have: {', '.join(lacking[:8])}"
            f"{f' and {len(lacking) - 8} more' if len(lacking) > 8 else ''}. Export to the class "
            "that the model was built as."
        )
    tensors = []
    for entry in layout.entries:
        leaves = [flat[slot.path] for slot in entry.ours]
        shapes = [slot.shape(leaf.shape) for slot, leaf in zip(entry.ours, leaves, strict=True)]
        kind = np.dtype(leaves[0].dtype)
        if dtype is not None and jax.numpy.issubdtype(kind, np.floating):
            kind = np.dtype(dtype)
        if kind not in NAMES:
            raise UserError(
                f"{entry.theirs!r} is of type {kind}, which safetensors do not have: choose "
                "float32, float16 or bfloat16."
            )
        tensors.append(_Tensor(entry, entry.their_shape(shapes), kind))
    return tensors


def _has(flat: Mapping[str, Any], slot: Slot) -> bool:
    if slot.path not in flat:
        return False
    return slot.layer is None or slot.layer < flat[slot.path].shape[0]


def _shards(tensors: list[_Tensor], max_bytes: int) -> list[list[_Tensor]]:
    """In the order of the model, as many to a file as fit."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    # Wide types first, so that every tensor is aligned to its own width.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _index(files: Sequence[str], shards: Sequence[Sequence[_Tensor]]) -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": sum(math.prod(t.shape) for shard in shards for t in shard),
            "total_size": sum(tensor.size for shard in shards for tensor in shard),
        },
        "weight_map": {
            tensor.entry.theirs: file
            for file, shard in zip(files, shards, strict=True)
            for tensor in shard
        },
    }


def _write_file(
    file: Path, tensors: Sequence[_Tensor], flat: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        header[tensor.entry.theirs] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    new = file.with_name(f".{file.name}.new")  # no half-written file under the real name
    with new.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors:
            arrays = [_on_host(flat[slot.path], slot.layer) for slot in tensor.entry.ours]
            _write_tensor(stream, tensor.entry.join(arrays), tensor.dtype)
    new.replace(file)


def _write_tensor(stream: BinaryIO, array: np.ndarray, dtype: np.dtype) -> None:
    """The bytes in row-major order; a transposed view is copied some rows at a time."""
    array = np.atleast_1d(array)
    row_bytes = max(1, math.prod(array.shape[1:]) * dtype.itemsize)
    rows = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(array), rows):
        chunk = np.ascontiguousarray(array[start : start + rows], dtype)
        stream.write(chunk.reshape(-1).view(np.uint8))


def _on_host(leaf: Any, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of it, without a host copy of the rest of the stack."""
    index = () if layer is None else (layer,)
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf[index])
    if not leaf.is_fully_addressable:
        raise UserError(
            "The parameters lie on the devices of several processes: export from one process, "
            "with `jaxblip convert` on the checkpoint."
        )
    array = np.empty(leaf.shape[len(index) :], leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id:
            continue
        part = shard.data
        if layer is not None:
            layers = range(leaf.shape[0])[shard.index[0]]
            if layer not in layers:
                continue
            part = jax.lax.dynamic_index_in_dim(part, layer - layers.start, keepdims=False)
        elif shard.device.platform != "cpu":
            part = part.copy()  # an array keeps the host copy that is made of it
        array[shard.index[len(index) :]] = np.asarray(part)
    return array


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
