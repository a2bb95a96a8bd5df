"""Direct preference optimisation against the frozen model that the stage starts from (ALLaM, section 5)."""

import dataclasses

import jax

from ain_jax.stages import common, training
from ain_jax.train import losses, reference
from ain_jax.train.loop import Trainer


@dataclasses.dataclass(frozen=True)
class Preference:
    """Settings of the preference loss."""

    beta: float = 0.1  # how dear it is to leave the reference, per nat
    sft: float = 0.0  # share of the better answer's own cross-entropy (per token) in the loss

    def __post_init__(self):
        if not self.beta > 0 or self.sft < 0:
            raise ValueError(f"beta = {self.beta}, sft = {self.sft}: expected above 0, and 0 or more")


def run(stage: common.StageRun) -> dict:
    rows = stage.training_rows(pairs=True)
    params = stage.starting_params()
    with jax.set_mesh(stage.mesh):
        batches = lambda r: stage.batches(r, stage.get(Trainer).rows)
        rows = reference.with_reference(rows, stage.model, params, batches, stage.folder / "reference.npz")
    return training.fit(stage, params, loss(stage, len(rows.groups)), rows)


def loss(stage: common.StageRun, groups: int) -> losses.Loss:
    """The preference loss, reported by so many kinds of pairs."""
    settings = stage.get(Preference)
    return losses.preference(stage.model, groups, settings.beta, settings.sft)
