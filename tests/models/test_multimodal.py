"""The joined model against itself: packed and alone, rematerialised or not. transformers is in tests/parity."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax.data.positions import mrope_positions, patch_positions
from ain_jax.generate import Prompt, rows_of
from ain_jax.models.config import tiny
from ain_jax.models.layers import REMAT
from ain_jax.models.multimodal import MultimodalModel, abstract_params, axis_names, init_params

CONFIG = tiny(tied=False)
START, END, IMAGE = CONFIG.vision_start_token_id, CONFIG.vision_end_token_id, CONFIG.image_token_id
CONVERSATIONS = (  # tokens, grids of their pictures
    ([5, 6, START] + [IMAGE] * 6 + [END, 7, 8, START] + [IMAGE] * 2 + [END, 9], [(1, 4, 6), (1, 4, 2)]),
    ([10, 11, 12, 13], []),
    ([14, START] + [IMAGE] * 4 + [END, 15, 16], [(1, 2, 8)]),
)


@pytest.fixture(scope="module")
def params():
    # Larger than at the start of training, so that every part of the model is felt in the hidden states.
    return jax.tree.map(lambda x: 1.5 * x + 0.1, init_params(CONFIG, jax.random.key(0)))


@lru_cache
def compiled(**settings):
    return jax.jit(lambda p, arrays: MultimodalModel(CONFIG, **settings).apply({"params": p}, **arrays))


def hidden_of(params, arrays, **settings):
    return np.asarray(compiled(**settings)(params, arrays))


def patches_of(seed, grids):
    count = sum(int(np.prod(grid)) for grid in grids)
    return np.random.default_rng(seed).normal(size=(count, CONFIG.vision.patch_values)).astype(np.float32)


def packed_row(L=48, P=64):
    """All conversations in one row, laid by hand, with padding behind."""
    arrays = {
        "tokens_BL": np.zeros((1, L), np.int32),
        "segments_BL": np.zeros((1, L), np.int32),
        "positions_3BL": np.zeros((3, 1, L), np.int32),
        "feature_index_BL": np.full((1, L), -1, np.int32),
        "patches_BPK": np.zeros((1, P, CONFIG.vision.patch_values), np.float32),
        "patch_positions_BP2": np.zeros((1, P, 2), np.int32),
        "patch_segments_BP": np.zeros((1, P), np.int32),
    }
    at = patch = picture = 0
    spans = []
    for number, (tokens, grids) in enumerate(CONVERSATIONS):
        here = slice(at, at + len(tokens))
        spans.append(here)
        is_picture = np.array(tokens) == IMAGE
        arrays["tokens_BL"][0, here] = tokens
        arrays["segments_BL"][0, here] = number + 1
        arrays["positions_3BL"][:, 0, here] = mrope_positions(tokens, grids, IMAGE)
        arrays["feature_index_BL"][0, here][is_picture] = patch // 4 + np.arange(is_picture.sum())
        patches, done = patches_of(number, grids), 0
        for grid in grids:
            count, picture = int(np.prod(grid)), picture + 1
            there = slice(patch, patch + count)
            arrays["patches_BPK"][0, there] = patches[done : done + count]
            arrays["patch_positions_BP2"][0, there] = patch_positions(grid)
            arrays["patch_segments_BP"][0, there] = picture
            patch, done = patch + count, done + count
        at += len(tokens)
    return arrays, spans


def alone(number, L=48, P=64):
    tokens, grids = CONVERSATIONS[number]
    prompt = Prompt(np.array(tokens), patches_of(number, grids) if grids else None, tuple(grids))
    arrays = rows_of([prompt], CONFIG, 1, L, P)
    return {name: array for name, array in arrays.items() if name not in ("length_B", "next_position_B")}


@pytest.mark.parametrize("settings", [{}, {"longest_image": 24}], ids=["whole", "in bands"])
def test_packed_conversations_equal_the_conversations_alone(params, settings):
    arrays, spans = packed_row()
    hidden_LD = hidden_of(params, arrays, **settings)[0]
    assert np.isfinite(hidden_LD).all()
    for number, span in enumerate(spans):
        expected_LD = hidden_of(params, alone(number))[0]
        np.testing.assert_allclose(hidden_LD[span], expected_LD[: span.stop - span.start], atol=1e-5)


def test_a_picture_longer_than_promised_is_not_cut(params):
    arrays, _ = packed_row()
    assert np.isnan(hidden_of(params, arrays, longest_image=16)).any()


def test_without_patches_the_image_encoder_is_not_run(params):
    arrays = {name: packed_row()[0][name] for name in ("tokens_BL", "segments_BL", "positions_3BL")}
    text_only = {"model": params["model"], "lm_head": params["lm_head"]}
    hidden = hidden_of(text_only, arrays)
    assert hidden.shape == (1, 48, CONFIG.text.width)


def test_logits_may_be_asked_for_at_some_positions(params):
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, CONFIG.text.width)), jnp.float32)
    model = MultimodalModel(CONFIG)
    logits_BLV = model.apply({"params": params}, hidden, method="logits")
    logits_V = model.apply({"params": params}, hidden[1, 2], method="logits")
    np.testing.assert_allclose(logits_BLV[1, 2], logits_V, atol=1e-5)


@pytest.fixture(scope="module")
def gradients(params):
    """(loss, gradients) by policy."""
    return lru_cache(lambda remat: jax.jit(jax.value_and_grad(squares(remat)))(params))


def squares(remat):
    arrays, _ = packed_row()
    return lambda p: jnp.mean(jnp.square(MultimodalModel(CONFIG, remat=remat).apply({"params": p}, **arrays)))


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_rematerialised_layers_give_the_same_gradients(gradients, remat):
    plain_loss, plain = gradients("none")
    loss, found = gradients(remat)
    assert all(
        np.abs(leaf).max() > 0 for leaf in jax.tree.leaves({"v": plain["visual"], "l": plain["model"]["layers"]})
    )
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-4)


# By hand: what is computed again of the products of a decoder layer (q, k, v, scores, sum of values, o, gate, up; never
# down, which nothing needs again) and of a vision block (qkv, scores, sum of values, proj, fc1; never fc2).
@pytest.mark.parametrize(
    "remat, again",
    [
        ("full", 8 + 5),
        ("offload", 8 + 5),
        ("attention", 7 + 4),  # not the sum of values
        ("minimal", 3 + 2),  # scores, and the wide products of the MLP
        ("offload_minimal", 3 + 2),
        ("dots", 2 + 2),  # scores and sum of values alone
    ],
)
def test_a_policy_computes_again_what_it_does_not_keep(params, remat, again):
    def products(jaxpr):
        inner = [
            v for eqn in jaxpr.eqns for value in eqn.params.values() for v in jax.tree.leaves(value, is_leaf=is_jaxpr)
        ]
        own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
        return own + sum(products(getattr(v, "jaxpr", v)) for v in inner if is_jaxpr(v))

    is_jaxpr = lambda v: hasattr(getattr(v, "jaxpr", v), "eqns")
    of = lambda name: products(jax.make_jaxpr(jax.grad(squares(name)))(params).jaxpr)
    assert of(remat) - of("none") == again


def test_bfloat16_stays_near_float32(params):
    arrays, spans = packed_row()
    exact, rough = hidden_of(params, arrays), hidden_of(params, arrays, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    difference = (exact - rough.astype(np.float32))[0, : spans[-1].stop]
    assert 1e-4 < np.abs(difference).mean() < 0.1


def test_every_parameter_has_a_shape_and_a_name_for_each_axis():
    shapes, names = abstract_params(CONFIG), axis_names(CONFIG)
    is_names = lambda x: isinstance(x, tuple)
    assert jax.tree.structure(shapes) == jax.tree.structure(names, is_leaf=is_names)
    for shape, axes in zip(jax.tree.leaves(shapes), jax.tree.leaves(names, is_leaf=is_names), strict=True):
        assert len(shape.shape) == len(axes) and all(axes)
    assert names["model"]["layers"]["self_attn"]["q_proj"]["weight"] == ("layers", "embed", "heads", "head")
    assert type(shapes) is dict and type(shapes["visual"]["merger"]["mlp"]["0"]) is dict


def test_fresh_parameters_follow_the_key_and_start_quietly():
    config = tiny(vocabulary=512, width=128, layers=4)
    first, again, other = (init_params(config, jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))
    assert not np.array_equal(first["model"]["embed_tokens"]["weight"], other["model"]["embed_tokens"]["weight"])
    layers = np.asarray(first["model"]["layers"]["self_attn"]["q_proj"]["weight"])
    assert not np.array_equal(layers[0], layers[1])  # each layer draws its own
    tokens = np.arange(64, dtype=np.int32)[None]
    positions = np.broadcast_to(tokens, (3, 1, 64))
    model = MultimodalModel(config)

    @jax.jit
    def logits_of(p):
        hidden = model.apply({"params": p}, tokens, np.ones_like(tokens), positions)
        return model.apply({"params": p}, hidden, method="logits")

    logits = logits_of(first)
    assert float(jnp.std(logits)) < 0.5  # so that the first loss is near log V


def test_wrong_patches_are_refused(params):
    arrays, _ = packed_row()
    with pytest.raises(
        ValueError, match=r"patches of 95 values, but the tower reads 96 = 3 channels x 2 frames x 4 x 4"
    ):
        MultimodalModel(CONFIG).apply(
            {"params": params}, **(arrays | {"patches_BPK": arrays["patches_BPK"][:, :, :95]})
        )
    fewer = {name: arrays[name][:, :63] for name in ("patches_BPK", "patch_positions_BP2", "patch_segments_BP")}
    with pytest.raises(ValueError, match="63 patches per row cannot be merged 2 x 2"):
        MultimodalModel(CONFIG).apply({"params": params}, **(arrays | fewer))
