"""Parameters of checkpoints, read and written a piece at a time.

A large parameter is a stack of layers. Checkpoints keep each layer in a chunk of its own, so that
one can be read, or written, without the others in memory.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import type_handlers

from jaxblip.interop.load import StoredParam

Params = dict[str, Any]

PARAMS = "params"  # the item of a checkpoint
# A parameter of fewer bytes is one chunk, whatever its shape.
SMALL_BYTES = 16 << 20


class SavedParam:
    """A parameter that is still in a checkpoint; indexing reads what the index needs.

    Attributes:
      shape: of the parameter, its layers on axis 0 if it is stacked.
      dtype: of the arrays that are read.
      is_stacked: whether its layers can be read one by one.
    """

    def __init__(self, store: ts.TensorStore, dtype: Any = None):
        """`dtype`: by default that of the checkpoint."""
        self._store = store
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype if dtype is None else dtype)
        chunk = store.chunk_layout.read_chunk.shape
        self.is_stacked = len(self.shape) > 1 and chunk[0] == 1 < self.shape[0]

    def as_dtype(self, dtype: Any) -> SavedParam:
        """The same parameter, cast when it is read."""
        return SavedParam(self._store, dtype)

    def first(self, number: int) -> SavedParam:
        """The first layers of a stack; all, where there are no more."""
        return SavedParam(self._store[: min(number, self.shape[0])], self.dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the whole parameter."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        array = np.asarray(self._store[index].read().result())
        return array.astype(self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"SavedParam({self.shape}, {self.dtype})"


class InMemory:
    """An array, where others are still in files: it has what they have."""

    is_stacked = False

    def __init__(self, array: np.ndarray):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.size, self.nbytes = array.size, array.nbytes

    def as_dtype(self, dtype: Any) -> InMemory:
        """The same values as another type."""
        return InMemory(self._array.astype(dtype))

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._array[index]


def saved_params(checkpoint: str | os.PathLike) -> Params:
    """The parameters of one checkpoint, none of them read.

    Args:
      checkpoint: the folder of a step, such as "run/checkpoints/5000", or its URL in a bucket.
    """
    folder = f"{os.fspath(checkpoint)}/{PARAMS}"
    metadata = _metadata(folder)
    base = folder if "://" in folder else f"file://{os.path.abspath(folder)}"
    if metadata.get("use_ocdbt", True):
        kvstore = {"driver": "ocdbt", "base": f"{base}/"}
    else:
        kvstore = f"{base}/"
    whole = ts.KvStore.open(kvstore).result()
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    opened = {
        path: ts.open({"driver": driver, "kvstore": (whole / (".".join(path) + "/")).spec()})
        for path in _paths(metadata)
    }
    return unflatten_dict({path: SavedParam(store.result()) for path, store in opened.items()})


def saved_paths(checkpoint: str | os.PathLike) -> frozenset[str]:
    """Paths of the parameters of one checkpoint; argument as of `saved_params`."""
    metadata = _metadata(f"{os.fspath(checkpoint)}/{PARAMS}")
    return frozenset("/".join(path) for path in _paths(metadata))


def _metadata(folder: str) -> dict[str, Any]:
    with epath.Path(folder, "_METADATA").open() as file:
        return json.load(file)


def _paths(metadata: dict[str, Any]) -> list[tuple[str, ...]]:
    leaves = metadata["tree_metadata"].values()
    return [tuple(part["key"] for part in leaf["key_metadata"]) for leaf in leaves]


def layer_chunks(tree: Params) -> Any:
    """Orbax's arguments for saving `tree`: a chunk for each layer of a large parameter."""

    def arguments(leaf: Any) -> ocp.SaveArgs:
        if not _is_large_stack(leaf):
            return ocp.SaveArgs()
        layer_bytes = math.prod(leaf.shape[1:]) * np.dtype(leaf.dtype).itemsize
        return ocp.SaveArgs(chunk_byte_size=layer_bytes, shard_axes=(0,))

    return jax.tree.map(arguments, tree)


def write_checkpoint(folder: str | os.PathLike, params: Params) -> None:
    """Parameters alone as the checkpoint of step 0: nothing to go on with, and nothing frozen.

    Args:
      folder: the folder of a run's checkpoints.
      params: numpy arrays, and `StoredParam`, of which a layer at a time is read.
    """
    with ocp.CheckpointManager(
        epath.Path(folder).resolve(),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={PARAMS: _piecewise_handler(), "frozen": ocp.JsonCheckpointHandler()},
    ) as manager:
        args = ocp.args.PyTreeSave(params, save_args=layer_chunks(params))
        manager.save(0, args=ocp.args.Composite(params=args, frozen=ocp.args.JsonSave({})))


def _is_large_stack(leaf: Any) -> bool:
    nbytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return len(leaf.shape) > 2 and nbytes >= SMALL_BYTES


def _piecewise_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes trees of numpy arrays and of `StoredParam`, of which it reads a layer at a time."""
    registry = type_handlers.create_type_handler_registry(
        (StoredParam, _PiecewiseHandler()),
        (np.ndarray, type_handlers.NumpyHandler()),
        (jax.Array, type_handlers.ArrayHandler()),  # it keeps notes of all arrays
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _PiecewiseHandler(type_handlers.NumpyHandler):
    """Orbax asks the arrays' type how they are written, all of them at once: here in turn."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._turn: asyncio.Lock | None = None

    async def _open_and_write(
        self, value: StoredParam, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        self._turn = self._turn or asyncio.Lock()  # made within the loop that it belongs to
        async with self._turn:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            if not (value.is_stacked and _is_large_stack(value)):
                await store.write(value[()])
                return
            for layer in range(value.shape[0]):
                await store[layer].write(value[layer])
