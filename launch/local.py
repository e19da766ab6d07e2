#!/usr/bin/env python3
"""Starts a command as several processes of one run on this machine, each with its own devices.

    launch/local.py --processes=2 -- jaxblip train --config=FILE.py --workdir=DIR

On a machine with NVIDIA GPUs each process gets an equal share of them, elsewhere a virtual device
of the CPU, or --devices-per-process of either. Every line of output begins with the number of the
process that wrote it. SIGTERM and Ctrl-C are passed on to all. When a process fails the others are
ended, and the exit status is that of the first that failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE_S = 5  # between SIGTERM and SIGKILL, when another process has failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="launch/local.py",
        usage="%(prog)s --processes=N [options] -- COMMAND …",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many")
    parser.add_argument(
        "--devices-per-process", type=int, metavar="N",
        help="by default an equal share of the GPUs, or 1 on the CPU",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="of process 0, by default a free one")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:end]), arguments[end + 1 :]

    for name in ("processes", "devices_per_process", "port"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value} must be at least 1")
    if not command:
        parser.error("no command: write it behind a --, as in -- jaxblip train --config=FILE.py …")
    if shutil.which(command[0]) is None:
        parser.error(f"the command {command[0]!r} was not found: see that it is installed")
    try:
        devices = _devices(options.processes, options.devices_per_process)
    except ValueError as error:
        parser.error(str(error))
    address = f"127.0.0.1:{options.port or _free_port()}"
    return _run(command, [
        {
            **os.environ,
            **variables,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(options.processes),
            "JAX_PROCESS_ID": str(index),
            "PYTHONUNBUFFERED": "1",
        }
        for index, variables in enumerate(devices)
    ])  # fmt: skip


def _devices(processes: int, per_process: int | None) -> list[dict[str, str]]:
    """The variables that give each process its own devices."""
    gpus = _gpus()
    if not gpus:
        flag = f"--xla_force_host_platform_device_count={per_process or 1}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()  # the last one counts
        return [{"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}] * processes
    if per_process is None and len(gpus) % processes:
        raise ValueError(
            f"{len(gpus)} GPU(s) cannot be split evenly over --processes={processes}: choose a "
            "divisor, or --devices-per-process"
        )
    share = per_process or len(gpus) // processes
    if share * processes > len(gpus):
        raise ValueError(
            f"--processes={processes} x --devices-per-process={share} = {processes * share} GPUs, "
            f"and {len(gpus)} are here: lower one, or set JAX_PLATFORMS=cpu"
        )
    shares = [gpus[index * share : (index + 1) * share] for index in range(processes)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(own)} for own in shares]


def _gpus() -> list[str]:
    """Names, for CUDA_VISIBLE_DEVICES, of the GPUs that may be used here."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(index) for index in range(count)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(command: Sequence[str], environments: Sequence[dict[str, str]]) -> int:
    """Starts a process in each environment, and waits; the exit status of the first that failed."""
    # In groups of their own, so that Ctrl-C reaches each of them once, through us.
    processes = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            process_group=0,
        )
        for environment in environments
    ]  # fmt: skip

    def pass_on(number: int, frame: object = None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    readers = [
        threading.Thread(target=_copy_lines, args=(index, process.stdout), daemon=True)
        for index, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()

    failed = _first_failure(processes)
    if failed is not None:
        status = _status(processes[failed])
        if any(process.poll() is None for process in processes):
            print(f"launch/local.py: process {failed} ended with status {status}: ending the rest",
                  file=sys.stderr, flush=True)  # fmt: skip
            _end(processes)
    for reader in readers:
        reader.join(timeout=1)  # something that a process has left behind may hold the pipe
    return 0 if failed is None else status


def _first_failure(processes: Sequence[subprocess.Popen]) -> int | None:
    """Waits until a process fails, and returns its number; None when all have ended well."""
    running = dict(enumerate(processes))
    while running:
        for index, process in list(running.items()):
            if process.poll() is not None:
                del running[index]
                if process.returncode:
                    return index
        time.sleep(0.05)
    return None


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM, and SIGKILL, which ends stopped processes too, to those that stay."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _status(process: subprocess.Popen) -> int:
    """As a shell has it: 128 and the number of the signal that ended the process."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _copy_lines(index: int, stream: object) -> None:
    for line in stream:
        sys.stdout.buffer.write(b"[%d] " % index + line.rstrip(b"\n") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
