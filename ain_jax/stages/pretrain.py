"""Bilingual pretraining: plain and parallel text, every token learnt (ALLaM, arXiv 2407.15390, section 3)."""

from ain_jax.stages import common, training


def run(stage: common.StageRun) -> dict:
    rows = stage.training_rows()
    return training.fit(stage, stage.starting_params(), training.next_token(stage, len(rows.groups)), rows)
