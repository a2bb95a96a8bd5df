"""Batches are the rows of the plan in their order, from whatever step on, and nothing is counted twice."""

import dataclasses

import jax
import numpy as np
import pytest
import worked

from ain_jax.data import loader, pack_plan
from ain_jax.data.batch import Batch, PairBatch
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing, lay_row

PACKING = Packing(row_tokens=48, row_patches=64, row_targets=48, window=8)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    sources = {
        "a": worked.examples([worked.example(i, 3 + i, [(16, 8)] * (i % 2), group="ar") for i in range(9)], "a"),
        "b": worked.examples([worked.example(50 + i, 9, group="en") for i in range(7)], "b"),
    }
    plan = pack_plan.plan(
        sources, Mixture({"a": 0.5, "b": 0.5}), PACKING, 10, 0, tmp_path_factory.mktemp("plan") / "plan.npz"
    )
    return loader.Rows(plan, list(sources.values()), PACKING, worked.PICTURE, worked.IMAGES)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    kinds = ["kind b", "kind a", "kind b", "kind a", "kind b"]
    source = worked.examples([worked.example(i, 3, [(8, 8)], pair=True, group=k) for i, k in enumerate(kinds)], "pairs")
    plan = pack_plan.plan({"pairs": source}, None, PACKING, None, 0, tmp_path_factory.mktemp("plan") / "plan.npz")
    return loader.Rows(plan, [source], PACKING, worked.PICTURE, worked.IMAGES, pairs=True)


def arrays(batches):
    return [(jax.tree.map(np.asarray, batch), tokens) for batch, tokens in batches]


def assert_same(one, other):
    assert len(one) == len(other)
    for (a, a_tokens), (b, b_tokens) in zip(one, other, strict=True):
        assert a_tokens == b_tokens
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_row_is_laid_from_the_examples_of_the_plan(rows):
    assert rows.groups == ("a/ar", "b/en")
    for r in (3, 0, 9):
        units = rows.plan.row(r)
        made = [s for source, e in units for s in worked.segments(rows.sources[source], e)]
        expected = lay_row(made, PACKING, worked.IMAGES.patch_values, 2)
        found = rows[r]
        for name in set(expected) - {"target_groups_BC"}:
            np.testing.assert_array_equal(found[name], expected[name])
        used = found["target_segments_BC"] > 0
        by_unit = [int(source) for source, _ in units]  # the groups are one to a source here
        assert found["target_groups_BC"][used].tolist() == [by_unit[s - 1] for s in found["target_segments_BC"][used]]
        assert found["tokens"] == (found["segments_BL"] > 0).sum()


@pytest.mark.parametrize("rows_per_batch", [1, 4, 10, 16])
def test_any_step_gives_the_same_batch(rows, rows_per_batch):
    steps = -(-10 // rows_per_batch)
    whole = arrays(loader.batches(rows, rows_per_batch, None))
    assert len(whole) == steps and all(isinstance(batch, Batch) for batch, _ in whole)
    for start in range(steps + 1):
        assert_same(arrays(loader.batches(rows, rows_per_batch, None, start)), whole[start:])
    assert_same(arrays(loader.batches(rows, rows_per_batch, None, threads=0)), whole)


def test_batches_are_the_rows_in_order_and_the_last_is_filled_with_nothing(rows):
    whole = arrays(loader.batches(rows, 4, None))
    tokens_BL = np.concatenate([batch.tokens_BL for batch, _ in whole])
    np.testing.assert_array_equal(tokens_BL[:10], np.stack([rows[r]["tokens_BL"] for r in range(10)]))
    assert [tokens for _, tokens in whole] == [(tokens_BL[i : i + 4] > 0).sum() for i in (0, 4, 8)]
    last = whole[-1][0]
    for name in ("tokens_BL", "segments_BL", "target_segments_BC", "patch_segments_BP", "patches_BPK"):
        assert (getattr(last, name)[:2] != 0).any() and not getattr(last, name)[2:].any()
    assert (last.feature_index_BL[2:] == -1).all()


def test_pairs_stand_beside_their_rows(pairs):
    assert pairs.groups == ("pairs/kind a", "pairs/kind b")
    count = pairs.plan.rows + 1
    ((batch, _),) = arrays(loader.batches(pairs, count, None))
    assert isinstance(batch, PairBatch) and batch.pair_groups_BN.shape == (count, pairs.plan.max_units)
    for r in range(pairs.plan.rows):
        units = pairs.plan.row(r)
        groups = [1 - int(e) % 2 for _, e in units]
        assert batch.pair_groups_BN[r].tolist() == groups + [-1] * (pairs.plan.max_units - len(units))
        assert batch.rows.segments_BL[r].max() == 2 * len(units)
    assert (batch.pair_groups_BN[-1] == -1).all()
    reference_RN2 = np.arange(pairs.plan.rows * pairs.plan.max_units * 2, dtype=np.float32).reshape(
        pairs.plan.rows, -1, 2
    )
    with_reference = dataclasses.replace(pairs, reference_RN2=reference_RN2)
    ((batch, _),) = arrays(loader.batches(with_reference, count, None))
    np.testing.assert_array_equal(batch.reference_BN2[:-1], reference_RN2)
    assert not batch.reference_BN2[-1].any()


def test_pairs_and_plain_examples_are_not_mistaken_for_one_another(rows, pairs):
    # The rejected answer of a pair would be learnt, and a plain example would shift every pair behind it.
    with pytest.raises(
        ValueError, match="record pairs/0 is a preference pair, and this stage would learn its rejected"
    ):
        dataclasses.replace(pairs, pairs=False)
    with pytest.raises(ValueError, match="record a/0 has no rejected answer, and this stage compares pairs"):
        dataclasses.replace(rows, pairs=True)


def test_a_picture_that_breaks_later_stops_the_run_by_its_name(rows):
    broken = [dataclasses.replace(r, images=tuple(b[:80] for b in r.images)) for r in rows.sources[0].records]
    sources = [dataclasses.replace(rows.sources[0], records=broken), rows.sources[1]]
    with pytest.raises(ValueError, match=r"record a/\d: a broken picture of 16 x 8 pixels"):
        list(loader.batches(dataclasses.replace(rows, sources=sources), 4, None))


def test_rows_that_the_devices_cannot_share_are_refused(rows):
    class OfThree:
        def shard_shape(self, shape):
            raise ValueError("not divisible")

    with pytest.raises(ValueError, match="a batch of 4 rows cannot be laid over the devices equally"):
        next(loader.batches(rows, 4, OfThree()))
