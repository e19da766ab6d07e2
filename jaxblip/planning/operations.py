"""How many operations a program has, counted in its jaxpr.

XLA's `cost_analysis` counts the body of a loop once, whatever its length, and all layers of a deep
stack are one loop. Here a scan counts as often as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count_operations(function: Callable, *args: Any) -> int:
    """Floating-point operations of the matrix products and convolutions of one call.

    A multiplication and its addition are two, as the peaks of data sheets count them. Everything
    else (norms, activations, softmax) is left out, as is usual where a share of the peak is told.

    Args:
      function: traced, not run.
      args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: a loop without a known length has matrix products.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    bodies = [_of_jaxpr(body) for body in _bodies(params)]
    if name == "cond":
        return max(bodies)
    if name == "while" and sum(bodies):
        raise ValueError("matrix products in a loop of unknown length cannot be counted")
    times = {"scan": params.get("length"), "shard_map": _mesh_size(params)}.get(name, 1)
    return times * sum(bodies)


def _mesh_size(params: dict[str, Any]) -> int:
    return math.prod(params["mesh"].shape.values()) if "mesh" in params else 1


def _bodies(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _dot(equation: JaxprEqn) -> int:
    left, _ = (variable.aval.shape for variable in equation.invars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(left[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation: JaxprEqn) -> int:
    kernel = equation.invars[1].aval.shape
    output_axis, *_ = equation.params["dimension_numbers"].rhs_spec
    inner = math.prod(kernel) // kernel[output_axis]  # input channels a group, and the window
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
