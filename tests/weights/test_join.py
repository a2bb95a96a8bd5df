"""A language model and a CLIP, each as its maker publishes it, joined: its weights and the others'."""

import json

import families
import jax
import numpy as np
import pytest

from ain_jax.experiment import parse_override, resolve
from ain_jax.models.config import ClipConfig, pangea_7b
from ain_jax.stages import registry
from ain_jax.stages.common import StageRun
from ain_jax.train.optimizer import path_name
from ain_jax.twins import models
from ain_jax.weights import join
from ain_jax.weights.load import load_folder

SETTINGS = """Experiment.name="joined"
Experiment.stages=("instruct",)
Model.folder="{root}/qwen2"
Model.vision_folder="{root}/clip"
Model.size="pangea_twin"
Chat.template="llava_chatml"
Packing.row_tokens=64
Optimizer.learning_rate=0.1
Trainer.steps=1
Trainer.rows=1
Mixture.weights={{"name": 1.0}}"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    models.write_models(folder, ("qwen2_twin", "llama_3_twin"))
    return folder


def stage(root, folder, *more):
    lines = [*SETTINGS.format(root=root).splitlines(), *more]
    return StageRun(resolve([parse_override(line) for line in lines], registry.SETTINGS), folder, "instruct")


def test_weights_are_those_of_both_folders(root, tmp_path):
    run = stage(root, tmp_path)
    params, (decoder, _) = run.initial_params(), load_folder(root / "qwen2")
    for path, theirs in jax.tree_util.tree_leaves_with_path(decoder):
        ours, name = params, path_name(path)
        for part in name.split("/"):
            ours = ours[part]
        if name in ("model/embed_tokens/weight", "lm_head/weight"):  # whose spare row a picture's token has taken
            ours, theirs = (np.delete(table, run.config.image_token_id, axis=0) for table in (ours, theirs))
        np.testing.assert_array_equal(ours, theirs)
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    clip = transformers.CLIPVisionModel.from_pretrained(root / "clip")
    side = run.config.vision.tile
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    with torch.no_grad():
        theirs = clip(torch.tensor(pixels), output_hidden_states=True).hidden_states[-2][:, 1:].numpy()
    from ain_jax.models.clip import ClipTower

    size = run.config.vision.patch_size
    patches = pixels.reshape(1, 3, side // size, size, side // size, size).transpose(0, 2, 4, 1, 3, 5)
    patches_1PK = patches.reshape(1, -1, 3 * size * size)
    tower = params["visual"]["vision_tower"]
    ours = ClipTower(run.config.vision).apply({"params": tower}, patches_1PK)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    drawn = params["visual"]["multi_modal_projector"]["linear_1"]["weight"]
    assert np.std(drawn) > 0 and np.std(params["visual"]["image_newline"]) > 0
    again = stage(root, tmp_path).initial_params()
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_the_picture_is_a_token_and_tiles_are_the_towers(root, tmp_path):
    run = stage(root, tmp_path)
    vision = run.config.vision
    assert isinstance(vision, ClipConfig) and run.config.image_token_id == run.token("<image>")
    assert (run.images.tile, run.images.patch_size, run.images.pinpoints) == (28, 14, vision.pinpoints)
    attributes = {"model_type": "clip", "vision_config": CLIP_L, "text_config": {"hidden_size": 7}}
    (tmp_path / "config.json").write_text(json.dumps(attributes), "utf-8")
    full = join.joined_config(families.text("qwen2"), tmp_path, run.tokenizer, 2048)
    assert full.vision == pangea_7b().vision


# As the published config of CLIP ViT-L/14 of 336 pixels has it.
CLIP_L = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16}
CLIP_L |= {"num_hidden_layers": 24, "patch_size": 14, "model_type": "clip_vision_model", "dropout": 0.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('Chat.template="chatml"', "joins two models by the token <image>, and the tokenizer has none"),
        ('Model.vision_folder="{root}/qwen2"', "model_type='qwen2', expected a CLIP"),
        ('Model.size="qwen2_7b"', "is no qwen2_7b, which Model.size names"),
        ('Model.vision_folder="nowhere"', "nowhere/config.json is missing"),
    ],
)
def test_what_does_not_join_is_told(root, tmp_path, change, words):
    run = stage(root, tmp_path, change.format(root=root))
    with pytest.raises(ValueError, match=words):
        _ = run.config
    if "nowhere" in change:
        with pytest.raises(ValueError, match="expected a language model, one of llama, mistral, qwen2"):
            join.joined_config(families.text("gemma"), root / "clip", run.tokenizer, 96)
