"""Which peers a process has, by its environment; and where compiled programs are kept."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxblip import runtime
from jaxblip.errors import UserError

LOCAL = {
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
SLURM = {"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}
GPUS = ",".join(map(str, range(8)))


@pytest.fixture
def joined(monkeypatch):
    """The arguments that `jax.distributed.initialize` got."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    monkeypatch.setattr(runtime.sys, "excepthook", runtime.sys.excepthook)
    return calls


def test_peers_are_named_by_variables(joined):
    runtime.join_peers(LOCAL)
    (settings,) = joined
    assert settings["coordinator_address"] == "127.0.0.1:1234"
    assert (settings["num_processes"], settings["process_id"]) == (2, 1)
    assert settings["initialization_timeout"] > runtime._GIVE_UP_AFTER_S
    assert settings["heartbeat_timeout_seconds"] == 100
    assert settings["shutdown_timeout_seconds"] == 300


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, None),  # JAX finds none, or those of a TPU
        (SLURM, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": GPUS}, [3]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": GPUS, "SLURM_STEP_TASKS_PER_NODE": "4"}, [6, 7]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, [0]),  # --gpus-per-task=1
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": GPUS, "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                     "SLURM_LOCALID": "0"},
            list(range(8)),
        ),
        (SLURM | {"CUDA_VISIBLE_DEVICES": GPUS, "JAX_LOCAL_DEVICE_IDS": "5"}, None),
    ],
)  # fmt: skip
def test_elsewhere_jax_finds_them_and_no_gpu_is_left_over(joined, variables, gpus):
    runtime.join_peers(variables)
    (settings,) = joined
    assert settings["local_device_ids"] == gpus and "num_processes" not in settings


def test_a_single_task_of_slurm_is_alone_and_has_all_gpus(joined):
    runtime.join_peers(SLURM | {"SLURM_NTASKS": "1"})
    assert joined == []


def test_a_process_alone_stays_alone(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    runtime.join_peers({})  # JAX has been used already in this process, and is not asked to join
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_NUM_PROCESSES is set but JAX_PROCESS_ID is not"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS is not"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2 is no process"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host must be HOST:PORT"),
    ],
)
def test_variables_that_contradict_each_other(joined, changed, message):
    with pytest.raises(UserError, match=message):
        runtime.join_peers(LOCAL | changed)
    assert joined == []


def test_peers_that_do_not_meet(monkeypatch):
    def fail(**settings):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"127.0.0.1:1234 \(UNKNOWN: Failed to start RPC server\)"):
        runtime.join_peers(LOCAL)


def test_a_long_wait_for_peers_is_said_once(monkeypatch, capfd):
    monkeypatch.setattr(runtime, "_SAY_WAITING_AFTER_S", 0.05)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: time.sleep(0.5))
    monkeypatch.setattr(runtime.sys, "excepthook", runtime.sys.excepthook)
    runtime.join_peers(LOCAL)
    assert capfd.readouterr().err.count("waiting for the other processes of this run at 127") == 1


def test_peers_that_never_come_end_the_wait_with_one_sentence(tmp_path):
    """Process 0 waits for another one, and process 1 for an address where nobody is."""
    code = (
        "from jaxblip import runtime; runtime._SAY_WAITING_AFTER_S = 60;"
        "runtime._GIVE_UP_AFTER_S = 2; runtime.join_peers()"
    )
    waiting = []
    for index in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = "{}:{}".format(*free.getsockname())
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env=os.environ | variables | {"JAX_PROCESS_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        waiting.append((process, address))
    for process, address in waiting:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2
        (line,) = said.splitlines()
        assert f"did not meet at {address} (not within 2 s): see that all are started" in line


@pytest.mark.parametrize(
    "error",
    [
        ValueError("coordinator_address should be defined."),
        RuntimeError("Cannot automatically initialize distributed workload: pod x has none"),
        RuntimeError("jax.distributed.initialize() must be called before any JAX calls"),
    ],
)
def test_where_jax_finds_nobody_the_process_is_alone(monkeypatch, error):
    def fail(**settings):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    runtime.join_peers({})
    monkeypatch.setattr(runtime, "_NO_PEERS", ())
    with pytest.raises(type(error)):
        runtime.join_peers({})


def test_a_process_that_fails_does_not_wait_for_its_peers():
    """JAX would have it wait 300 s for all to end; the launcher then ends the other one."""
    code = (
        "import time, jax; from jaxblip.runtime import join_peers; join_peers();"
        "time.sleep(600) if jax.process_index() == 0 else print('count', jax.process_count());"
        "raise KeyError('broken')"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["launch/local.py", "--processes=2", "--", sys.executable, "-c", code],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "[1] count 2" in done.stdout and "[1] KeyError: 'broken'" in done.stdout
    assert done.returncode == 1 and "process 1 ended with status 1" in done.stderr


@pytest.fixture
def cache_folder(monkeypatch):
    """Sets JAX's own folder, and gives back a function that reads it."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_in_the_users_cache_folder(cache_folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    runtime.keep_compilations({"XDG_CACHE_HOME": str(tmp_path)})
    assert cache_folder() == str(tmp_path / "jaxblip" / "compilations")
    runtime.keep_compilations({"XDG_CACHE_HOME": str(tmp_path / "other")})  # JAX has been told
    assert cache_folder() == str(tmp_path / "jaxblip" / "compilations")


def test_a_cache_folder_that_cannot_be_made_is_done_without(cache_folder, tmp_path):
    (tmp_path / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", None)
    runtime.keep_compilations({"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert cache_folder() is None
