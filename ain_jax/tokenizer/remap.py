"""A checkpoint made under one tokenizer, moved to another: rows go with the text of their piece.

    python -m ain_jax.tokenizer.remap --checkpoint RUN/STAGE/checkpoints --from FOLDER --to FOLDER --out FOLDER

    piece of the new tokenizer          its row
    spelt alike in the old one          the same row, bit for bit (special tokens by name)
    not there                           the mean of the rows of the old pieces that spell it
    a special token not there           the mean of all rows

The optimiser's moments of such rows move along; those of rows newly made are zero. The old checkpoint is only read. A
low-rank pair of an embedding or a head has rows as well, which move like the table's: the mean of a·b is that of a, b.
"""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from orbax.checkpoint import v1 as ocp

from ain_jax.data.examples import tokenizer_fingerprint
from ain_jax.tokenizer.align import cut, spellings
from ain_jax.tokenizer.chat import load_tokenizer
from ain_jax.tokenizer.extend import padded_vocab
from ain_jax.train.checkpoint import Checkpoints, opened
from ain_jax.train.optimizer import path_name
from ain_jax.train.state import TrainState

# The end of a parameter's path, and which of its axes counts ids: tables, and the low-rank pairs beside them.
ID_AXES = {"embed_tokens/weight": 0, "lm_head/weight": 0, "embed_tokens/a": 0, "lm_head/b": 1}
MOMENTS = ("mu", "nu")  # what Adam keeps of each number


@dataclasses.dataclass(frozen=True)
class Moves:
    """Where the row of each id of the new tokenizer comes from."""

    same_W: np.ndarray  # the old id of the same piece, -1 where there is none
    spelt: tuple[tuple[int, ...], ...]  # the old ids that spell the piece, () where it is there or has no spelling
    old_ids: int  # highest old id + 1; rows behind it are padding

    @property
    def kept(self) -> int:
        """How many rows are carried over."""
        return int((self.same_W >= 0).sum())


def moves(old: tokenizers.Tokenizer, new: tokenizers.Tokenizer) -> Moves:
    """Where each row of the new tokenizer's table comes from.

    old a b c, new a ab: same_W [0, -1], spelt ((), (0, 1))
    """
    theirs, ours = spellings(old), spellings(new)
    places = {spelling: index for index, spelling in enumerate(theirs) if spelling is not None}
    same_W = np.array([-1 if spelling is None else places.get(spelling, -1) for spelling in ours], np.int64)
    missing = [i for i in np.flatnonzero(same_W < 0).tolist() if (spelling := ours[i]) and not spelling.special]
    cuts = dict(zip(missing, cut(old, [_text(ours[i]) for i in missing]), strict=True))
    return Moves(same_W, tuple(tuple(cuts.get(i, ())) for i in range(len(ours))), len(theirs))


def moved(table_V: np.ndarray, plan: Moves, rows: int, axis: int = 0, fresh: float | None = None) -> np.ndarray:
    """The table in the new tokenizer's order, with `rows` rows along `axis`.

    Rows that the old table lacks are made as the head of this file says, or hold `fresh` where it is given. So do the
    rows behind the last id, which are padding.
    """
    table_VD = np.moveaxis(np.asarray(table_V), axis, 0)
    W = len(plan.same_W)
    if plan.old_ids > len(table_VD):
        raise ValueError(
            f"a table of {len(table_VD)} rows, and the old tokenizer has {plan.old_ids} ids: give whole tables, "
            "and the tokenizer that they were made under"
        )
    if rows < W:
        raise ValueError(f"rows = {rows}, and the new tokenizer has {W} ids: expected {W} or more")
    result = np.empty((rows, *table_VD.shape[1:]), table_VD.dtype)
    known = table_VD[: plan.old_ids]
    mean = known.astype(np.float32).mean(axis=0) if fresh is None else np.float32(fresh)
    result[:] = np.asarray(mean).astype(table_VD.dtype)
    there = np.flatnonzero(plan.same_W >= 0)
    result[there] = known[plan.same_W[there]]
    if fresh is None:
        made = [i for i, ids in enumerate(plan.spelt) if ids]
        lengths = [len(plan.spelt[i]) for i in made]
        flat = np.array([index for i in made for index in plan.spelt[i]], np.int64)
        if made:
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            sums = np.add.reduceat(known[flat].astype(np.float32), starts, axis=0)
            sizes = np.array(lengths, np.float32).reshape(-1, *[1] * (sums.ndim - 1))
            result[made] = (sums / sizes).astype(table_VD.dtype)
    return np.moveaxis(result, 0, axis)


def remap_params(params: Any, plan: Moves, rows: int) -> Any:
    """The parameters, or low-rank pairs, under the new tokenizer; what has no row of an id stays the same array."""

    def leaf(path, array):
        axis = _id_axis(path_name(path))
        return array if axis is None else moved(array, plan, rows, axis)

    return jax.tree_util.tree_map_with_path(leaf, params)


def remap_opt_state(opt_state: Any, plan: Moves, rows: int) -> Any:
    """The optimiser's state under the new tokenizer: moments of carried rows move along, those of new rows are 0."""

    def leaf(path, array):
        name = path_name(path)
        axis = _id_axis(name)
        if axis is None or not set(MOMENTS).intersection(name.split("/")):
            return array
        return moved(array, plan, rows, axis, fresh=0.0)

    return jax.tree_util.tree_map_with_path(leaf, opt_state)


def remap_checkpoint(
    folder: str | Path,
    old: str | Path,
    new: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    rows: int | None = None,
    pack_plan: str | None = None,
) -> tuple[int, Moves]:
    """(step, moves) of the checkpoint written to `out`: the one in `folder` at `step`, or the newest, moved.

    rows       of the new tables (default: the new tokenizer's ids, up to a multiple of 64)
    pack_plan  the fingerprint of the plan of the run that goes on from it. Without one the mark of the old plan stays:
               rows planned under another tokenizer are other rows, so no run goes on from it, but any can begin with it

    Raises ValueError where the checkpoint was not made under the tokenizer in `old`, or `out` holds anything.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a folder that is, or that is not there yet")
    before, after = load_tokenizer(old), load_tokenizer(new)
    with opened(folder, step) as (_, found):
        pass
    source: Any = (folder / str(found)).absolute()
    saved: Any = ocp.checkpointables_metadata(source).custom_metadata
    marks: dict[str, str] = dict(saved or {})
    made_under, expected = marks.get("tokenizer"), tokenizer_fingerprint(before)
    if made_under != expected:
        raise ValueError(
            f"{folder}/{found} was made under tokenizer {made_under}, and {old} is {expected}: give the tokenizer that "
            "it was made under as --from"
        )
    plan = moves(before.backend_tokenizer, after.backend_tokenizer)
    rows = padded_vocab(len(plan.same_W)) if rows is None else rows
    with warnings.catch_warnings():  # that it reads the layout of the arrays from the checkpoint: so it shall
        warnings.filterwarnings("ignore", message="Sharding info not provided")
        parts = ocp.load_checkpointables(source)
    state = TrainState(
        np.int32(found),
        remap_params(parts["params"], plan, rows),
        remap_opt_state(parts["opt_state"], plan, rows),
    )
    marks["tokenizer"] = tokenizer_fingerprint(after)
    if pack_plan is not None:
        marks["pack_plan"] = pack_plan
    checkpoints = Checkpoints(out)
    try:
        checkpoints.save(state, marks, wait=True)
    finally:
        checkpoints.close()
    return found, plan


def _text(spelling: Any) -> bytes:
    return spelling.text


def _id_axis(path: str) -> int | None:
    """Which axis of a parameter counts ids; None where none does."""
    return next((axis for end, axis in ID_AXES.items() if path == end or path.endswith("/" + end)), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint made under one tokenizer as one made under another."""
    parser = argparse.ArgumentParser(prog="python -m ain_jax.tokenizer.remap", description=main.__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a stage's folder `checkpoints`")
    parser.add_argument("--from", required=True, type=Path, dest="old", help="the tokenizer it was made under")
    parser.add_argument("--to", required=True, type=Path, dest="new", help="the tokenizer that it is to have")
    parser.add_argument("--out", required=True, type=Path, help="the folder `checkpoints` to write")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--rows", type=int, help="rows of the tables (default: the ids, up to a multiple of 64)")
    parser.add_argument("--pack_plan", type=Path, help="the folder pack_plan of the run that goes on from it")
    given = parser.parse_args(arguments)
    try:
        mark = None
        if given.pack_plan is not None:
            from ain_jax.data import pack_plan

            mark = pack_plan.load(given.pack_plan).fingerprint
        step, plan = remap_checkpoint(
            given.checkpoint, given.old, given.new, given.out, step=given.step, rows=given.rows, pack_plan=mark
        )
    except (ValueError, OSError) as fault:
        print(f"ain_jax: {fault}", file=sys.stderr)
        return 1
    made = sum(bool(ids) for ids in plan.spelt)
    print(f"{given.out}/{step}: {plan.kept} rows carried over, {made} made of others, ids {len(plan.same_W)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
