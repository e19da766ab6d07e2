"""metrics.jsonl: valid JSON, complete after a kill, equal after a resume; TensorBoard events."""

import json

import jax.numpy as jnp
import numpy as np
from tensorboardX.proto import event_pb2

from jaxblip.training.metrics import METRICS_FILE, MetricsWriter, read_metrics


def write(workdir, steps, resume_step=0):
    with MetricsWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step, "skipped_total": 0})


def events(workdir):
    """Events of all files, in the order of the files' names."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]


def test_each_line_is_a_json_object_with_plain_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        values = {"loss": jnp.float32(0.5), "skipped": jnp.int32(2), "rate": np.float64(1.5)}
        writer.write(3, values)
        # Visible at once, without close: a killed process loses no line.
        (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line) == {"step": 3, "loss": 0.5, "skipped": 2, "rate": 1.5}
    assert '"skipped": 2,' in line


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": np.nan, "b": np.inf, "c": jnp.float32(-np.inf), "d": 1.0})
    text = (tmp_path / METRICS_FILE).read_text()
    expected = {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}
    assert json.loads(text, parse_constant=refuse) == expected


def test_a_resumed_run_has_the_lines_of_one_that_was_never_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write(whole, range(1, 11))
    write(killed, range(1, 8))
    with (killed / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    assert [m["step"] for m in read_metrics(killed)] == list(range(1, 8))
    write(killed, range(6, 11), resume_step=5)
    assert (killed / METRICS_FILE).read_bytes() == (whole / METRICS_FILE).read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == [METRICS_FILE, "tensorboard"]


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"i2t_r1": 0.01})  # before the first step
        writer.write(3, {"loss": 1.0})
    write(tmp_path, range(1, 3))
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3], resume_step=2)
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3]


def test_no_file_reads_as_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_the_scalars_and_is_told_what_to_forget(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3], resume_step=2)
    scalars, purged = [], []
    for event in events(tmp_path):
        for value in event.summary.value:
            if value.tag == "loss":
                scalars.append((event.step, round(value.simple_value, 4)))
        if event.HasField("session_log"):
            purged.append(event.step)
    assert sorted(scalars) == [(1, 1.0), (2, 0.5), (3, 0.3333), (3, 0.3333)]
    assert sorted(purged) == [1, 3]
