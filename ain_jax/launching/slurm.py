"""A Slurm job that saves before its time is up, and queues again."""

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run, on how much, and for how long at once."""

    name: str
    folder: Path  # of the run; on a disk that every node sees
    root: Path  # of the checkout
    command: Sequence[str]
    nodes: int = 1
    gpus: int = 8  # of a node
    cpus: int = 8  # of a process
    time: str = "24:00:00"
    save_before: int = 300  # seconds
    options: Sequence[str] = ()  # of sbatch, handed on

    def __post_init__(self):
        low = [f"{name} = {getattr(self, name)}" for name in ("nodes", "gpus", "cpus") if getattr(self, name) < 1]
        if low:
            raise ValueError(f"{', '.join(low)}: expected 1 or more each")

    @property
    def script(self) -> str:
        """The batch script.

        The shell gets the signal before the limit (B:) and hands it on through srun; only then does the job queue
        itself again, so that one that is cancelled stays so. A preempted one is queued again by Slurm.
        """
        options = [
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.gpus}",
            f"--gpus-per-node={self.gpus}",
            f"--cpus-per-task={self.cpus}",
            f"--time={self.time}",
            f"--signal=B:USR1@{self.save_before}",
            "--requeue",
            "--open-mode=append",
            f"--output={self.folder}/slurm-%j.log",
            *self.options,
        ]
        run = shlex.join([*self.command, "--run_dir", str(self.folder)])
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {option}" for option in options),
                "",
                f"cd {shlex.quote(str(self.root))} || exit 1",
                "limit=",
                "trap 'limit=1; interrupted=1; kill -USR1 $running' USR1",
                # One process a GPU: jax reads Slurm's variables, each takes the GPU of its number on the node.
                f"srun --kill-on-bad-exit=1 --cpus-per-task={self.cpus} {run} &",
                "running=$!",
                "interrupted=1",
                'while [ "$interrupted" ]; do  # the signal ends the wait, whose status then is not the run\'s',
                "  interrupted=",
                "  wait $running",
                "  status=$?",
                "done",
                '[ -z "$limit" ] || [ $status -le 1 ] || scontrol requeue "$SLURM_JOB_ID"',
                "exit $status",
                "",
            ]
        )


def submit(job: Job, only_print: bool) -> int:
    """Write the script into the run's folder and submit it: 0; or print the two. ValueError where Slurm refuses."""
    path = job.folder / "job.sh"
    command = ["sbatch", str(path)]
    if only_print:
        print(f"# {path}\n{job.script}\n{shlex.join(command)}")
        return 0
    if not shutil.which("sbatch"):
        raise ValueError("sbatch is not here: run this on a login node of the cluster, or add --print_commands")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.script, encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    print(f"{done.stdout.strip()}; log {job.folder}/slurm-*.log")
    return 0
