"""LoRA: low-rank factors beside frozen linear maps (Hu et al. 2021, arXiv 2106.09685).

The update of a kernel W of a linear map is `alpha / rank * A @ B`. Beside `…/query/kernel` stand
`…/query/lora_a`, `[*inputs, rank]`, and `…/query/lora_b`, `[rank, *outputs]`; in a stack both have
the layers on axis 0. B starts at zero, so that the adapted model starts as the base model.

No architecture knows of it: the factors are put into the tree of parameters (`with_factors`), and a
model that is wrapped (`adapted`) adds their product to the output of every linear map that has
some, in training as in decoding.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from jaxblip.errors import UserError
from jaxblip.models.dropout import drop
from jaxblip.models.layers import matrix_axes

Params = dict[str, Any]

A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which linear maps have low-rank factors, and how these count.

    Attributes:
      rank: columns of A and rows of B; 0 is no LoRA.
      alpha: the product counts `alpha / rank`.
      dropout: share of the inputs of A that are dropped in training.
      targets: names of linear maps, such as query, value, up.
      parts: path prefixes of the models that are adapted, such as "language_model".
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "value")
    parts: tuple[str, ...] = ("language_model",)

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank} must be positive, or 0 for no LoRA.")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha={self.alpha} must be positive.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout} must be at least 0 and below 1.")
        if self.rank and not (self.targets and self.parts):
            raise UserError(
                "lora.targets and lora.parts name what is adapted, and one of them is empty: set "
                "both, or --config.lora.rank=0."
            )

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def has(self, part: str) -> bool:
        """Whether something of a part of the tree, such as "vision", is adapted."""
        return bool(self.rank) and any(name.split("/")[0] == part for name in self.parts)


def is_factor(path: str) -> bool:
    """Whether the parameter at `path` is one of the two factors."""
    return path.rpartition("/")[2] in (A, B)


def with_factors(params: Params, config: LoraConfig, rng: Key[Array, ""]) -> Params:
    """The parameters with the factors that `config` asks for: A random, B zero, both float32.

    A is uniform within ±1 / sqrt(inputs), as in the reference implementation (loralib).

    Raises:
      UserError: a part, or a target, is the name of nothing.
    """
    if not config.rank:
        return params
    flat = flatten_dict(params, sep="/")
    for number, path in enumerate(_kernels(list(flat), config)):
        shape, (num_inputs, num_outputs) = flat[path].shape, matrix_axes(path)
        end = len(shape) - num_outputs
        begin = end - num_inputs
        stack, inputs, outputs = shape[:begin], shape[begin:end], shape[end:]
        bound = math.prod(inputs) ** -0.5
        at = path.removesuffix("kernel")
        flat[at + A] = jax.random.uniform(
            jax.random.fold_in(rng, number),
            (*stack, *inputs, config.rank),
            minval=-bound,
            maxval=bound,
        )
        flat[at + B] = jnp.zeros((*stack, config.rank, *outputs))
    return unflatten_dict(flat, sep="/")


def _kernels(paths: list[str], config: LoraConfig) -> list[str]:
    """Paths of the kernels that are adapted, sorted."""
    found: set[str] = set()
    for part in config.parts:
        inside = sorted(path for path in paths if path.startswith(f"{part}/") and matrix_axes(path))
        if not inside:
            parts = ", ".join(dict.fromkeys(path.split("/")[0] for path in paths))
            raise UserError(
                f"lora.parts has {part!r}, where the model has no linear maps: its parts are "
                f"{parts}."
            )
        names = {path: path.split("/")[-2] for path in inside}
        for target in config.targets:
            if target not in names.values():
                known = sorted(set(names.values()))
                (near,) = difflib.get_close_matches(target, known, n=1, cutoff=0.0)
                raise UserError(
                    f"lora.targets has {target!r}, of which {part!r} has none; the nearest is "
                    f"{near!r}, and all are {', '.join(known)}."
                )
        found.update(path for path, name in names.items() if name in config.targets)
    return sorted(found)


def adapted(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The model as one whose `apply` counts the factors that it is given; it is still of its class.

    Dropout of the inputs is active exactly when the caller passes a `dropout` key.
    """
    if not config.rank:
        return model
    fields = (f.name for f in dataclasses.fields(model) if f.init and f.name not in _OF_FLAX)
    return _adapted_class(type(model), config)(**{name: getattr(model, name) for name in fields})


_OF_FLAX = ("parent", "name")


@functools.cache  # one class for equal arguments, so that models that are equal compare equal
def _adapted_class(kind: type[nn.Module], config: LoraConfig) -> type[nn.Module]:
    class Adapted(kind):
        @nn.nowrap
        def apply(self, *args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(functools.partial(_add_product, config)):
                return super().apply(*args, **kwargs)

    Adapted.__name__ = Adapted.__qualname__ = f"Adapted{kind.__name__}"
    return Adapted


def _add_product(config: LoraConfig, method: Any, args: tuple, kwargs: dict, context: Any) -> Any:
    y, module = method(*args, **kwargs), context.module
    if not isinstance(module, (nn.Dense, nn.DenseGeneral)) or not module.has_variable("params", A):
        return y
    # A method that calls that of its base class is intercepted twice: the outer one counts.
    if context.orig_method.func is not inspect.unwrap(type(module).__call__):
        return y
    a, b = (module.get_variable("params", name).astype(y.dtype) for name in (A, B))
    (x,) = args
    if config.dropout and module.has_rng("dropout"):
        x = drop(x, config.dropout, module.make_rng("dropout"))
    hidden = jnp.tensordot(x.astype(y.dtype), a, axes=a.ndim - 1)
    return y + config.scale * jnp.tensordot(hidden, b, axes=1)


def merged_kernel(
    kernel: np.ndarray, a: np.ndarray, b: np.ndarray, config: LoraConfig
) -> np.ndarray:
    """W + alpha / rank * A @ B in float32, of one layer or of a stack."""
    stack = a.shape[: a.ndim + b.ndim - 2 - kernel.ndim]
    a, b = np.float32(a).reshape(*stack, -1, a.shape[-1]), np.float32(b)
    b = b.reshape(*stack, a.shape[-1], -1)
    return np.float32(kernel) + config.scale * (a @ b).reshape(kernel.shape)
