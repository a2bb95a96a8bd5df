"""Batches are the rows of the plan in their order, from whatever step on, and nothing is counted twice."""

import dataclasses
import multiprocessing
import pickle

import jax
import numpy as np
import pytest
import worked
from worker_sources import Dies, Large, Raises

from ain_jax.data import loader, pack_plan, workers
from ain_jax.data.batch import Batch, PairBatch
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing, lay_row
from ain_jax.models.multimodal import MultimodalModel, init_params
from ain_jax.train import losses

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
    return loader.Rows(plan, [source], PACKING, worked.PICTURE, worked.IMAGES, answers="pair")


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
    assert_same(arrays(loader.batches(rows, rows_per_batch, None, loader=loader.Loader(threads=0))), whole)


def test_batches_are_the_rows_in_order_and_the_last_is_filled_with_nothing(rows):
    whole = arrays(loader.batches(rows, 4, None))
    tokens_BL = np.concatenate([batch.tokens_BL for batch, _ in whole])
    alone = [rows[r] for r in range(10)]
    for field in dataclasses.fields(Batch):
        found = np.concatenate([getattr(batch, field.name) for batch, _ in whole])
        np.testing.assert_array_equal(found[:10], np.stack([row[field.name] for row in alone]))
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
    with pytest.raises(ValueError, match="record pairs/0 is a preference pair, and this stage would learn from bad"):
        dataclasses.replace(pairs, answers="one")
    with pytest.raises(
        ValueError, match="record a/0 has neither a rejected answer nor a verdict, and this stage compar"
    ):
        dataclasses.replace(rows, answers="pair")


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


def test_workers_make_the_same_batches_in_order(rows):
    whole = arrays(loader.batches(rows, 2, None))
    assert_same(arrays(loader.batches(rows, 2, None, 1, loader.Loader(workers=2, prefetch=1))), whole[1:])
    assert not multiprocessing.active_children()


def test_rows_without_pictures_start_no_process(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "in_order", lambda *_: pytest.fail("a process was started"))
    sources = {"b": rows.sources[1]}
    plan = pack_plan.plan(sources, None, PACKING, None, 0, tmp_path / "plan.npz")
    text = loader.Rows(plan, [rows.sources[1]], PACKING, worked.PICTURE, worked.IMAGES)
    assert len(arrays(loader.batches(text, 1, None, loader=loader.Loader(workers=2)))) == plan.rows


def test_a_batch_that_the_plan_keeps_free_of_pictures_has_no_arrays_of_patches(rows):
    # Of the first source the examples of odd number hold a picture. A row of one example each, two rows a batch.
    units_U2 = np.array([(0, 0), (1, 2), (1, 3), (0, 1), (1, 0), (0, 4), (0, 3)])
    plan = Planned(units_U2, np.arange(8), np.array([True, False, True, False]))
    whole, grouped = (arrays(loader.batches(dataclasses.replace(rows, plan=p), 2, None)) for p in (
        dataclasses.replace(plan, text_only_B=np.zeros(0, bool)), plan))  # fmt: skip
    for (plain, tokens), (found, also), text in zip(whole, grouped, plan.text_only_B, strict=True):
        assert tokens == also and (found.patches_BPK is None) == text
        expected = dataclasses.replace(plain, **dict.fromkeys(PATCHES)) if text else plain
        jax.tree.map(np.testing.assert_array_equal, expected, found)
    with pytest.raises(AssertionError, match="of a batch without pictures holds one"):
        wrong = dataclasses.replace(plan, text_only_B=np.ones(4, bool))
        arrays(loader.batches(dataclasses.replace(rows, plan=wrong), 2, None))
    with pytest.raises(ValueError, match="batches of 3 rows, and the plan sets batches of 2 rows without pictures"):
        arrays(loader.batches(dataclasses.replace(rows, plan=plan), 3, None))


PATCHES = ("feature_index_BL", "patches_BPK", "patch_positions_BP2", "patch_segments_BP")


def test_the_loss_of_a_model_that_sees_is_the_same_without_arrays_of_patches():
    model, params = MultimodalModel(worked.CONFIG), init_params(worked.CONFIG, jax.random.key(0))
    source = worked.examples([worked.example(i, 5 + i) for i in range(2)])
    whole = worked.batch([[s for e in (0, 1) for s in worked.segments(source, e)]])
    loss = jax.jit(lambda batch: losses.next_token(model, 1)(params, {}, batch, jax.random.key(0)).loss)
    assert float(loss(dataclasses.replace(whole, **dict.fromkeys(PATCHES)))) == pytest.approx(float(loss(whole)), 1e-6)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan by hand, and which of its batches hold no pictures."""

    units_U2: np.ndarray
    starts_R: np.ndarray
    text_only_B: np.ndarray
    rows_per_batch = 2
    row = pack_plan.PackPlan.row
    rows = pack_plan.PackPlan.rows


def test_large_arrays_come_back_whole_and_nothing_is_left_behind(rows, monkeypatch):
    names, named = [], workers._name
    monkeypatch.setattr(workers, "_name", lambda *of: names.append(named(*of)) or names[-1])
    coming = workers.in_order(Large(rows), range(5, 105), 2, 3)
    for number, found in zip(range(5, 9), coming, strict=False):
        expected = Large()[number]
        for name in ("one", "two", "none"):
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype and found[name].shape == expected[name].shape
        assert not len(found["names"]), "a worker has imported " + found["names"][0]
    assert len(multiprocessing.active_children()) == 2
    coming.close()
    assert not multiprocessing.active_children() and len(names) >= 3  # those that were asked for and not taken
    for name in names:
        with pytest.raises(FileNotFoundError):
            workers.SharedMemory(name)


def test_what_goes_wrong_in_a_worker_is_told_here(rows):
    with pytest.raises(RuntimeError, match=r"data worker 0 ended before its batch was made \(exit status 7\)"):
        list(workers.in_order(Dies(3), range(8), 1))
    broken = [dataclasses.replace(r, images=tuple(b[:80] for b in r.images)) for r in rows.sources[0].records]
    sources = [dataclasses.replace(rows.sources[0], records=broken), rows.sources[1]]
    with pytest.raises(ValueError, match=r"record a/\d: a broken picture of 16 x 8 pixels"):
        list(loader.batches(dataclasses.replace(rows, sources=sources), 4, None, 0, loader.Loader(workers=1)))
    assert not multiprocessing.active_children()


def test_any_exception_reaches_the_parent():
    try:
        Raises()[4]
    except Exception as error:
        told = pickle.loads(pickle.dumps(workers._portable(error)))
    assert isinstance(told, RuntimeError) and str(told) == "Odd: 4 is odd" and "in __getitem__" in told.__notes__[0]


def test_a_loader_of_nothing_is_refused():
    with pytest.raises(ValueError, match="workers = -1: expected 0 or more"):
        loader.Loader(workers=-1)
    with pytest.raises(ValueError, match="prefetch = 0"):
        loader.Loader(prefetch=0)
