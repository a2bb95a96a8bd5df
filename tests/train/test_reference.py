"""The frozen policy's log-probabilities: right, computed once, and anew when weights or data change."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import worked

from ain_jax.data import loader, pack_plan
from ain_jax.data.packing import Packing
from ain_jax.train import reference
from ain_jax.train.preferences import Preference, preference

PACKING = Packing(row_tokens=48, row_patches=32, row_targets=48)


@pytest.fixture
def rows(tmp_path):
    source = worked.examples([worked.example(i, 2 + i, pair=True, group=("a", "b")[i % 2]) for i in range(7)], "pairs")
    plan = pack_plan.plan({"pairs": source}, None, PACKING, None, 0, tmp_path / "plan.npz")
    return loader.Rows(plan, [source], PACKING, worked.PICTURE, worked.IMAGES, answers="pair")


def batches(rows):
    return loader.batches(rows, 2, None)


def test_filled_in_it_is_what_the_policy_says_and_the_loss_begins_at_log_2(rows, tmp_path):
    params = worked.table()
    filled = reference.with_reference(rows, worked.Bigram(), params, batches, tmp_path / "reference.npz")
    assert filled.reference_RN2.shape == (rows.plan.rows, rows.plan.max_units, 2)
    logs = worked.log_table(params)
    for r in range(rows.plan.rows):
        for n, (_, e) in enumerate(rows.plan.row(r)):
            for which, made in enumerate(worked.segments(rows.sources[0], e)):
                steps = zip(made.tokens_L, made.tokens_L[1:], made.learn_L[1:], strict=False)
                expected = sum(logs[a, b] for a, b, learnt in steps if learnt)
                assert filled.reference_RN2[r, n, which] == pytest.approx(expected, abs=1e-4)
    loss = preference(worked.Bigram(), 2, Preference(beta=0.1))
    score = jax.jit(lambda batch: loss(params, {}, batch, None))
    sums = [score(batch) for batch, _ in batches(filled)]
    assert sum(float(s.count) for s in sums) == 7  # the last batch is filled up with rows that count nothing
    assert sum(float(s.loss) for s in sums) / 7 == pytest.approx(math.log(2), abs=1e-5)


def test_it_is_computed_once_for_the_same_weights_and_data(rows, tmp_path):
    path, params, other = tmp_path / "folder" / "reference.npz", worked.table(), worked.table(seed=1)
    first = reference.with_reference(rows, worked.Bigram(), params, batches, path)
    again = reference.with_reference(rows, worked.Bigram(), params, lambda _: pytest.fail("computed again"), path)
    np.testing.assert_array_equal(again.reference_RN2, first.reference_RN2)
    changed = reference.with_reference(rows, worked.Bigram(), other, batches, path)
    assert not np.allclose(changed.reference_RN2, first.reference_RN2)
    replanned = dataclasses.replace(rows, plan=dataclasses.replace(rows.plan, fingerprint="other"))
    asked = []
    reference.with_reference(replanned, worked.Bigram(), other, lambda rows: asked.append(rows) or batches(rows), path)
    assert len(asked) == 1 and asked[0] is replanned


def test_the_fingerprint_is_of_every_bit_of_the_weights():
    one = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    other = {"a": np.zeros(3, np.float32), "b": np.array([1, np.nextafter(np.float32(1), np.float32(2))])}
    assert reference.params_fingerprint(one) == reference.params_fingerprint(one)
    assert reference.params_fingerprint(one) != reference.params_fingerprint(other)
