"""Our LLaVA-NeXT against transformers': the same weights and pictures, the same numbers, in float32."""

import dataclasses
import json
from functools import lru_cache

import jax
import numpy as np
import pytest
from families import IMAGE, LLAVAS, picture_settings
from PIL import Image
from safetensors.numpy import load_file, save_file

from ain_jax.generate import Prompt, generate, prompt_with_images, rows_of
from ain_jax.models.config import ModelConfig
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.weights.export import write_json, write_weights
from ain_jax.weights.load import load_folder

torch = pytest.importorskip("torch")
LOGITS, MODULE = 1e-4, 1e-5


@pytest.fixture(scope="module", params=LLAVAS)
def case(request, build_once):
    return build_once(LLAVAS[request.param])


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


# What stands in a conversation: ids, and pictures by width and height.
TALKS = {
    "one wide picture": [1, 2, (40, 13), 3, 4],
    "two uneven pictures": [(16, 30), 5, 6, (20, 20), 7],
    "a flat picture, of which no row is left": [(160, 2), 5, 6, (20, 20), 7],
    "no picture": [8, 9, 10, 11, 12],
}


def prompt(config: ModelConfig, talk: list) -> Prompt:
    pictures = [picture(*part) for part in talk if isinstance(part, tuple)]
    cut = prompt_with_images([], pictures, picture_settings(config))
    counts = iter(len(index_M) for index_M in cut.features)
    ids = [[part] if isinstance(part, int) else [IMAGE] * next(counts) for part in talk]
    return dataclasses.replace(cut, tokens_L=np.concatenate(ids).astype(np.int32))


def theirs(reference, talk: list) -> tuple[np.ndarray, dict]:
    from transformers import AutoImageProcessor

    one = prompt(reference.config, talk)
    ids = torch.tensor(one.tokens_L[None]).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pictures = [picture(*part) for part in talk if isinstance(part, tuple)]
    if pictures:
        from ain_jax.data.tiles import preprocessor_config

        write_json(
            reference.folder / "preprocessor_config.json", preprocessor_config(picture_settings(reference.config))
        )
        processor = AutoImageProcessor.from_pretrained(reference.folder, backend="pil")
        inputs |= dict(processor(pictures, return_tensors="pt"))
    with torch.no_grad():
        return reference.model(**inputs).logits[0].numpy(), inputs


@lru_cache
def compiled(config: ModelConfig):
    model = MultimodalModel(config)

    def logits(params, arrays):
        return model.apply({"params": params}, model.apply({"params": params}, **arrays), method="logits")

    return jax.jit(logits)


def row(config: ModelConfig, one: Prompt) -> dict:
    tiles = 0 if one.patches_PK is None else 10 * config.vision.tile_patches
    arrays = rows_of([one], config, 1, 192, tiles)
    return {name: array for name, array in arrays.items() if name not in ("length_B", "next_position_B")}


def ours(config: ModelConfig, params, arrays, length: int) -> np.ndarray:
    return np.asarray(compiled(config)(params, arrays))[0, :length]


@pytest.mark.parametrize("name", TALKS)
def test_logits_are_equal(case, name):
    params, config = load_folder(case.folder)
    assert config == case.config
    one = prompt(config, TALKS[name])
    expected, _ = theirs(case, TALKS[name])
    assert expected.std() >= 1, "weights too small to test with"
    np.testing.assert_allclose(ours(config, params, row(config, one), len(one.tokens_L)), expected, atol=LOGITS, rtol=0)


def test_features_are_equal(case):
    params, config = load_folder(case.folder)
    one = prompt(config, TALKS["two uneven pictures"])
    _, inputs = theirs(case, TALKS["two uneven pictures"])
    with torch.no_grad():
        packed = case.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    expected_MD = torch.cat(list(packed)).numpy()
    arrays = row(config, one)
    model = MultimodalModel(config)
    names = ("tokens_BL", "feature_index_BL", "patches_BPK")
    x_BLD = jax.jit(lambda p, a: model.apply({"params": p}, **a, method="embed"))(params, {n: arrays[n] for n in names})
    found_MD = np.asarray(x_BLD)[0, : len(one.tokens_L)][one.tokens_L == IMAGE]
    assert expected_MD.std() > 0.3
    np.testing.assert_allclose(found_MD, expected_MD, atol=MODULE * 2, rtol=0)


def test_greedy_decoding_is_equal_token_for_token(case):
    params, config = load_folder(case.folder)
    expected = []
    for talk in TALKS.values():
        _, inputs = theirs(case, talk)
        greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        new = case.model.generate(**inputs, **greedy)
        expected.append(new[0, inputs["input_ids"].shape[1] :].tolist())
    assert generate(params, config, [prompt(config, talk) for talk in TALKS.values()], 8) == expected


SWITCHES = {
    "the line ends": lambda p, a: (
        p | {"visual": p["visual"] | {"image_newline": p["visual"]["image_newline"] * 0}},
        a,
    ),
    "picture features": lambda p, a: (p, a | {"feature_index_BL": np.full_like(a["feature_index_BL"], -1)}),
    "the order of picture features": lambda p, a: (
        p,
        a | {"feature_index_BL": np.minimum(a["feature_index_BL"], 3)},
    ),
    "the order of patches": lambda p, a: (p, a | {"patches_BPK": a["patches_BPK"][:, ::-1]}),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_feature_is_felt(build_once, switch):
    params, config = load_folder(build_once(LLAVAS["qwen2"]).folder)
    one = prompt(config, TALKS["two uneven pictures"])
    arrays, length = row(config, one), len(one.tokens_L)
    changed = ours(config, *SWITCHES[switch](params, arrays), length)
    assert np.abs(changed - ours(config, params, arrays, length)).max() >= 100 * LOGITS


@pytest.mark.parametrize("change", [{"feature_layer": -1}, {"activation": "gelu_tanh"}], ids=str)
def test_each_setting_of_the_tower_is_felt(build_once, change):
    params, config = load_folder(build_once(LLAVAS["qwen2"]).folder)
    one = prompt(config, TALKS["one wide picture"])
    arrays, length = row(config, one), len(one.tokens_L)
    other = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **change))
    if "feature_layer" in change:  # all layers in one stack
        encoder = params["visual"]["vision_tower"]["encoder"]
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), encoder["layers"], encoder["last_layers"])
        tower = params["visual"]["vision_tower"] | {"encoder": {"layers": whole}}
        moved = params | {"visual": params["visual"] | {"vision_tower": tower}}
    else:
        moved = params
    assert np.abs(ours(other, moved, arrays, length) - ours(config, params, arrays, length)).max() >= 100 * LOGITS


def newest(name: str) -> str:
    """As transformers 5 calls a tensor in memory, and writes some."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    return "model." + name.replace("language_model.model.", "language_model.")


def original(name: str) -> str:
    """As LLaVA's own code calls it."""
    name = name.removeprefix("language_model.")
    name = name.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
    name = name.replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")
    name = name.replace("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model.")
    return "model.image_newline" if name == "image_newline" else name


@pytest.mark.parametrize("spelling", [newest, original])
def test_other_spellings_load_alike(build_once, tmp_path, spelling):
    reference = build_once(LLAVAS["qwen2"])
    params, config = load_folder(reference.folder)
    write_weights(params, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({spelling(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", json.loads((reference.folder / "config.json").read_text()))
    again, _ = load_folder(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def test_what_we_write_is_opened_by_transformers(case, tmp_path):
    from transformers import AutoModelForImageTextToText

    params, config = load_folder(case.folder)
    write_weights(params, config, tmp_path)
    write_json(tmp_path / "config.json", json.loads((case.folder / "config.json").read_text()))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
