"""A plan is the same wherever it is read, holds the shares asked for, and is made anew when anything changes."""

import dataclasses
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import worked
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.data import pack_plan, planning
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing

PACKING = Packing(row_tokens=32, window=16)


def source(name, count, words, seed=0):
    rng = np.random.default_rng(seed)
    return worked.examples([worked.example(int(rng.integers(1000)), int(w)) for w in rng.integers(*words, count)], name)


@pytest.fixture(scope="module")
def sources():
    return {"short": source("short", 30, (2, 8)), "long": source("long", 12, (10, 24), 1)}


def totals(plan, sources):
    names = list(sources)
    sizes = {name: s.sizes() for name, s in sources.items()}
    return [sum((sizes[names[s]][e] for s, e in plan.row(r)), np.zeros(3, int)) for r in range(plan.rows)]


def test_without_a_mixture_every_example_comes_once(sources, tmp_path):
    plan = pack_plan.plan(sources, None, PACKING, None, 0, tmp_path / "plan.npz")
    units = [tuple(u) for r in range(plan.rows) for u in plan.row(r)]
    assert sorted(units) == [(0, e) for e in range(30)] + [(1, e) for e in range(12)]
    used = np.stack(totals(plan, sources))
    assert (used <= PACKING.budgets).all()
    assert plan.filled == pytest.approx(used[:, 0].sum() / (32 * plan.rows))
    assert plan.filled <= plan.best <= 1
    assert plan.max_units == max(len(plan.row(r)) for r in range(plan.rows))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 120), st.floats(0.05, 20), st.sampled_from(["tokens", "examples"]), st.integers(0, 3))
def test_a_mixture_gives_as_many_rows_as_asked_for_in_its_shares(tmp_path_factory, rows, weight, by, seed):
    sources = {"short": source("short", 30, (2, 8)), "long": source("long", 12, (10, 24), 1)}
    mixture = Mixture({"short": weight, "long": 1.0}, by=by)
    plan = pack_plan.plan(sources, mixture, PACKING, rows, seed, tmp_path_factory.mktemp("plan") / "plan.npz")
    assert plan.rows == rows
    assert (np.stack(totals(plan, sources)) <= PACKING.budgets).all()
    counted = Counter(int(s) for s, _ in plan.units_U2)
    mean = [s.sizes()[:, 0].mean() if by == "tokens" else 1.0 for s in sources.values()]
    raw = [weight / mean[0], 1.0 / mean[1]]
    share = raw[0] / sum(raw)
    # Up to a window of examples waits when the last row is made.
    assert abs(counted[0] - share * len(plan.units_U2)) <= PACKING.window + 2


def test_a_share_of_tokens_is_a_share_of_tokens(sources, tmp_path):
    plan = pack_plan.plan(sources, Mixture({"short": 3.0, "long": 1.0}, "tokens"), PACKING, 400, 0, tmp_path / "p.npz")
    sizes = [s.sizes()[:, 0] for s in sources.values()]
    tokens = [sum(sizes[s][e] for s, e in plan.units_U2 if s == which) for which in (0, 1)]
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.02)


def test_the_rows_of_a_phase_hold_its_sources_alone(sources, tmp_path):
    mixture = Mixture({"short": (1.0, 0.0, 0.5), "long": (0.0, 1.0, 0.5)}, phases=(0.25, 0.25, 0.5))
    plan = pack_plan.plan(sources, mixture, PACKING, 40, 0, tmp_path / "plan.npz")
    assert plan.rows == 40
    held = [{int(s) for s, _ in plan.row(r)} for r in range(40)]
    assert all(h == {0} for h in held[:10]) and all(h == {1} for h in held[10:20])
    assert set.union(*held[20:]) == {0, 1}
    # The last phase goes on in the epoch of the one before, instead of drawing the same again.
    drawn = [[int(e) for r in rows for s, e in plan.row(r) if s == 1] for rows in (range(10, 20), range(20, 40))]
    assert len(drawn[0]) >= 8 and len(drawn[1]) >= 8 and set(drawn[0][:8]) != set(drawn[1][:8])
    totals_R3 = np.stack(totals(plan, sources))
    assert (totals_R3 <= PACKING.budgets).all()


def test_a_longer_run_begins_with_the_rows_of_the_shorter_one(sources, tmp_path):
    mixture = Mixture({"short": 0.6, "long": 0.4})
    short, long = (pack_plan.plan(sources, mixture, PACKING, n, 0, tmp_path / f"{n}.npz") for n in (20, 90))
    for r in range(20):
        np.testing.assert_array_equal(short.row(r), long.row(r))


def test_a_stored_plan_is_read_and_gives_the_same_rows(sources, tmp_path, monkeypatch):
    arguments = (sources, Mixture({"short": 0.6, "long": 0.4}), PACKING, 20, 3)
    path = tmp_path / "folder" / "plan.npz"
    made = pack_plan.plan(*arguments, path)
    monkeypatch.setattr(planning, "write", lambda *_: pytest.fail("was made again"))
    read = pack_plan.plan(*arguments, path)
    for field in dataclasses.fields(read):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(made, field.name))
        assert type(getattr(read, field.name)) is type(getattr(made, field.name))
    for r in (19, 0, 7, 7):
        np.testing.assert_array_equal(read.row(r), made.row(r))
    assert [p.name for p in path.parent.glob("[!.]*")] == ["plan.npz"]


def test_whatever_changes_makes_another_plan(sources, tmp_path):
    mixture = Mixture({"short": 0.6, "long": 0.4})
    changed = dataclasses.replace(sources["long"], fingerprint="other data")
    variants = [
        (sources, mixture, PACKING, 20, 0),
        (sources, mixture, PACKING, 20, 1),
        (sources, mixture, PACKING, 21, 0),
        (sources, mixture, dataclasses.replace(PACKING, window=17), 20, 0),
        (sources, mixture, dataclasses.replace(PACKING, row_targets=31), 20, 0),
        (sources, dataclasses.replace(mixture, by="tokens"), PACKING, 20, 0),
        (sources, Mixture({"short": 0.5, "long": 0.5}), PACKING, 20, 0),
        (sources, Mixture({"short": (0.6, 0.5), "long": 0.4}, phases=(0.5, 0.5)), PACKING, 20, 0),
        (sources, Mixture({"short": (0.6, 0.5), "long": 0.4}, phases=(0.4, 0.6)), PACKING, 20, 0),
        (sources | {"long": changed}, mixture, PACKING, 20, 0),
        # The same sources in another order: units count them, so a plan of the one is wrong for the other.
        (dict(reversed(sources.items())), mixture, PACKING, 20, 0),
        (sources, None, PACKING, None, 0),
    ]
    marks = [pack_plan.fingerprint(*v) for v in variants]
    assert len(set(marks)) == len(marks)
    path = tmp_path / "plan.npz"
    for variant, mark in zip(variants, marks, strict=True):
        assert pack_plan.plan(*variant, path).fingerprint == mark
        assert pack_plan.load(path).fingerprint == mark


def test_reordered_sources_are_laid_from_the_right_source(sources, tmp_path):
    for order in (sources, dict(reversed(sources.items()))):
        plan = pack_plan.plan(order, Mixture({"short": 0.6, "long": 0.4}), PACKING, 20, 0, tmp_path / "plan.npz")
        assert (np.stack(totals(plan, order)) <= PACKING.budgets).all()
        counted = Counter(list(order)[s] for s, _ in plan.units_U2)
        assert counted["short"] > counted["long"]


def test_what_cannot_be_learnt_from_is_refused(sources, tmp_path):
    silent = dataclasses.replace(sources["long"], learn_T=np.zeros_like(sources["long"].learn_T))
    with pytest.raises(ValueError, match="source long: example 0 has no token to learn from; check template and roles"):
        pack_plan.plan(sources | {"long": silent}, None, PACKING, None, 0, tmp_path / "plan.npz")
    with pytest.raises(ValueError, match="names 'shrt': did you mean 'short'"):
        pack_plan.plan(sources, Mixture({"shrt": 1.0}), PACKING, 4, 0, tmp_path / "plan.npz")
    assert not list(tmp_path.glob("[!.]*"))


def test_a_plan_is_mapped_from_its_files_and_handed_on_by_their_names(sources, tmp_path):
    plan = pack_plan.plan(sources, Mixture({"short": 0.6, "long": 0.4}), PACKING, 4000, 0, tmp_path / "plan")
    assert isinstance(plan.units_U2, np.memmap) and isinstance(plan.starts_R, np.memmap)
    packed = pickle.dumps(plan)
    assert len(packed) < 2000 < plan.units_U2.nbytes
    again = pickle.loads(packed)
    for r in (0, 3999, 17):
        np.testing.assert_array_equal(again.row(r), plan.row(r))
    part = pickle.loads(pickle.dumps(dataclasses.replace(plan, starts_R=plan.starts_R[:3])))
    assert part.rows == 2  # a part of a file goes as numbers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=8))
def test_least_rows_is_a_bound_of_the_best_packing(sizes):
    def fewest(left, rooms):
        """The fewest rows by trying everything."""
        if not left:
            return len(rooms)
        tries = [[*rooms[:i], room - left[0], *rooms[i + 1 :]] for i, room in enumerate(rooms) if room >= left[0]]
        return min(fewest(left[1:], rooms) for rooms in [*tries, [*rooms, 12 - left[0]]])

    found = planning.least_rows(np.bincount(sizes, minlength=13))
    assert -(-sum(sizes) // 12) <= found <= fewest(sorted(sizes, reverse=True), [])


def test_least_rows_by_hand():
    at = lambda sizes: planning.least_rows(np.bincount(sizes, minlength=11))
    assert [at([6, 6, 6, 4]), at([6, 6, 6, 6]), at([5, 5]), at([9, 9, 2, 2]), at([])] == [3, 4, 1, 3, 0]


def test_batches_without_pictures_are_brought_together(tmp_path):
    made = [worked.example(i, 6 + i % 5, [(16, 8)] * (i % 3 == 0)) for i in range(90)]
    source = {"mixed": worked.examples(made, "mixed")}
    packing = Packing(row_tokens=40, row_patches=32, window=24, text_batches=True)
    patches = source["mixed"].sizes()[:, 1]
    for mixture, rows in ((Mixture({"mixed": 1.0}), 48), (None, None)):
        plan = pack_plan.plan(source, mixture, packing, rows, 0, tmp_path / "plan", rows_per_batch=4)
        assert plan.rows_per_batch == 4 and len(plan.text_only_B) == -(-plan.rows // 4)
        plain_R = np.array([not patches[plan.row(r)[:, 1]].any() for r in range(plan.rows)])
        for batch, text_only in enumerate(plan.text_only_B):
            own = plain_R[4 * batch : 4 * batch + 4]
            assert own.all() if text_only else not own.all()
        mixed = [b for b in range(plan.rows // 4) if 0 < plain_R[4 * b : 4 * b + 4].sum() < 4]
        assert plan.text_only_B.sum() >= 2 and (~plan.text_only_B).sum() >= 2 and len(mixed) <= (mixture is None)
    assert sorted(plan.units_U2[:, 1].tolist()) == list(range(90))  # and none is lost
    with pytest.raises(ValueError, match="needs the rows of a batch"):
        pack_plan.plan(source, None, packing, None, 0, tmp_path / "plan")
    with pytest.raises(ValueError, match="makes whole batches of 4 rows; 6 rows are no such"):
        pack_plan.plan(source, Mixture({"mixed": 1.0}), packing, 6, 0, tmp_path / "plan", 4)


def test_epochs_are_gone_through_as_often_as_said(sources, tmp_path):
    mixture = Mixture({"short": 2.5, "long": 1.0}, by="epochs")
    plan = pack_plan.plan(sources, mixture, PACKING, None, 0, tmp_path / "plan")
    counted = Counter(map(tuple, plan.units_U2.tolist()))
    assert Counter(counted[0, e] for e in range(30)) == {2: 15, 3: 15}
    assert [counted[1, e] for e in range(12)] == [1] * 12
    steps = -(-plan.rows // 4)
    same = pack_plan.plan(sources, mixture, PACKING, 4 * steps, 0, tmp_path / "same", rows_per_batch=4)
    np.testing.assert_array_equal(same.units_U2, plan.units_U2)
    with pytest.raises(ValueError, match=rf"{steps} steps of 4 rows, and 8 rows were asked for: set Trainer.steps"):
        pack_plan.plan(sources, mixture, PACKING, 8, 0, tmp_path / "other", rows_per_batch=4)


def test_the_table_tells_what_the_rows_hold(tmp_path):
    made = [worked.example(i, 5, group="en" if i < 60 else "ar" if i < 75 else "ur") for i in range(80)]
    sources = {"talks": worked.examples(made, "talks")}
    mixture = Mixture({"talks": 1.0}, shares={"en": 0.4}, temperature=1e9)
    plan = pack_plan.plan(sources, mixture, PACKING, 200, 0, tmp_path / "plan")
    lines = {line["language"]: line for line in pack_plan.table(plan, sources, mixture)}
    assert {k: line["examples"] for k, line in lines.items()} == {"ar": 15, "en": 60, "ur": 5}
    for language, share in {"en": 0.4, "ar": 0.3, "ur": 0.3}.items():
        line = lines[language]
        own = [e for e in plan.units_U2[:, 1] if made[e][3] == language]
        assert line["drawn"] == len(own) and line["tokens"] == 6 * len(own)
        assert line["epochs"] == pytest.approx(len(own) / line["examples"])
        assert line["example_share"] == pytest.approx(share, abs=0.02) == line["share"]
    # Each language goes through its own examples before any comes again.
    ur = [e for e in plan.units_U2[:, 1] if e >= 75]
    assert max(Counter(ur).values()) - min(Counter(ur).values()) <= 2
    text = pack_plan.table_text(list(lines.values()))
    assert len(text.splitlines()) == 4 and "40." in text.splitlines()[2]


def test_the_draw_is_held_a_window_at_a_time(sources):
    sizes = [s.sizes() for s in sources.values()]
    drawing = planning._Drawing(sources, sizes, Mixture({"short": 0.5, "long": 0.5}), 0)
    stream = planning._Stream(drawing.chunks(0, np.zeros(2, int)), sizes)
    numbers, whole = stream.sizes(), []
    for start in range(0, 100_000, 1000):
        asked = list(itertools.islice(numbers, 1000))
        units_U2, sizes_U3 = stream.take(np.arange(start, start + 1000))
        assert sizes_U3.tolist() == asked == [sizes[s][e].tolist() for s, e in units_U2]
        assert len(stream.held) <= 2
        whole.append(units_U2)
    assert stream.used(2).tolist() == np.bincount(np.concatenate(whole)[:, 0]).tolist()
