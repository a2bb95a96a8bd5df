"""A run of one host goes on with four, then with two: the batches that they lay together are the single host's."""

import dataclasses
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import worked
from worker_sources import host

from ain_jax.data import loader, pack_plan
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing

PACKING = Packing(row_tokens=48, row_patches=64, row_targets=48, window=8)
ROWS, STEPS = 4, 6  # the last batch has two rows


def make(folder: Path) -> loader.Rows:
    """The rows of a small mixture of text and pictures, the same in each process."""
    sources = {
        "a": worked.examples([worked.example(i, 3 + i, [(16, 8)] * (i % 2), group="ar") for i in range(9)], "a"),
        "b": worked.examples([worked.example(50 + i, 9, group="en") for i in range(7)], "b"),
    }
    plan = pack_plan.plan(sources, Mixture({"a": 0.5, "b": 0.5}), PACKING, 22, 0, folder / "plan.npz")
    return loader.Rows(plan, list(sources.values()), PACKING, worked.PICTURE, worked.IMAGES)


def columns(batch) -> dict[str, np.ndarray]:
    return {f.name: np.asarray(getattr(batch, f.name)) for f in dataclasses.fields(batch)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def whole(rows):
    """Of a single host: the arrays of each step, and its count of tokens."""
    return [(columns(batch), tokens) for batch, tokens in loader.batches(rows, ROWS, None)]


def test_one_host_then_four_then_two(rows, whole, tmp_path):
    payload = tmp_path / "rows.pickle"
    payload.write_bytes(pickle.dumps(rows))
    jobs = []
    for hosts, steps in ((4, (2, 3)), (2, (4, 5))):
        share = ROWS // hosts
        for number in range(hosts):
            own = tuple(range(number * share, (number + 1) * share))
            jobs.append((payload, ROWS, own, steps, tmp_path / f"{hosts}-{number}.npz"))
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=3) as pool:  # each host's own view of the files
        pool.starmap(host, jobs, chunksize=3)
    found = {path.stem: np.load(path) for path in tmp_path.glob("*.npz")}
    for hosts, steps in ((4, (2, 3)), (2, (4, 5))):
        for step in steps:
            expected, tokens = whole[step]
            parts = [found[f"{hosts}-{number}"] for number in range(hosts)]
            for name, array in expected.items():
                np.testing.assert_array_equal(np.concatenate([part[f"{step}/{name}"] for part in parts]), array)
            assert sum(int(part[f"{step}/tokens"].sum()) for part in parts) == tokens


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_goes_on_at_any_step(rows, whole, processes):
    for start in (0, 3, STEPS - 1):
        streams = [
            loader.batches(rows, ROWS, None, start, process=p, processes=processes) for p in reversed(range(processes))
        ]
        for (expected, tokens), parts in zip(whole[start:], zip(*streams, strict=True), strict=True):
            for name, array in expected.items():
                joined = np.concatenate([columns(batch)[name] for batch, _ in reversed(parts)])
                np.testing.assert_array_equal(joined, array)
            assert sum(count for _, count in parts) == tokens
    with pytest.raises(ValueError, match="Trainer.rows = 4 cannot be shared by 3 processes equally"):
        next(loader.batches(rows, ROWS, None, process=0, processes=3))


def test_processes_that_jax_joins_lay_the_rows_of_their_devices(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(port), str(number), str(tmp_path / str(number))],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)
    found = [np.load(tmp_path / f"{number}.npz") for number in range(2)]
    for mesh in ("rows", "rows and replicas", "crossed"):
        for step in (3, 4, 5):
            seen = set()
            for part in found:
                for key in part.files:
                    kind, at, name, first = key.split("|")
                    if (kind, at) == (mesh, str(step)):
                        array = part[key]
                        expected = whole[step][0][name][int(first) : int(first) + len(array)]
                        np.testing.assert_array_equal(array, expected)
                        seen |= {(name, int(first) + i) for i in range(len(array))}
            assert seen == {(name, row) for name in whole[step][0] for row in range(ROWS)}


def _joined(port: str, number: str, out: str) -> None:
    """One of two processes with two devices each: what lies on its devices, under three layouts."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(number))
    devices = np.array(jax.devices())
    assert len(devices) == 4 and jax.process_count() == 2
    layouts = {
        "rows": devices.reshape(4, 1),
        "rows and replicas": devices.reshape(2, 2),  # both devices of a process hold the same rows
        "crossed": devices.reshape(2, 2).T,  # both processes hold the same rows, in parts not of their number
    }
    folder = Path(out)
    folder.mkdir()
    made, rows = {}, make(folder)
    for kind, grid in layouts.items():
        mesh = jax.sharding.Mesh(grid, ("rows", "same"))
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
        for step, (batch, _) in enumerate(loader.batches(rows, ROWS, spread, 3), start=3):
            for field in dataclasses.fields(batch):
                array = getattr(batch, field.name)
                assert array.shape[0] == ROWS
                for shard in array.addressable_shards:
                    made[f"{kind}|{step}|{field.name}|{shard.index[0].start or 0}"] = np.asarray(shard.data)
    np.savez(folder.with_suffix(".npz"), **made)


if __name__ == "__main__":
    _joined(*sys.argv[1:])
