"""The experiments of the papers: their settings fit, their sizes are the published ones; nothing is there."""

from pathlib import Path

import jax
import pytest

from ain_jax.experiment import read_bindings, resolve
from ain_jax.models.multimodal import parameter_count
from ain_jax.plan import compile as compiler
from ain_jax.plan.planned import planned
from ain_jax.stages import registry
from ain_jax.stages.common import StageRun

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
QWEN2, PROJECTOR = 7_615_616_512, 1024 * 3584 + 3584 + 3584 * 3584 + 3584
CLIP = 303_507_456  # ViT-L/14 of 336 pixels, as transformers counts it
# Name: its parameters, and how many steps each stage takes.
PAPERS = {
    # As Llama-2's, with 32,000 rows more in the embedding and in the head.
    "allam_7b": (7_000_559_616, {"pretrain": 286_103, "instruct": 17_167, "prefer": 468}),
    "allam_7b_scratch": (7_000_559_616, {"pretrain": 1_239_777, "instruct": 17_167, "prefer": 468}),
    "allam_13b": (13_015_864_320 + 2 * 32_000 * 5120, {"pretrain": 286_103}),
    "allam_70b": (68_976_648_192 + 2 * 32_000 * 8192, {"pretrain": 143_052}),
    "pangea_7b": (QWEN2 + CLIP + PROJECTOR + 3584, {"projector": 3_148, "instruct": 28_611}),
    "llamar_8b": (8_030_261_248, {"instruct": 19_532}),
    "gemmar_7b": (8_537_680_896, {"instruct": 19_532}),
}


@pytest.mark.parametrize("name", PAPERS)
def test_sizes_and_steps(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = resolve(read_bindings(EXPERIMENTS / f"{name}.gin"), registry.SETTINGS)
    for stage in made.experiment.stages:
        registry.CHECK[made.experiment.kind(stage)](StageRun(made, tmp_path, stage))
    parameters, steps = PAPERS[name]
    for stage, count in steps.items():
        run = planned(made, tmp_path, stage, jax.devices())
        assert parameter_count(run.config) == parameters
        assert compiler.steps_of(run) == count
        assert "no pack plan yet: rows are counted as full" in run.assumed
        others = [program for program, _, _ in compiler.others(run)]
        watched = ["watched texts"] + ["watched texts without pictures"] * (run.config.vision is not None)
        assert others == (["reference"] if stage == "prefer" else []) + watched
