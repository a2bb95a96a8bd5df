"""Shapes and dtypes are written out in the models: no rank and no dtype may be promoted unseen."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
