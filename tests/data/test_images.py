"""Pictures to patches; transformers' processor is the measure in tests/parity/test_image_processor.py."""

import io

import numpy as np
import pytest
from PIL import Image

from ain_jax.data.images import (
    ImageSettings,
    image_settings,
    open_image,
    placeholder_tokens,
    preprocess,
    preprocess_frames,
    preprocessor_config,
    share_pixels,
    smart_resize,
    to_rgb,
    video_grid,
)

SMALL = ImageSettings(patch_size=4, min_pixels=64, max_pixels=1024)


def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def test_sides_are_rounded_and_the_area_is_kept_in_bounds():
    default = ImageSettings()
    assert smart_resize(100, 300, default) == (112, 308)
    assert smart_resize(3000, 4000, default) == (840, 1148)  # at most 1,003,520 pixels
    assert smart_resize(10, 20, default) == (56, 84)  # at least 3,136
    with pytest.raises(ValueError, match="1 x 201 pixels; one side may be at most 200 times the other"):
        smart_resize(201, 1, default)


def test_placeholders_are_counted_without_decoding_and_equal_the_features():
    for width, height in [(9, 40), (64, 64), (17, 33), (200, 3)]:
        patches, grid = preprocess(picture(width, height), SMALL)
        assert patches.shape == (grid[1] * grid[2], SMALL.patch_values)
        assert placeholder_tokens(width, height, SMALL) == len(patches) // 4
    encoded = io.BytesIO()
    picture(17, 33).save(encoded, "PNG")
    head = open_image(encoded.getvalue()[:60])  # the head alone tells the size
    assert head.size == (17, 33)


def test_a_patch_holds_colour_frame_row_column():
    pixels = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    settings = ImageSettings(patch_size=4, min_pixels=64, max_pixels=1024, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    patches_PK, grid = preprocess(Image.fromarray(pixels), settings)
    assert grid == (1, 2, 4)
    patches = np.rint(patches_PK.reshape(8, 3, 2, 4, 4) * 255).astype(np.uint8)
    # patch 5 is the second of the second merge block: row 0, column 3
    expected = pixels[0:4, 12:16].transpose(2, 0, 1)
    assert np.array_equal(patches[5, :, 0], expected) and np.array_equal(patches[5, :, 1], expected)


def test_a_still_video_is_a_picture_repeated_and_the_last_frame_fills_up():
    first, second, third = (picture(17, 33, seed=seed) for seed in range(3))
    patches_PK, grid = preprocess_frames([first, first, second, third, third], SMALL)
    count = grid[1] * grid[2]
    assert grid == video_grid(5, 17, 33, SMALL) == (3, *preprocess(first, SMALL)[1][1:])
    frames = patches_PK.reshape(3, count, 3, 2, 4, 4)
    for group, pair in enumerate([(first, first), (second, third), (third, third)]):
        for at, frame in enumerate(pair):
            alone = preprocess(frame, SMALL)[0].reshape(count, 3, 2, 4, 4)
            assert np.array_equal(frames[group, :, :, at], alone[:, :, 0])


def test_a_frame_of_a_long_video_is_made_smaller():
    video = ImageSettings(min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)
    shared = {frames: share_pixels(video, frames) for frames in (1, 100, 800, 9000)}
    assert [settings.max_pixels for settings in shared.values()] == [602_112, 602_112, 225_792, 105_369]
    # Nine tenths of 128,000 tokens, two frames to a token.
    assert placeholder_tokens(1000, 1000, shared[800]) * 800 // 2 <= 115_200


def test_videos_without_frames_or_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match="a video without frames"):
        preprocess_frames([], SMALL)
    with pytest.raises(ValueError, match="frame 2 of a video has 17 x 34 pixels and frame 0 has 17 x 33"):
        preprocess_frames([picture(17, 33), picture(17, 33), picture(17, 34)], SMALL)


def test_transparent_parts_lie_on_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert list(np.asarray(to_rgb(clear)).reshape(-1, 3).tolist()) == [[255, 255, 255], [255, 0, 0]]


def test_settings_are_written_and_read_again():
    written = preprocessor_config(SMALL)
    assert image_settings(written) == SMALL
    assert (written["min_pixels"], written["max_pixels"]) == (64, 1024)  # the only ones that transformers 4.51 reads
    assert image_settings({"size": {"shortest_edge": 3136, "longest_edge": 50176}}).max_pixels == 50176
    with pytest.raises(ValueError, match="image_processor_type='CLIPImageProcessor'"):
        image_settings({"image_processor_type": "CLIPImageProcessor"})


def test_whatever_would_change_pixels_is_refused_by_name_all_at_once():
    told = preprocessor_config(SMALL) | {"do_center_crop": None, "device": "cpu", "data_format": "channels_first"}
    assert image_settings(told) == SMALL
    with pytest.raises(ValueError) as error:
        image_settings(told | {"do_resize": False, "resample": 2, "rescale_factor": 1.0, "sharpen": 2})
    for words in (
        "do_resize=False (expected True)",
        "resample=2 (expected 3)",
        "rescale_factor=1.0",
        "sharpen=2 (unknown)",
    ):
        assert words in str(error.value)


def test_broken_pictures_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"11 bytes beginning with b'no pictu' are no picture"):
        preprocess(b"no picture!", SMALL)
    encoded = io.BytesIO()
    picture(64, 64).save(encoded, "PNG")
    with pytest.raises(ValueError, match="a broken picture of 64 x 64 pixels"):
        preprocess(encoded.getvalue()[:2000], SMALL)
    with pytest.raises(ValueError, match="min_pixels=100 and max_pixels=10"):
        ImageSettings(min_pixels=100, max_pixels=10)
