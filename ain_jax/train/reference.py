"""The frozen policy's log-probabilities of each pair: computed once, fingerprinted, kept beside the plan."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ain_jax.data.loader import Rows
from ain_jax.launching import processes
from ain_jax.train.losses import pair_log_probs


def params_fingerprint(params: Any) -> str:
    """A digest of every parameter's bytes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(processes.fetch(leaf)).tobytes())
    return digest.hexdigest()[:16]


def with_reference(
    rows: Rows, model: Any, params: Any, batches: Callable[[Rows], Iterator[tuple[Any, int]]], path: Path
) -> Rows:
    """The rows with `reference_RN2` filled in, in nats; read from `path` where it fits these weights and this plan.

    The reference model is gone from memory afterwards: training holds the policy alone.
    """
    mark = f"{params_fingerprint(params)}/{rows.plan.fingerprint}"
    if processes.of_first(lambda: _mark(path) == mark):
        with np.load(path) as stored:
            return dataclasses.replace(rows, reference_RN2=stored["reference_RN2"])
    score = jax.jit(lambda p, batch: pair_log_probs(model, p, batch)[0])
    parts = [processes.fetch(score(params, batch)) for batch, _ in batches(rows)]
    reference_RN2 = np.concatenate(parts)[: len(rows)]
    if processes.is_first():
        beside = path.with_suffix(".tmp.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(beside, reference_RN2=reference_RN2, mark=np.array(mark))
        beside.replace(path)
    return dataclasses.replace(rows, reference_RN2=reference_RN2)


def _mark(path: Path) -> str:
    """What the stored values were made of; "" where none are."""
    if not path.exists():
        return ""
    with np.load(path) as stored:
        return str(stored["mark"])
