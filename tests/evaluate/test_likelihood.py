"""Summed nats and chosen answers against sums by hand; a batch that is filled up counts nothing twice."""

import dataclasses

import numpy as np
import pytest
import worked

from ain_jax.data import loader, pack_plan
from ain_jax.data.packing import Packing
from ain_jax.evaluate import likelihood

PACKING = Packing(row_tokens=40, row_targets=40)


def nats_of(segment, logs):
    steps = zip(segment.tokens_L, segment.tokens_L[1:], segment.learn_L[1:], strict=False)
    return -sum(logs[a, b] for a, b, learnt in steps if learnt)


def rows_of(source, path, pairs=False):
    plan = pack_plan.plan({"x": source}, None, PACKING, None, 0, path / "plan.npz")
    return loader.Rows(plan, [source], PACKING, worked.PICTURE, None, answers="pair" if pairs else "one")


@pytest.mark.parametrize("rows_per_batch", [1, 2, 3])
def test_nats_are_summed_once_whatever_the_batch(tmp_path, rows_per_batch):
    source = worked.examples([worked.example(i, 8 + i, group=("ar", "en")[i % 3 == 0]) for i in range(11)])
    rows = rows_of(source, tmp_path)
    assert rows.plan.rows % 2 and rows.plan.rows % 3
    params = worked.table()
    found = likelihood.nats(worked.Bigram(), params, rows.groups, loader.batches(rows, rows_per_batch, None))
    logs = worked.log_table(params)
    for group in ("ar", "en"):
        chosen = [e for e in range(11) if source.groups[source.group_E[e]] == f"made/{group}"]
        expected = sum(nats_of(s, logs) for e in chosen for s in worked.segments(source, e))
        assert found[f"made/{group}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows_per_batch", [1, 3])
def test_choices_by_hand(tmp_path, rows_per_batch):
    source = worked.examples([worked.example(i, 2 + i, pair=True, group=f"kind {i % 2}") for i in range(9)])
    rows = rows_of(source, tmp_path, pairs=True)
    assert rows.plan.rows % 3
    params = worked.table(seed=2)
    found = likelihood.pair_choices(worked.Bigram(), params, rows.groups, loader.batches(rows, rows_per_batch, None))
    logs = worked.log_table(params)
    margins = [np.subtract(*[-nats_of(s, logs) for s in worked.segments(source, e)]) for e in range(9)]
    for kind in (0, 1):
        chosen = [m for e, m in enumerate(margins) if e % 2 == kind]
        assert found[f"made/kind {kind}"] == {
            "accuracy": pytest.approx(np.mean([m > 0 for m in chosen])),
            "margin": pytest.approx(np.mean(chosen), abs=1e-4),
            "pairs": len(chosen),
        }


def test_a_kind_without_pairs_is_left_out(tmp_path):
    source = worked.examples([worked.example(i, 4, pair=True, group="kind") for i in range(3)])
    source = dataclasses.replace(source, groups=("made/kind", "made/none"))
    rows = rows_of(source, tmp_path, pairs=True)
    found = likelihood.pair_choices(worked.Bigram(), worked.table(), rows.groups, loader.batches(rows, 2, None))
    assert list(found) == ["made/kind"] and found["made/kind"]["pairs"] == 3
