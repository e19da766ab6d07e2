"""Which peers a process has, by its environment; and where compiled programs are kept."""

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
    assert settings["initialization_timeout"] == 300
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


def test_peers_that_are_not_there(monkeypatch):
    def fail(**settings):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"127.0.0.1:1234 within 300 s \(DEADLINE_EXCEEDED: Bar"):
        runtime.join_peers(LOCAL)


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
