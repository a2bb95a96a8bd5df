"""The table of axes, and one device against eight simulated ones."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ain_jax import sharding
from ain_jax.models.config import qwen2_vl_7b, tiny
from ain_jax.models.multimodal import MultimodalModel, abstract_params, axis_names


def mesh(**sizes) -> Any:
    sizes = [sizes.get(name, 1) for name in sharding.AXES]
    return AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


TWOS = mesh(slice=2, data=2, fsdp=2, sequence=2, tensor=2)
CUT = ("fsdp", "sequence")


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        (("layers", "embed", "heads", "head"), (2, 32, 4, 8), (None, CUT, "tensor", None)),
        (("layers", "embed", "heads", "head"), (2, 6, 4, 8), (None, "fsdp", "tensor", None)),  # 6 has no quarters
        (("vocab", "embed"), (192, 32), ("tensor", CUT)),
        (("vocab", "embed"), (191, 32), (None, (*CUT, "tensor"))),  # 191 rows cannot be halved: the width is instead
        (("vocab", "embed"), (191, 4), (None, CUT)),
        (("heads", "head"), (3, 8), (None, None)),  # a bias has nothing that is cut in memory alone
        (("rows", "positions", None), (8, 6, 5), (("slice", "data", "fsdp"), "sequence", None)),
        (("rows", "positions"), (6, 5), ("slice", None)),
        (("tiles", None), (16, 5), (("slice", "data", "fsdp", "sequence"), None)),
        (("unknown", "head"), (4, 4), (None, None)),
    ],
)
def test_where_the_axes_lie(axes, shape, expected):
    assert sharding.spec(axes, shape, TWOS) == PartitionSpec(*expected)
    assert sharding.spec(axes, shape, mesh()) == PartitionSpec(*[None] * len(shape))


def test_a_mesh_axis_used_twice_is_refused():
    with pytest.raises(ValueError, match="mesh axis 'tensor' would be used twice; change sharding.RULES"):
        sharding.spec(("heads", "mlp"), (4, 4), TWOS)


@pytest.mark.parametrize("config, slack", [(tiny(tied=False), 1.5), (qwen2_vl_7b(), 1.05)], ids=["tiny", "7b"])
def test_every_parameter_has_a_place_on_every_mesh(config, slack):
    shapes, names = abstract_params(config), axis_names(config)
    is_names = lambda x: isinstance(x, tuple)
    for sizes in (
        {"slice": 2, "data": 4},
        {"fsdp": 8},
        {"sequence": 8},
        {"tensor": 4},
        {"slice": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 2, "tensor": 2},
    ):
        whole, split = 0, 0
        for axes, leaf in zip(jax.tree.leaves(names, is_leaf=is_names), jax.tree.leaves(shapes), strict=True):
            found = sharding.spec(axes, leaf.shape, mesh(**sizes))
            parts = np.prod([mesh(**sizes).shape[a] for entry in found if entry for a in np.atleast_1d(entry)])
            whole, split = whole + leaf.size, split + leaf.size / parts
        cut = np.prod([size for axis, size in sizes.items() if axis not in ("slice", "data")])
        assert split <= whole / cut * slack  # nearly all of it is really shared out


def test_a_mesh_on_which_much_work_would_be_done_many_times_is_refused():
    config = qwen2_vl_7b()
    shapes, names = abstract_params(config), axis_names(config)
    with pytest.raises(ValueError, match="Mesh cannot divide heads = 28 by tensor = 8: every device of the axis would"):
        sharding.shardings(names, shapes, mesh(tensor=8))
    # Four key heads on eight devices are repeated, as query heads need them, but stored in parts all the same.
    repeated = {(r.path, r.axis, r.size, r.mesh_axis) for r in sharding.undivided(names, shapes, mesh(tensor=8))}
    key = "model/layers/self_attn/k_proj/weight"
    assert (key, "kv_heads", 4, "tensor") in repeated
    assert sharding.spec(("layers", "embed", "kv_heads", "head"), (28, 3584, 4, 128), mesh(tensor=8))[1] == "tensor"
    assert not {path for path, *_ in repeated if "mlp" in path}
    assert not list(sharding.undivided(names, shapes, mesh(tensor=4, fsdp=8)))


@dataclasses.dataclass(frozen=True)
class Described:
    """A device that is not here."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_the_mesh_takes_all_devices(monkeypatch):
    made = {}

    def record(sizes, devices, **_):
        made.update(zip(sharding.AXES, sizes, strict=True))
        return np.array(devices).reshape(sizes)

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", record)
    monkeypatch.setattr(jax, "devices", lambda: [object()] * 8)
    for asked, expected in (
        (sharding.Mesh(), (1, 8, 1, 1, 1)),
        (sharding.Mesh(data=-1, fsdp=4), (1, 2, 4, 1, 1)),
        (sharding.Mesh(data=2, fsdp=2, tensor=-1), (1, 2, 2, 1, 2)),
        (sharding.Mesh(slice=2, data=1, sequence=-1), (2, 1, 1, 4, 1)),
    ):
        sharding.make_mesh(asked)
        assert tuple(made.values()) == expected
    sharding.make_mesh(sharding.Mesh(), [object()] * 3)
    assert tuple(made.values()) == (1, 3, 1, 1, 1)
    for asked in (sharding.Mesh(data=4), sharding.Mesh(fsdp=3), sharding.Mesh(tensor=16)):
        with pytest.raises(ValueError, match=r"asks for \d+ devices; 8 are here: change Mesh"):
            sharding.make_mesh(asked)
    for wrong in ({"data": 0}, {"fsdp": -1}, {"tensor": -2}):
        with pytest.raises(ValueError, match="expected sizes of 1 or more, and -1 at most once"):
            sharding.Mesh(**wrong)


def test_the_slices_alone_lie_along_their_axis():
    # Given in an order that mixes them; 0 to 3 are on one slice, 4 to 7 on the other.
    devices: list[Any] = [Described(i, i // 4) for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    found = sharding.make_mesh(sharding.Mesh(slice=2, data=1, fsdp=2, tensor=2), devices)
    of_slices = np.vectorize(lambda device: device.slice_index)(found.devices)
    assert (of_slices[0] == of_slices[0].flat[0]).all() and (of_slices[1] == 1 - of_slices[0].flat[0]).all()
    with pytest.raises(ValueError, match="the devices lie on 2 slices: set Mesh.slice = 2"):
        sharding.make_mesh(sharding.Mesh(fsdp=8, data=1), devices)


@pytest.mark.parametrize("remat", ["none", "full", "minimal", "dots"])
def test_no_policy_keeps_a_parameter_that_was_gathered(remat):
    config = tiny(tied=False, vision=False, mlp_width=80)
    params, tokens_BL = abstract_params(config), np.zeros((8, 16), np.int32)
    model: Any = MultimodalModel(config, remat=remat)
    forward = lambda p: model.apply({"params": p}, tokens_BL, tokens_BL, np.zeros((3, 8, 16), np.int32)).sum()
    with jax.sharding.use_abstract_mesh(mesh(fsdp=8)):
        jaxpr = jax.make_jaxpr(jax.grad(forward))(params)
    stacks = {leaf.shape for leaf in jax.tree.leaves(params["model"]["layers"]) if leaf.ndim > 2}
    first = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    assert "sharding_constraint" in str(first) and len(first.outvars) > 1  # what it gives beside x is kept
    assert not stacks.intersection(value.aval.shape for value in first.outvars)


def test_without_a_mesh_an_activation_is_left_alone():
    x = np.ones((4, 4), np.float32)
    assert sharding.constrain(x, ("rows", "positions")) is x and sharding.gathered(x, ("embed", "heads")) is x
    with jax.set_mesh(sharding.one_device()):
        assert sharding.constrain(x, ("rows", "positions")) is x and sharding.row_parts() == 1


def test_eight_devices_come_to_what_one_comes_to(tmp_path, request):
    here = Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "TF_CPP_MIN_LOG_LEVEL": "0",  # what the partitioner complains of is looked for
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
    assert "rematerialization" not in done.stderr  # of the partitioner, that gave up and copied everything everywhere
    for name, apart in found["cases"].items():
        if "whole" in apart:
            assert not apart["gathered"], name  # parameters come layer by layer, inside the scan
            assert apart["losses"] < 1e-5 and apart["whole"] < 1e-3 and apart["parameter"] < 1e-3, (name, apart)
        else:
            assert apart["losses"][-1] < apart["losses"][0] / 2, name
    assert published["read"] == 1 and published["largest_read"] <= published["largest"] / 2
