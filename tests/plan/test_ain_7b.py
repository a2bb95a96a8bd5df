"""The experiment of the AIN paper: its settings go together, and its sizes are those of the published model."""

import json
from pathlib import Path

import jax
import pytest

from ain_jax.experiment import parse_override, read_bindings, resolve
from ain_jax.models.config import qwen2_vl_7b, tiny, to_hf
from ain_jax.plan import compile as compiler
from ain_jax.plan import flops
from ain_jax.plan.planned import planned
from ain_jax.stages import registry
from ain_jax.stages.common import StageRun

FILE = Path(__file__).resolve().parents[2] / "experiments" / "ain_7b.gin"


def resolved(*overrides):
    return resolve(read_bindings(FILE), registry.SETTINGS, [parse_override(text) for text in overrides])


def test_needs_neither_weights_nor_data(tmp_path):
    made = resolved()
    for stage in made.experiment.stages:
        registry.CHECK[made.experiment.kind(stage)](StageRun(made, tmp_path, stage))
    run = planned(made, tmp_path, "instruct", jax.devices())
    assert run.config == qwen2_vl_7b()
    assert sum(leaf.size for leaf in jax.tree.leaves(run.layout())) == 8_291_375_616
    batch = run.batch()
    assert batch.tokens_BL.shape == (64, 2048) and batch.patches_BPK.shape == (64, 5376, 3 * 2 * 14 * 14)
    assert compiler.steps_of(run) == 16_785  # 2.2e9 tokens in batches of 131,072
    assert run.model.longest_image == 262_144 // 14**2
    assert run.assumed[0].endswith("sizes of qwen2_vl_7b")


def test_model_flops(tmp_path):
    """6 for each parameter of the matrices and each token or patch, and the pairs of attention."""
    run = planned(resolved(), tmp_path, "instruct", jax.devices())
    every = flops.of_step(run, needed=False)
    matrices = 28 * (3584 * (28 + 2 * 4) * 128 + 3584 * 3584 + 3 * 3584 * 18944)
    assert every["decoder"] == 64 * 2048 * 6 * matrices
    assert every["head"] == 64 * 2048 * 6 * 152064 * 3584
    assert every["attention"] == 64 * 2048**2 * 12 * 28 * 3584
    tower = 1176 * 1280 + 32 * (4 * 1280**2 + 2 * 1280 * 5120)
    assert every["vision"] == 64 * 5376 * 6 * tower
    frozen = planned(resolved('instruct/Optimizer.rates={"visual": 0.0}'), tmp_path, "instruct", jax.devices())
    needed = flops.of_step(frozen, needed=True)
    assert needed["vision"] == every["vision"] / 3 and needed["head"] == every["head"] / 2
    adapters = planned(resolved("instruct/Lora.rank=8"), tmp_path, "instruct", jax.devices())
    assert flops.of_step(adapters, needed=True)["decoder"] == every["decoder"] * 2 / 3


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny())), encoding="utf-8")
    run = planned(resolved(f'Model.folder="{tmp_path}"'), tmp_path, "instruct", jax.devices())
    with pytest.raises(ValueError, match="is no qwen2_vl_7b, which Model.size names: .* and [0-9]+ more"):
        _ = run.config


def test_sizes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no published sizes 'qwen2_vl_8b': did you mean 'qwen2_vl_7b'"):
        resolved('Model.size="qwen2_vl_8b"')
    run = planned(resolved('Model.size=""'), tmp_path, "instruct", jax.devices())
    with pytest.raises(ValueError, match='Model.size = "qwen2_vl_7b"'):
        _ = run.config


def test_only_the_bounds_of_a_published_processor_may_change(tmp_path):
    run = planned(resolved("ImageSettings.patch_size=16"), tmp_path, "instruct", jax.devices())
    with pytest.raises(ValueError, match=r"ImageSettings.patch_size, max_pixels: the processor of"):
        _ = run.images
