import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ain_jax.models import lora
from ain_jax.models.config import tiny
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import MultimodalModel, abstract_params, axis_names, init_params
from ain_jax.weights.table import published, rearrange, sizes

KEY = jax.random.key(3)
EVERYTHING = ("all-linear", "embed_tokens", "lm_head")


def drawn(shapes, seed=0):
    """A tree of these shapes, normal."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def whole(shapes, seed=0):
    """A tree of these shapes, of small whole numbers: sums of products are then exact."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.integers(-3, 4, leaf.shape).astype(np.float32), shapes)


def test_a_pair_has_the_summed_axes_and_the_new_ones():
    config = tiny(tied=False)
    c, rank = config.text, 5
    tree = lora.init(Lora(rank=rank, targets=EVERYTHING), config, KEY)
    shapes = {path: (a.shape, b.shape) for path, a, b in lora.pairs(tree)}
    layers, D, N, K, H, F, V = c.layers, c.width, c.heads, c.kv_heads, c.head_width, c.mlp_width, c.vocabulary
    E, n = config.vision.width, config.vision.heads
    expected = {
        "model/embed_tokens": ((V, rank), (rank, D)),
        "model/layers/self_attn/q_proj": ((layers, D, rank), (layers, rank, N, H)),
        "model/layers/self_attn/k_proj": ((layers, D, rank), (layers, rank, K, H)),
        "model/layers/self_attn/v_proj": ((layers, D, rank), (layers, rank, K, H)),
        "model/layers/self_attn/o_proj": ((layers, N, H, rank), (layers, rank, D)),
        "model/layers/mlp/gate_proj": ((layers, D, rank), (layers, rank, F)),
        "model/layers/mlp/up_proj": ((layers, D, rank), (layers, rank, F)),
        "model/layers/mlp/down_proj": ((layers, F, rank), (layers, rank, D)),
        "lm_head": ((D, rank), (rank, V)),
        "visual/blocks/attn/qkv": ((2, E, rank), (2, rank, 3, n, E // n)),
        "visual/blocks/attn/proj": ((2, E, rank), (2, rank, E)),
        "visual/blocks/mlp/fc1": ((2, E, rank), (2, rank, 4 * E)),
        "visual/blocks/mlp/fc2": ((2, 4 * E, rank), (2, rank, E)),
        "visual/merger/mlp/0": ((4 * E, rank), (rank, 4 * E)),
        "visual/merger/mlp/2": ((4 * E, rank), (rank, D)),
    }
    assert shapes == expected
    assert lora.count(tree) == sum(np.prod(a) + np.prod(b) for a, b in expected.values())


def test_targets_are_ends_of_paths_or_all_that_is_linear():
    config = tiny(tied=False)
    chosen = lambda *targets: list(lora.targeted(Lora(rank=2, targets=targets), config))
    assert chosen("q_proj", "model/layers/mlp/up_proj") == [
        "model/layers/self_attn/q_proj",
        "model/layers/mlp/up_proj",
    ]
    assert chosen("mlp/0") == ["visual/merger/mlp/0"] and chosen("embed_tokens") == ["model/embed_tokens"]
    linear = chosen("all-linear")
    assert set(chosen(*EVERYTHING)) - set(linear) == {"model/embed_tokens", "lm_head"}
    assert "visual/patch_embed/proj" not in lora.sites(config)  # published as a convolution


def test_windowed_layers_that_end_early_are_a_stack_of_their_own():
    config = tiny(layers=3, windows=(4, 0))
    tree = lora.init(Lora(rank=2, targets=("o_proj",)), config, KEY)
    assert {path: a.shape[0] for path, a, _ in lora.pairs(tree)} == {
        "model/layers/self_attn/o_proj": 2,
        "model/last_layers/self_attn/o_proj": 1,
    }


def test_fresh_pairs_leave_the_base_as_it_is():
    config = tiny(tied=False)
    params, settings = init_params(config, KEY), Lora(rank=4, targets=EVERYTHING)
    tree = lora.init(settings, config, KEY)
    merged = lora.merge(params, tree, settings)
    assert jax.tree.all(jax.tree.map(np.array_equal, merged, params))
    for path, a, b in lora.pairs(tree):
        drawn_one, zero = (b, a) if path == "model/embed_tokens" else (a, b)
        assert not np.any(zero), path
        assert len(np.unique(drawn_one)) > 0.9 * drawn_one.size, path
    # Uniform up to 1 / sqrt(fan in): o_proj sums over heads and their width.
    a = np.asarray(tree["model"]["layers"]["self_attn"]["o_proj"]["a"]) * 32**0.5
    assert 0.95 < np.abs(a).max() <= 1 and abs(a.std() - 3**-0.5) < 0.05
    assert abs(np.asarray(tree["model"]["embed_tokens"]["b"]).std() - 1) < 0.1


def test_a_pair_is_drawn_by_its_own_path_and_the_key():
    config = tiny()
    one = lora.init(Lora(rank=4, targets=("v_proj",)), config, KEY)
    many = lora.init(Lora(rank=4), config, KEY)
    other = lora.init(Lora(rank=4), config, jax.random.key(4))
    a = lambda tree, name: np.asarray(tree["model"]["layers"]["self_attn"][name]["a"])
    assert np.array_equal(a(one, "v_proj"), a(many, "v_proj"))
    assert not np.array_equal(a(many, "v_proj"), a(other, "v_proj"))
    assert not np.array_equal(a(many, "v_proj"), a(many, "k_proj"))


@pytest.mark.parametrize("vocabulary", [192, 32], ids=["", "as many rows as the width"])
def test_merging_adds_scale_a_b_to_each_published_matrix(vocabulary):
    """Against B A of the published matrices, of whole numbers, layer by layer: equal to the last bit."""
    config = tiny(tied=False, vocabulary=vocabulary)
    settings = Lora(rank=2, alpha=6, targets=EVERYTHING, rank_pattern={"q_proj": 3}, alpha_pattern={"mlp/up_proj": 8})
    params = whole(abstract_params(config))
    tree = whole(lora.init(settings, config, KEY), seed=1)
    merged, letters, known = lora.merge(params, tree, settings), sizes(config), lora.sites(config)
    at = lambda tree, path: tree if not path else at(tree[path.split("/")[0]], "/".join(path.split("/")[1:]))
    changed = 0
    for place in published(config):
        before, after = (np.asarray(at(x, place.path)) for x in (params, merged))
        path = place.path.removesuffix("/weight")
        if path not in known:
            assert np.array_equal(before, after), path
            continue
        before, after, a, b = (
            x if place.layer is None else x[place.layer] for x in (before, after, *at(tree, path).values())
        )
        theirs = [rearrange(x, place.layout, letters, reverse=True) for x in (before, after)]
        scale = {"q_proj": 2, "up_proj": 4}.get(path.split("/")[-1], 3)
        product = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
        product = product if path.endswith("embed_tokens") else product.T  # a linear map is published as (out, in)
        assert np.array_equal(theirs[1], theirs[0] + scale * product), path
        changed += 1
    assert changed == 2 * 7 + 2 * 4 + 2 + 2


def test_merging_sums_in_float32_and_keeps_the_dtype():
    config, settings = tiny(), Lora(rank=1, alpha=1, targets=("model/embed_tokens",))
    params = jax.tree.map(lambda x: np.full(x.shape, 256, ml_dtypes.bfloat16), abstract_params(config))
    a, b = np.full((192, 1), 257 / 256, np.float32), np.full((1, 32), 1, np.float32)  # bfloat16 rounds this a to 1
    merged = lora.merge(params, {"model": {"embed_tokens": {"a": a, "b": b}}}, settings)
    table = merged["model"]["embed_tokens"]["weight"]
    assert table.dtype == jnp.bfloat16 and np.all(np.asarray(table) == 258)  # 257 1/256, rounded once; 257 gives 256
    assert merged["model"]["norm"]["weight"] is params["model"]["norm"]["weight"]


def test_the_scale_falls_with_the_rank_or_its_root():
    pattern = {"q_proj": 4, "model/layers/self_attn/q_proj": 16}
    settings = Lora(rank=64, alpha=32, rank_pattern=pattern, alpha_pattern={"q_proj": 8})
    path = "model/layers/self_attn/q_proj"
    assert (settings.rank_of(path), settings.alpha_of(path), settings.scale_of(path)) == (16, 8, 0.5)
    assert settings.scale_of("model/last_layers/self_attn/q_proj") == 2
    assert settings.scale_of("lm_head") == 0.5
    assert Lora(rank=64, alpha=32, rslora=True).scale_of("lm_head") == 4


def test_rank_0_adapts_nothing():
    config, settings = tiny(), Lora()
    params, tree = init_params(config, KEY), lora.init(settings, config, KEY)
    assert tree == {} and lora.count(tree) == 0 and lora.scaled(tree, settings) == {}
    assert jax.tree.all(jax.tree.map(np.array_equal, lora.merge(params, tree, settings), params))


def batch(config):
    rng = np.random.default_rng(0)
    P = 16
    return {
        "tokens_BL": jnp.asarray(rng.integers(0, 180, (2, 9)), jnp.int32),
        "segments_BL": jnp.ones((2, 9), jnp.int32),
        "positions_3BL": jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (3, 2, 9)),
        "feature_index_BL": jnp.broadcast_to(jnp.asarray([-1, 0, 1, 2, 3, -1, -1, -1, -1], jnp.int32), (2, 9)),
        "patches_BPK": jnp.asarray(rng.normal(size=(2, P, config.vision.patch_values)), jnp.float32),
        "patch_positions_BP2": jnp.asarray(rng.integers(0, 4, (2, P, 2)), jnp.int32),
        "patch_segments_BP": jnp.ones((2, P), jnp.int32),
    }


def test_the_merged_head_of_a_tied_model_is_the_merged_embedding():
    config, settings = tiny(tied=True), Lora(rank=3, alpha=6, targets=("embed_tokens",))
    params = drawn(abstract_params(config))
    tree = drawn(lora.init(settings, config, KEY), seed=1)
    pair = tree["model"]["embed_tokens"]
    merged, model = lora.merge(params, tree, settings), MultimodalModel(config)
    hidden_TD = np.random.default_rng(2).normal(size=(4, 32)).astype(np.float32)
    found_TV = model.apply({"params": merged}, hidden_TD, method="logits")
    table_VD = params["model"]["embed_tokens"]["weight"] + 2 * pair["a"] @ pair["b"]
    np.testing.assert_allclose(found_TV, hidden_TD @ table_VD.T, atol=1e-4, rtol=0)


def moved(tree, size=0.1):
    """A tree of pairs that are normal times `size`, and of magnitudes that differ from their own by such a share."""

    def one(path, own, values):
        return own * (1 + size * values) if path[-1].key == "magnitude" else size * values

    return jax.tree_util.tree_map_with_path(one, tree, drawn(tree))


@pytest.mark.parametrize(
    ("tied", "remat", "dora"),
    [(True, "none", False), (False, "full", False), (False, "none", True), (False, "full", True)],
)
def test_beside_the_parameters_the_pairs_do_what_they_do_merged(tied, remat, dora):
    config = tiny(tied=tied, layers=3, windows=(4, 0))
    targets = EVERYTHING[: 2 if tied else 3]
    settings = Lora(rank=3, alpha=2, targets=targets, rank_pattern={"o_proj": 2}, dora=dora)
    params = init_params(config, KEY)
    tree = moved(lora.init(settings, config, KEY, params))
    model, arrays = MultimodalModel(config, remat=remat), batch(config)

    @jax.jit
    def logits(variables):
        return model.apply(variables, model.apply(variables, **arrays), method="logits")

    beside = logits({"params": params, "lora": lora.scaled(tree, settings)})
    merged = logits({"params": lora.merge(params, tree, settings)})
    assert float(jnp.abs(logits({"params": params}) - merged).max()) > 100 * 1e-5
    np.testing.assert_allclose(beside, merged, atol=1e-5, rtol=0)
    # And each pair is read: without it the logits are others.
    for path, *_ in lora.pairs(tree):
        less = lora.scaled(tree, settings)
        leaf = less
        for name in path.split("/"):
            leaf = leaf[name]
        leaf["b"] = jnp.zeros_like(leaf["b"])
        assert float(jnp.abs(logits({"params": params, "lora": less}) - beside).max()) > 1e-4, path


def columns(config, path, weight):
    """The lengths of the rows of the published matrices: of the columns of an embedding, which is read by id."""
    found = []
    for place in published(config):
        if place.path == f"{path}/weight":
            one = np.asarray(weight if place.layer is None else weight[place.layer], np.float64)
            theirs = rearrange(one, place.layout, sizes(config), reverse=True)
            found.append(np.linalg.norm(theirs, axis=0 if path.endswith("embed_tokens") else 1))
    return np.stack(found)


def test_magnitudes_are_at_first_the_lengths_of_the_columns():
    config, settings = tiny(tied=False), Lora(rank=2, targets=EVERYTHING, dora=True)
    params = drawn(abstract_params(config))
    params["lm_head"]["weight"][190:] = 0  # as rows are that fill a vocabulary up
    tree = lora.init(settings, config, KEY, params)
    shapes = lambda x: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), x)
    assert shapes(tree) == shapes(lora.abstract(settings, config))
    flat, lengths = dict(jax.tree_util.tree_leaves_with_path(params)), lora.magnitudes(tree)
    weights = {"/".join(key.key for key in path): leaf for path, leaf in flat.items()}
    assert lengths.keys() == lora.sites(config).keys()
    for path, length in lengths.items():
        expected = columns(config, path, weights[f"{path}/weight"])
        np.testing.assert_allclose(np.asarray(length).reshape(expected.shape), expected, rtol=1e-5, atol=1e-12)
    # Then the adapted model is the base, and a column is as long as its magnitude whatever the pair.
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5)
    jax.tree.map(same, lora.merge(params, tree, settings), params)
    pairs = moved(tree, 0.5)
    merged = dict(jax.tree_util.tree_leaves_with_path(lora.merge(params, pairs, settings)))
    merged = {"/".join(key.key for key in path): leaf for path, leaf in merged.items()}
    for path, length in lora.magnitudes(pairs).items():
        found = columns(config, path, merged[f"{path}/weight"])
        np.testing.assert_allclose(found, np.abs(np.asarray(length)).reshape(found.shape), rtol=1e-5, atol=1e-12)
    assert lora.count(tree) == lora.count(lora.init(Lora(2, targets=EVERYTHING), config, KEY)) + sum(
        length.size for length in lengths.values()
    )


def test_a_head_with_magnitudes_is_read_in_blocks_as_it_is_whole():
    config, settings = tiny(tied=False), Lora(rank=2, targets=("lm_head",), dora=True)
    params = drawn(abstract_params(config))
    tree, model = moved(lora.init(settings, config, KEY, params)), MultimodalModel(config)
    variables = {"params": params, "lora": lora.scaled(tree, settings)}
    hidden_TD = np.random.default_rng(2).normal(size=(4, 32)).astype(np.float32)
    merged = {"params": lora.merge(params, tree, settings)}
    expected = model.apply(merged, hidden_TD, method="logits")
    np.testing.assert_allclose(model.apply(variables, hidden_TD, method="logits"), expected, atol=1e-4, rtol=0)
    pairs, _ = model.apply(variables, hidden_TD, method="head")
    np.testing.assert_allclose(sum(y @ w.T for y, w in pairs), expected, atol=1e-4, rtol=0)


def test_magnitudes_and_settings_must_agree():
    config = tiny(tied=False)
    params = init_params(config, KEY)
    plain, dora = (Lora(rank=2, targets=("q_proj",), dora=dora) for dora in (False, True))
    with pytest.raises(ValueError, match="q_proj has no magnitude, the settings say dora = True"):
        lora.merge(params, lora.init(plain, config, KEY), dora)
    with pytest.raises(ValueError, match="q_proj has a magnitude, the settings say dora = False"):
        lora.scaled(lora.init(dora, config, KEY, params), plain)


def test_the_axes_of_a_pair_are_those_of_its_weight_and_the_rank():
    config = tiny(tied=False)
    tree = lora.abstract(Lora(rank=2, targets=EVERYTHING, dora=True), config)
    names = lora.axis_names(tree, axis_names(config))
    attention = names["model"]["layers"]["self_attn"]
    of_q = {"a": ("layers", "embed", "rank"), "b": ("layers", "rank", "heads", "head")}
    assert attention["q_proj"] == of_q | {"magnitude": ("layers", "heads", "head")}
    of_o = {"a": ("layers", "heads", "head", "rank"), "b": ("layers", "rank", "embed")}
    assert attention["o_proj"] == of_o | {"magnitude": ("layers", "embed")}
    assert names["model"]["embed_tokens"] == {"a": ("vocab", "rank"), "b": ("rank", "embed"), "magnitude": ("embed",)}
    assert names["lm_head"] == {"a": ("embed", "rank"), "b": ("rank", "vocab"), "magnitude": ("vocab",)}
    is_names = lambda x: isinstance(x, tuple)
    fits = jax.tree.map(lambda names, leaf: len(names) == leaf.ndim, names, tree, is_leaf=is_names)
    assert jax.tree.all(fits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank = -1, alpha = 16.0: expected 0 or more, and above 0"),
        ({"alpha": 0.0}, "alpha = 0.0: expected 0 or more, and above 0"),
        ({"rank": 4, "targets": ()}, r"targets = \(\): expected names of modules, or 'all-linear'"),
        ({"rank": 4, "rank_pattern": {"q_proj": 0}}, r"rank_pattern, alpha_pattern = {'q_proj': 0}: expected .* above"),
        ({"rank_pattern": {"q_proj": 2}}, "but rank = 0 adapts nothing: set rank"),
        ({"dora": True}, "dora = True, but rank = 0 adapts nothing: set rank"),
        (
            {"alpha": 32.0, "targets": ("q_proj",), "rslora": True, "alpha_pattern": {"q_proj": 8.0}},
            r"alpha = 32.0 and targets = .* and rslora = True and alpha_pattern = {'q_proj': 8.0}, but rank = 0 adapts",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


def test_names_that_no_module_has_are_told_together():
    settings = Lora(rank=2, targets=("q_prj", "mlp.up_proj", "k_proj", "lm_head"), rank_pattern={"v_proj": 3})
    with pytest.raises(ValueError) as error:
        lora.init(settings, tiny(tied=True), KEY)
    for words in (
        "targets names 'q_prj', which no matrix ends in: did you mean 'q_proj'?",
        "targets names 'mlp.up_proj', which no matrix ends in: did you mean 'up_proj'?",
        "targets names 'lm_head'",
        "rank_pattern names 'v_proj', which no target ends in: did you mean 'k_proj'?",
    ):
        assert words in str(error.value)


def test_adapters_of_another_model_are_not_merged():
    config, settings = tiny(), Lora(rank=2, targets=("q_proj", "k_proj", "up_proj"))
    params, tree = init_params(config, KEY), lora.init(settings, config, KEY)
    attention = tree["model"]["layers"]["self_attn"]
    attention["q_prj"] = attention.pop("q_proj")
    attention["k_proj"]["b"] = attention["k_proj"]["b"][:, :, :1]
    tree["model"]["layers"]["mlp"]["up_proj"]["a"] = jnp.zeros((2, 32, 3))
    with pytest.raises(ValueError) as error:
        lora.merge(params, tree, settings)
    for words in (
        "3 faults",
        "model/layers/self_attn/q_prj is no weight of this model: did you mean 'model/layers/self_attn/q_proj'?",
        "k_proj: a (2, 32, 2) and b (2, 2, 1, 8) make (2, 32, 1, 8), expected (2, 32, 2, 8)",
        "up_proj: a (2, 32, 3) has rank 3, the settings say 2",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="up_proj: a .* has rank 3, the settings say 2"):
        lora.scaled(tree, settings)
    with pytest.raises(ValueError, match="no tree of adapters: model/norm holds a, c; expected a and b"):
        lora.merge(params, {"model": {"norm": {"a": np.zeros(2), "c": np.zeros(2)}}}, settings)
