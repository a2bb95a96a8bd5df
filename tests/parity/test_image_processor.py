"""Our preprocessing against transformers' image processors (resizing with Pillow): equal bit for bit.

So are our counts of placeholder tokens and, for LLaVA-NeXT, the order of its features against the model itself.
"""

import dataclasses
import inspect
import io
import json
import math
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ain_jax.data import images, tiles

transformers = pytest.importorskip("transformers")
OLD = transformers.__version__.startswith("4.")
PILLOW = {"use_fast": False} if OLD else {"backend": "pil"}

QWEN = {
    "published": images.ImageSettings(),
    "small": images.ImageSettings(
        patch_size=8, min_pixels=256, max_pixels=4096, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    ),
}
TILES = {
    "published": tiles.TileSettings(),
    "odd sides": tiles.TileSettings(
        tile=42,
        pinpoints=((42, 84), (84, 42), (84, 84), (126, 42), (42, 126), (126, 126)),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        resample=int(Image.Resampling.BILINEAR),
        rescale=1 / 127.5,
    ),
}
SHAPES = {
    "plain": (37, 91),
    "already of size": (56, 56),
    "one tile": (336, 336),
    "a whole grid of tiles": (672, 672),
    "a photograph": (640, 427),
    "huge": (5000, 3000),
    "one pixel": (1, 1),
    "two by three": (2, 3),
    "tiny": (5, 3),
    "very wide": (600, 4),
    "as wide as allowed": (800, 4),
    "very tall": (3, 310),
    "a line": (200, 1),
}
MODES = ("L", "LA", "P", "1", "RGBA", "CMYK", "YCbCr", "I;16")
UNREADABLE_BEFORE_5 = (1, 3)  # rows: transformers 4.51 takes an array of 1 or 3 rows to have its colours first


def photograph(width, height, seed=0):
    """Slow changes of colour with grain on them, in four bands, so that both filters and rounding are felt."""
    rng = np.random.default_rng([width, height, seed])
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    turns, phases = rng.uniform(-9, 9, (2, 4)), rng.uniform(0, 6, 4)
    slow = 128 + 110 * np.sin(turns[0] * rows + turns[1] * columns + phases)
    return Image.fromarray((slow + rng.normal(0, 12, slow.shape)).clip(0, 255).astype(np.uint8), "RGBA")


def pictures():
    """Each with its name: many shapes, every mode that a file may have, transparency of each kind, a turned JPEG."""
    result = {name: photograph(*shape).convert("RGB") for name, shape in SHAPES.items()}
    for mode in MODES[:-1]:
        result[f"mode {mode}"] = photograph(150, 133).convert(mode)
    grey = np.asarray(photograph(150, 133).convert("L"))
    result["mode I;16, dark"] = Image.fromarray(grey.astype(np.uint16))
    result["mode I;16, clipped"] = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = photograph(150, 133).convert("RGB").quantize(32)
    result["palette, one colour transparent"] = encoded(palette, "PNG", transparency=3)
    result["palette, shades of transparency"] = encoded(palette, "PNG", transparency=bytes(range(0, 256, 8)))
    few = Image.fromarray(np.asarray(photograph(150, 133).convert("RGB")) // 64 * 64)
    result["one colour transparent"] = encoded(few, "PNG", transparency=few.getpixel((75, 60)))
    for orientation in (3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        result[f"JPEG to be turned, {orientation}"] = encoded(
            photograph(190, 95).convert("RGB"), "JPEG", exif=exif.tobytes()
        )
    return result


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


PICTURES = pictures()


def theirs_and_ours(name):
    """The picture as it is handed to the processor, and to us: encoded, if it is."""
    picture = PICTURES[name]
    opened = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    if OLD and ("A" in opened.getbands() or "transparency" in opened.info):
        pytest.skip("transformers 4.51 drops the transparency, version 5 and we lay the picture on white")
    if OLD and opened.height in UNREADABLE_BEFORE_5:
        pytest.skip(f"transformers 4.51 misreads a picture of {opened.height} rows")
    return opened, picture


def open_processor(config, folder):
    """transformers' processor that resizes with Pillow."""
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    found = transformers.AutoImageProcessor.from_pretrained(folder, **PILLOW)
    if type(found).__name__.endswith("Fast") or not (OLD or type(found).__name__.endswith("Pil")):
        pytest.skip(f"{type(found).__name__} does not resize with Pillow")
    return found


@pytest.fixture(scope="module", params=QWEN)
def qwen(request, tmp_path_factory):
    ours = QWEN[request.param]
    return open_processor(images.preprocessor_config(ours), tmp_path_factory.mktemp("qwen")), ours


@pytest.fixture(scope="module", params=TILES)
def llava(request, tmp_path_factory):
    ours = TILES[request.param]
    return open_processor(tiles.preprocessor_config(ours), tmp_path_factory.mktemp("llava")), ours


def skip_what_old_ones_refuse(width, height, ours):
    if OLD and min(width, height) < ours.factor:
        pytest.skip(f"transformers 4.51 refuses a picture with a side of less than {ours.factor} pixels")


@pytest.mark.parametrize("name", PICTURES)
def test_patches_equal_qwen2_vls(qwen, name):
    theirs, ours = qwen
    opened, picture = theirs_and_ours(name)
    skip_what_old_ones_refuse(*opened.size, ours)
    expected = theirs(opened, return_tensors="np")
    patches, grid = images.preprocess(picture, ours)
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    assert patches.dtype == np.float32 and np.array_equal(patches, expected["pixel_values"])
    assert images.placeholder_tokens(*opened.size, ours) == len(patches) // ours.merge_size**2


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (2001, 10)])
def test_both_refuse_a_picture_longer_than_200_times_its_width(qwen, size):
    theirs, ours = qwen
    picture = photograph(*size).convert("RGB")
    with pytest.raises(ValueError, match="one side may be at most 200 times the other"):
        images.preprocess(picture, ours)
    with pytest.raises(ValueError):
        theirs(picture, return_tensors="np")


def skip_what_old_ones_spoil(opened, resolution):
    scale = min(resolution[0] / opened.height, resolution[1] / opened.width)
    scaled = [
        min(math.ceil(round(side * scale, 9)), most) for side, most in zip(opened.size[::-1], resolution, strict=True)
    ]
    if scaled[0] in UNREADABLE_BEFORE_5:
        pytest.skip("transformers 4.51 misreads the picture once it is scaled to so few rows")
    if sum(resolution) % 2 != sum(scaled) % 2:
        pytest.skip("transformers 4.51 forgets the odd pixel of padding, and stretches the last tiles for it")


@pytest.mark.parametrize("name", PICTURES)
def test_tiles_equal_llava_nexts(llava, name):
    theirs, ours = llava
    opened, picture = theirs_and_ours(name)
    if OLD:
        skip_what_old_ones_spoil(opened, tiles.select_resolution(opened.height, opened.width, ours.pinpoints))
    expected = theirs(opened, return_tensors="np")
    assert tuple(expected["image_sizes"][0]) == opened.size[::-1]
    patches, counts = tiles.preprocess_tiles(picture, ours)
    side, p = ours.side, ours.patch_size
    squares = patches.reshape(-1, side, side, 3, p, p).transpose(0, 3, 1, 4, 2, 5)
    assert patches.dtype == np.float32 and counts == (side**2,) * len(squares)
    assert np.array_equal(squares.reshape(-1, 3, ours.tile, ours.tile), expected["pixel_values"][0])


def test_a_picture_is_turned_by_neither(qwen):
    """But by `load_image`, which reads a path before a processor sees it: records must hold turned pictures."""
    theirs, ours = qwen
    picture = PICTURES["JPEG to be turned, 6"]
    opened = Image.open(io.BytesIO(picture))
    grid = images.preprocess(picture, ours)[1]
    assert [*grid] == theirs(opened, return_tensors="np")["image_grid_thw"][0].tolist()
    assert grid != images.preprocess(ImageOps.exif_transpose(opened), ours)[1]


FRAMES = {
    "one": (1, 60, 90),
    "two": (2, 37, 91),
    "odd": (5, 200, 133),
    "even, large": (4, 640, 427),
    "a line": (3, 90, 2),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_equal_the_processors_frame_by_frame(qwen, name):
    """A processor for one frame at a time tells each frame's values; a patch holds those of two frames."""
    theirs, ours = qwen
    count, width, height = FRAMES[name]
    skip_what_old_ones_refuse(width, height, ours)
    frames = [photograph(width, height, seed).convert("RGB") for seed in range(count)]
    patches, grid = images.preprocess_frames(frames, ours)
    filled = [*frames, frames[-1]] if count % 2 else frames
    assert grid == images.video_grid(count, width, height, ours) == (len(filled) // 2, *grid[1:])
    single = [theirs(frame, temporal_patch_size=1, return_tensors="np")["pixel_values"] for frame in filled]
    # group, frame, patch, colour and pixels -> group, patch, colour, frame, pixels
    expected = np.stack(single).reshape(grid[0], 2, grid[1] * grid[2], 3, -1).transpose(0, 2, 3, 1, 4)
    assert patches.dtype == np.float32 and np.array_equal(patches, expected.reshape(patches.shape))


@pytest.mark.parametrize("name", FRAMES)
def test_frames_equal_the_processors_videos(qwen, name):
    theirs, ours = qwen
    if "videos" not in inspect.signature(theirs.preprocess).parameters:
        pytest.skip("this transformers prepares videos with torchvision alone")
    count, width, height = FRAMES[name]
    skip_what_old_ones_refuse(width, height, ours)
    frames = [photograph(width, height, seed).convert("RGB") for seed in range(count)]
    expected = theirs.preprocess(images=None, videos=[frames], return_tensors="np")
    patches, grid = images.preprocess_frames(frames, ours)
    assert grid == tuple(expected["video_grid_thw"][0].tolist())
    assert np.array_equal(patches, expected["pixel_values_videos"])


LENGTHS = st.integers(1, 60) | st.integers(1, 2000) | st.sampled_from([1, 2, 14, 335, 336, 337, 672, 1008, 20000])


def llava_processor(theirs, ours):
    """LlavaNextProcessor as far as it counts tokens; the whole of it needs a tokenizer."""
    processor = object.__new__(transformers.LlavaNextProcessor)
    processor.image_processor = types.SimpleNamespace(image_grid_pinpoints=theirs.image_grid_pinpoints)
    processor.patch_size, processor.num_additional_image_tokens = ours.patch_size, 1
    return processor


@given(height=LENGTHS, width=LENGTHS)
@settings(max_examples=400, deadline=None)
def test_placeholders_are_as_many_as_llava_nexts(llava, height, width):
    theirs, ours = llava
    counted = llava_processor(theirs, ours)._get_number_of_features(height, width, ours.tile, ours.tile)
    counted -= 1  # the class token, which the strategy "default" leaves out
    assert tiles.placeholder_tokens(width, height, ours) == counted
    assert len(tiles.feature_index(height, width, ours)) == counted


def test_placeholders_are_as_many_as_in_a_rendered_prompt(llava):
    from tokenizers import Tokenizer, models

    theirs, ours = llava
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<image>": 0, "?": 1}, "?")), unk_token="?"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = transformers.LlavaNextProcessor(
        theirs,
        tokenizer,
        patch_size=ours.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    for name in ("plain", "a photograph", "very wide", "very tall"):
        ids = processor(text="<image>?", images=PICTURES[name], return_tensors="np")["input_ids"][0]
        assert (ids == 0).sum() == tiles.placeholder_tokens(*PICTURES[name].size, ours)


@pytest.fixture(scope="module", params=TILES)
def tower(request):
    """A tiny LLaVA-NeXT of transformers, with the tiles of the settings."""
    pytest.importorskip("torch")
    ours = TILES[request.param]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=ours.tile,
            patch_size=ours.patch_size,
        ),
        text_config=transformers.Qwen2Config(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
        image_grid_pinpoints=[list(pinpoint) for pinpoint in ours.pinpoints],
        image_token_index=7,
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    return getattr(model, "model", model), ours


@given(height=LENGTHS, width=LENGTHS)
@settings(max_examples=200, deadline=None)
def test_features_stand_where_llava_next_packs_them(tower, height, width):
    """Numbered features and a newline with the number after theirs are packed into our index."""
    import torch

    model, ours = tower
    rows, columns = tiles.tile_grid(height, width, ours)
    count = (1 + rows * columns) * ours.side**2
    numbered = torch.arange(count, dtype=torch.float32).reshape(-1, ours.side**2, 1)
    packed, lengths = model.pack_image_features(
        [numbered], torch.tensor([[height, width]]), "default", image_newline=torch.tensor([float(count)])
    )
    packed = packed[0] if isinstance(packed, list) else packed
    index = tiles.feature_index(height, width, ours)
    assert index.dtype == np.int32 and lengths.tolist() == [len(index)]
    assert np.array_equal(packed[:, 0].numpy(), index)


def test_a_base_tile_alone_is_closed_by_one_newline(tower):
    import torch

    model, ours = tower
    alone = dataclasses.replace(ours, pinpoints=())
    count = ours.side**2
    numbered = torch.arange(count, dtype=torch.float32).reshape(1, count, 1)
    packed, _ = model.pack_image_features(
        [numbered], torch.tensor([[50, 60]]), "default", image_newline=torch.tensor([float(count)])
    )
    assert np.array_equal(np.asarray(packed).reshape(-1), tiles.feature_index(50, 60, alone))
    patches, counts = tiles.preprocess_tiles(photograph(60, 50), alone)
    assert counts == (count,) and len(patches) == count
    assert tiles.placeholder_tokens(60, 50, alone) == count + 1


def test_the_models_picture_features_are_ours_in_our_order(tower):
    """From pixels on: our patches through the tower, gathered by our index, are what the model puts into its rows."""
    import torch

    model, ours = tower
    for width, height in [(60, 50), (300, 20), (17, 400)]:
        patches, counts = tiles.preprocess_tiles(photograph(width, height), ours)
        side, p = ours.side, ours.patch_size
        pixels = patches.reshape(len(counts), side, side, 3, p, p).transpose(0, 3, 1, 4, 2, 5)
        pixels = torch.tensor(pixels.reshape(len(counts), 3, ours.tile, ours.tile))
        sizes = torch.tensor([[height, width]])
        with torch.no_grad():
            hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            features = model.multi_modal_projector(hidden).reshape(sum(counts), -1)
            expected = model.get_image_features(
                pixels[None], sizes, vision_feature_layer=-2, vision_feature_select_strategy="default"
            )
            if OLD:
                expected, _ = model.pack_image_features(expected, sizes, "default", model.image_newline)
            else:
                expected = expected.pooler_output[0]
            with_newline = torch.cat([features, model.image_newline[None]])
        index = torch.tensor(tiles.feature_index(height, width, ours))
        assert torch.equal(with_newline[index], expected)
