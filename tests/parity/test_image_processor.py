"""Our preprocessing against transformers' image processor (its PIL backend): equal bit for bit."""

import json

import numpy as np
import pytest
from PIL import Image

from ain_jax.data.images import ImageSettings, placeholder_tokens, preprocess, preprocessor_config

PICTURES = {
    "plain": ("RGB", 37, 91),
    "already of size": ("RGB", 56, 56),
    "tiny": ("RGB", 5, 3),
    "huge": ("RGB", 1999, 1200),
    "very wide": ("RGB", 600, 4),
    "very tall": ("L", 3, 310),
    "grey": ("L", 300, 20),
    "grey and transparent": ("LA", 50, 33),
    "palette": ("P", 64, 64),
    "black and white": ("1", 40, 80),
    "transparent": ("RGBA", 150, 133),
    "four inks": ("CMYK", 30, 40),
}
SETTINGS = {
    "published": ImageSettings(),
    "small": ImageSettings(patch_size=8, min_pixels=256, max_pixels=4096, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
}


@pytest.fixture(scope="module", params=SETTINGS)
def processor(request, tmp_path_factory):
    from transformers import AutoImageProcessor

    settings = SETTINGS[request.param]
    folder = tmp_path_factory.mktemp("processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(settings)))
    found = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if not type(found).__name__.endswith("Pil"):
        pytest.skip(f"{type(found).__name__} does not resize with Pillow")
    return found, settings


@pytest.mark.parametrize("name", PICTURES)
def test_patches_equal_the_processors(processor, name):
    theirs, settings = processor
    mode, width, height = PICTURES[name]
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels, "RGBA").convert(mode)
    expected = theirs(picture, return_tensors="np")
    patches, grid = preprocess(picture, settings)
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    assert patches.dtype == np.float32 and np.array_equal(patches, expected["pixel_values"])
    assert placeholder_tokens(width, height, settings) == len(patches) // settings.merge_size**2
