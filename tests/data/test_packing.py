"""Rows within their budgets, no example lost; and the arrays of a row, worked by hand."""

import itertools

import numpy as np
import pytest
import worked
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.data.packing import PATIENCE, Packing, Segment, batched, lay_row, pack, packed


def text(tokens, learn, group=0):
    tokens_L = np.array(tokens, np.int32)
    positions_3L = np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1))
    return Segment(tokens_L, np.array(learn, bool), positions_3L, group)


def test_a_row_of_two_examples_as_the_docstring_of_batch_draws_it():
    packing = Packing(row_tokens=6, row_targets=3)
    row = lay_row([text([7, 8, 9], [0, 0, 1], 4), text([4, 5], [0, 1], 2)], packing, 0, 1)
    assert {name: array.tolist() for name, array in row.items()} == {
        "tokens_BL": [7, 8, 9, 4, 5, 0],
        "segments_BL": [1, 1, 1, 2, 2, 0],
        "positions_B3L": [[0, 1, 2, 0, 1, 0]] * 3,
        "predict_at_BC": [1, 3, 0],
        "targets_BC": [9, 5, 0],
        "target_segments_BC": [1, 2, 0],
        "target_groups_BC": [4, 2, 0],
    }
    assert {array.dtype for array in row.values()} == {np.dtype(np.int32)}


def test_the_first_token_of_a_segment_is_never_a_target():
    row = lay_row([text([7, 8], [1, 1]), text([4, 5], [1, 0])], Packing(row_tokens=4), 0, 1)
    assert row["predict_at_BC"].tolist() == [0, 0, 0, 0]
    assert row["targets_BC"].tolist() == [8, 0, 0, 0]
    assert row["target_segments_BC"].tolist() == [1, 0, 0, 0]


def test_a_row_with_pictures_by_hand():
    # a picture of 2 x 4 patches (2 features) in the first segment, two of 2 x 2 (1 feature each) in the second
    def pictured(tokens, counts, first):
        total = sum(counts)
        places = np.array([t == 9 for t in tokens])
        return Segment(
            np.array(tokens, np.int32),
            np.zeros(len(tokens), bool),
            np.zeros((3, len(tokens)), np.int32),
            0,
            places,
            np.full((total, 2), first, np.float32) + np.arange(total, dtype=np.float32)[:, None],
            np.arange(2 * total, dtype=np.int32).reshape(total, 2),
            counts,
        )

    segments = [pictured([1, 9, 9, 2], (8,), 100), text([3], [0]), pictured([9, 4, 9], (4, 4), 200)]
    row = lay_row(segments, Packing(row_tokens=10, row_patches=20), 2, 2)
    assert row["feature_index_BL"].tolist() == [-1, 0, 1, -1, -1, 2, -1, 3, -1, -1]
    assert row["patch_segments_BP"].tolist() == [1] * 8 + [2] * 4 + [3] * 4 + [0] * 4
    assert row["patches_BPK"][:, 0].tolist() == [*range(100, 108), *range(200, 208), 0, 0, 0, 0]
    assert row["patch_positions_BP2"][8:16].tolist() == segments[2].patch_positions_P2.tolist()
    assert row["patches_BPK"].dtype == np.float32
    with pytest.raises(ValueError, match="segment 1 of a row: 1 picture places but 8 patches, which make 2 features"):
        lay_row([pictured([1, 9, 2], (8,), 0)], Packing(row_tokens=10, row_patches=20), 2, 2)


def test_positions_of_a_picture_begin_anew_in_each_segment():
    source = worked.examples([worked.example(1, 2, [(16, 8)]), worked.example(2, 1, [(16, 16)])])
    made = [s for e in range(2) for s in worked.segments(source, e)]
    row = lay_row(made, worked.PACKING, worked.IMAGES.patch_values, 2)
    # token, vision start, 1 x 2 features, vision end, 2 words; then token, start, 2 x 2 features, end, 1 word
    assert row["segments_BL"][:16].tolist() == [1] * 7 + [2] * 8 + [0]
    assert row["positions_B3L"][:, :15].tolist() == [
        [0, 1, 2, 2, 4, 5, 6, 0, 1, 2, 2, 2, 2, 4, 5],
        [0, 1, 2, 2, 4, 5, 6, 0, 1, 2, 2, 3, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 2, 3, 4, 5],
    ]
    assert row["feature_index_BL"][:15].tolist() == [-1, -1, 0, 1, -1, -1, -1, -1, -1, 2, 3, 4, 5, -1, -1]


sizes = st.lists(st.tuples(st.integers(1, 16), st.integers(0, 4).map(lambda n: 4 * n), st.integers(0, 9)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 20), st.sampled_from([0, 9, 12]))
def test_no_budget_is_exceeded_and_no_example_lost(items, window, row_targets):
    packing = Packing(row_tokens=16, row_patches=16, row_targets=row_targets, window=window)
    rows = list(pack(items, packing))
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(items)))
    assert all(rows)
    for row in rows:
        assert (np.sum([items[e] for e in row], axis=0) <= packing.budgets).all()
    assert rows == list(pack(iter(items), packing))


def test_rows_come_while_examples_go_on():
    endless = ((5 + i % 7, 0, 1) for i in itertools.count())
    rows = list(itertools.islice(pack(endless, Packing(row_tokens=32, window=16)), 50))
    seen = list(itertools.chain.from_iterable(rows))
    assert len(set(seen)) == len(seen)
    assert max(seen) < len(seen) + 16  # no more than a window is held back


@pytest.mark.parametrize("seed", range(3))
def test_realistic_sizes_fill_97_percent(seed):
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(3.6, 0.6, 6000), 8, 256).astype(int)
    items = [(t, 0, t // 2) for t in tokens]
    packing = Packing(row_tokens=256)
    rows = list(itertools.islice(pack(items, packing), 600))
    assert sum(tokens[e] for row in rows for e in row) / (256 * 600) >= 0.97


def test_docstring_example():
    assert list(pack([(5, 0, 5), (4, 0, 4), (3, 0, 3)], Packing(row_tokens=8, window=3))) == [[0, 2], [1]]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(
        ValueError, match="example 1 has 9 tokens, 4 patches and 2 learnt tokens; a row holds 8, 4 and 8"
    ):
        list(pack([(1, 0, 1), (9, 4, 2)], Packing(row_tokens=8, row_patches=4)))
    with pytest.raises(ValueError, match="example 0 has 2 tokens, 4 patches"):
        list(pack([(2, 4, 1)], Packing(row_tokens=8)))
    with pytest.raises(ValueError, match="row_tokens = 0: expected 1 or more"):
        Packing(row_tokens=0)
    with pytest.raises(ValueError, match="expected 0 \\(no such budget\\) or more"):
        Packing(row_patches=-1)


def plain_best_fit(items, budgets):
    """Best-fit decreasing as its definition says, over all rows each time."""
    sizes, scale = np.array(items), np.maximum(budgets, 1)
    rooms, rows = [], []
    for i in np.argsort(-(sizes / scale).max(axis=1), kind="stable"):
        fitting = [(float((room / scale).sum()), r) for r, room in enumerate(rooms) if (room >= sizes[i]).all()]
        if not fitting:
            rooms.append(np.array(budgets))
            rows.append([])
        row = min(fitting)[1] if fitting else len(rows) - 1
        rooms[row] = rooms[row] - sizes[i]
        rows[row].append(int(i))
    return sorted(sorted(row) for row in rows)


@settings(max_examples=150, deadline=None)
@given(sizes.filter(bool), st.sampled_from([0, 9, 12]))
def test_the_quick_search_finds_the_row_that_the_plain_one_does(items, row_targets):
    packing = Packing(row_tokens=16, row_patches=16, row_targets=row_targets, window=100)
    assert list(pack(items, packing)) == plain_best_fit(items, packing.budgets)


def test_batches_of_one_kind_by_hand():
    rows = [([0], 4), ([1], 0), ([2], 0), ([3], 8), ([4], 0)]
    assert list(batched(rows, 2)) == [([[1], [2]], True), ([[0], [3]], False), ([[4]], True)]
    assert list(batched(rows[:4], 3)) == [([[0], [3], [1]], False), ([[2]], True)]
    # One row without pictures among many with: in time it is laid in a batch of theirs.
    late = list(batched([([0], 0), *(([i], 4) for i in range(1, 2 * PATIENCE + 4))], 2))
    assert late[PATIENCE] == ([[0], [2 * PATIENCE + 1]], False) and all(not plain for _, plain in late)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), max_size=400), st.integers(1, 5))
def test_no_row_waits_for_ever_and_none_is_lost(kinds, size):
    made = list(batched((([i], int(pictured)) for i, pictured in enumerate(kinds)), size))
    assert sorted(i for rows, _ in made for (i,) in rows) == list(range(len(kinds)))
    assert all(len(rows) == size for rows, _ in made[:-1])
    for number, (rows, plain) in enumerate(made):
        assert plain == (not any(kinds[i] for (i,) in rows))
        assert number * size <= min(i for (i,) in rows) + (PATIENCE + 2) * size


def test_with_text_batches_pictures_take_few_rows():
    items = [(6, 4, 3), (10, 0, 2), (6, 4, 3), (10, 0, 2)]
    patches_of = lambda together: [p for _, p in packed(items, Packing(16, 16, text_batches=together))]
    assert patches_of(False) == [4, 4] and patches_of(True) == [8, 0, 0]


def test_no_example_waits_for_ever():
    # Two of 16 fill a row, and one of 9 fills none: its row is the emptiest of every window.
    endless = itertools.chain([(9, 0, 9)], itertools.repeat((16, 0, 16)))
    rows = list(itertools.islice(pack(endless, Packing(row_tokens=32, window=16)), 100))
    assert any(0 in row for row in rows) and sum(len(row) == 2 for row in rows) == 100
