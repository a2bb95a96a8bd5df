"""The gcloud commands that bring a commit to every worker of a TPU slice, start it, follow it and start it again."""

import dataclasses
import hashlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ain_jax.plan import chips

# What Cloud TPU calls the versions, and the image that each boots.
GCLOUD_NAMES = {"v5e": "v5litepod"}
IMAGES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
HOME = "ain_jax"  # below the home folder of each worker
FAULTS = (1, 2)  # exit statuses that the same command would end with again
SOON_SECONDS, SOON_TIMES = 600, 3  # a run that ends so soon so often does not come any further
LOST = ("PREEMPTED", "TERMINATED", "SUSPENDED", "SUSPENDING", "FAILED", "STOPPED", "")


class Failed(ValueError):
    """A command did not do what it was to do, or the run ended with a fault."""


@dataclasses.dataclass(frozen=True)
class Shell:
    """Runs commands, or prints them and takes every one for done."""

    only_print: bool = False
    wait_seconds: float = 30.0  # between two looks at a slice that is not there yet

    def run(self, command: Sequence[str], *, text: str | None = None, may_fail: bool = False) -> str:
        """What the command prints. Raises Failed with its last words where it fails, unless it may: then ""."""
        if self.only_print:
            print(shlex.join(command) + (" < FILES" if text is not None else ""))
            return ""
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode and not may_fail:
            raise Failed(f"{shlex.join(command)}\nended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        return "" if done.returncode else done.stdout.strip()

    def follow(self, command: Sequence[str], seen: int) -> int:
        """Print the lines of a command as they come; how many lines have now been seen, `seen` before it."""
        if self.only_print:
            print(shlex.join(command))
            return seen
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as running:
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                seen += 1
        return seen


@dataclasses.dataclass(frozen=True)
class Code:
    """The source that the workers get, and its name there: the commit, with a digest of what was changed in it."""

    root: Path
    name: str
    dirty: bool

    @property
    def archive(self) -> Path:
        return Path(f"/tmp/ain_jax-{self.name}.tar.gz")

    def pack(self, shell: Shell) -> None:
        """Write the archive: the commit, or every file of the tree that git does not ignore."""
        git = ["git", "-C", str(self.root)]
        if not self.dirty:
            shell.run([*git, "archive", "--format=tar.gz", f"--output={self.archive}", self.name])
            return
        files = subprocess.run([*git, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True).stdout
        here = "\n".join(file for file in files.splitlines() if (self.root / file).is_file())
        shell.run(["tar", "-C", str(self.root), "-czf", str(self.archive), "--files-from=-"], text=here)


def code(root: Path, take_dirty: bool) -> Code:
    """The commit of a checkout. Raises Failed where files differ from it and `take_dirty` does not ask for them."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"git {' '.join(arguments)} in {root}: {done.stderr.strip()}; expected a git checkout")
        return done.stdout

    commit, changed = git("rev-parse", "HEAD").strip(), git("status", "--porcelain").rstrip().splitlines()
    if not changed:
        return Code(root, commit, False)
    if not take_dirty:
        listed = "\n  ".join(changed[:10] + ["..."] * (len(changed) > 10))
        raise Failed(
            f"{len(changed)} files differ from commit {commit[:12]}, and the workers get exactly a commit:\n  "
            f"{listed}\nCommit them, or take them along with --dirty"
        )
    digest = hashlib.sha256(git("diff", "HEAD").encode())
    for line in changed:
        path = root / line[3:]
        if line.startswith("??") and path.is_file():
            digest.update(path.read_bytes())
    return Code(root, f"{commit[:12]}-dirty-{digest.hexdigest()[:8]}", True)


@dataclasses.dataclass(frozen=True)
class Pod:
    """One slice by its name and zone. A slice that is created is a queued resource of the same name."""

    name: str
    zone: str
    project: str = ""
    create: str = ""  # "v5p-128"
    spot: bool = False
    bucket: str = ""  # mounted on every worker below the home folder

    def _gcloud(self, *command: str) -> list[str]:
        project = [f"--project={self.project}"] if self.project else []
        return ["gcloud", "compute", "tpus", *command, f"--zone={self.zone}", *project]

    def _ssh(self, command: str, worker: str = "all") -> list[str]:
        return self._gcloud("tpu-vm", "ssh", self.name, f"--worker={worker}", f"--command={command}")

    def state(self, shell: Shell) -> str:
        """READY, PREEMPTED ...; "" where there is no such slice."""
        return shell.run(self._gcloud("tpu-vm", "describe", self.name, "--format=value(state)"), may_fail=True)

    def bring_up(self, shell: Shell) -> None:
        """Return when the slice is ready: the one that is there, or a new one where `create` says which."""
        state = self.state(shell)
        if state in ("CREATING", "STARTING", "RESTARTING", "REPAIRING"):
            self._wait(shell)
            return
        if state == "READY" and not shell.only_print:
            return
        if not self.create:
            if shell.only_print:
                return
            raise Failed(
                f"no slice {self.name} that is ready in {self.zone} (its state: {state or 'there is none'}); create it "
                "with --create v5p-128"
            )
        slices = chips.read(self.create)
        if slices.count > 1:
            raise Failed(f"--create {self.create}: one slice at a time; several slices are for launch/jobset.py")
        kind, cores = slices.chip.name, slices.chips * slices.chip.cores_in_name
        if state or not shell.only_print:  # what a preemption leaves has the name
            self.delete(shell, may_fail=True)
        shell.run(
            self._gcloud(
                *("queued-resources", "create", self.name, f"--node-id={self.name}"),
                f"--accelerator-type={GCLOUD_NAMES.get(kind, kind)}-{cores}",
                f"--runtime-version={IMAGES[kind]}",
                *(["--spot"] if self.spot else []),
            )
        )
        self._wait(shell)

    def _wait(self, shell: Shell) -> None:
        """Until the slice is ready; capacity may take days."""
        while (state := self.state(shell)) != "READY" and not shell.only_print:
            asked = self._gcloud("queued-resources", "describe", self.name, "--format=value(state.state)")
            queued = shell.run(asked, may_fail=True)
            if queued in ("FAILED", "SUSPENDED"):
                raise Failed(f"the request for {self.name} is {queued}; {shlex.join(asked[:-1])} says why")
            print(f"{self.name}: {state or queued or 'asked for'}", file=sys.stderr, flush=True)
            time.sleep(shell.wait_seconds)

    def delete(self, shell: Shell, may_fail: bool = False) -> None:
        """Hand the slice back."""
        shell.run(self._gcloud("queued-resources", "delete", self.name, "--force", "--quiet"), may_fail=may_fail)

    def install(self, shell: Shell, source: Code) -> None:
        """Bring the source and what it needs to every worker; the bucket is mounted."""
        source.pack(shell)
        archive, place = source.archive.name, f"{HOME}/{source.name}"
        copy = ["tpu-vm", "scp", str(source.archive), f"{self.name}:{archive}", "--worker=all"]
        shell.run(self._gcloud(*copy))
        lines = [
            "set -e",
            f"mkdir -p ~/{place}",
            f"tar -xzf ~/{archive} -C ~/{place}",
            "python3 -m pip install --quiet --user uv",
            f"~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/{HOME}/venv",
            f"cd ~/{place}",
            f"VIRTUAL_ENV=~/{HOME}/venv ~/.local/bin/uv pip install --quiet -c constraints.txt -e '.[tpu]'",
        ]
        if self.bucket:
            mount = f"gcsfuse --implicit-dirs --rename-dir-limit=1000000 {self.bucket} ~/{self.bucket}"
            lines += [f"mkdir -p ~/{self.bucket}", f"mountpoint -q ~/{self.bucket} || {mount}"]
        shell.run(self._ssh("; ".join(lines)))

    def start(self, shell: Shell, source: Code, arguments: Sequence[str]) -> None:
        """Start the run on every worker, where it is not running yet."""
        # A folder below the home of each worker is not quoted, so that its shell puts the home in.
        given = [word if word.startswith("~/") else shlex.quote(word) for word in arguments]
        command = f"~/{HOME}/venv/bin/python launch/tpu_pod.py {' '.join(given)}"
        lines = [
            f"cd ~/{HOME}/{source.name}",
            f"if kill -0 $(cat ~/{HOME}/pid 2>/dev/null) 2>/dev/null; then exit 0; fi",
            f"rm -f ~/{HOME}/status ~/{HOME}/log",
            f"(setsid nohup sh -c '{command.replace(chr(39), _QUOTE)} >~/{HOME}/log 2>&1; echo $? >~/{HOME}/status' "
            f"</dev/null >/dev/null 2>&1 & echo $! >~/{HOME}/pid)",
        ]
        shell.run(self._ssh("; ".join(lines)))

    def follow(self, shell: Shell) -> int | None:
        """The exit status of worker 0, whose log is printed as it grows; None where the slice was lost meanwhile."""
        seen, failures = 0, 0
        while True:
            tail = f"touch ~/{HOME}/log; tail -n +{seen + 1} --pid=$(cat ~/{HOME}/pid) -f ~/{HOME}/log"
            before, seen = seen, shell.follow(self._ssh(tail, "0"), seen)
            told = shell.run(self._ssh(f"cat ~/{HOME}/status", "0"), may_fail=True)
            if shell.only_print:
                return 0
            if told.isdigit():
                return int(told)
            # The connection has ended, or the slice: a run without a status goes on, or is lost with its worker.
            if self.state(shell) in LOST:
                return None
            failures = 0 if seen > before else failures + 1
            if failures > 20:
                return None
            time.sleep(shell.wait_seconds)


_QUOTE = "'\"'\"'"  # a quote inside quotes of a shell


def run(pod: Pod, source: Code, arguments: Sequence[str], shell: Shell, restarts: int) -> int:
    """The exit status of the run, brought up, installed, started and followed; started again where it was lost.

    A run that was preempted, or ended by anything but a fault that it tells, goes on from its last checkpoint.
    """
    soon = 0
    for attempt in range(restarts + 1):
        pod.bring_up(shell)
        began = time.monotonic()
        pod.install(shell, source)
        pod.start(shell, source, arguments)
        status = pod.follow(shell)
        if status == 0 or status in FAULTS:
            return status
        soon = soon + 1 if time.monotonic() - began < SOON_SECONDS else 0
        if soon == SOON_TIMES:
            raise Failed(f"the run ended {SOON_TIMES} times in its first {SOON_SECONDS / 60:.0f} minutes; see the log")
        why = "the slice was lost" if status is None else f"it ended with status {status}"
        print(f"{pod.name}: {why}; start {attempt + 2} goes on from the last checkpoint", file=sys.stderr, flush=True)
    print(f"{pod.name}: stopped {restarts + 1} times, no more than --restarts {restarts}", file=sys.stderr)
    return 1
