"""A pod from a workstation: the very commands run, by a gcloud whose workers are folders of this machine."""

import shlex
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from ain_jax.launching import machine, pod

# Two workers, each a home folder. `states` says what the slice is at each look, "" once it was deleted and before it is
# created; `tpu-vm ssh` runs its command in bash with that home.
GCLOUD = """
import os, pathlib, shutil, subprocess
here, words = pathlib.Path({here!r}), sys.argv[1:]
option = {{w.partition("=")[0]: w.partition("=")[2] for w in words if w.startswith("--")}}
chosen = ("0", "1") if option.get("--worker") == "all" else (option.get("--worker"),)
kind = " ".join(words[2:4])
states = here / "states"
if kind == "tpu-vm describe":
    now, _, later = states.read_text().partition(" ")
    states.write_text(later or now)
    if now == "NONE":
        sys.exit(1)
    print(now)
elif kind == "queued-resources create":
    states.write_text("CREATING READY")
elif kind == "queued-resources describe":
    print("WAITING_FOR_RESOURCES")
elif kind == "tpu-vm scp":
    for worker in chosen:
        shutil.copy(words[4], here / worker / words[5].partition(":")[2])
elif kind == "tpu-vm ssh":
    for worker in chosen:
        home = here / worker
        environment = {{"HOME": str(home), "PATH": str(home / ".local/bin") + ":" + os.environ["PATH"]}}
        done = subprocess.run(["bash", "-c", option["--command"]], env=environment, cwd=home)
        if done.returncode:
            sys.exit(done.returncode)
"""
# What the workers have in place of Python and uv: a run that says what it was told and ends as `statuses` says.
PYTHON = """#!/bin/bash
if [ "$1" = -m ]; then exit 0; fi
echo "run on $(basename $HOME): $(printf '[%s]' "$@") $(cat code.py)"
read -r status rest < $HOME/../statuses-$(basename $HOME)
echo "$rest" > $HOME/../statuses-$(basename $HOME)
[ "$status" = lost ] && { echo PREEMPTED NONE > $HOME/../states; kill -9 $PPID; exit; }
exit $status
"""
UV = """#!/bin/bash
echo "$*" >> $HOME/uv.calls
"""


@pytest.fixture
def pods(tmp_path, fake, monkeypatch):
    """`pods(states, statuses)`: the recording gcloud, and the folder that holds the workers."""
    monkeypatch.setattr(pod.time, "sleep", lambda _: time_passes(0.05))
    monkeypatch.setattr(pod.Code, "archive", property(lambda self: tmp_path / f"ain_jax-{self.name}.tar.gz"))

    def make(states: str, statuses: str = "0"):
        here = tmp_path / "pod"
        for worker in ("0", "1"):
            for path, text in (
                ("ain_jax/venv/bin/python", PYTHON), (".local/bin/python3", PYTHON), (".local/bin/uv", UV),
            ):  # fmt: skip
                file = here / worker / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                file.chmod(0o755)
            (here / f"statuses-{worker}").write_text(statuses + "\n")
        (here / "states").write_text(states)
        return fake("gcloud", GCLOUD.format(here=str(here))), here

    return make


time_passes = time.sleep
ARGUMENTS = ("--exp", "small", "--tpu", "mine", "--zone", "us-z", "--project", "p", "--run_dir", "/disk/run")


def kinds(gcloud) -> list[str]:
    return [" ".join(call[2:4]) for call in gcloud.calls]


def test_the_commit_runs_on_every_worker_and_worker_0_is_heard(pods, launcher, checkout, capfd):
    gcloud, here = pods("READY")
    odd = "pretrain/Mixture.weights = {'a b': \"$HOME\"}"
    assert launcher("tpu_pod").main([*ARGUMENTS, "--set", odd]) == 0
    heard = capfd.readouterr().out
    told = ["launch/tpu_pod.py", "--exp", "experiments/small.gin", "--set", odd, "--run_dir", "/disk/run"]
    assert heard == f"run on 0: {''.join(f'[{word}]' for word in told)} print(1)\n"
    commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    for worker in ("0", "1"):
        assert (here / worker / "ain_jax" / commit.strip() / "code.py").read_text() == "print(1)\n"
        assert (here / worker / "ain_jax" / "log").read_text().startswith(f"run on {worker}")
        assert "pip install --quiet -c constraints.txt -e .[tpu]" in (here / worker / "uv.calls").read_text()
    assert kinds(gcloud) == ["tpu-vm describe", "tpu-vm scp", *["tpu-vm ssh"] * 4]
    assert all({"--zone=us-z", "--project=p"} <= set(call) for call in gcloud.calls)


def test_a_slice_that_is_not_there_is_created(pods, launcher):
    gcloud, _ = pods("NONE")
    assert launcher("tpu_pod").main([*ARGUMENTS, "--create", "v5e-16", "--spot"]) == 0
    created = next(call for call in gcloud.calls if "create" in call)
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(created)
    assert "--node-id=mine" in created and "mine" in created
    assert kinds(gcloud).index("queued-resources create") < kinds(gcloud).index("tpu-vm scp")


def test_a_preempted_run_is_started_again_on_a_new_slice(pods, launcher, capfd):
    gcloud, _ = pods("READY", "lost 0")
    assert launcher("tpu_pod").main([*ARGUMENTS, "--create", "v5p-16", "--spot"]) == 0
    out, err = capfd.readouterr()
    assert out.count("run on 0") == 2
    assert "the slice was lost; start 2 goes on from the last checkpoint" in err
    order = kinds(gcloud)
    again = order.index("queued-resources create")
    assert order.index("queued-resources delete") < again < len(order) - 1 - order[::-1].index("tpu-vm scp")


@pytest.mark.parametrize(("statuses", "ends", "starts"), [("1", 1, 1), ("130 75 0", 0, 3), ("75 75 75 0", 1, 3)])
def test_a_fault_ends_it_and_other_ends_start_it_again(pods, launcher, capfd, statuses, ends, starts):
    pods("READY", statuses)
    assert launcher("tpu_pod").main([*ARGUMENTS]) == ends
    out, err = capfd.readouterr()
    assert out.count("run on 0") == starts
    assert ("ended 3 times in its first 10 minutes" in err) == (starts == 3 and ends == 1)


def test_files_that_differ_are_refused_or_taken_along(pods, launcher, checkout, capfd):
    gcloud, here = pods("READY")
    (checkout / "code.py").write_text("print(2)\n")
    (checkout / "new.py").write_text("print(3)\n")
    assert launcher("tpu_pod").main([*ARGUMENTS]) == 1
    refused = capfd.readouterr().err
    assert "2 files differ from commit" in refused and " M code.py" in refused and "--dirty" in refused
    assert not gcloud.calls
    assert launcher("tpu_pod").main([*ARGUMENTS, "--dirty"]) == 0
    assert "print(2)" in capfd.readouterr().out
    (place,) = (here / "1" / "ain_jax").glob("*-dirty-*")
    assert (place / "new.py").read_text() == "print(3)\n"
    with tarfile.open(next(here.parent.glob("ain_jax-*-dirty-*.tar.gz"))) as archive:
        assert sorted(archive.getnames()) == ["code.py", "experiments/small.gin", "new.py"]


def test_the_commands_are_printed_and_none_is_run(fake, launcher, capsys):
    gcloud = fake("gcloud")
    bucket = ["--exp", "small", "--tpu", "mine", "--zone", "us-z", "--bucket", "b", "--create", "v5p-128"]
    assert launcher("tpu_pod").main([*bucket, "--print_commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not gcloud.calls
    commands = [shlex.split(line) for line in lines]
    assert ["--accelerator-type=v5p-128" in command for command in commands].count(True) == 1
    assert any("gcsfuse" in word and "~/b" in word for command in commands for word in command)
    assert any("--run_dir ~/b/runs/small" in word for command in commands for word in command)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--exp", "small"], "this machine has no TPU. Choose one of"),
        (["--exp", "small", "--zone", "z"], "--zone needs --tpu NAME"),
        (["--exp", "small", "--tpu", "a"], "--tpu a needs --zone"),
        (["--exp", "small", "--tpu", "a", "--zone", "z"], "give --bucket NAME, or --run_dir"),
        (["--exp", "smal", "--tpu", "a", "--zone", "z", "--bucket", "b"], "did you mean 'small'"),
        ([*ARGUMENTS, "--create", "v5p-100"], "is no slice that Cloud TPU offers"),
        ([*ARGUMENTS, "--create", "2xv5p-16"], "launch/jobset.py"),
        ([*ARGUMENTS], "create it with --create"),
    ],
)
def test_what_cannot_be_is_told(pods, launcher, monkeypatch, capsys, arguments, expected):
    pods("NONE")
    monkeypatch.setattr(machine, "has_tpu", lambda: False)
    assert launcher("tpu_pod").main(list(arguments)) == 1
    assert expected in capsys.readouterr().err


def test_without_gcloud(launcher, monkeypatch, capsys, tmp_path):
    git = subprocess.run(["which", "git"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "git").symlink_to(git)
    monkeypatch.setenv("PATH", str(tmp_path / "only"))
    assert launcher("tpu_pod").main([*ARGUMENTS]) == 1
    assert "gcloud is not here" in capsys.readouterr().err


def test_on_a_host_it_joins_and_runs(launcher, monkeypatch):
    from ain_jax import run

    told = {}
    monkeypatch.setattr(machine, "has_tpu", lambda: True)
    monkeypatch.setattr(run, "main", lambda argv, **more: told.update(argv=argv, **more) or 0)
    assert launcher("tpu_pod").main(["--exp", "small", "--stage", "pretrain", "--run_dir", "/d"]) == 0
    assert told["argv"] == ["--exp", "small", "--stage", "pretrain", "--run_dir", "/d"] and told["join"] is machine.join


def test_a_plan_goes_to_the_planner(launcher, monkeypatch):
    from ain_jax.plan import command

    seen = []
    monkeypatch.setattr(command, "main", lambda argv, experiments: seen.append((argv, experiments)) or 3)
    arguments = ["--exp", "small", "--plan", "v5p-128", "--search"]
    assert launcher("tpu_pod").main(arguments) == 3
    ((argv, experiments),) = seen
    assert argv == arguments and Path(experiments).name == "experiments"
