"""Vocabulary rows for new pieces, made from the old pieces that they replace."""

from collections.abc import Sequence

import numpy as np


def extend_rows(table_VD: np.ndarray, replaced_ids: Sequence[Sequence[int]], padded: int, seed: int = 0) -> np.ndarray:
    """The table with one row more for each new id and, behind them, padding up to `padded` rows; old rows stay.

    A new piece's row is the mean of the rows of the old pieces that spelt it. An id that replaces nothing (a special
    token: an empty list) gets the mean of all old rows and a little noise, so that two of them can be told apart.
    Padding rows hold the mean: they are no id's, and score like an average word. Use it for the embedding and, if it is
    not tied, for the head.

    extend_rows([[0, 2], [4, 0]], [[0, 1], []], 5): row 2 is [2, 1], row 3 near [2, 1], row 4 is [2, 1]
    """
    table_VD = np.asarray(table_VD)
    V, D = table_VD.shape
    known = V + len(replaced_ids)
    outside = [(V + i, bad) for i, ids in enumerate(replaced_ids) for bad in ids if not 0 <= bad < V]
    if outside:
        raise ValueError(
            f"new row {outside[0][0]} replaces id {outside[0][1]}; expected ids of the old table, 0 to {V - 1}"
        )
    if padded < known:
        raise ValueError(
            f"padded={padded} rows cannot hold {V} old and {len(replaced_ids)} new ones; expected {known} or more"
        )
    old = table_VD.astype(np.float32)
    mean_D, spread_D = old.mean(axis=0), old.std(axis=0)
    noise = np.random.default_rng(seed)
    extended = np.empty((padded, D), table_VD.dtype)
    extended[:V] = table_VD
    extended[V:] = mean_D.astype(table_VD.dtype)
    for i, ids in enumerate(replaced_ids):
        row = (
            old[list(ids)].mean(axis=0)
            if ids
            else mean_D + 0.1 * spread_D * noise.standard_normal(D).astype(np.float32)
        )
        extended[V + i] = row.astype(table_VD.dtype)
    return extended
