import json
import math
import re

import pytest

from jaxblip.evaluation.curves import draw_curve, last_finite, read_points


def read(tmp_path, *lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_points(path)[0]


def test_the_total_loss_is_left_out_where_it_has_one_part_alone(tmp_path):
    one = {"train/loss": 0.5, "train/lm": 0.5, "train/token_accuracy": 0.25, "grad_norm": 1.0}
    assert list(read(tmp_path, {"step": 1, **one})) == ["train/lm", "train/token_accuracy"]
    two = {"train/itc": 0.25, "train/loss": 0.5, "train/itm": 0.25}
    assert list(read(tmp_path, {"step": 1, **two})) == ["train/loss", "train/itc", "train/itm"]


def test_a_null_is_a_value_that_was_not_finite(tmp_path):
    series = read(tmp_path, *({"step": s, "train/itc": v} for s, v in [(1, 2.0), (2, None)]))
    assert series["train/itc"][1] == 2.0 and math.isnan(series["train/itc"][2])
    assert last_finite(series["train/itc"]) == 2.0
    assert math.isnan(last_finite({1: math.nan}))


def num_strokes(svg):
    """Number of pieces of the curve."""
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--accent\)', svg)
    return path[1].count("M")


def test_a_value_that_is_not_finite_leaves_a_gap():
    whole, broken = {s: float(s) for s in range(20)}, {s: float(s) for s in range(20)}
    broken[10] = math.nan
    assert num_strokes(draw_curve("train/itc", whole, "a")) == 1
    assert num_strokes(draw_curve("train/itc", broken, "a")) == 2


@pytest.mark.parametrize("name, top", [("train/itm_accuracy", "1"), ("eval/i2t_r1", "1")])
def test_shares_are_drawn_from_0_to_1(name, top):
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", draw_curve(name, {0: 0.5, 9: 0.6}, "a"))
    assert "0" in ticks and top in ticks
