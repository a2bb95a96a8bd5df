"""A language model gains an image encoder: on text nothing changes, in transformers too, and pictures are felt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ain_jax.data.images import ImageSettings
from ain_jax.generate import Prompt, prompt_with_images, rows_of
from ain_jax.models.config import VisionConfig
from ain_jax.models.multimodal import MultimodalModel, abstract_params
from ain_jax.tokenizer.chat import load_tokenizer
from ain_jax.twins.models import write_models
from ain_jax.weights.load import load_folder
from ain_jax.weights.see import see

SIZES = VisionConfig(32, 2, 2, 64)
IMAGES = ImageSettings(min_pixels=784, max_pixels=50176)
NAMES = ("llama_3", "qwen2")
TOKENS = [5, 9, 300, 41, 7, 7, 250, 19]


@pytest.fixture(scope="module", params=NAMES)
def folders(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    plain = write_models(out, [f"{request.param}_twin"])[0]
    return plain, see(plain, out / "seeing", SIZES, IMAGES)


def logits(folder, prompt):
    params, config = load_folder(folder, jnp.float32)
    patches = 0 if prompt.patches_PK is None else len(prompt.patches_PK)
    arrays = rows_of([prompt], config, 1, len(prompt.tokens_L), patches)
    for name in ("length_B", "next_position_B"):
        arrays.pop(name)
    model = MultimodalModel(config)
    hidden_BLD = model.apply({"params": params}, **arrays)
    return np.asarray(model.apply({"params": params}, hidden_BLD, method="logits"))[0]


def test_text_gets_the_logits_that_it_got(folders):
    before, after = (logits(folder, Prompt(TOKENS)) for folder in folders)
    ids = len(load_tokenizer(folders[0]))  # behind them lie spare rows, which new tokens take
    np.testing.assert_allclose(after[:, :ids], before[:, :ids], rtol=0, atol=1e-5)


def test_transformers_opens_it_as_a_qwen2_vl_and_reads_text_as_before(folders):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    plain, seeing = folders
    tokens_BL = torch.tensor([TOKENS])
    with torch.no_grad():
        before = transformers.AutoModelForCausalLM.from_pretrained(plain)(tokens_BL).logits.numpy()
        model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(seeing)
        after = model(input_ids=tokens_BL).logits.numpy()
    ids = len(load_tokenizer(plain))  # behind them lie spare rows, which new tokens take
    np.testing.assert_allclose(after[..., :ids], before[..., :ids], rtol=0, atol=1e-5)


def test_it_has_the_encoder_asked_for_and_looks_at_pictures(folders):
    params, config = load_folder(folders[1], jnp.float32)
    assert config.family == "qwen2_vl" and config.vision == SIZES and config.image_token_id is not None
    same = jax.tree.map(lambda leaf, shape: leaf.shape == shape.shape, params, abstract_params(config))
    assert all(jax.tree.leaves(same))
    start, pad, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    tokens = [7, start, *[pad] * 4, end, 9]
    noise = np.random.default_rng(0).integers(0, 255, (2, 56, 56, 3), np.uint8)
    one, other = (
        dataclasses.replace(prompt_with_images([], [Image.fromarray(picture_HW3)], IMAGES), tokens_L=np.array(tokens))
        for picture_HW3 in noise
    )
    one_LV, other_LV = logits(folders[1], one), logits(folders[1], other)
    assert (one_LV[:2] == other_LV[:2]).all() and (abs(one_LV[-1] - other_LV[-1]) > 1e-6).any()


def test_an_existing_folder_and_other_families_are_refused(folders, tmp_path):
    plain, seeing = folders
    with pytest.raises(ValueError, match="already exists"):
        see(plain, seeing, SIZES, IMAGES)
    gemma = write_models(tmp_path, ["gemma_twin"])[0]
    with pytest.raises(ValueError, match="a gemma; expected one of llama, qwen2"):
        see(gemma, tmp_path / "other", SIZES, IMAGES)
    assert not (tmp_path / "other").exists()
