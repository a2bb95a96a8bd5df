"""The frozen policy's log-probabilities of each answer: computed once, fingerprinted, kept beside the run's data."""

import dataclasses
import hashlib
import os
import platform
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


def scorer(model: Any) -> Any:
    """The jitted function `(params, batch)` -> log-probabilities (B, N, 2) of both answers; a plan compiles it too."""
    return jax.jit(lambda params, batch: pair_log_probs(model, params, batch)[0])


def with_reference(
    rows: Rows,
    model: Any,
    params: Any,
    batches: Callable[[Rows], Iterator[tuple[Any, int]]],
    folder: Path,
    also: str = "",
) -> Rows:
    """The rows with `reference_RN2` filled in, in nats: read from the folder, else computed and written there.

    A file's name is the digest of all that its values follow from: the weights, the plan's fingerprint (data,
    tokenizer, chat template, image settings, packing, mixture) and `also`, what else the model reads (its config and
    dtype). So a run that goes on finds them, and so does another stage that starts from the same weights on the same
    rows, whatever its loss. Files of other weights or data stay where they are.

    The reference model is gone from memory afterwards: training holds the policy alone.
    """
    mark = "/".join((params_fingerprint(params), rows.plan.fingerprint, also))
    path = folder / f"{hashlib.sha256(mark.encode()).hexdigest()[:16]}.npz"
    if processes.of_first(path.is_file):
        with np.load(path) as stored:
            return dataclasses.replace(rows, reference_RN2=stored["reference_RN2"])
    score = scorer(model)
    parts = [processes.fetch(score(params, batch)) for batch, _ in batches(rows)]
    reference_RN2 = np.concatenate(parts)[: len(rows)]
    if odd := int(np.count_nonzero(~np.isfinite(reference_RN2))):
        raise ValueError(
            f"{odd} of {reference_RN2.size} log-probabilities of the reference are not finite, so that nothing can be "
            "compared with them: look at the stage that it starts from, or try another Model.dtype or Model.attention"
        )
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.stem}.{platform.node()}.{os.getpid()}.tmp.npz")
        np.savez(beside, reference_RN2=reference_RN2)
        beside.replace(path)
    return dataclasses.replace(rows, reference_RN2=reference_RN2)
