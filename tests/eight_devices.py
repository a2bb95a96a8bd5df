"""Prints, as JSON, what updates come to on one device and on eight simulated ones: run by test_sharding.py.

A process of its own, because the number of simulated devices is fixed when jax starts. With "every" as a second
argument all cases of `mesh_cases` run on all meshes, which takes minutes, and each line is printed as it comes.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import worked

from ain_jax import sharding
from ain_jax.data import loader, pack_plan
from ain_jax.models.config import tiny, to_hf
from ain_jax.models.multimodal import MultimodalModel, abstract_params, axis_names, init_params
from ain_jax.train import checkpoint, losses, optimizer, state, step
from ain_jax.weights import load, shards
from ain_jax.weights.export import write_json, write_weights

CONFIG = tiny(tied=False, layers=1)
MARKS = {"pack_plan": "abc"}

MESHES = {
    "slice": {"slice": 8},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "sequence": {"sequence": 8},
    "tensor": {"tensor": 8},
    "slice x fsdp": {"slice": 2, "fsdp": 4},
    "fsdp x sequence": {"fsdp": 4, "sequence": 2},
    "sequence x tensor": {"sequence": 4, "tensor": 2},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp x sequence x tensor": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "slice x data x sequence": {"slice": 2, "data": 2, "sequence": 2},
}
# What is not the same as on the one device beside the mesh: it must not matter either.
CHOSEN: list[tuple[str, str, dict[str, Any]]] = [
    ("pictures", "data", {}),  # slice = 8 comes to the same program
    ("pictures", "slice x fsdp", {"remat": "full"}),
    ("pictures", "fsdp x sequence x tensor", {"remat": "offload_minimal"}),
    ("tiles", "sequence x tensor", {}),
    ("windows", "fsdp x sequence", {"accumulate": 2}),
    ("judged and adapters", "data x fsdp x tensor", {}),
    ("new rows", "fsdp x sequence x tensor", {}),
]


def rows(folder: Path) -> loader.Rows:
    made = [worked.example(i, 3 + i % 5, [(8, 8)] * (i % 2), group=("ar", "en")[i % 3 == 0]) for i in range(60)]
    source = worked.examples(made)
    plan = pack_plan.plan({"made": source}, None, worked.PACKING, None, 0, folder / "plan.npz")
    assert plan.rows >= 8
    return loader.Rows(plan, [source], worked.PACKING, worked.PICTURE, worked.IMAGES)


def on(mesh: jax.sharding.Mesh, made: loader.Rows, folder: Path) -> dict:
    """Losses of two updates on one batch, the second after the state was saved and loaded."""
    settings = optimizer.Optimizer(1e-2, 1e-2, weight_decay=0.1, rates={"model/embed_tokens": 0.0})
    with jax.set_mesh(mesh):
        placed = sharding.shardings(axis_names(CONFIG), abstract_params(CONFIG), mesh)
        params = jax.tree.map(jax.device_put, init_params(CONFIG, jax.random.key(0)), placed)
        transform = optimizer.make(settings, params, 10)
        loss = losses.next_token(MultimodalModel(CONFIG), len(made.groups))
        update = step.make_update(loss, transform, optimizer.rate_tree(params, settings.rates))
        batch, _ = next(loader.batches(made, 8, sharding.rows(mesh)))
        begun = state.create(params, transform)
        before = jax.tree.map(np.array, begun.params)
        after, sums, norm = update(begun, {}, batch, jax.random.key(0))
        checkpoints = checkpoint.Checkpoints(folder)
        checkpoints.save(after, MARKS, wait=True)
        held = jax.tree.map(np.array, after)
        loaded = checkpoints.load(1, after, MARKS)
        checkpoints.close()
        same = jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), held, loaded)
        where = jax.tree.map(lambda a, b: a.sharding == b.sharding, after.params, loaded.params)
        after, more, _ = update(loaded, {}, batch, jax.random.key(0))
        moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), before, after.params)
        largest = max(jax.tree.leaves(after.params["model"]["layers"]), key=lambda x: x.size)
    return {
        "losses": [float(s.loss / s.count) for s in (sums, more)],
        "groups": [float(x) for x in np.asarray(more.parts["loss"][0])],
        "norm": float(norm),
        "checksum": float(sum(np.abs(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(after.params))),
        "loaded_equal": all(jax.tree.leaves(same)) and all(jax.tree.leaves(where)),
        "frozen_moved": moved["model"]["embed_tokens"]["weight"],
        "least_moved": min(jax.tree.leaves(moved["visual"])),
        "part": largest.addressable_shards[0].data.size / largest.size,
    }


def published(mesh: jax.sharding.Mesh, folder: Path) -> dict:
    """A folder loaded onto the mesh: what it took to read, and whether all is as it was and where it belongs."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(CONFIG, jax.random.key(1)))
    folder.mkdir()
    write_json(folder / "config.json", to_hf(CONFIG))
    write_weights(params, CONFIG, folder, shard_bytes=40_000)
    read, counted = shards.Stored.read, []
    shards.Stored.read = lambda self, index=(): counted.append(read(self, index)) or counted[-1]
    loaded, _ = load.load_folder(folder, mesh=mesh)
    shards.Stored.read = read
    cast, _ = load.load_folder(folder, np.float32, mesh)
    placed = sharding.shardings(axis_names(CONFIG), abstract_params(CONFIG), mesh)
    equal = lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "equal": jax.tree.all(jax.tree.map(equal, loaded, params)),
        "cast_equal": jax.tree.all(jax.tree.map(lambda a, b: equal(a, b.astype(jnp.float32)), cast, params)),
        "placed": jax.tree.all(
            jax.tree.map(lambda a, where: a.sharding.is_equivalent_to(where, a.ndim), loaded, placed)
        ),
        "read": sum(array.nbytes for array in counted) / size,
        "largest_read": max(array.nbytes for array in counted),
        "largest": max(tensor.count * tensor.dtype.itemsize for tensor in shards.stored(folder)),
    }


def mesh_of(name: str) -> jax.sharding.Mesh:
    return sharding.make_mesh(sharding.Mesh(**({"data": 1} | MESHES[name])))


def apart(chosen: list[tuple[str, str, dict[str, Any]]], say: bool = False) -> dict[str, Any]:
    """By case and mesh, how far ten updates there are from those of one device."""
    made, alone, found = mesh_cases.cases(), {}, {}
    for name, where, changed in chosen:
        if name not in alone:
            alone[name] = made[name].run(sharding.one_device())
            found[name] = {"losses": alone[name].losses}
        result = dataclasses.replace(made[name], **changed).run(mesh_of(where))
        found[f"{name}, {where}"] = result.apart(alone[name])
        if say:
            print(name, where, found[f"{name}, {where}"], flush=True)
    return found


def main(folder: Path) -> None:
    made = rows(folder)
    one = sharding.one_device()
    eight = sharding.make_mesh(sharding.Mesh(data=-1, fsdp=2, tensor=2))
    found = {"one": on(one, made, folder / "one"), "eight": on(eight, made, folder / "eight")}
    # What eight devices wrote, one device reads.
    like = sharding.layout(axis_names(CONFIG), abstract_params(CONFIG), one)
    read, again = (checkpoint.load_params(folder / name, like) for name in ("one", "eight"))
    differ = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), read, again)
    found["published"] = published(eight, folder / "published")
    found["cases"] = apart(CHOSEN)
    print(json.dumps(found | {"apart": max(jax.tree.leaves(differ))}))


if __name__ == "__main__":
    if sys.argv[2:] == ["every"]:
        apart([(name, where, {}) for name in mesh_cases.cases() for where in MESHES], say=True)
    else:
        main(Path(sys.argv[1]))
