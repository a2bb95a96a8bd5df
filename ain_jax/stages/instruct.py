"""Instruction tuning on text and pictures packed together, the assistant's tokens learnt (AIN, arXiv 2502.00094)."""

from ain_jax.stages import common, training
from ain_jax.train import losses


def run(stage: common.StageRun) -> dict:
    rows = stage.training_rows()
    return training.fit(stage, stage.starting_params(), loss(stage, len(rows.groups)), rows)


def loss(stage: common.StageRun, groups: int) -> losses.Loss:
    """Cross-entropy of the learnt tokens, reported by so many groups."""
    return losses.next_token(stage.model, groups, stage.get(losses.NextToken), stage.token_bytes_V)
