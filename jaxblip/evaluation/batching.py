"""Functions of a task over any number of rows, a batch of fixed shape at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxblip import sharding
from jaxblip.decoding.generation import jit_on_mesh
from jaxblip.errors import UserError
from jaxblip.training.state import Params, merge_params


class RowMap:
    """Maps compiled functions over the rows of host arrays, sharded over the mesh.

    Every process holds all rows, computes its devices' part and gets the whole result.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        """`batch_size` rows at a time; UserError unless they divide over the mesh."""
        shards = sharding.batch_shards(mesh)
        if batch_size < 1 or batch_size % shards:
            raise UserError(
                f"eval.batch_size={batch_size} cannot be split over data x fsdp = {shards} device "
                f"groups: use a multiple of {shards}."
            )
        self.mesh, self.batch_size = mesh, batch_size
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(
        self,
        function: Callable[..., Any],
        params: Params,
        frozen: Params,
        *arrays: np.ndarray,
        rows: tuple[np.ndarray, ...] | None = None,
        whole: tuple[Any, ...] = (),
    ) -> Any:
        """`function(all_params, *whole, *batch)` over all rows, put together again.

        Args:
          function: gives a row for each row of its batch, or several arrays of such rows; compiled
            once.
          params, frozen: both parts of the parameters.
          arrays: what the batches are cut from, along axis 0.
          rows: for each array, the rows to take, in order; by default all.
          whole: what every batch sees as a whole, on the devices already (`whole_array`).
        """
        count = len(arrays[0]) if rows is None else len(rows[0])
        rows = (np.arange(count),) * len(arrays) if rows is None else rows
        compiled = self._compile(function)
        outputs = []
        for start in range(0, count, self.batch_size):
            stop = min(start + self.batch_size, count)
            # The last batch is filled up with rows of its own, so that one compilation serves all.
            taken = np.resize(np.arange(start, stop), self.batch_size)
            batch = [
                self.place(array, chosen[taken])
                for array, chosen in zip(arrays, rows, strict=True)
            ]
            output = compiled(params, frozen, whole, *batch)
            outputs.append(jax.tree.map(lambda x: np.asarray(x)[: stop - start], output))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)

    def whole_array(self, array: np.ndarray) -> jax.Array:
        """A host array, all of it on every device."""
        placed = NamedSharding(self.mesh, PartitionSpec())
        return jax.make_array_from_callback(array.shape, placed, lambda index: array[index])

    def place(self, array: np.ndarray, rows: np.ndarray) -> jax.Array:
        """Rows of a host array, each on its device."""
        return jax.make_array_from_callback(
            (len(rows), *array.shape[1:]),
            sharding.batch_sharding(self.mesh),
            lambda index: array[rows[index[0]]],
        )

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            self._compiled[function] = jit_on_mesh(
                lambda params, frozen, whole, *batch: function(
                    merge_params(params, frozen), *whole, *batch
                ),
                self.mesh,
                out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            )
        return self._compiled[function]
