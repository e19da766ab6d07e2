"""`launch/slurm.sbatch` and `launch/tpu_vm.sh`, with commands of Slurm and gcloud that pretend."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SLURM, TPU_VM = LAUNCH / "slurm.sbatch", LAUNCH / "tpu_vm.sh"
# What a shell would take apart.
COMMAND = ["jaxblip", "train", "--config=a.py", "--config.data.train.source=my file*.tar"]


@pytest.fixture
def pretend(tmp_path):
    """Makes a command of this name that runs a script, and gives back the environment with all."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, script):
        path = folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}

    return make


def run(script, *arguments, env=None):
    return subprocess.run([script, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("script", [SLURM, TPU_VM], ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(script):
    done = run("shellcheck", script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [(SLURM, []), (TPU_VM, []), (TPU_VM, ["pod", "zone"]), (TPU_VM, ["pod", "zone", "jaxblip"])],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_without_a_command_it_says_how_to_write_one(script, arguments):
    done = run("bash", script, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "jaxblip train" in done.stderr


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_starts_the_command_and_has_its_status(pretend, status):
    env = pretend("srun", f'printf "%s\\n" "$@"; exit {status}')
    done = run("bash", SLURM, *COMMAND, env=env)
    assert done.returncode == status
    assert done.stdout.splitlines() == ["--kill-on-bad-exit=1", *COMMAND]


def test_near_its_time_limit_the_job_saves_and_is_requeued(pretend, tmp_path):
    said = tmp_path / "said"
    pretend("srun", f"touch {said}.started; until [ -e {said} ]; do sleep 0.05; done; echo saved")
    pretend("scancel", f'echo scancel "$@" > {said}')
    env = pretend("scontrol", 'echo scontrol "$@"')
    job = subprocess.Popen(["bash", SLURM, *COMMAND], env=env, stdout=subprocess.PIPE, text=True)
    while not Path(f"{said}.started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert said.read_text() == "scancel --signal=TERM 7.0\n"
    assert output.splitlines()[1:] == ["saved", "scontrol requeue 7"]


def test_the_exact_command_for_a_tpu_vm():
    env = {**os.environ, "DRY_RUN": "1", "TPU_VM_FOLDER": "my folder"}
    done = run(TPU_VM, "pod", "us-east5-b", "--", *COMMAND, env=env)
    assert done.returncode == 0, done.stderr
    *gcloud, remote = shlex.split(done.stdout)
    assert gcloud == [
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-east5-b", "--worker=all"
    ]  # fmt: skip
    assert remote == (
        r"--command=cd my\ folder && { nohup jaxblip train --config=a.py "
        r"--config.data.train.source=my\ file\*.tar > jaxblip.log 2>&1 & } && "
        r"tail --pid=$! -n +1 -f jaxblip.log && wait $!"
    )


@pytest.mark.parametrize("status", [0, 3])
def test_a_host_of_a_tpu_shows_what_is_written_and_has_the_status(pretend, tmp_path, status):
    env = pretend("gcloud", 'for last; do :; done; bash -c "${last#--command=}"')
    env["TPU_VM_FOLDER"] = str(tmp_path)
    script = f"echo begin; sleep 0.2; echo end; exit {status}"
    done = run(TPU_VM, "pod", "zone", "--", "bash", "-c", script, env=env)
    assert (done.returncode, done.stdout) == (status, "begin\nend\n")
    assert (tmp_path / "jaxblip.log").read_text() == "begin\nend\n"
