"""One of several processes that train a table together: `python joined.py FOLDER ASKED_AT ASKED [RISE]`.

Process number ASKED sends itself SIGTERM when it has begun step ASKED_AT; 0 is at no step. With RISE the table's mean
size is watched, and may rise by that share.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import worked

from ain_jax import sharding
from ain_jax.data import loader, pack_plan
from ain_jax.data.packing import Packing
from ain_jax.launching import processes
from ain_jax.train import losses, metrics, optimizer, state, watch
from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.loop import Trainer, train
from ain_jax.train.step import make_update

STEPS, ROWS = 8, 4
MARKS = {"pack_plan": "abc", "tokenizer": "def"}


def go(folder: Path, asked_at: int = 0, asked: int = -1, save_seconds: float = 1e9, rise: float = 0.0):
    """The state that training in this folder ends with, on all devices of all processes."""
    packing = Packing(row_tokens=24, row_targets=24, window=4)
    source = worked.examples([worked.example(i, 5 + i % 9) for i in range(160)])
    plan = processes.first(lambda: pack_plan.plan({"a": source}, None, packing, None, 0, folder / "plan.npz"))
    rows = loader.Rows(plan, [source], packing, worked.PICTURE, None)
    assert rows.plan.rows >= STEPS * ROWS
    mesh = sharding.make_mesh(sharding.Mesh(data=1, fsdp=-1))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x: jax.device_put(x, spread), worked.table(seed=1))
        transform = optimizer.make(optimizer.Optimizer(0.1, warmup_steps=2), params, STEPS)
        update = make_update(losses.next_token(worked.Bigram(), 1), transform, optimizer.rate_tree(params, {}))
        number = [0]

        def counted(before, *rest):
            number[0] = (number[0] or int(before.step)) + 1
            if (number[0], jax.process_index()) == (asked_at, asked):
                os.kill(os.getpid(), signal.SIGTERM)
            return update(before, *rest)

        trainer = Trainer(steps=STEPS, rows=ROWS, save_seconds=save_seconds)
        checkpoints = Checkpoints(folder / "checkpoints")
        try:
            return train(
                update=counted,
                state=state.create(params, transform),
                frozen={},
                batches=lambda start: loader.batches(rows, ROWS, sharding.rows(mesh), start),
                trainer=trainer,
                key=jax.random.key(0),
                checkpoints=checkpoints,
                marks=MARKS,
                groups=rows.groups,
                log=lambda start: metrics.Log(folder, "test", STEPS, start, 0.9),
                watch=watch.Watcher(watch.Watch(("size",), every=2, stop_rise={"size": rise}), folder, size)
                if rise
                else None,
            )
        finally:
            checkpoints.close()


def size(trained, frozen) -> dict[str, float]:
    """The mean size of the table's numbers, whichever devices hold them."""
    return {"size": float(np.abs(processes.fetch(trained["table"])).mean())}


if __name__ == "__main__":
    from ain_jax.launching import Interrupted, machine

    machine.join()
    place, at, who = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rise = float(sys.argv[4]) if sys.argv[4:] else 0.0
    try:
        print("ended at", int(go(place, at, who, save_seconds=0.0 if at > 4 else 1e9, rise=rise).step))
    except watch.Risen as stop:
        print("stopped:", stop)
        sys.exit(1)
    except Interrupted as stop:
        print("interrupted:", stop)
        sys.exit(130)
