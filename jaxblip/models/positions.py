"""Position tables of a vision transformer: their start, and another resolution than trained at."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxblip.errors import UserError

CUBIC_A = -0.75  # the free coefficient of the cubic kernel; PyTorch's choice

# What each reference does with a table of another size.
METHODS = {
    "bicubic": False,  # EVA-CLIP in LAVIS, BLIP, and `interpolate_pos_encoding` of transformers
    "bicubic_align_corners": True,  # CLIP in LAVIS
}


def sincos2d_positions(num_patches_side: int, width: int) -> Float[np.ndarray, "patches width"]:
    """Sines and cosines of a patch's column and row ("Attention is all you need" in 2-D).

    A quarter of the width each: sines of the column, its cosines, sines of the row, its cosines,
    with wavelengths from 2 pi patches to 2 pi sides of the grid: the far longer ones that are usual
    for texts would be alike everywhere on it. float32.

    Args:
      num_patches_side: patches along one side of the square grid; they go row by row.
      width: a multiple of 4, at least 8.
    """
    if width % 4 or width < 8:
        raise UserError(
            f"Positions as sines need a width that is a multiple of 4 and at least 8, not {width}: "
            'change the width, or set position_init to "normal".'
        )
    frequencies = num_patches_side ** -np.linspace(0, 1, width // 4)
    rows, columns = np.divmod(np.arange(num_patches_side**2), num_patches_side)
    angles = [np.multiply.outer(place, frequencies) for place in (columns, rows)]
    table = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(table, axis=1).astype(np.float32)


def interpolate_positions(
    table: Float[np.ndarray, "tokens_from width"],
    num_patches_side_from: int,
    num_patches_side_to: int,
    method: str = "bicubic",
) -> Float[np.ndarray, "tokens_to width"]:
    """The table of a square grid of patches, resized to another square grid.

    Gives the numbers of `torch.nn.functional.interpolate(mode="bicubic")`, which smooths nothing
    when it shrinks a grid.

    Args:
      table: one row a patch, row by row of the image; a row more is the class token's, stands
        first, and stays as it is.
      num_patches_side_from: patches along one side of the table's grid, e.g. 16 for 224 px and
        patches of 14 px.
      num_patches_side_to: patches along one side of the wanted grid, e.g. 26 for 364 px.
      method: "bicubic", whose grids cover the same image area (`align_corners=False`), or
        "bicubic_align_corners", whose grids have the same centres of the corner patches.

    Returns:
      The new table, in the dtype of the old one.

    Raises:
      UserError: the table has another number of rows, or the method does not exist.
    """
    if method not in METHODS:
        raise UserError(
            f"method={method!r} resizes no position table: choose one of {', '.join(METHODS)}."
        )
    patches = num_patches_side_from**2
    num_extra = len(table) - patches
    if num_extra not in (0, 1):
        raise UserError(
            f"A position table of {len(table)} rows is not that of {num_patches_side_from} x "
            f"{num_patches_side_from} patches, which has {patches} rows, or {patches + 1} with a "
            f"class token: give the grid that the table was trained with."
        )
    weights = _bicubic_weights(num_patches_side_from, num_patches_side_to, METHODS[method])
    grid = table[num_extra:].reshape(num_patches_side_from, num_patches_side_from, -1)
    # Cubic interpolation is separable: rows first, then columns.
    grid = np.einsum("ih,jw,hwc->ijc", weights, weights, grid, optimize=True)
    resized = grid.reshape(-1, table.shape[1]).astype(table.dtype)
    return np.concatenate([table[:num_extra], resized])


def _bicubic_weights(size_from: int, size_to: int, align_corners: bool) -> np.ndarray:
    """Float64 `[size_to, size_from]`: each new row as a weighted sum of old ones."""
    if align_corners:
        source = np.arange(size_to) * ((size_from - 1) / max(size_to - 1, 1))
    else:
        source = (np.arange(size_to) + 0.5) * (size_from / size_to) - 0.5
    first = np.floor(source).astype(int)
    weights = np.zeros((size_to, size_from))
    for tap in range(-1, 3):
        # Past the edge the outermost row counts, so several taps may fall on one row.
        row = np.clip(first + tap, 0, size_from - 1)
        np.add.at(weights, (np.arange(size_to), row), _cubic(source - first - tap))
    return weights


def _cubic(distance: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) with coefficient `CUBIC_A`."""
    x, a = np.abs(distance), CUBIC_A
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
