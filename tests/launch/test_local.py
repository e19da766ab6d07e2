"""`launch/local.py` with small commands: what each process gets, and how all of them end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "local.py"
PYTHON = [sys.executable, "-c"]


def start(*options, code="", **variables):
    """The launcher, as a process, with processes that run `code` (where `i` is their number)."""
    code = f"import os, signal, sys, time; i = int(os.environ['JAX_PROCESS_ID']); {code}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *options, "--", *PYTHON, code], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_each_process_is_told_of_its_peers_and_writes_behind_its_number():
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "XLA_FLAGS", "JAX_PLATFORMS"
    code = f"[print(n, os.environ[n]) for n in {names}]; print('to stderr', file=sys.stderr)"
    status, output, errors = finish(
        start("--processes=3", "--devices-per-process=4", code=code, XLA_FLAGS="--xla_a=1")
    )
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    of_each = [[x.removeprefix(f"[{i}] ") for x in lines if x.startswith(f"[{i}] ")] for i in "012"]
    assert of_each[0] == of_each[1] == of_each[2] and sum(map(len, of_each)) == len(lines)
    address, count, flags, platform, to_stderr = of_each[0]
    assert re.fullmatch(r"JAX_COORDINATOR_ADDRESS 127\.0\.0\.1:\d+", address)
    assert count == "JAX_NUM_PROCESSES 3" and platform == "JAX_PLATFORMS cpu"
    assert flags == "XLA_FLAGS --xla_a=1 --xla_force_host_platform_device_count=4"
    assert to_stderr == "to stderr"


def test_gpus_are_split_evenly():
    code = "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    gpus = {"CUDA_VISIBLE_DEVICES": "3,5,6,7", "JAX_PLATFORMS": "cuda"}
    _, output, _ = finish(start("--processes=2", code=code, **gpus))
    assert sorted(output.splitlines()) == ["[0] 3,5", "[1] 6,7"]
    _, output, _ = finish(start("--processes=2", "--devices-per-process=1", code=code, **gpus))
    assert sorted(output.splitlines()) == ["[0] 3", "[1] 5"]
    for options, message in {
        ("--processes=3",): "4 GPU(s) cannot be split evenly over --processes=3",
        ("--processes=2", "--devices-per-process=3"): "2 x --devices-per-process=3 = 6 GPUs, and 4",
    }.items():
        status, output, errors = finish(start(*options, code=code, **gpus))
        assert status == 2 and message in errors and not output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --processes"),
        (["--processes=0", "--", "true"], "--processes=0 must be at least 1"),
        (["--processes=two", "--", "true"], "invalid int value: 'two'"),
        (["--processes=2", "--devices-per-process=0", "--", "true"], "--devices-per-process=0"),
        (["--processes=2"], "no command: write it behind a --"),
        (["--processes=2", "true"], "unrecognized arguments: true"),
        (["--processes=2", "--", "no-such-command"], "'no-such-command' was not found"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    usage, *_, error = done.stderr.splitlines()
    assert usage.startswith("usage: launch/local.py --processes=N") and message in error


def test_the_first_failure_ends_all_and_is_the_exit_status():
    begin = time.monotonic()
    status, _, errors = finish(start("--processes=3", code="sys.exit(7) if i else time.sleep(60)"))
    assert status == 7 and time.monotonic() - begin < 20
    assert re.search(r"process [12] ended with status 7: ending the rest", errors)


def test_an_early_end_that_is_none_of_failure_ends_nobody_else():
    code = "time.sleep(0.5 * i); print('end')"
    status, output, errors = finish(start("--processes=2", code=code))
    assert (status, output, errors) == (0, "[0] end\n[1] end\n", "")


def test_a_stopped_process_is_killed_when_another_fails():
    code = "os.kill(os.getpid(), signal.SIGSTOP) if i else (time.sleep(0.5), os.abort())"
    launcher = start("--processes=2", code=code)
    launcher_status, _, errors = finish(launcher)
    assert launcher_status == 128 + signal.SIGABRT
    assert "process 0 ended with status 134" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_to_all(number):
    code = (
        f"signal.signal({int(number)}, lambda *_: (print('saved'), sys.exit(0)));"
        "print('ready'); time.sleep(60)"
    )
    launcher = start("--processes=2", code=code)
    for _ in range(2):
        assert launcher.stdout.readline().endswith("ready\n")
    launcher.send_signal(number)
    status, output, errors = finish(launcher)
    assert (status, sorted(output.splitlines()), errors) == (0, ["[0] saved", "[1] saved"], "")
