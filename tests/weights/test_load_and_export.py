import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ain_jax.data.images import ImageSettings
from ain_jax.data.tiles import TileSettings
from ain_jax.models.config import ClipConfig, ModelConfig, tiny, to_hf
from ain_jax.models.multimodal import abstract_params
from ain_jax.weights.export import export_folder, write_json, write_weights
from ain_jax.weights.load import load_folder, load_params

SETTINGS = ImageSettings(patch_size=4, min_pixels=64, max_pixels=1024)


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), abstract_params(config))


@pytest.fixture
def tokenizer_dir(small_tokenizer_folder, tmp_path):
    folder = shutil.copytree(small_tokenizer_folder, tmp_path / "tokenizer")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.txt").write_text("stays at home")
    return folder


def written(folder, config, params, names=None):
    """A folder with config and weights, the tensors renamed by `names`."""
    folder.mkdir()
    write_json(folder / "config.json", to_hf(config))
    write_weights(params, config, folder)
    if names:
        tensors = load_file(folder / "model.safetensors")
        save_file({names(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_exported_loaded_and_exported_again_the_bytes_are_the_same(tmp_path, tokenizer_dir, tied, dtype):
    config = tiny(tied=tied)
    params = random_params(config, dtype)
    first = export_folder(params, config, tokenizer_dir, SETTINGS, tmp_path / "first", shard_bytes=40_000)
    loaded, read_config = load_folder(first)
    assert read_config == config and same(loaded, params)
    second = export_folder(loaded, read_config, first, SETTINGS, tmp_path / "second", shard_bytes=40_000)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 1 and "model.safetensors.index.json" in files
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert "notes.txt" not in files and {"generation_config.json", "preprocessor_config.json", "README.md"} < set(files)
    weight_map = json.loads((first / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in weight_map) is not tied


TEXT = tiny(mrope_section=None, qkv_bias=False).text
CLIP = ClipConfig(16, 3, 2, 32, tile=8, patch_size=4, pinpoints=((8, 16),))
OTHERS = {
    "llama": (ModelConfig(TEXT, family="llama", eos_token_id=(3, 4)), None),
    "llava": (
        ModelConfig(TEXT, CLIP, "llava_next", "llama", image_token_id=5, eos_token_id=7),
        TileSettings(tile=8, patch_size=4, pinpoints=((8, 16),)),
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_is_exported_with_what_its_processor_needs(tmp_path, tokenizer_dir, family):
    config, settings = OTHERS[family]
    folder = export_folder(random_params(config), config, tokenizer_dir, settings, tmp_path / "out")
    loaded, read_config = load_folder(folder)
    assert read_config == config and same(loaded, random_params(config))
    files = {path.name for path in folder.iterdir()}
    assert ({"preprocessor_config.json", "processor_config.json"} <= files) is (family == "llava")
    written = to_hf(config)
    card = (folder / "README.md").read_text()
    assert written["architectures"][0] in card and ("image-text-to-text" in card) is (family == "llava")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == ([3, 4] if family == "llama" else config.eos_token_id)


def test_image_settings_of_another_tower_are_refused(tmp_path, tokenizer_dir):
    config, settings = OTHERS["llava"]
    with pytest.raises(ValueError, match="a llava_next needs TileSettings, and ImageSettings was given"):
        export_folder(random_params(config), config, tokenizer_dir, SETTINGS, tmp_path / "out")
    other = dataclasses.replace(settings, pinpoints=((16, 8),))
    with pytest.raises(ValueError, match="pinpoints is"):
        export_folder(random_params(config), config, tokenizer_dir, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_newer_names_load_alike(tmp_path):
    config = tiny(tied=False)
    params = random_params(config)

    def newer(name):
        if name.startswith("visual."):
            return "model." + name
        return name.replace("model.", "model.language_model.", 1)

    assert same(load_folder(written(tmp_path / "new", config, params, newer))[0], params)


def test_weights_are_cast_on_the_way(tmp_path):
    config = tiny()
    folder = written(tmp_path / "bf16", config, random_params(config, ml_dtypes.bfloat16))
    params, _ = load_folder(folder, np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_all_faults_are_told_at_once(tmp_path):
    config = tiny()
    folder = written(tmp_path / "faulty", config, random_params(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.wait"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.visual.merger.ln_q.bias"] = tensors["visual.merger.ln_q.bias"]
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_folder(folder)
    for words in (
        "4 faults",
        "model.safetensors: model.layers.0.mlp.up_proj.wait (96, 32) has no place in this model",
        "model.layers.0.mlp.up_proj.weight is missing",
        "visual.merger.ln_q.bias is given twice",
        "model.norm.weight has shape (31,), expected (32,)",
    ):
        assert words in str(error.value)


def test_an_untied_model_needs_its_head_and_a_tied_one_takes_an_equal_copy(tmp_path):
    tied, untied = tiny(tied=True), tiny(tied=False)
    params = random_params(tied)
    folder = written(tmp_path / "tied", tied, params)
    with pytest.raises(ValueError, match=r"1 faults:\n  lm_head.weight is missing"):
        load_params(folder, untied)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "model.safetensors")
    assert same(load_params(folder, tied), params)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding"):
        load_params(folder, tied)


def test_damaged_and_missing_files_are_named(tmp_path, tokenizer_dir):
    config = tiny()
    folder = export_folder(random_params(config), config, tokenizer_dir, SETTINGS, tmp_path / "m", shard_bytes=40_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated or damaged"):
        load_folder(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=f"index.json names {shard.name}, not found"):
        load_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing; expected a folder"):
        load_folder(folder)


def test_a_failed_export_leaves_the_old_folder_and_nothing_else(tmp_path, tokenizer_dir):
    config = tiny()
    params = random_params(config)
    out = export_folder(params, config, tokenizer_dir, SETTINGS, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    broken = params | {"visual": {"merger": params["visual"]["merger"]}}
    with pytest.raises(ValueError, match="visual/blocks/attn/proj/bias is missing"):
        export_folder(broken, config, tokenizer_dir, SETTINGS, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer"]


def test_what_does_not_fit_together_is_not_exported(tmp_path, tokenizer_dir):
    config = tiny()
    (tokenizer_dir / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"patch_size is 4 in the model and 14 in the image settings.*tokenizer.json is missing"
    ):
        export_folder(random_params(config), config, tokenizer_dir, ImageSettings(), tmp_path / "out")
    mixed = random_params(config)
    mixed["model"]["norm"]["weight"] = mixed["model"]["norm"]["weight"].astype(np.float16)
    with pytest.raises(ValueError, match="weights of several dtypes, float16, float32"):
        write_weights(mixed, config, tmp_path)


def test_a_tokenizer_that_transformers_would_open_as_another_is_refused(tokenizer_folder, tmp_path):
    """transformers 5 takes Qwen2Tokenizer for any text model of that family, whatever the folder says."""
    config = dataclasses.replace(ModelConfig(tiny(mrope_section=None).text), family="qwen2")
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer\) cuts .* only be written with its family's own kind"):
        export_folder(random_params(config), config, tokenizer_folder, None, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tokenizer_folder, tmp_path):
    config = tiny()
    with pytest.raises(ValueError, match=r"has 32022 ids, and the model \d+ rows: it is another model's"):
        export_folder(random_params(config), config, tokenizer_folder, SETTINGS, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_answers_end_where_the_generation_config_says_too(tmp_path, tokenizer_dir):
    config, _ = OTHERS["llama"]
    config = dataclasses.replace(config, eos_token_id=3)
    folder = written(tmp_path / "published", config, random_params(config))
    write_json(folder / "generation_config.json", {"eos_token_id": [6, 3], "temperature": 0.6})
    params, found = load_folder(folder)
    assert found.stop_ids == (3, 6)
    again = export_folder(params, found, tokenizer_dir, None, tmp_path / "again")
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == [3, 6]
    for odd in ({"eos_token_id": 10**6}, {"eos_token_id": ["</s>"]}):
        write_json(folder / "generation_config.json", odd)
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id=.*; expected an id of the model"):
            load_folder(folder)


def test_buffers_that_older_folders_hold_are_passed_over(tmp_path):
    config, _ = OTHERS["llava"]
    params = random_params(config)
    folder = written(tmp_path / "old", config, params)
    tensors = load_file(folder / "model.safetensors")
    (layer,) = (
        name.split("self_attn")[0]
        for name in tensors
        if name.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in name
    )
    tensors[f"{layer}self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(5)[None]
    save_file(tensors, folder / "model.safetensors")
    assert same(load_folder(folder)[0], params)
