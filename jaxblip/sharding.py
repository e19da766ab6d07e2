"""Where arrays live: the device mesh, and the one table from parameter path to mesh axes."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxblip.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# End of a parameter's path -> mesh axes of its TRAILING dimensions; the first match counts. Leading
# dimensions beyond these are the layers of a scanned stack and stay whole. `tensor` splits heads,
# hidden units and vocabularies (each device computes its part), `fsdp` splits the width (gathered
# just before use). Vectors as long as the width stay whole: gathering them costs more than they do.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # attention
    (r"(query|key|value)/kernel", ("fsdp", "tensor", None)),  # [width, heads, head_width]
    (r"(query|key|value)/bias", ("tensor", None)),  # [heads, head_width]
    (r"out/kernel", ("tensor", None, "fsdp")),  # [heads, head_width, width]
    (r"out/bias", (None,)),  # [width]
    # feed-forward networks
    (r"(up|gate)/kernel", ("fsdp", "tensor")),  # [width, hidden]
    (r"(up|gate)/bias", ("tensor",)),  # [hidden]
    (r"down/kernel", ("tensor", "fsdp")),  # [hidden, width]
    (r"down/bias", (None,)),  # [width]
    # low-rank factors beside these kernels; the rank stays whole
    (r"(query|key|value|up|gate|dense|[a-z_]*projection)/lora_a", ("fsdp", None)),  # [width, rank]
    (r"(query|key|value)/lora_b", (None, "tensor", None)),  # [rank, heads, head_width]
    (r"out/lora_a", ("tensor", None, None)),  # [heads, head_width, rank]
    (r"down/lora_a", ("tensor", None)),  # [hidden, rank]
    (r"(up|gate)/lora_b", (None, "tensor")),  # [rank, hidden]
    (r"(out|down|dense|[a-z_]*projection)/lora_b", (None, "fsdp")),  # [rank, width]
    # norms
    (r"[^/]*norm/(scale|bias)", (None,)),  # [width]
    # embeddings; a vocabulary that `tensor` does not divide (BERT's 30,523) is split by width only
    (r"token_embedding/embedding", ("tensor", "fsdp")),  # [vocab, width]
    (r"position_embedding(/embedding)?", (None, "fsdp")),  # [positions, width]
    (r"relative_position_bias", (None, "tensor")),  # [buckets, heads]
    (r"patch_embedding/kernel", (None, None, None, "fsdp")),  # [patch, patch, 3, width]
    (r"patch_embedding/bias", (None,)),  # [width]
    (r"cls_token", ()),
    (r"query_tokens|latents", (None, "fsdp")),  # [queries, width]
    (r"ns_coeffs", (None,)),  # Muon's polynomial, in the optimizer state
    # projections and heads
    (r"lm_head/kernel", ("fsdp", "tensor")),  # [width, vocab]
    (r"itg_head/bias", ("tensor",)),  # [vocab]
    (r"itm_head/kernel", ("fsdp", None)),  # [width, 2]
    (r"(projection|image_projection|text_projection|itg_head/dense)/kernel", ("fsdp", None)),
    (r"(projection|image_projection|text_projection|itg_head/dense|itm_head)/bias", (None,)),
)

# A parameter kept whole on every device although it has this many elements is worth a report.
LARGE_ELEMENTS = 1 << 20


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with the axes `data`, `fsdp` and `tensor` over all devices.

    Args:
      sizes: devices along each axis; a missing axis has size 1, and -1 (once) means the rest.
      devices: the devices to use, by default all of the run.

    Raises:
      UserError: when an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = list(mesh_sizes(sizes, len(devices)).values())
    # Splitting a physical axis lets e.g. 64 x 4 run on a 16 x 16 TPU slice.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def mesh_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The size of each axis of a mesh over `count` devices: `make_mesh` before it has devices."""
    shown = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if unknown := sorted(set(sizes) - set(AXES)):
        raise UserError(f"Mesh axis {unknown[0]!r} does not exist: the axes are {', '.join(AXES)}.")
    shape = [sizes.get(axis, 1) for axis in AXES]
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(
            f"The mesh ({shown}) needs positive sizes, at most one of them -1 for the rest."
        )
    if -1 in shape and count % known == 0:
        shape[shape.index(-1)] = count // known
    if math.prod(shape) != count:
        product = " x ".join("the rest" if size == -1 else str(size) for size in shape)
        wrong = f"that is {known} devices, and there are {count}"
        if -1 in shape:
            wrong = f"{count} devices are not a multiple of {known}"
        elif known < count:
            wrong = f"that is {known} of {count} devices, and {count - known} would stand idle"
        raise UserError(
            f"The mesh ({shown}) is data x fsdp x tensor = {product}: {wrong}. Choose sizes whose "
            f"product is {count}, or -1 for one axis."
        )
    return dict(zip(AXES, shape, strict=True))


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Mesh axes of the parameter, or optimizer moment, whose path ends as `path` does.

    A mesh axis that does not divide its dimension is dropped there; scalars are replicated.

    Raises:
      ValueError: when no rule matches, or the rule names more dimensions than there are: a model
        has a parameter that `RULES` does not know.
    """
    if not shape:
        return PartitionSpec()
    for pattern, axes in RULES:
        if re.search(rf"(^|/)({pattern})$", path):
            break
    else:
        raise ValueError(f"No sharding rule matches parameter {path!r} of shape {tuple(shape)}.")
    if len(axes) > len(shape):
        raise ValueError(f"Parameter {path!r} of shape {tuple(shape)} has too few axes for {axes}.")
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The same tree with a `NamedSharding` for each array or `jax.ShapeDtypeStruct`.

    Works on parameters, on optimizer states (the paths of Adam's moments end with the parameter's
    path) and on a whole train state.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, tree)


def check_axes_are_used(params: Any, mesh: Mesh) -> None:
    """Raises UserError where `fsdp` or `tensor` splits no parameter at all.

    Its devices would hold, and along `tensor` compute, the same as each other.
    """
    specs = [place.spec for place in jax.tree.leaves(tree_shardings(params, mesh))]
    sizes = {"fsdp": "widths", "tensor": "head counts, hidden widths and vocabularies"}
    for axis, what in sizes.items():
        size = mesh.shape[axis]
        if size > 1 and not any(axis in spec for spec in specs):
            raise UserError(
                f"mesh.{axis}={size} divides none of the model's {what}, so that each {size} "
                "devices would do the work of one: choose a divisor of them, and mesh.data for the "
                "rest."
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over `data` and `fsdp` and repeated along `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_stay_split(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """While a model is traced inside, its activations keep the rows of `batch_sharding`.

    Left to itself, the compiler may follow `fsdp` from the parameters into the activations: each
    device then holds all rows and a slice of the width, and every product is summed over all
    devices while they wait. With the rows in place it must gather the parameters, one layer ahead
    of its use. The activations are held at the norms, of which every block has one at its
    beginning or end, and in front of the scores of words; in between their places follow.
    """
    places = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def keep(x: Any) -> Any:
        # [rows, length, width]; other arrays, such as a table of queries, have no rows.
        has_rows = isinstance(x, jax.Array) and x.ndim == 3 and x.shape[0] % batch_shards(mesh) == 0
        return jax.lax.with_sharding_constraint(x, places) if has_rows else x

    def keep_at_norms(method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name == "__call__" and (context.module.name or "").endswith("norm"):
            return keep(method(*map(keep, args), **kwargs))
        if context.method_name in ("logits", "word_logits"):  # whose vocabulary `tensor` splits
            return method(*map(keep, args), **kwargs)
        return method(*args, **kwargs)

    return nn.intercept_methods(keep_at_norms)


def batch_shards(mesh: Mesh) -> int:
    """Number of equal parts into which the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_is_split() -> bool:
    """Whether the program being traced is for a mesh that splits the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and batch_shards(mesh) > 1


def take_rows(x: Array, rows: Int[Array, " rows"]) -> Array:
    """`x[rows]` of an array `[rows, ...]` that is split as a batch, without all of it anywhere.

    The devices show each other a part of what they hold, one part after the other, and each keeps
    the rows that it wants. By itself the compiler would gather the whole array on every device.
    What is there at a time is about as much as the rows of one device: one of each at least.
    """
    if not batch_is_split():
        return x[rows]

    def on_device(x, rows):
        owner, place = jnp.divmod(rows, len(x))
        most = max(1, len(x) // jax.lax.axis_size(BATCH_AXES))
        size = next(size for size in range(most, 0, -1) if len(x) % size == 0)

        def visit(taken, part):
            number, held = part
            shown = jax.lax.all_gather(held, BATCH_AXES)[owner, place % size]
            is_there = (place // size == number).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(is_there, shown, taken), None

        parts = x.reshape(-1, size, *x.shape[1:])
        return jax.lax.scan(visit, x, (jnp.arange(len(parts)), parts))[0]

    split = PartitionSpec(BATCH_AXES)
    return jax.shard_map(on_device, in_specs=(split, split), out_specs=split)(x, rows)


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises UserError unless each device gets the same number of rows of each micro-batch."""
    shards = batch_shards(mesh)
    if accumulation_steps < 1:
        raise UserError(f"optimizer.accumulation_steps={accumulation_steps} must be at least 1.")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    parts = shards * accumulation_steps
    if batch_size % parts:
        nearest = max(parts, round(batch_size / parts) * parts)
        raise UserError(
            f"batch_size={batch_size} cannot be split evenly over data x fsdp = {shards} device "
            f"group(s) times optimizer.accumulation_steps={accumulation_steps}: "
            f"use a multiple of {parts}, for example {nearest}."
        )


def process_shard(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal, contiguous parts of each global batch this process must read.

    Processes that hold the same rows, because the `tensor` axis runs across them, read the same
    part.

    Raises:
      UserError: when the rows of this process are not contiguous in the batch.
    """
    total = batch_shards(mesh)
    slices = batch_sharding(mesh).addressable_devices_indices_map((total,)).values()
    rows = sorted({row for (part,) in slices for row in range(*part.indices(total))})
    if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise UserError(
            f"The mesh {dict(mesh.shape)} gives process {jax.process_index()} the batch parts "
            f"{rows} of {total}, which are not one block: choose another order of axis sizes."
        )
    return rows[0] // len(rows), total // len(rows)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from the rows that this process has read (its `process_shard`).

    Shapes `[rows of this process, ...]` become `[rows of the global batch, ...]`; dtypes stay.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def replicated_report(tree: Any, mesh: Mesh) -> list[str]:
    """One line for each large array that is whole on every device although the mesh could split it.

    Empty on a mesh without `fsdp` and `tensor`.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []
    report = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = parameter_spec(name, leaf.shape, mesh)
        whole = all(axis is None or mesh.shape[axis] == 1 for axis in spec)
        if whole and math.prod(leaf.shape) >= LARGE_ELEMENTS:
            report.append(f"{name} {tuple(leaf.shape)} is whole on every device")
    return report
