"""A machine lent for minutes: what goes over in parts arrives whole or not at all, and a run there ends in time."""

import hashlib
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from ain_jax.data import files
from ain_jax.launching import parcels


@pytest.fixture
def near(tmp_path, monkeypatch) -> Path:
    """A folder with 5 MiB that do not compress, some that do, and a link."""
    root = tmp_path / "near"
    (root / "runs/a").mkdir(parents=True)
    (root / "runs/a/noise").write_bytes(random.Random(0).randbytes(5 << 20))
    (root / "runs/a/zeros").write_bytes(bytes(3 << 20))
    (root / "runs/a/.data.lock").touch()
    (root / "ماء").mkdir()
    (root / "ماء/نص.txt").write_text("سلام")
    (root / "linked").symlink_to(root / "ماء")
    monkeypatch.chdir(root)
    return root


def test_what_is_packed_comes_out_the_same(near, tmp_path):
    parts = parcels.pack([Path("runs"), Path("linked")], Path("parcels"), 2)
    assert [part.name for part in parts] == ["00000.part", "00001.part", "00002.part"]
    assert all(part.stat().st_size <= 2 << 20 for part in parts)
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd="parcels", capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count("OK") == 3
    far = tmp_path / "far"
    far.mkdir()
    assert parcels.unpack(Path("parcels"), far)
    for name in ("runs/a/noise", "runs/a/zeros"):
        assert (far / name).read_bytes() == (near / name).read_bytes()
    assert (far / "linked/نص.txt").read_text() == "سلام" and not (far / "linked").is_symlink()
    assert not (far / "runs/a/.data.lock").exists()  # held by a process of the other machine
    (far / "runs/a/zeros").unlink()
    assert not parcels.unpack(Path("parcels"), far)  # before: what has become of it there stays
    assert not (far / "runs/a/zeros").exists()


def test_parts_lost_or_damaged_on_the_way_are_all_named_and_nothing_is_written(near, tmp_path):
    first, second, _ = parcels.pack([Path("runs")], Path("parcels"), 2)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"!")
    far = tmp_path / "far"
    far.mkdir()
    with pytest.raises(ValueError, match="of 3 parts in parcels: 00000.part is missing, 00001.part is damaged; copy"):
        parcels.unpack(Path("parcels"), far)
    sums = Path("parcels/SHA256SUMS")
    for cut in (sums.read_text()[:-1].rpartition("\n")[0] + "\n", sums.read_text()[:40], ""):
        sums.write_text(cut)
        with pytest.raises(ValueError, match="SHA256SUMS is not whole"):
            parcels.unpack(Path("parcels"), far)
    assert not list(far.iterdir())


def test_prepared_data_outlive_their_move(near, tmp_path, monkeypatch):
    """What was built of a large file is found by the file's size and time."""
    monkeypatch.setattr(files, "SMALL", 0)
    for number in range(20):
        path = Path(f"runs/{number}.jsonl")
        path.write_text("{}")
        os.utime(path, ns=(0, 1_790_000_000_123_456_789 + number * 7_654_321_987))
    parcels.pack([Path("runs")], Path("parcels"), 60)
    parcels.unpack(Path("parcels"), tmp_path)
    names = sorted(str(path) for path in Path("runs").glob("*.jsonl"))
    before = files.mark(names)
    monkeypatch.chdir(tmp_path)
    assert files.mark(names) == before


def test_what_cannot_be_packed_is_refused(near, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not there"):
        parcels.pack([Path("nowhere")], Path("parcels"), 2)
    with pytest.raises(ValueError, match="outside .*near: it would have no place"):
        parcels.pack([tmp_path], Path("parcels"), 2)
    (tmp_path / "near2").mkdir()
    with pytest.raises(ValueError, match="near2 lies outside"):
        parcels.pack([Path("../near2")], Path("parcels"), 2)
    with pytest.raises(ValueError, match="parts of 0 MiB; expected 1 or more"):
        parcels.pack([Path("runs")], Path("parcels"), 0)
    with pytest.raises(ValueError, match="SHA256SUMS is not there"):
        parcels.unpack(Path("runs"), near)


# Stands for the run of an experiment: each call takes two steps of a second, and saves when it is asked to stop.
LOCAL = """
import pathlib, signal, sys, time
root = pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1])
step = int((root / "step").read_text()) if (root / "step").exists() else 0
def save(*_):
    (root / "step").write_text(str(step))
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
if sys.argv[-1] == "fault":
    sys.exit(3)
while step < {steps}:
    time.sleep(1)
    step += 1
(root / "export").mkdir(exist_ok=True)
(root / "export/model.safetensors").write_bytes(bytes(range(256)) * 40000)
"""


def test_a_run_goes_on_stay_after_stay_and_its_model_comes_back(launcher, near, tmp_path, monkeypatch, capsys):
    lent = launcher("lent")
    monkeypatch.setattr(lent, "GRACE", 2)
    assert lent.main(["pack", "parcels", "runs", "--mib", "2"]) == 0
    assert "3 parts in parcels, 5," in capsys.readouterr().out
    far = tmp_path / "far"
    (far / "launch").mkdir(parents=True)
    (far / "launch/local.py").write_text(LOCAL.format(steps=4))
    (far / "figures.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('told')")
    monkeypatch.chdir(far)
    (far / "wheels").mkdir()
    (far / "wheels/some-1-py3-none-any.whl").touch()
    pip = "import pathlib, sys; pathlib.Path('installed').open('a').write(sys.argv[0].split('/')[-2] + '\\n')"
    (far / "pip").mkdir()
    (far / "pip/__init__.py").touch()
    (far / "pip/__main__.py").write_text(pip)
    monkeypatch.setenv("PYTHONPATH", str(far))
    command = ["run", str(near / "parcels"), "--exp", "a", "--out", "out", "--then", "figures.py 'the figures'"]
    statuses, begin = [], time.monotonic()
    while not statuses or statuses[-1] == lent.AGAIN:
        statuses.append(lent.main([*command, "--minutes", str(4.5 / 60)]))
        assert len(statuses) < 5, "no progress from stay to stay"
    assert (far / "installed").read_text() == "pip\n"  # once
    assert statuses[0] == lent.AGAIN and statuses[-1] == 0
    assert time.monotonic() - begin < 4.5 * len(statuses)
    assert (far / "the figures").read_text() == "told"
    assert "the model: 1 parts in out/a" in capsys.readouterr().out
    monkeypatch.chdir(near)
    assert lent.main(["unpack", str(far / "out/a"), "."]) == 0
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest(near / "runs/a/export/model.safetensors") == digest(far / "runs/a/export/model.safetensors")


def test_a_fault_there_ends_the_stay_with_its_status(launcher, near, tmp_path, monkeypatch, capsys):
    lent = launcher("lent")
    parcels.pack([Path("runs")], Path("parcels"), 60)
    far = tmp_path / "far"
    (far / "launch").mkdir(parents=True)
    (far / "launch/local.py").write_text(LOCAL.format(steps=0))
    monkeypatch.chdir(far)
    command = ["run", str(near / "parcels"), "--exp", "a", "--out", "out", "--minutes", "5"]
    assert lent.main([*command, "--set", "fault"]) == 3
    assert not (far / "out").exists()
    with pytest.raises(SystemExit):
        lent.main([*command[:-1], "1.5"])
    assert "--minutes 1.5: of these 90 s are left for a save" in capsys.readouterr().err
    os.remove(near / "parcels/00000.part")
    (far / parcels.MARK).unlink()
    assert lent.main(command) == 1
    assert "lent.py: of 1 parts in" in capsys.readouterr().err
