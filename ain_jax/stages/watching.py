"""What a stage's held-out texts are, and how they are measured on whatever the stage trains."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import jax
import numpy as np

from ain_jax.data import loader
from ain_jax.data.builders.files import Sources
from ain_jax.data.builders.sample_records import KINDS
from ain_jax.data.packing import Packing
from ain_jax.experiment import nearest
from ain_jax.launching import processes
from ain_jax.stages.common import StageRun, source_parts
from ain_jax.train import losses
from ain_jax.train.loop import Trainer
from ain_jax.train.watch import Watch, Watcher


def check(run: StageRun) -> None:
    """Refuse, before anything runs, texts of which nothing is held out."""
    sources = run.get(Sources)
    for text in run.get(Watch).texts:
        kind, _ = source_parts(text)
        if kind not in sources.files and kind not in KINDS:
            raise ValueError(
                f"{run.stage}/Watch.texts names {text!r}, which is no source: {nearest(kind, [*sources.files, *KINDS])}"
            )
        if kind in sources.files and kind not in sources.held_out:
            raise ValueError(
                f"{run.stage}/Watch.texts names {text!r}, of which nothing is held out: set Sources.held_out = "
                f"{{{kind!r}: 0.01}}, a share of its records"
            )


def shape(run: StageRun) -> tuple[Packing, int]:
    """How watched texts are packed, and how many rows of them are read together: as many as a step holds at once."""
    own, trainer = run.get(Packing), run.get(Trainer)
    packing = Packing(
        row_tokens=run.get(Watch).row_tokens or own.row_tokens,
        row_patches=own.row_patches,
        too_long="split",
        text_batches=own.row_patches > 0,  # texts without pictures need no arrays for them
    )
    return packing, trainer.rows // trainer.accumulate


def scorer(run: StageRun, aimed: Callable[[losses.Loss], losses.Loss], groups: int) -> Any:
    """The jitted function `(trained, frozen, batch)` -> bits and bytes by group; a plan compiles it too."""
    aim = aimed(losses.next_token(run.model, groups, losses.PLAIN, run.token_bytes_V))
    return jax.jit(lambda trained, frozen, batch: aim(trained, frozen, batch, None).parts["bits_per_byte"])


def held_out(run: StageRun) -> dict[str, loader.Rows]:
    """The packed rows of each watched text, tokenised and planned where they are not yet.

    Raises ValueError for a text of which nothing is held out, or which holds preferences.
    """
    settings, found = run.get(Watch), {}
    packing, together = shape(run)
    for text in settings.texts:
        examples = run.examples(text, "test", packing)
        if not len(examples):
            raise ValueError(f"{run.stage}/Watch.texts names {text!r}, of which nothing is held out: take it out")
        judged = np.flatnonzero(examples.answers())
        if len(judged):
            raise ValueError(
                f"{run.stage}/Watch.texts names {text!r}, of whose {len(examples)} held-out examples {len(judged)} are "
                "preferences: texts and conversations are watched; take it out"
            )
        name = f"watch_{quote(text, safe='')}"  # "a/b" and "a_b" are two
        rows = run.rows({text: examples}, None, None, name, packing=packing, rows_per_batch=together)
        if settings.rows:  # the same texts, however many rows a batch of the stage has
            # Batches of one shape are whole.
            most = -(-settings.rows // together) * together if packing.text_batches else settings.rows
            plan = dataclasses.replace(rows.plan, starts_R=rows.plan.starts_R[: most + 1])
            rows = dataclasses.replace(rows, plan=plan)
        found[text] = rows
    return found


def watcher(run: StageRun, aimed: Callable[[losses.Loss], losses.Loss]) -> Watcher | None:
    """What measures the texts of `Watch` in bits per byte; None where none are watched. `aimed` as `training.aimed`.

    They may be documents in a stage of conversations or of pairs as well: what is asked is whether the language is
    still known. Of conversations what the stage learns of them is measured, their answers. Where a vocabulary grows by
    parts all are cut by the whole of it, so that values compare.
    """
    settings = run.get(Watch)
    if not settings.texts:
        return None
    batches, groups = {}, {}
    for text, rows in held_out(run).items():
        batches[text] = [batch for batch, _ in run.batches(rows, shape(run)[1])]
        groups[text] = len(rows.groups)

    score = functools.cache(lambda groups: run.program("watch", lambda: scorer(run, aimed, groups), groups))

    def measure(trained: Any, frozen: Any) -> dict[str, float]:
        found = {}
        for text, of_text in batches.items():
            sums = [processes.fetch(score(groups[text])(trained, frozen, batch)) for batch in of_text]
            bits, size = (
                sum(float(np.sum(part, dtype=np.float64)) for part in parts) for parts in zip(*sums, strict=True)
            )
            found[text] = bits / size
        return found

    return Watcher(settings, run.folder, measure)
