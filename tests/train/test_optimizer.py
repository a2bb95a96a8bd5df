"""Learning rates at given steps, what decays, what stays frozen."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ain_jax.models.config import tiny
from ain_jax.models.multimodal import abstract_params
from ain_jax.train.optimizer import Optimizer, make, matrices, path_name, rate_tree, schedule


def rates(settings, steps):
    rate = schedule(settings, steps)
    return [float(rate(s)) for s in range(steps)]


def test_warm_up_and_decay_by_hand():
    # 4 steps up, then 6 of which the first stands at the peak and the last at a tenth of it.
    linear = rates(Optimizer(1.0, warmup_steps=4, schedule="linear", final_share=0.1), 10)
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28, 0.1])
    cosine = rates(Optimizer(2.0, warmup_steps=2, schedule="cosine", final_share=0.5), 5)
    halfway = 2 * (0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert cosine == pytest.approx([1.0, 2.0, 2.0, halfway, 1.0])
    assert rates(Optimizer(3.0, schedule="flat"), 4) == [3.0] * 4
    assert rates(Optimizer(3.0, schedule="flat", warmup_steps=1), 3) == [3.0] * 3
    assert rates(Optimizer(1.0, schedule="linear", final_share=0.0), 3) == pytest.approx([1.0, 0.5, 0.0])
    assert rates(Optimizer(1.0), 1) == [1.0]
    assert rates(Optimizer(1.0, warmup_steps=10), 3) == pytest.approx([0.1, 0.2, 0.3])  # shorter than its warm-up


def leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def ones(shapes):
    return jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)


def updated(optimizer, gradients, params):
    """In one compilation: operation by operation takes half a minute."""
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradients, params)


@pytest.mark.parametrize("matrix_rate", [0.0, 0.5])
def test_matrices_alone_decay(matrix_rate):
    params = ones(abstract_params(tiny(tied=False)))
    optimizer = make(Optimizer(0.5, matrix_rate, schedule="flat", weight_decay=0.1), params, 10)
    updates, _ = updated(optimizer, jax.tree.map(np.zeros_like, params), params)
    for name, update in leaves(updates).items():
        vector = name.endswith("bias") or "norm" in name or "ln_q" in name
        assert float(update.min()) == float(update.max()) == (0 if vector else pytest.approx(-0.05)), name
    assert leaves(matrices(params))["model/layers/self_attn/q_proj/weight"]


def test_the_longest_path_decides_the_rate():
    params = abstract_params(tiny())
    found = leaves(rate_tree(params, {"visual": 0.1, "visual/merger": 1.5, "model/embed_tokens": 0.0}))
    for name, rate in found.items():
        expected = 1.5 if name.startswith("visual/merger/") else 0.1 if name.startswith("visual/") else 1.0
        assert rate == (0.0 if name == "model/embed_tokens/weight" else expected)
    with pytest.raises(
        ValueError, match="names 'visual/mergr', which no parameter lies under: did you mean 'visual/merger'"
    ):
        rate_tree(params, {"visual/mergr": 0.0})
    with pytest.raises(ValueError, match="names 'vis'"):  # a beginning of a name is no path
        rate_tree(params, {"vis": 0.0})


def test_patterns_name_modules_wherever_they_lie():
    params = abstract_params(tiny(tied=False))

    def named(rates):
        """The parameters whose rate is not 1."""
        return {name: rate for name, rate in leaves(rate_tree(params, rates)).items() if rate != 1}

    assert named({"q_proj": 0.0}) == dict.fromkeys(
        [f"model/layers/self_attn/q_proj/{x}" for x in ("weight", "bias")], 0
    )
    assert set(named({"mlp/up_proj": 2.0})) == {"model/layers/mlp/up_proj/weight"}
    norms = {name for name in leaves(params) if "norm" in name}
    assert set(named({"*norm*": 0.0})) == norms and len(norms) == 3 + 4
    assert set(named({"*/norm": 0.0})) == {"model/norm/weight"}
    assert set(named({"visual/*/mlp": 0.0})) == {n for n in leaves(params) if n.startswith("visual/") and "/mlp/" in n}
    assert set(named({"bias": 0.0})) == {n for n in leaves(params) if n.endswith("/bias")}
    # What ends deeper decides, then what is longer, then what leaves less open.
    found = leaves(rate_tree(params, {"attn": 2.0, "visual": 0.0, "visual/b*": 3.0, "visual/blocks": 4.0}))
    assert found["visual/blocks/attn/proj/weight"] == 2.0
    assert found["visual/blocks/norm1/weight"] == 4.0
    assert found["visual/merger/ln_q/weight"] == 0.0
    with pytest.raises(
        ValueError, match=r"q_proj/\w+ by '\*_proj' and 'q_pro\*' alike, with 0.0 and 2.0: name it more"
    ):
        rate_tree(params, {"*_proj": 0.0, "q_pro*": 2.0})
    with pytest.raises(ValueError, match="names 'q_prj', which no parameter lies under: did you mean 'q_proj'"):
        rate_tree(params, {"q_prj": 0.0})
    with pytest.raises(ValueError, match="freezes all that is there: leave something to learn"):
        rate_tree(params, {"model": 0.0, "visual": 0.0, "lm_head": 0.0})


def test_frozen_parameters_have_no_state_and_others_their_own_rate():
    params = ones(abstract_params(tiny()))
    optimizer = make(Optimizer(1e-2, schedule="flat", clip=0.0, rates={"visual": 0.0, "model/norm": 0.5}), params, 10)
    state = optimizer.init(params)
    held = [name for name in leaves(state) if "mu" in name or "nu" in name]
    assert not [name for name in held if "visual" in name]
    assert [name for name in held if "model/norm" in name]
    assert sum(x.size for n, x in leaves(state).items() if n in held) == 2 * sum(
        x.size for n, x in leaves(params).items() if not n.startswith("visual")
    )
    updates, _ = updated(optimizer, params, params)
    for name, update in leaves(updates).items():
        expected = 0.0 if name.startswith("visual") else -5e-3 if name.startswith("model/norm") else -1e-2
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_muon_turns_the_gradient_of_each_matrix_into_one_whose_singular_values_are_near_one():
    shapes = abstract_params(tiny(tied=False))
    rng = np.random.default_rng(0)
    draw = lambda s: rng.normal(size=s.shape).astype(np.float32)
    params, gradients = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)
    settings = Optimizer(0.01, 0.5, schedule="flat", clip=0.0, rates={"visual/blocks": 0.5})
    updates, _ = updated(make(settings, params, 10), gradients, params)
    for name, update in leaves(updates).items():
        multiple = 0.5 if name.startswith("visual/blocks") else 1.0
        matrix = leaves(matrices(params))[name]
        if not matrix or any(part in name for part in ("embed_tokens", "lm_head", "patch_embed")):
            first_step = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # of Adam with Nesterov's momentum, in size
            np.testing.assert_allclose(np.abs(update), 0.01 * multiple * first_step, rtol=1e-3)
            continue
        layers = update if "layers" in name or "blocks" in name else update[None]
        for layer in layers:
            inputs = 2 if "o_proj" in name else 1  # heads and their width come in together
            joined = layer.reshape(int(np.prod(layer.shape[:inputs])), -1)
            values = np.linalg.svd(joined, compute_uv=False) / (0.5 * multiple)
            stretched = max(1, joined.shape[1] / joined.shape[0]) ** 0.5
            # Five Newton-Schulz steps leave the smallest values of a square matrix, which lie near 0, where they are.
            assert 0.3 * stretched < np.median(values) and values.max() < 1.4 * stretched, name


def test_eps_holds_back_what_gets_next_to_no_gradient():
    params = {
        "model": {
            "embed_tokens": {"weight": np.ones((4, 4), np.float32)},
            "other": {"weight": np.ones((4, 4), np.float32)},
        }
    }
    gradients = jax.tree.map(lambda p: np.full_like(p, 1e-6), params)
    for matrix_rate in (0.0, 0.1):
        settings = Optimizer(1.0, matrix_rate, schedule="flat", clip=0.0, eps=1e-3)
        update, _ = updated(make(settings, params, 10), gradients, params)
        assert np.abs(update["model"]["embed_tokens"]["weight"]).max() < 2e-3


def test_the_gradient_is_clipped_by_its_global_norm():
    params = {"a": {"weight": jnp.ones((2, 2))}, "b": {"weight": jnp.ones((3,))}}
    large, small = (
        jax.tree.map(lambda p, s=scale: s * jnp.arange(1.0, p.size + 1).reshape(p.shape), params) for scale in (9, 0.01)
    )
    norm = float(optax.global_norm(large))
    clipped_by_hand = jax.tree.map(lambda g: g / norm, large)

    def run(clip, first):
        optimizer = make(Optimizer(1.0, schedule="flat", clip=clip), params, 10)
        _, state = optimizer.update(first, optimizer.init(params), params)
        return optimizer.update(small, state, params)[0]  # Adam remembers how large the first was

    with_clip, by_hand, without = run(1.0, large), run(0.0, clipped_by_hand), run(0.0, large)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), with_clip, by_hand)
    assert not np.allclose(with_clip["b"]["weight"], without["b"]["weight"], rtol=1e-2)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"learning_rate": 0.0}, "learning_rate = 0.0, matrix_rate = 0.0: expected above 0, and 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"learning_rate": 1.0, "matrix_rate": -1.0}, "matrix_rate = -1.0"),
        ({"learning_rate": 1.0, "warmup_steps": -1}, "warmup_steps = -1"),
        ({"learning_rate": 1.0, "final_share": 1.5}, "final_share = 1.5"),
        (
            {"learning_rate": 1.0, "rates": {"visual": -1.0}},
            "rates = {'visual': -1.0}: expected multiples of 0 or more",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, told):
    with pytest.raises(ValueError) as error:
        Optimizer(**settings)
    assert told in str(error.value)
