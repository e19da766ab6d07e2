"""Weights of files as parameters: checked by name and shape first, then read where they belong."""

from __future__ import annotations

import difflib
import gc
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxblip.errors import UserError
from jaxblip.interop.entries import Entry, Layout, Shape, Slot
from jaxblip.interop.files import Weights

Params = dict[str, Any]

# A larger stack of layers is put together on its devices. Below that, the copy on the host costs
# less than compiling what spares it.
LARGE_BYTES = 256 << 20


def load_params(
    weights: Weights, layout: Layout, shapes: Params, shardings: Params, dtype: Any = None
) -> Params:
    """Parameters from files, each shard straight to its device.

    The host has one parameter at a time, or one layer of a large stack, and of that only the shards
    of this process's devices.

    Args:
      layout: how such files hold the parameters (`interop.families`).
      shapes: tree of `jax.ShapeDtypeStruct`. It may be a part of what the files hold: tensors that
        the layout knows and the tree does not want stay unread.
      shardings: the same tree of shardings (`sharding.tree_shardings`).
      dtype: of floating-point parameters; None takes the dtypes of `shapes`.

    Raises:
      UserError: as `check`.
    """
    return put_params(stored_params(weights, layout, shapes, dtype), shardings)


def put_params(stored: Params, shardings: Params) -> Params:
    """Parameters that are read piece by piece, each shard straight to its device.

    Args:
      stored: tree of `StoredParam`, or of anything else that has its `shape`, `dtype`,
        `is_stacked`, `nbytes` and indexing.
      shardings: the same tree of shardings.
    """
    return jax.tree.map(_put, stored, shardings)


def stored_params(weights: Weights, layout: Layout, shapes: Params, dtype: Any = None) -> Params:
    """The tree with a `StoredParam` for each parameter: nothing is read before it is indexed.

    Arguments and errors are those of `load_params`.
    """
    check(weights, layout, shapes)
    flat = flatten_dict(shapes, sep="/")
    pieces = defaultdict(dict)
    for entry, slots in _wanted(layout, flat):
        name = _name_in(weights, entry)
        if name is None:
            continue
        of_entry = [slot.shape(flat[slot.path].shape) for slot in entry.ours]
        for position, slot in enumerate(entry.ours):
            if slot in slots:
                pieces[slot.path][slot.layer] = (entry, name, of_entry, position)
    tree = {}
    for path, leaf in flat.items():
        floating = jnp.issubdtype(leaf.dtype, np.floating)
        kind = np.dtype(dtype if dtype is not None and floating else leaf.dtype)
        tree[path] = StoredParam(leaf.shape, kind, weights, pieces[path])
    return unflatten_dict(tree, sep="/")


class StoredParam:
    """A parameter that is still in files.

    Indexing reads what the index needs, as an array of its own; a whole stack is `param[()]`, its
    layer 3 `param[3]`.

    Attributes:
      shape: of the parameter, its layers on axis 0 if it is stacked.
      dtype: of the arrays that are read.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: np.dtype,
        weights: Weights,
        pieces: Mapping[int | None, tuple[Entry, str, list[Shape], int]],
    ):
        """`pieces`: by layer, which entry, tensor, shapes of its places, and place among them."""
        self.shape, self.dtype = tuple(shape), dtype
        self._weights, self._pieces = weights, pieces

    @property
    def is_stacked(self) -> bool:
        """Whether axis 0 runs over layers, which are tensors of their own in the files."""
        return None not in self._pieces

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
        index = index if isinstance(index, tuple) else (index,)
        # The result's shape, by numpy's own rules.
        empty = np.broadcast_to(np.zeros((), self.dtype), self.shape)[index]
        array = np.empty(empty.shape, self.dtype)
        if not self.is_stacked:
            self._fill(array, None, index)
            return array
        of_layers, rest = (index or (slice(None),))[0], index[1:]
        layers = range(self.shape[0])[of_layers]
        if isinstance(layers, int):
            self._fill(array, layers, rest)
            return array
        for row, layer in enumerate(layers):
            self._fill(array[row, ...], layer, rest)
        return array

    def _fill(self, array: np.ndarray, layer: int | None, index: tuple) -> None:
        entry, name, shapes, position = self._pieces[layer]
        values = entry.split(self._weights.read(name), shapes)[position]
        np.copyto(array, values[index], casting="unsafe")

    def __repr__(self) -> str:
        return f"StoredParam({self.shape}, {self.dtype})"


class QuietParam(StoredParam):
    """A stored parameter for a writer with threads, which at an error would print their stacks.

    The first error of all that share `errors` goes there; from then on they read zeros.
    """

    def __init__(self, param: StoredParam, errors: list[Exception]):
        super().__init__(param.shape, param.dtype, param._weights, param._pieces)
        self._errors = errors

    def __getitem__(self, index: Any) -> np.ndarray:
        if not self._errors:
            try:
                return super().__getitem__(index)
            except Exception as error:
                self._errors.append(error)
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)[index]


def _put(param: StoredParam, sharding: jax.sharding.Sharding) -> jax.Array:
    of_layer = _layer_sharding(sharding)
    if param.is_stacked and of_layer is not None and param.nbytes > LARGE_BYTES:
        return _put_by_layer(param, sharding, of_layer)
    return _make(param.shape, param.dtype, sharding, param.__getitem__)


def _make(
    shape: Shape, dtype: np.dtype, sharding: jax.sharding.Sharding, read: Callable
) -> jax.Array:
    # Devices that hold the same shard get the same array, read once.
    shards: dict[str, np.ndarray] = {}

    def shard(index: tuple) -> np.ndarray:
        key = str(index)
        if key not in shards:
            shards[key] = read(index)
        return shards[key]

    array = jax.make_array_from_callback(shape, sharding, shard, dtype=dtype)
    # The host's copies go before the next ones come: JAX drops them when Python collects garbage.
    array.block_until_ready()
    shards.clear()
    gc.collect(0)
    return array


def _put_by_layer(
    param: StoredParam, sharding: jax.sharding.Sharding, of_layer: jax.sharding.Sharding
) -> jax.Array:
    """The stack is put together on its devices, so that the host has one layer of it at a time."""
    stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(
        param.shape, param.dtype
    )
    put = jax.jit(_set_layer, donate_argnums=0, out_shardings=sharding)
    for i in range(param.shape[0]):
        layer = _make(param.shape[1:], param.dtype, of_layer, lambda index, i=i: param[(i, *index)])
        stack = put(stack, layer, i)
    return stack.block_until_ready()


def _set_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    # As integers: a CPU would cast all of the bfloat16 stack to float32 and back, for each layer.
    bits = jnp.uint16 if stack.dtype == jnp.bfloat16 else stack.dtype
    stack_bits, layer_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (stack, layer))
    stack_bits = jax.lax.dynamic_update_index_in_dim(stack_bits, layer_bits, i, axis=0)
    return jax.lax.bitcast_convert_type(stack_bits, stack.dtype)


def _layer_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """The sharding of one layer of a stack; None where the layers themselves are divided."""
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, NamedSharding) or (*sharding.spec, None)[0] is not None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def check(weights: Weights, layout: Layout, shapes: Params) -> None:
    """Whether the files hold these parameters and nothing unknown; reads names and shapes only.

    Args:
      layout: as in `load_params`.
      shapes: as in `load_params`.

    Raises:
      UserError: lists all missing, left-over and wrongly shaped tensors, grouped over the numbers
        in their names, with the nearest name on the other side.
    """
    flat = flatten_dict(shapes, sep="/")
    known = {name for entry in layout.entries for name in entry.names}
    unknown = [
        name for name in weights.tensors if name not in known and not layout.is_ignored(name)
    ]
    missing, wrong, filled = [], [], defaultdict(set)
    for entry, slots in _wanted(layout, flat):
        for slot in slots:
            filled[slot.path].add(slot.layer)
        name = _name_in(weights, entry)
        if name is None:
            missing.append(entry.theirs)
            continue
        expected = entry.their_shape([slot.shape(flat[slot.path].shape) for slot in entry.ours])
        found = weights.tensors[name].shape
        if tuple(found) != tuple(expected):
            wrong.append((name, f"{_shown(found)} in the file, {_shown(expected)} in the model"))
    nowhere = [path for path, leaf in flat.items() if not _is_whole(filled[path], leaf.shape)]
    if not (missing or unknown or wrong or nowhere):
        return
    lines = [f"The weights in {weights.source!r} do not fit the model."]
    if missing:
        candidates = _groups(unknown) or _groups(weights.tensors)
        lines.append("Missing in the file:")
        lines += [
            f"  {group}{_nearest(pattern, candidates, 'the file has')}"
            for pattern, group in _groups(missing).items()
        ]
    if unknown:
        candidates = _groups(missing) or _groups(known)
        lines.append("Left over in the file:")
        lines += [
            f"  {group}{_nearest(pattern, candidates, 'the model has')}"
            for pattern, group in _groups(unknown).items()
        ]
    if wrong:
        lines.append("Of another shape:")
        by_text = defaultdict(list)
        for name, text in wrong:
            by_text[text].append(name)
        lines += [
            f"  {group}: {text}"
            for text, names in by_text.items()
            for group in _groups(names).values()
        ]
    if nowhere:
        lines.append("Without a place in such a file:")
        lines += [f"  {path}" for path in nowhere]
    lines.append("Take the config that belongs to these weights, or give the model their sizes.")
    raise UserError("\n".join(lines))


def _wanted(layout: Layout, flat: Mapping[str, Any]) -> Iterable[tuple[Entry, list[Slot]]]:
    """The entries that fill something of the tree, and which of their places it wants.

    A layer beyond the end of a stack is not wanted: an encoder may leave out its last blocks.
    """
    for entry in layout.entries:
        slots = [
            slot
            for slot in entry.ours
            if slot.path in flat and (slot.layer is None or slot.layer < flat[slot.path].shape[0])
        ]
        if slots:
            yield entry, slots


def _is_whole(layers: set[int | None], shape: Shape) -> bool:
    return layers == {None} or bool(layers) and layers == set(range(shape[0]))


def _name_in(weights: Weights, entry: Entry) -> str | None:
    return next((name for name in entry.names if name in weights.tensors), None)


def _shown(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _groups(names: Iterable[str]) -> dict[str, str]:
    """Names that differ in their numbers only, as one: pattern to the group written out."""
    numbers: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name in names:
        found = tuple(int(number) for number in NUMBER.findall(name))
        numbers[NUMBER.sub("#", name)].add(found)
    shown = {}
    for pattern, found in numbers.items():
        columns = [set(column) for column in zip(*found, strict=True)]
        spans = [*map(_span, columns), ""]
        text = "".join(part + span for part, span in zip(pattern.split("#"), spans, strict=True))
        # With two numbers in a name, not every combination need be there.
        complete = len(found) == math.prod(map(len, columns))
        shown[pattern] = text if complete else f"{text} [{len(found)} of these]"
    return shown


def _span(numbers: set[int]) -> str:
    """`{0-2,5}`; a single number by itself."""
    if len(numbers) == 1:
        return str(*numbers)
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = (f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return "{" + ",".join(shown) + "}"


def _nearest(pattern: str, candidates: Mapping[str, str], side: str) -> str:
    near = difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.6)
    return f" ({side} {candidates[near[0]]})" if near else ""
