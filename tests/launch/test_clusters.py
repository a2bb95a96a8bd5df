"""Slurm jobs and JobSets: what is submitted says what was asked for, and the script does what it says."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from ain_jax.launching import machine


def submitted(launcher, fake, tmp_path, *more: str):
    sbatch = fake("sbatch", "print('Submitted batch job 7')")
    given = ["--exp", "small", "--nodes", "2", "--gpus", "4", "--run_dir", str(tmp_path / "run"), *more]
    assert launcher("slurm").main(given) == 0
    return sbatch, tmp_path / "run" / "job.sh"


def test_a_slurm_job_asks_for_what_was_said(launcher, fake, tmp_path, capsys):
    odd = "Mixture.weights = {'a b': 1}"
    sbatch, script = submitted(launcher, fake, tmp_path, "--sbatch=--partition=gpu", "--set", odd)
    assert sbatch.calls == [[str(script)]] and "Submitted batch job 7" in capsys.readouterr().out
    options = {line[8:] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")}
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue", "--partition=gpu"} <= options
    assert {"--time=24:00:00", "--signal=B:USR1@300"} <= options
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


# A run that says what it was told, and on USR1 "saves" and ends as an interrupted one does.
SRUN = """
import signal, time
def save(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGUSR1, save)
print("running", flush=True)
end = {seconds}
while end > 0:
    time.sleep(0.05)
    end -= 0.05
sys.exit({status})
"""


@pytest.mark.parametrize(
    ("seconds", "status", "signalled", "queued"),
    [(30, 0, True, True), (0, 0, False, False), (0, 1, False, False), (0, 130, False, False)],
    ids=["limit", "done", "fault", "cancelled"],
)
@pytest.mark.parametrize("pause", [0, 0.3], ids=["", "slow"])
def test_only_the_time_limit_queues_a_job_again(
    launcher, fake, tmp_path, monkeypatch, pause, seconds, status, signalled, queued
):
    _, script = submitted(launcher, fake, tmp_path, "--set", "Mixture.weights = {'a b': 1}")
    srun, scontrol = fake("srun", SRUN.format(seconds=seconds, status=status)), fake("scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    # A shell that pauses before each of its commands: the run can have ended before the shell looks for it.
    (tmp_path / "env").write_text(f"trap 'sleep {pause}' DEBUG\n" if pause else "")
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "env"))
    with subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stdout.readline() == "running\n"
        if signalled:
            time.sleep(0.2 + 5 * pause)
            os.kill(job.pid, signal.SIGUSR1)  # as Slurm does to the shell alone
        assert job.wait(20) == (130 if signalled else status)
    assert scontrol.calls == ([["requeue", "7"]] if queued else [])
    (call,) = srun.calls
    assert call[-6:] == ["--exp", call[-5], "--set", "Mixture.weights = {'a b': 1}", "--run_dir", str(tmp_path / "run")]
    assert Path(call[-5]).name == "small.gin" and call[-7].endswith("launch/local.py")


def test_slurm_commands_are_printed_and_none_is_run(launcher, fake, tmp_path, capsys):
    sbatch = fake("sbatch")
    given = ["--exp", "small", "--run_dir", str(tmp_path / "run"), "--print_commands"]
    assert launcher("slurm").main(given) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=8" in out and f"sbatch {tmp_path / 'run' / 'job.sh'}" in out
    assert not sbatch.calls and not (tmp_path / "run").exists()
    assert launcher("slurm").main([*given[:-1], "--nodes", "0"]) == 1
    assert "nodes = 0: expected 1 or more" in capsys.readouterr().err


def manifest(launcher, capsys, *more: str) -> dict:
    given = ["--exp", "small", "--image", "registry/image:1", "--claim", "disk", *more]
    assert launcher("jobset").main(given) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_jobset_of_gpus(launcher, capsys):
    made = manifest(launcher, capsys, "--gpus", "8", "--nodes", "4", "--set", "a = 'b: c'")
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], replicated["replicas"]) == (4, 4, 1)
    container = job["template"]["spec"]["containers"][0]
    assert container["command"] == [
        *("python", "launch/local.py", "--exp", "small", "--run_dir", "/runs/small", "--set", "a = 'b: c'")
    ]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    told = {one["name"]: one.get("value", "3") for one in container["env"]}
    assert machine.joins(told) == {
        "coordinator_address": "small-workers-0-0.small:8476", "num_processes": 4, "process_id": 3,
    }  # fmt: skip


def test_a_jobset_of_two_tpu_slices(launcher, capsys):
    made = manifest(launcher, capsys, "--tpu", "2xv5p-128", "--name", "two")
    (replicated,) = made["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]["template"]["spec"]
    # v5p-128 is 64 chips, four of them in a host.
    assert (replicated["replicas"], replicated["template"]["spec"]["completions"]) == (2, 16)
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x4",
    }  # fmt: skip
    assert spec["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert (
        spec["containers"][0]["command"][:2] == ["python", "launch/tpu_pod.py"] and "env" not in spec["containers"][0]
    )


def test_what_no_jobset_can_be(launcher, capsys):
    given = ["--exp", "small", "--image", "i", "--claim", "c"]
    for more, expected in (
        ([], "expected one of the two"),
        (["--tpu", "v5p-16", "--gpus", "8"], "expected one of the two"),
        (["--gpus", "8", "--name", "Not_this"], "small letters"),
    ):
        assert launcher("jobset").main([*given, *more]) == 1
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {"cluster_detection_method": "slurm"}),
    ],
)
def test_how_a_process_joins(environment, expected):
    assert machine.joins(environment) == expected


def test_half_a_coordinator_is_refused():
    with pytest.raises(
        ValueError, match="JAX_COORDINATOR_ADDRESS is set, and JAX_NUM_PROCESSES, JAX_PROCESS_ID is not"
    ):
        machine.joins({"JAX_COORDINATOR_ADDRESS": "a:1"})
