"""A checkout of its own, and commands on PATH that record how they were called instead of reaching a cluster."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Fake:
    """A command on PATH; `calls` are the arguments of each of its calls."""

    def __init__(self, folder: Path, name: str, body: str):
        self.log = folder / f"{name}.calls"
        self.log.touch()
        path = folder / name
        record = f"import json, sys\nopen({str(self.log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        path.write_text(f"#!{sys.executable} -SE\n{record}{body}")
        path.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`fake(name, body)`: a command whose Python source is `body`, before all others on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda name, body="": Fake(folder, name, body)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A clean git checkout with an experiment and one other file."""
    root = tmp_path / "checkout"
    (root / "experiments").mkdir(parents=True)
    (root / "experiments" / "small.gin").write_text('Experiment.name = "small"\n')
    (root / "code.py").write_text("print(1)\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "Begin"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


@pytest.fixture
def launcher(checkout, monkeypatch):
    """`launcher(name)`: the module of launch/NAME.py, started from the checkout above."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "ROOT", checkout)
        return module

    return load
