"""Sizes by the shapes of tensors, for files that have no config."""

from __future__ import annotations

from jaxblip.errors import UserError
from jaxblip.interop.entries import Shape
from jaxblip.interop.files import Weights


def shape_of(weights: Weights, name: str, num_axes: int) -> Shape:
    """The shape of a tensor that sizes of the model are told by.

    Raises:
      UserError: it is not there, or has another number of axes.
    """
    if name not in weights.tensors:
        raise UserError(
            f"{weights.source!r} has no {name!r}, by which the model's sizes are told: it is not "
            "whole, or none of the files that jaxblip reads."
        )
    shape = weights.tensors[name].shape
    if len(shape) != num_axes:
        raise UserError(
            f"{name!r} of {weights.source!r} has {len(shape)} axes, not {num_axes}: it is none of "
            "the files that jaxblip reads."
        )
    return shape


def layers_with(weights: Weights, prefix: str, part: str = "") -> set[int]:
    """The numbers behind `prefix` in names of tensors, of those with `part` behind the number."""
    rests = (n.removeprefix(prefix).split(".", 1) for n in weights.tensors if n.startswith(prefix))
    return {int(rest[0]) for rest in rests if rest[0].isdecimal() and rest[-1].startswith(part)}


def num_layers(weights: Weights, prefix: str) -> int:
    """The length of a stack: one that lacks a layer in between is as long as a whole one."""
    return max(layers_with(weights, prefix), default=0) + 1


def heads_of(weights: Weights, width: int, head_width: int) -> int:
    """The number of heads of an attention.

    Raises:
      UserError: the width is not that of whole heads.
    """
    if width < 1 or width % head_width:
        raise UserError(
            f"{weights.source!r} has an attention of width {width}, which is not cut into heads of "
            f"width {head_width}, as in the models of its kind: jaxblip does not read it."
        )
    return width // head_width
