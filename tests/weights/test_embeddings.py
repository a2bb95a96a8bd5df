import numpy as np
import pytest

from ain_jax.weights.embeddings import extend_rows

OLD = np.array([[0, 2], [4, 0], [2, 4]], np.float32)


def test_a_new_row_is_the_mean_of_the_rows_it_replaces():
    new = extend_rows(OLD, [[0, 1], [2], [1, 1, 2]], 8)
    assert new.shape == (8, 2) and new.dtype == np.float32
    assert np.array_equal(new[:3], OLD)
    np.testing.assert_allclose(new[3:6], [[2, 1], [2, 4], [10 / 3, 4 / 3]], rtol=1e-6)
    np.testing.assert_allclose(new[6:], [[2, 2]] * 2)


def test_special_rows_lie_near_the_mean_and_differ():
    new = extend_rows(OLD, [[], []], 5)
    assert np.abs(new[3:] - 2).max() < 1 and not np.array_equal(new[3], new[4])
    assert np.array_equal(new, extend_rows(OLD, [[], []], 5))


def test_ids_outside_the_old_table_and_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="new row 4 replaces id 3; expected ids of the old table, 0 to 2"):
        extend_rows(OLD, [[0], [3]], 8)
    with pytest.raises(ValueError, match="padded=4 rows cannot hold 3 old and 2 new ones; expected 5 or more"):
        extend_rows(OLD, [[0], [1]], 4)
