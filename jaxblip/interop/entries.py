"""The language in which families say how their weights stand in files: one table, both directions.

An `Entry` ties one tensor of a file to the slices of our parameters that it holds. `split` cuts the
tensor into them for import, `join` puts it together for export; both work on views, so nothing is
copied before the bytes are needed. The functions below make the entries of the usual layers, from
PyTorch's names (`weight`, `bias`) to Flax's (`kernel`, `bias`, `scale`, `embedding`).

Prefixes of names, theirs and ours, end with their separator (`"vision_model."`, `"vision/"`) or are
empty.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxblip.errors import UserError

Shape = tuple[int, ...]
Split = Callable[[np.ndarray, Sequence[Shape]], Sequence[np.ndarray]]
Join = Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place in our parameter tree.

    Attributes:
      path: such as "language_model/layers/attention/query/kernel".
      layer: position on axis 0 of a stacked parameter (a layer; in the Q-Former a group); None for
        the whole parameter.
    """

    path: str
    layer: int | None = None

    def shape(self, shape: Shape) -> Shape:
        """Shape of the place, from the shape of the parameter at `path`."""
        return tuple(shape) if self.layer is None else tuple(shape[1:])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file, and the places in our tree that its values belong to.

    Attributes:
      theirs: name of the tensor.
      ours: one or more places.
      split: (tensor, shapes of our places) to one array a place.
      join: arrays of our places to the tensor; its result's shape depends on their shapes alone.
      aliases: further names under which files have had the same tensor, such as that of a tied
        output head. Import takes the first name that is there, and export writes `theirs`.
    """

    theirs: str
    ours: tuple[Slot, ...]
    split: Split
    join: Join
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the tensor, the current one first."""
        return (self.theirs, *self.aliases)

    def their_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the tensor, from the shapes of our places."""
        stand_in = np.zeros((), np.int8)  # every element of an array is this one: no memory
        return self.join([np.broadcast_to(stand_in, shape) for shape in shapes]).shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the parameters of one model stand in one kind of checkpoint.

    Attributes:
      entries: every tensor that such a checkpoint has for the model.
      ignored: regular expressions of whole names that carry no weights, such as index buffers.
      absent: prefixes of our paths that such a checkpoint has no place for. Import leaves them to
        the caller, and export leaves them behind.
    """

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of this name is left over without harm."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def holds(self, path: str) -> bool:
        """Whether such a checkpoint has a place for the parameter at `path`."""
        return not any(path == part or path.startswith(f"{part}/") for part in self.absent)


Entries = tuple[Entry, ...]

QKV = ("query", "key", "value")


def plain(
    theirs: str,
    ours: str,
    layer: int | None = None,
    *,
    their_shape: Callable[[Shape], Shape] = lambda shape: shape,
    aliases: tuple[str, ...] = (),
) -> Entries:
    """The same values in the same order.

    Args:
      their_shape: their shape from ours, where the two differ.
    """
    return (
        Entry(
            theirs,
            (Slot(ours, layer),),
            split=lambda tensor, shapes: (tensor.reshape(shapes[0]),),
            join=lambda arrays: arrays[0].reshape(their_shape(arrays[0].shape)),
            aliases=aliases,
        ),
    )


def flat(theirs: str, ours: str, layer: int | None = None) -> Entries:
    """A vector that ours cuts into heads: the bias of a projection to heads."""
    return plain(theirs, ours, layer, their_shape=lambda shape: (math.prod(shape),))


def linear(
    theirs: str,
    ours: str,
    layer: int | None = None,
    *,
    bias: bool = True,
    inputs: int = 1,
    aliases: tuple[str, ...] = (),
) -> Entries:
    """A linear map: `[out, in]` in PyTorch, `[in, out]` in Flax.

    Either side of ours may be several axes: `[width, heads, head_width]` is a projection to heads.

    Args:
      inputs: how many leading axes of our kernel are inputs.
      aliases: of the weight.
    """

    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        (kernel,) = arrays
        return kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T

    kernel = Entry(
        f"{theirs}.weight",
        (Slot(f"{ours}/kernel", layer),),
        split=lambda tensor, shapes: (tensor.T.reshape(shapes[0]),),
        join=join,
        aliases=aliases,
    )
    return (kernel, *(flat(f"{theirs}.bias", f"{ours}/bias", layer) if bias else ()))


def linear_from_heads(
    theirs: str, ours: str, layer: int | None = None, *, bias: bool = True
) -> Entries:
    """The output projection of an attention: our kernel is `[heads, head_width, width]`."""
    return linear(theirs, ours, layer, bias=bias, inputs=2)


def norm(theirs: str, ours: str, layer: int | None = None) -> Entries:
    """A layer norm, with scale and bias."""
    return rms_norm(theirs, ours, layer) + plain(f"{theirs}.bias", f"{ours}/bias", layer)


def rms_norm(theirs: str, ours: str, layer: int | None = None) -> Entries:
    """A norm with a scale only."""
    return plain(f"{theirs}.weight", f"{ours}/scale", layer)


def embedding(theirs: str, ours: str, *, aliases: tuple[str, ...] = ()) -> Entries:
    """A table `[rows, width]`."""
    return plain(f"{theirs}.weight", f"{ours}/embedding", aliases=aliases)


def patch_convolution(theirs: str, ours: str, *, bias: bool = True) -> Entries:
    """Patches: `[out, in, height, width]` in PyTorch, `[height, width, in, out]` in Flax."""
    kernel = Entry(
        f"{theirs}.weight",
        (Slot(f"{ours}/kernel"),),
        split=lambda tensor, shapes: (tensor.transpose(2, 3, 1, 0),),
        join=lambda arrays: arrays[0].transpose(3, 2, 0, 1),
    )
    return (kernel, *(plain(f"{theirs}.bias", f"{ours}/bias") if bias else ()))


def joint_qkv(
    weight: str,
    ours: str,
    layer: int | None = None,
    *,
    key_values: str | None = None,
    bias: str | None = None,
    key_bias: bool = True,
) -> Entries:
    """Query, key and value projections of an attention in one tensor, in this order.

    Args:
      weight: name of the tensor `[3 * width, width]`.
      ours: path of the attention; its kernels are `[width, heads, head_width]`.
      key_values: path of what has the projections of keys and values, where it is not `ours`.
      bias: name of the joint bias; None where there is none.
      key_bias: False where our keys have no bias (EVA-CLIP). Export then writes zeros in its place,
        and import refuses anything else: a key bias changes no output, but it would be lost.
    """

    def places(leaf: str, parts: Sequence[str]) -> tuple[Slot, ...]:
        at = dict.fromkeys(QKV, key_values or ours) | {"query": ours}
        return tuple(Slot(f"{at[part]}/{part}/{leaf}", layer) for part in parts)

    def split_bias(tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        parts = np.split(tensor, 3)
        if not key_bias:
            _, key, _ = parts
            if key.any():
                raise UserError(
                    f"The key part of {bias!r} is not zero, and the model has no key bias "
                    "(key_bias=False): set key_bias=True for this checkpoint."
                )
            del parts[1]
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def join_bias(arrays: Sequence[np.ndarray]) -> np.ndarray:
        query, *key, value = (array.reshape(-1) for array in arrays)
        return np.concatenate([query, *(key or [np.zeros_like(query)]), value])

    weights = Entry(
        weight,
        places("kernel", QKV),
        split=lambda tensor, shapes: [
            part.T.reshape(shape) for part, shape in zip(np.split(tensor, 3), shapes, strict=True)
        ],
        join=lambda kernels: np.concatenate(
            [kernel.reshape(len(kernel), -1).T for kernel in kernels]
        ),
    )
    if bias is None:
        return (weights,)
    parts = QKV if key_bias else ("query", "value")
    return (weights, Entry(bias, places("bias", parts), split=split_bias, join=join_bias))


def also_under(entries: Entries, current: str, other: str) -> Entries:
    """The entries, found also where a file's names begin with `other` in place of `current`."""
    return tuple(
        dataclasses.replace(
            entry, aliases=(*entry.aliases, other + entry.theirs.removeprefix(current))
        )
        if entry.theirs.startswith(current)
        else entry
        for entry in entries
    )
