"""Pictures to tiles and the order of their features, worked by hand; tests/parity compares with transformers."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ain_jax.data.tiles import (
    TileSettings,
    feature_index,
    placeholder_tokens,
    preprocess_tiles,
    preprocessor_config,
    select_resolution,
    tile_grid,
    tile_settings,
)

# Values are the bytes themselves: mean 0, deviation 1, rescaled by 1.
BYTES = TileSettings(
    tile=28, patch_size=14, pinpoints=((28, 56),), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), rescale=1.0
)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(1, 256, (height, width, 3), dtype=np.uint8))


def test_the_resolution_keeps_most_pixels_and_then_wastes_fewest():
    pinpoints = ((336, 672), (672, 336), (672, 672))
    assert select_resolution(400, 500, pinpoints) == (672, 672)
    assert select_resolution(200, 400, pinpoints) == (336, 672)
    assert select_resolution(200, 200, pinpoints) == (336, 672)  # as good as 672 x 336, and named first
    assert select_resolution(1, 5000, pinpoints) == (336, 672)  # nothing is kept of it; the smallest wastes fewest
    with pytest.raises(ValueError, match="a picture of 3 x 0 pixels"):
        select_resolution(0, 3, pinpoints)


def test_the_base_comes_first_then_the_tiles_row_by_row():
    """A picture of just the size of two tiles is cut without being scaled; the first four patches are the base."""
    image = picture(56, 28)
    pixels = np.asarray(image)
    patches_PK, counts = preprocess_tiles(image, BYTES)
    assert patches_PK.shape == (12, 3 * 14 * 14) and patches_PK.dtype == np.float32 and counts == (4, 4, 4)
    base = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC))
    corners = [(base, 0, 0), (base, 0, 14), (base, 14, 0), (base, 14, 14)]
    corners += [(pixels, row, start + column) for start in (0, 28) for row in (0, 14) for column in (0, 14)]
    for patch_K, (source, row, column) in zip(patches_PK, corners, strict=True):
        expected = source[row : row + 14, column : column + 14].transpose(2, 0, 1)
        assert np.array_equal(patch_K.reshape(3, 14, 14), expected)


def test_the_odd_pixel_of_padding_lies_behind_the_picture():
    patches_PK, _ = preprocess_tiles(picture(29, 28), BYTES)  # 27 of 56 columns are padding: 13 before, 14 behind
    tiles = patches_PK[4:].reshape(2, 2, 2, 3, 14, 14).transpose(3, 1, 4, 0, 2, 5).reshape(3, 28, 56)
    assert np.flatnonzero(tiles.any(axis=(0, 1))).tolist() == list(range(13, 42))


def test_rows_are_read_across_tiles_and_closed_by_a_newline():
    n = 12
    assert feature_index(30, 60, BYTES).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, n, 6, 7, 10, 11, n]
    # A square picture fills the middle two of four columns; the others were padding.
    assert feature_index(30, 30, BYTES).tolist() == [0, 1, 2, 3, 5, 8, n, 7, 10, n]
    # A tall one fills none of them after rounding, and its newlines stay; of a flat one no row is left.
    assert feature_index(500, 1, BYTES).tolist() == [0, 1, 2, 3, n, n]
    assert feature_index(1, 500, BYTES).tolist() == [0, 1, 2, 3]


def test_a_model_without_pinpoints_sees_the_base_and_one_newline():
    alone = dataclasses.replace(BYTES, pinpoints=())
    assert tile_grid(30, 60, alone) == (0, 0)
    assert preprocess_tiles(picture(60, 30), alone)[1] == (4,)
    assert feature_index(30, 60, alone).tolist() == [0, 1, 2, 3, 4]
    assert placeholder_tokens(60, 30, alone) == 5


def test_published_sizes_take_as_many_tokens_as_worked_out_by_hand():
    published = TileSettings()
    assert placeholder_tokens(336, 336, published) == 576 + 24 * (24 + 1)
    assert placeholder_tokens(672, 672, published) == 576 + 48 * (48 + 1)
    assert placeholder_tokens(640, 480, published) == 576 + 36 * (48 + 1)
    assert placeholder_tokens(1, 5000, published) == 576 + 24  # no column is left, but each row's newline


SIZES = st.integers(1, 100) | st.integers(1, 5000) | st.sampled_from([28, 56, 336, 672, 1008, 100_000])


@given(height=SIZES, width=SIZES)
@settings(max_examples=300, deadline=None)
def test_each_feature_stands_at_one_place_at_most(height, width):
    odd = TileSettings(tile=42, pinpoints=((42, 84), (84, 42), (84, 84), (126, 42), (42, 126)))
    for each in (TileSettings(), odd):
        index = feature_index(height, width, each)
        rows, columns = tile_grid(height, width, each)
        own = index[index < (1 + rows * columns) * each.side**2]
        assert len(index) == placeholder_tokens(width, height, each)
        assert index.dtype == np.int32 and len(np.unique(own)) == len(own)
        assert own[: each.side**2].tolist() == list(range(each.side**2))  # the base is always whole
        assert index.max() <= (1 + rows * columns) * each.side**2


def test_settings_are_written_and_read_again():
    for each in (TileSettings(), dataclasses.replace(BYTES, resample=int(Image.Resampling.BILINEAR))):
        assert tile_settings(preprocessor_config(each), each.patch_size) == each
    with pytest.raises(ValueError, match="needs one or more"):
        preprocessor_config(dataclasses.replace(BYTES, pinpoints=()))


def test_both_spellings_of_a_size_are_read_and_defaults_are_transformers():
    for size in (
        {"shortest_edge": 336},
        {"height": 336, "width": 336},
        {"shortest_edge": 336, "longest_edge": None},
        336,
    ):
        for crop_size in ({"height": 336, "width": 336}, 336):
            assert tile_settings({"size": size, "crop_size": crop_size}) == TileSettings()
    named = {"image_mean": 0.5, "image_std": [0.1, 0.2, 0.3], "do_resize": False, "do_pad": None, "device": "cpu"}
    small = {"image_grid_pinpoints": [[224, 448]], **named}
    assert tile_settings(small) == TileSettings(224, 14, ((224, 448),), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="pinpoint 336 x 672 is not made of whole tiles of 224 pixels"):
        tile_settings({})


def test_whatever_would_change_pixels_is_refused_by_name_all_at_once():
    asked = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": False, "sharpen": 2, "size": 336}
    with pytest.raises(ValueError) as error:
        tile_settings({**asked, "aspect_ratio_setting": "square", "data_format": "channels_last"})
    for words in (
        "do_rescale=False (expected True)",
        "do_normalize=False",
        "do_convert_rgb=False",
        "sharpen=2 (unknown)",
        "size=336 and crop_size=None (expected one square)",
        "aspect_ratio_setting='square' (expected 'anyres')",
        "data_format='channels_last' (expected 'channels_first')",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"size=\{'height': 336, 'width': 224\}"):
        tile_settings({"size": {"height": 336, "width": 224}, "crop_size": 336})
    with pytest.raises(ValueError, match="image_processor_type='CLIPImageProcessor'"):
        tile_settings({"image_processor_type": "CLIPImageProcessor"})


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError) as error:
        TileSettings(tile=30, pinpoints=((30, 45),), mean=(0.5,), resample=9)
    for words in ("tile=30 is no multiple of patch_size=14", "pinpoint 30 x 45", "mean=(0.5,)", "resample=9 is none"):
        assert words in str(error.value)
