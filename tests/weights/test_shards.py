"""Tensors read slice by slice: the right numbers, and no byte beside them."""

import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ain_jax.weights import shards
from ain_jax.weights.load import read_slice
from ain_jax.weights.shards import header
from ain_jax.weights.table import rearrange

TENSORS = {
    "scalar": np.array(3, np.float32),
    "row": np.arange(7, dtype=np.float32),
    "matrix": np.arange(48, dtype=np.float32).reshape(6, 8).astype(ml_dtypes.bfloat16),
    "cube": np.arange(60, dtype=np.float16).reshape(3, 4, 5),
    "none": np.zeros((0, 4), np.float32),
}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return {tensor.name: tensor for tensor in header(path)}


def test_a_buffer_that_is_mapped_holds_the_same(tensors, monkeypatch):
    monkeypatch.setattr(shards, "MAPPED_BYTES", 1)
    for name, tensor in tensors.items():
        if tensor.count:
            assert np.array_equal(tensor.read(), TENSORS[name]) and tensor.read().dtype == TENSORS[name].dtype


def test_the_header_says_what_each_tensor_is(tensors):
    assert tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape, tensors[name].count) == (array.dtype, array.shape, array.size)
        np.testing.assert_array_equal(tensors[name].read(), array)


@given(st.data())
def test_any_slices_are_those_of_the_whole(tensors, data):
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    array = TENSORS[name]
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in array.shape]
    index = tuple(slice(*pair) for pair in bounds)[: data.draw(st.integers(0, array.ndim))]
    read = tensors[name].read(index)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array[index])


def test_no_byte_is_read_that_is_not_wanted(tensors, monkeypatch):
    sizes, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: sizes.append(real(*given)) or sizes[-1])
    tensors["matrix"].read((slice(1, 3), slice(2, 4)))
    assert sizes == [4, 4]  # two numbers of two bytes in each of two rows
    sizes.clear()
    tensors["cube"].read((slice(1, 3),))
    assert sizes == [2 * 4 * 5 * 2]  # one run


def test_a_read_that_comes_in_parts_goes_on(tensors, monkeypatch):
    real = os.preadv  # as of a tensor beyond 2 GiB
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:5]], offset))
    np.testing.assert_array_equal(tensors["matrix"].read((slice(2, 5),)), TENSORS["matrix"][2:5])


def test_blocks_are_the_tensor_in_order(tensors, monkeypatch):
    monkeypatch.setattr("ain_jax.weights.shards.BUFFER_BYTES", 40)  # two rows of sixteen bytes
    blocks = list(tensors["matrix"].blocks())
    assert [len(block) for block in blocks] == [2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), TENSORS["matrix"])


@given(st.data())
def test_a_slice_of_ours_is_cut_from_what_was_read(tensors, data):
    # rows (N H) of 2 x 3, cut over N, over H or over D, as a mesh may
    letters, layout = {"N": 2, "H": 3, "D": 8}, "(N H) D -> D N H"
    whole = rearrange(TENSORS["matrix"], layout, letters)
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in whole.shape]
    index = tuple(slice(*pair) for pair in bounds)
    np.testing.assert_array_equal(read_slice(tensors["matrix"], layout, letters, index), whole[index])


def test_only_the_rows_of_the_heads_wanted_are_read(tensors, monkeypatch):
    sizes, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: sizes.append(real(*given)) or sizes[-1])
    everything = slice(None)
    read_slice(tensors["matrix"], "(N H) D -> D N H", {"N": 2, "H": 3, "D": 8}, (everything, slice(1, 2), everything))
    assert sizes == [3 * 8 * 2]
