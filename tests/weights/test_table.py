import jax
import numpy as np
import pytest

from ain_jax.models.config import ClipConfig, ModelConfig, VisionConfig, tiny
from ain_jax.models.multimodal import abstract_params
from ain_jax.weights.export import placed
from ain_jax.weights.table import canonical, our_shape, published, rearrange, rows, sizes, their_shape

LETTERS = {"N": 2, "H": 3, "D": 5}


def test_joined_axes_are_split_and_turned():
    theirs = np.arange(30).reshape(6, 5)  # row n * 3 + h
    ours = rearrange(theirs, "(N H) D -> D N H", LETTERS)
    assert ours.shape == (5, 2, 3)
    assert all(ours[d, n, h] == theirs[n * 3 + h, d] for d, n, h in np.ndindex(5, 2, 3))
    assert np.array_equal(rearrange(ours, "(N H) D -> D N H", LETTERS, reverse=True), theirs)


CONFIGS = {
    "tied": tiny(),
    "untied": tiny(tied=False),
    "no biases": tiny(qkv_bias=False),
    "all biases": tiny(vision=False, o_bias=True, mlp_bias=True),
    "text": tiny(vision=False),
    "tiles": ModelConfig(
        tiny(vision=False).text, ClipConfig(16, 3, 2, 32, tile=8, patch_size=4, pinpoints=()), image_token_id=5
    ),
    "a gated tower": ModelConfig(tiny().text, VisionConfig(24, 2, 2, 60, patch_size=4, gated=True), image_token_id=5),
    "a turn cut short": tiny(vision=False, layers=8, windows=(4, 4, 0), qk_norm=True, sandwich_norms=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_and_the_declared_parameters_agree(config):
    shapes = abstract_params(config)
    flat = {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert {place.path for place in published(config)} == flat.keys()
    letters = sizes(config)
    for place in published(config):
        one = rearrange(np.empty(their_shape(place.layout, letters)), place.layout, letters)
        assert one.shape == our_shape(place.layout, letters)
        stack = () if place.layers is None else (place.layers,)
        assert (*stack, *one.shape) == flat[place.path], place.name


def test_no_name_and_no_path_stands_twice():
    names = [place.name for place in published(tiny(tied=False))]
    paths = [row.ours for row in rows(tiny(tied=False))]
    assert len(set(names)) == len(names) and len(set(paths)) == len(paths)


def test_newer_names_are_brought_to_the_published_ones():
    assert canonical("model.language_model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert canonical("model.visual.blocks.0.norm1.bias") == "visual.blocks.0.norm1.bias"
    assert canonical("lm_head.weight") == "lm_head.weight"


def test_parameters_without_a_row_are_not_exported():
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(tiny(tied=True)))
    params["lm_head"] = {"weight": np.zeros((192, 32), np.float32)}
    del params["model"]["norm"]
    with pytest.raises(ValueError, match="lm_head/weight has no published name; model/norm/weight is missing"):
        list(placed(params, tiny(tied=True)))
