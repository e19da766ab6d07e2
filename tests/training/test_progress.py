"""What the terminal shows, and the clock behind the rates."""

import io

import pytest
from rich.console import Console

from jaxblip.training.progress import Progress, Throughput, status_line

METRICS = {
    "grad_norm": 3.0,
    "itc": 1.25,
    "itm": 0.5,
    "learning_rate": 9.8e-5,
    "loss": 1.75,
    "skipped_total": 0,
    "images_per_s": 412.34,
    "data_wait_share": 0.034,
    "seconds_per_step": 0.5,
}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_rates_between_reads():
    clock = Clock()
    throughput = Throughput(clock)
    clock.now += 60  # compilation
    throughput.reset()
    for _ in range(4):
        with throughput.waiting():
            clock.now += 0.5
        clock.now += 1.5
        throughput.step(16)
    rates = throughput.read()
    assert rates == pytest.approx(
        {"images_per_s": 8.0, "data_wait_share": 0.25, "seconds_per_step": 2.0}
    )
    clock.now += 1
    throughput.step(16)
    assert throughput.read() == pytest.approx(
        {"images_per_s": 16.0, "data_wait_share": 0.0, "seconds_per_step": 1.0}
    )
    assert throughput.read() == {}


def test_waiting_counts_also_where_it_ends_with_an_error():
    clock = Clock()
    throughput = Throughput(clock)
    with pytest.raises(StopIteration), throughput.waiting():
        clock.now += 3
        raise StopIteration
    clock.now += 1
    throughput.step(1)
    assert throughput.read()["data_wait_share"] == pytest.approx(0.75)


def test_the_status_line_has_every_part_and_stays_aligned():
    line = status_line(METRICS, steps_left=302)
    assert line == (
        "loss 1.7500  itc 1.2500  itm 0.5000  lr 9.8e-05    412.3 images/s  data   3%  left 0:02:31"
    )
    other = METRICS | {"images_per_s": 8.0, "data_wait_share": 0.25, "loss": 0.01}
    assert len(status_line(other, steps_left=302)) == len(line)


def test_the_status_line_without_rates_and_with_skipped_updates():
    metrics = {"loss": float("nan"), "learning_rate": 1e-4, "skipped_total": 2}
    assert status_line(metrics, steps_left=1) == "loss    nan  lr 1.0e-04  skipped 2"


def test_without_a_terminal_each_log_is_one_plain_line():
    output = io.StringIO()
    with Progress(600, console=Console(file=output, width=40)) as progress:
        for step in range(1, 121):
            progress.advance(step)
        progress.log(120, METRICS)
        progress.message("[bold] saved to runs/[demo]")
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("step 120/600  loss 1.7500  itc 1.2500")
    assert lines[0].endswith("left 0:04:00")
    assert lines[1] == "[bold] saved to runs/[demo]"
    assert len(lines) == 2 and "\x1b" not in output.getvalue()


def test_in_a_terminal_a_bar_shows_the_step_and_the_metrics():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, color_system=None)
    with Progress(600, start_step=100, console=console) as progress:
        progress.log(120, METRICS)
        progress.message("saved")
        progress.advance(140)
    text = output.getvalue()
    assert "140/600" in text and "loss 1.7500" in text and "saved" in text
    assert text.count("step 120/600") == 0
