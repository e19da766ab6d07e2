"""Position tables as sines by their formula, and of another size against both references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from jaxblip.errors import UserError
from jaxblip.models.positions import interpolate_positions, sincos2d_positions

METHODS = {"bicubic": False, "bicubic_align_corners": True}
WIDTH = 5


def table(side: int, *, has_cls_token: bool, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(side)
    return rng.normal(size=(side**2 + has_cls_token, WIDTH)).astype(dtype)


def by_torch(patches: np.ndarray, side_from: int, side_to: int, align_corners: bool) -> np.ndarray:
    grid = torch.tensor(patches).reshape(1, side_from, side_from, WIDTH).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(side_to, side_to), mode="bicubic", align_corners=align_corners
    )
    return grid.permute(0, 2, 3, 1).reshape(-1, WIDTH).numpy()


# ViT-g/14 and L/14 from 224 px to 364, 384 and 490 px; B/16 from 384 to 224 px; small grids.
@pytest.mark.parametrize(
    ("side_from", "side_to"),
    [(16, 26), (16, 27), (16, 35), (24, 14), (16, 16), (3, 2), (2, 7), (5, 1), (1, 4)],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("has_cls_token", [True, False])
def test_same_as_torch(side_from, side_to, method, has_cls_token):
    before = table(side_from, has_cls_token=has_cls_token)
    after = interpolate_positions(before, side_from, side_to, method)
    assert after.shape == (side_to**2 + has_cls_token, WIDTH) and after.dtype == np.float32
    np.testing.assert_array_equal(after[:has_cls_token], before[:has_cls_token])
    expected = by_torch(before[has_cls_token:], side_from, side_to, METHODS[method])
    np.testing.assert_allclose(after[has_cls_token:], expected, rtol=1e-5, atol=1e-5)


def test_same_as_transformers():
    config = transformers.Blip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        image_size=12, patch_size=3,
    )  # fmt: skip
    embeddings = transformers.Blip2VisionModel(config).embeddings
    before = table(4, has_cls_token=True)
    embeddings.position_embedding.data = torch.tensor(before)[None]
    with torch.no_grad():
        expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 50, WIDTH), 21, 21)[0]
    after = interpolate_positions(before, 4, 7, "bicubic")
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_table_of_the_wanted_size_stays_as_it_is(method):
    before = table(4, has_cls_token=True, dtype=np.float16)
    after = interpolate_positions(before, 4, 4, method)
    assert after.dtype == np.float16
    np.testing.assert_array_equal(after, before)


def test_the_methods_differ():
    before = table(4, has_cls_token=False)
    one, other = (interpolate_positions(before, 4, 6, method) for method in METHODS)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("rows", [15, 18, 257])
def test_a_table_of_another_grid_is_an_error(rows):
    with pytest.raises(UserError, match=f"{rows} rows.*4 x 4.*16 rows, or 17"):
        interpolate_positions(np.zeros((rows, WIDTH)), 4, 6)


def test_a_method_that_does_not_exist():
    with pytest.raises(UserError, match="'bilinear'.*bicubic, bicubic_align_corners"):
        interpolate_positions(np.zeros((16, WIDTH)), 4, 6, "bilinear")


def test_sines_of_column_and_row():
    table = sincos2d_positions(3, 8)
    assert table.shape == (9, 8) and table.dtype == np.float32
    for patch in range(9):
        row, column = divmod(patch, 3)
        expected = []
        for place in (column, row):
            angles = [place, place / 3]  # the longest wave is three times the shortest
            expected += [math.sin(angle) for angle in angles]
            expected += [math.cos(angle) for angle in angles]
        np.testing.assert_allclose(table[patch], expected, atol=1e-6)


@pytest.mark.parametrize("width", [4, 10])
def test_sines_need_a_width_that_four_divides(width):
    with pytest.raises(UserError, match=f"multiple of 4.*not {width}"):
        sincos2d_positions(3, width)
