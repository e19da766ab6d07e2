"""How JAX starts: the processes of one run find each other, and compiled programs are kept."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxblip.errors import UserError

# What tells a process of its peers where nothing else does; `launch/local.py` sets them.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_SAY_WAITING_AFTER_S, _GIVE_UP_AFTER_S = 20, 300
TIMEOUTS_S = {
    "initialization_timeout": 330,  # never reached: JAX would end the process with a dump of C++
    "heartbeat_timeout_seconds": 100,  # after which a process that is silent counts as dead
    "shutdown_timeout_seconds": 300,
}
# What JAX says where it finds none, and where it is too late, since a program has used devices.
_NO_PEERS = (
    "coordinator_address should be defined",
    "Cannot automatically initialize distributed workload",  # a pod of no Job
    "must be called before",
)
# For a process that fails: its peers may be about to say the same.
_SHUTDOWN_AFTER_FAILURE_S = 5
# A run compiles dozens of small programs beside its step: JAX keeps those of more than a second.
_WORTH_KEEPING_S = 0.1


def join_peers(environ: Mapping[str, str] = os.environ) -> None:
    """Connects this process with the others of its run, before anything touches a device.

    They are found by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as JAX does
    by itself under Slurm, Open MPI and on the hosts of a TPU. A process alone stays alone. Where
    they do not meet in time, the process ends with a sentence and exit status 2.

    Raises:
      UserError: the variables contradict each other, or the port of process 0 is taken.
    """
    settings = _named_peers(environ)
    if settings is None:
        if environ.get("SLURM_NTASKS") == "1":
            return  # JAX would take the first GPU for its only one
        settings = {"local_device_ids": _gpus_of_slurm_task(environ)}
    where = environ.get(COORDINATOR, "process 0")
    timers = [
        threading.Timer(_SAY_WAITING_AFTER_S, _say_waiting, [where]),
        threading.Timer(_GIVE_UP_AFTER_S, _give_up, [where]),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        with warnings.catch_warnings():
            # In a pod alone there is nobody to be found.
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            jax.distributed.initialize(**settings, **TIMEOUTS_S)
        sys.excepthook = _leave_after_error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(_not_met(where, str(error).splitlines()[0])) from error
    except (RuntimeError, ValueError) as error:
        if not any(said in str(error) for said in _NO_PEERS):
            raise
    finally:
        for timer in timers:
            timer.cancel()


def _say_waiting(where: str) -> None:
    print(
        f"jaxblip: waiting for the other processes of this run at {where}, at most "
        f"{_GIVE_UP_AFTER_S} s: see that all are started and reach it.",
        file=sys.stderr,
        flush=True,
    )


def _give_up(where: str) -> None:
    """Ends the process, whose main thread waits inside JAX."""
    reason = _not_met(where, f"not within {_GIVE_UP_AFTER_S} s")
    print(f"jaxblip: error: {reason}", file=sys.stderr, flush=True)
    os._exit(2)


def _not_met(where: str, why: str) -> str:
    return (
        f"The processes of this run did not meet at {where} ({why}): see that all are started with "
        f"the same {COORDINATOR}, that its port is free on the host of process 0, and that the "
        "others reach it there, past any firewall."
    )


def _named_peers(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` that variables give, if any does."""
    given = [name for name in (COUNT, INDEX) if environ.get(name)]
    if not given:
        return None
    if missing := [name for name in (COORDINATOR, COUNT, INDEX) if not environ.get(name)]:
        raise UserError(
            f"{given[0]} is set but {missing[0]} is not: set {COORDINATOR}, {COUNT} and {INDEX}, "
            "or none of them."
        )
    address, count, index = (environ[name] for name in (COORDINATOR, COUNT, INDEX))
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(
            f"{INDEX}={index} of {COUNT}={count} is no process of this run: they are numbered from "
            "0 to one less than their number."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{COORDINATOR}={address} must be HOST:PORT, where process 0 will listen.")
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _gpus_of_slurm_task(environ: Mapping[str, str]) -> list[int] | None:
    """This task's share of the GPUs that it sees; None leaves the choice to JAX, which takes one.

    Where each task sees its own ones alone (--gpus-per-task), all of them.
    """
    visible, tasks = environ.get("CUDA_VISIBLE_DEVICES"), environ.get("SLURM_STEP_TASKS_PER_NODE")
    if not visible or not tasks or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    gpus = len(visible.split(","))
    here = int(tasks.partition("(")[0].partition(",")[0])  # "8", or "8(x2)"
    share = gpus // here if gpus % here == 0 else gpus
    first = int(environ["SLURM_LOCALID"]) * share if share < gpus else 0
    return list(range(first, first + share))


def leave_peers(status: int) -> None:
    """Ends a process that failed, if it has joined peers, with this exit status.

    JAX would have it wait for the others to end as well, who may be waiting for it. They find out,
    or are ended by what started them.
    """
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    end.start()
    end.join(_SHUTDOWN_AFTER_FAILURE_S)
    os._exit(status)


def _leave_after_error(*error: Any) -> None:
    sys.__excepthook__(*error)
    leave_peers(1)


def keep_compilations(environ: Mapping[str, str] = os.environ) -> None:
    """Lets JAX keep what it compiles, so that the next run with the same shapes starts at once.

    In the user's cache folder, unless JAX was told of another one by JAX_COMPILATION_CACHE_DIR, or
    to keep nothing by JAX_ENABLE_COMPILATION_CACHE=0.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "jaxblip" / "compilations"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written is no reason not to train
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_S)
