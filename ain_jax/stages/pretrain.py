"""Bilingual pretraining: plain and parallel text, every token learnt (ALLaM, arXiv 2407.15390, section 3)."""

from ain_jax.stages import common, training
from ain_jax.train import losses


def run(stage: common.StageRun) -> dict:
    rows = stage.training_rows()
    loss = losses.next_token(stage.model, len(rows.groups), stage.get(losses.NextToken), stage.token_bytes_V)
    return training.fit(stage, stage.starting_params(), loss, rows)
