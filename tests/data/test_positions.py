import numpy as np
import pytest

from ain_jax.data.positions import feature_count, mrope_positions, patch_positions

IMAGE = 9


def test_text_counts_on_and_a_picture_stands_still_in_time():
    tokens = [1, 2, *[IMAGE] * 6, 3, 4]
    assert mrope_positions(tokens, [(1, 4, 6)], IMAGE).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_two_pictures_and_no_text_behind_them():
    tokens = [IMAGE, 1, IMAGE, IMAGE, IMAGE, IMAGE]
    assert mrope_positions(tokens, [(1, 2, 2), (2, 2, 4)], IMAGE).tolist() == [
        [0, 1, 2, 2, 3, 3],
        [0, 1, 2, 2, 2, 2],
        [0, 1, 2, 3, 2, 3],
    ]


def test_text_alone_has_three_equal_rows():
    assert mrope_positions([4, 5, 6], [], IMAGE).tolist() == [[0, 1, 2]] * 3
    assert mrope_positions([], [], IMAGE).shape == (3, 0)


@pytest.mark.parametrize(
    ("tokens", "grids", "found", "expected"),
    [
        ([1, IMAGE, 2], [], "[1]", "[]"),
        ([1, IMAGE, 2], [(1, 4, 4)], "[1]", "[4]"),
        ([IMAGE, IMAGE], [(1, 2, 2), (1, 2, 2)], "[2]", "[1, 1]"),
        ([1, 2], [(1, 2, 2)], "[]", "[1]"),
    ],
)
def test_spans_that_are_not_those_of_the_pictures_are_refused(tokens, grids, found, expected):
    with pytest.raises(ValueError) as error:
        mrope_positions(tokens, grids, IMAGE)
    assert f"spans of {found} image tokens" in str(error.value) and f"take {expected}" in str(error.value)


def test_patches_come_merge_block_by_merge_block():
    assert patch_positions((1, 2, 4)).T.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 2, 3, 2, 3]]
    twice = patch_positions((2, 2, 4))
    assert twice.dtype == np.int32 and twice[:8].tolist() == twice[8:].tolist()


def test_features_are_counted_after_merging():
    assert feature_count((1, 4, 6)) == 6
    assert feature_count((2, 6, 6), merge_size=3) == 8
