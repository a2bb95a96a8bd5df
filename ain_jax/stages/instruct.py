"""Instruction tuning on text and pictures packed together, the assistant's tokens learnt (AIN, arXiv 2502.00094)."""

from ain_jax.stages import common, training


def run(stage: common.StageRun) -> dict:
    rows = stage.training_rows()
    return training.fit(stage, stage.starting_params(), training.next_token(stage, len(rows.groups)), rows)
