"""Sums done by hand."""

import dataclasses

import pytest

from ain_jax.models.config import ClipConfig, ModelConfig, TextConfig, VisionConfig, qwen2_7b, qwen2_vl_7b
from ain_jax.plan import chips, estimate

TEXT = TextConfig(10, 4, 6, 2, 2, 1, 2, tied=False)  # V 10, D 4, F 6, two layers, N 2, K 1, H 2


def test_pairs_of_a_causal_row():
    assert estimate.pairs(4) == 1 + 2 + 3 + 4
    assert estimate.pairs(4, window=2) == 1 + 2 + 2 + 2
    assert estimate.pairs(4, window=9) == 10


def test_forward_flops_of_a_small_decoder():
    parts = estimate.forward(ModelConfig(TEXT), 3, 5, 2, 0, 0, needed=False)
    # a layer: q 4x4, k and v 4x2 each, o 4x4, three matrices 4x6 = 16 + 16 + 16 + 72 = 120 parameters
    assert parts["decoder"].flops == 3 * 5 * 2 * 2 * 120
    assert parts["attention"].flops == 3 * 2 * (4 * 2 * 2) * 25  # q k and weights v: 2 x 2 FLOPs, N H = 4, 5 x 5 pairs
    assert parts["head"].flops == 3 * 5 * 2 * 40
    needed = estimate.forward(ModelConfig(TEXT), 3, 5, 2, 0, 0, needed=True)
    assert needed["attention"].flops == 3 * 2 * 16 * 15
    assert needed["head"].flops == 3 * 2 * 2 * 40


def test_windows_see_fewer_pairs():
    text = dataclasses.replace(TEXT, windows=(2, 0))
    needed = estimate.forward(ModelConfig(text), 1, 5, 2, 0, 0, needed=True)
    assert needed["attention"].flops == 16 * ((1 + 2 * 4) + 15)


def test_forward_flops_of_a_small_tower():
    vision = VisionConfig(width=8, layers=2, heads=2, mlp_width=16, patch_size=2, temporal_patch_size=1)
    parts = estimate.forward(ModelConfig(TEXT, vision, image_token_id=0), 1, 5, 2, 16, 4, needed=True)
    # a patch of 3 x 2 x 2 values; a block 8x24 + 8x8 + 2 x 8x16 = 512 parameters
    assert parts["vision"].flops == 2 * 16 * (12 * 8 + 2 * 512)
    assert parts["vision attention"].flops == 2 * 4 * 8 * 16 * 4  # each of 16 patches sees the 4 of its picture
    assert parts["merger"].flops == 2 * 4 * (32 * 32 + 32 * 4)
    clip = ClipConfig(width=8, layers=3, heads=2, mlp_width=16, tile=4, patch_size=2, pinpoints=())
    tiles = estimate.forward(ModelConfig(TEXT, clip, image_token_id=0), 1, 5, 2, 16, 4, needed=True)
    assert tiles["vision"].flops == 2 * 16 * (12 * 8 + 2 * 512)  # the last of three layers is not run
    assert tiles["merger"].flops == 2 * 16 * (8 * 4 + 4 * 4)


def test_six_per_parameter_and_token():
    """Qwen2-7B: 6 (N - embedding) for every token, and 12 L N H T (PaLM, appendix B)."""
    tokens = 4096
    parts = estimate.forward(qwen2_7b(), 1, tokens, tokens, 0, 0, needed=False)
    total = sum(estimate.training(parts, dict.fromkeys(parts, "all"), True).values())
    biases_and_norms = 28 * (3584 + 2 * 512 + 2 * 3584) + 3584
    matrices = 7_615_616_512 - 152064 * 3584 - biases_and_norms
    assert total == tokens * (6 * matrices + 12 * 28 * 3584 * tokens)


def test_what_is_frozen_costs_less():
    parts = estimate.forward(qwen2_vl_7b(), 1, 64, 16, 64, 64, needed=True)
    forward = {name: part.flops for name, part in parts.items()}
    every = estimate.training(parts, dict.fromkeys(parts, "all"), True)
    assert every == {name: 3 * flops for name, flops in forward.items()}
    frozen = estimate.training(parts, dict.fromkeys(parts, "all") | {"vision": ""}, True)
    assert frozen["vision"] == forward["vision"] and frozen["vision attention"] == forward["vision attention"]
    assert frozen["merger"] == 2 * forward["merger"]  # nothing learns below it: no gradient of what comes in
    assert frozen["decoder"] == 3 * forward["decoder"]
    adapters = estimate.training(parts, {"decoder": "adapters"}, False)
    assert adapters["decoder"] == 2 * forward["decoder"] and adapters["attention"] == 3 * forward["attention"]
    assert adapters["vision"] == forward["vision"] and adapters["head"] == 2 * forward["head"]


def test_roofline_and_cost():
    pod = chips.read("v5p-128")
    roof = estimate.roofline(pod, 459e12, 2765e9 / 2, 600e9 / 4, 0.0)
    assert dataclasses.astuple(roof) == (1.0, 0.5, 0.25, 0.0)
    assert (roof.fastest, roof.slowest, roof.bound) == (1.0, 1.25, "compute")
    assert estimate.mfu(pod, 64 * 459e12, 2.0) == 0.5
    made = estimate.cost(pod, 1800, 1000, 2.0, 3.0)
    assert (made.tokens, made.hours, made.chip_hours, made.dollars) == (1_800_000, 1.0, 64.0, 192.0)
    assert estimate.cost(pod, 1, 1, 1.0, None).dollars is None
    assert [estimate.steps_for(tokens, 4) for tokens in (8, 9, 0)] == [2, 3, 0]


@pytest.mark.parametrize(
    ("name", "topology", "count"),
    [
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v6e-64", "v6e:8x8", 64),
        ("2xv5p-128", "v5p:4x4x4", 128),
        ("v5p:4x4x8", "v5p:4x4x8", 128),
    ],
)
def test_names_of_slices(name, topology, count):
    found = chips.read(name)
    assert (found.topology, found.chips) == (topology, count)
    assert chips.read(found.name) == found


@pytest.mark.parametrize(
    ("name", "slices", "said"),
    [
        ("v5p-126", 0, "v5p-8, v5p-16, .*v5p-128"),
        ("v5e-24", 0, "v5e-1, v5e-4, v5e-8"),
        ("v9-8", 0, "expected one of v5e, v5p, v6e"),
        ("a100", 0, "such as v5p-128"),
        ("2xv5p-128", 3, "one of the two"),
        ("v5p:4x4x5", 0, "no slice"),
    ],
)
def test_refuses_what_is_no_slice(name, slices, said):
    with pytest.raises(ValueError, match=said):
        chips.read(name, slices)


def test_slices_beside_the_name():
    assert chips.read("v5p-128", 2) == chips.read("2xv5p-128")
