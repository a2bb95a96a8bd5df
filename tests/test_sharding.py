"""The table of axes, and one device against eight simulated ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ain_jax import sharding
from ain_jax.models.config import qwen2_vl_7b, tiny
from ain_jax.models.multimodal import abstract_params, axis_names

NAMES = ("data", "fsdp", "tensor")


def mesh(*sizes):
    return AbstractMesh(sizes, NAMES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        (("layers", "embed", "heads", "head"), (2, 32, 4, 8), (None, "fsdp", "tensor", None)),
        (("vocab", "embed"), (192, 32), ("tensor", "fsdp")),
        (("vocab", "embed"), (191, 32), (None, "fsdp")),  # 191 rows cannot be halved
        (("rows", None), (8, 5), (("data", "fsdp"), None)),
        (("rows", None), (6, 5), (None, None)),
        (("unknown", "head"), (4, 4), (None, None)),
    ],
)
def test_where_the_axes_lie(axes, shape, expected):
    assert sharding.spec(axes, shape, mesh(2, 2, 2)) == PartitionSpec(*expected)
    assert sharding.spec(axes, shape, mesh(1, 1, 1)) == PartitionSpec(*[None] * len(shape))


def test_a_mesh_axis_used_twice_is_refused():
    with pytest.raises(ValueError, match="mesh axis 'tensor' would be used twice; change sharding.RULES"):
        sharding.spec(("heads", "mlp"), (4, 4), mesh(2, 2, 2))


@pytest.mark.parametrize("config, slack", [(tiny(tied=False), 1.5), (qwen2_vl_7b(), 1.05)], ids=["tiny", "7b"])
def test_every_parameter_has_a_place_on_every_mesh(config, slack):
    shapes, names = abstract_params(config), axis_names(config)
    is_names = lambda x: isinstance(x, tuple)
    for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)):
        whole, split = 0, 0
        for axes, leaf in zip(jax.tree.leaves(names, is_leaf=is_names), jax.tree.leaves(shapes), strict=True):
            found = sharding.spec(axes, leaf.shape, mesh(*sizes))
            parts = np.prod([mesh(*sizes).shape[axis] for axis in found if axis])
            whole, split = whole + leaf.size, split + leaf.size / parts
        assert split <= whole / np.prod(sizes[1:]) * slack  # nearly all of it is really shared out


def test_the_mesh_takes_all_devices(monkeypatch):
    made = {}
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, names, axis_types: made.update(zip(names, sizes, strict=True)))
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    for asked, expected in (
        (sharding.Mesh(), (8, 1, 1)),
        (sharding.Mesh(data=-1, fsdp=4), (2, 4, 1)),
        (sharding.Mesh(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (sharding.Mesh(data=4, tensor=2), (4, 1, 2)),
    ):
        sharding.make_mesh(asked)
        assert tuple(made.values()) == expected
    for asked in (sharding.Mesh(data=4), sharding.Mesh(fsdp=3), sharding.Mesh(tensor=16)):
        with pytest.raises(ValueError, match=r"asks for \d+ devices; 8 are here: change Mesh"):
            sharding.make_mesh(asked)
    for wrong in ({"data": 0}, {"fsdp": -1}, {"tensor": -2}):
        with pytest.raises(ValueError, match="expected sizes of 1 or more, and -1 at most once"):
            sharding.Mesh(**wrong)


def test_eight_devices_come_to_what_one_comes_to(tmp_path, request):
    here = Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    arguments = [sys.executable, str(here / "eight_devices.py"), str(tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    one, eight = found["one"], found["eight"]
    assert one["losses"][1] < one["losses"][0] - 0.1
    for name in ("losses", "groups", "norm", "checksum"):
        assert eight[name] == pytest.approx(one[name], rel=1e-5), name
    assert found["apart"] < 1e-4  # the parameters, as one device reads what eight wrote
    assert one["loaded_equal"] and eight["loaded_equal"]
    assert one["frozen_moved"] == eight["frozen_moved"] == 0 < eight["least_moved"]
    assert one["part"] == 1 and eight["part"] == 1 / 4  # of the largest matrix, on each device
    # A published folder: each byte read once, in slices of what the devices hold, and put where it belongs.
    published = found["published"]
    assert published["equal"] and published["cast_equal"] and published["placed"]
    assert published["read"] == 1 and published["largest_read"] <= published["largest"] / 2
