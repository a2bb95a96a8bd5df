"""Preferences, learnt against the frozen model that the stage starts from, or without one (ALLaM, section 5: DPO)."""

import jax
import jax.numpy as jnp

from ain_jax.data.examples import Answers
from ain_jax.data.packing import Packing
from ain_jax.stages import common, training
from ain_jax.stages.model_settings import Model
from ain_jax.tokenizer.chat import Chat
from ain_jax.train import losses, preferences, reference
from ain_jax.train.loop import Trainer
from ain_jax.train.preferences import Preference


def check(stage: common.StageRun) -> None:
    """Refuse, before anything runs, settings that this stage would ignore or cannot keep to."""
    training.check(stage)
    learn, accumulate = stage.get(Chat).learn, stage.get(Trainer).accumulate
    if learn != ("assistant",):
        raise ValueError(
            f"{stage.stage}/Chat.learn = {learn!r}: the assistant's last turn alone is compared or judged: "
            f'give {stage.stage}/Chat.learn = ("assistant",)'
        )
    if stage.get(Preference).answers == "judged" and accumulate > 1:
        raise ValueError(
            f'{stage.stage}/Trainer.accumulate = {accumulate} and Preference.loss = "kto": its baseline is a mean over '
            "the whole batch, which every answer's gradient needs and no part of it has before all are read; leave "
            "accumulate at 1, and save memory by Model.remat"
        )


def run(stage: common.StageRun) -> dict:
    settings = stage.get(Preference)
    rows = stage.training_rows(settings.answers)
    params = stage.starting_params()
    if settings.needs_reference:
        with jax.set_mesh(stage.mesh):
            batches = lambda r: stage.batches(r, together(stage))
            also = f"{stage.config!r}/{jnp.dtype(stage.get(Model).dtype).name}"
            folder = stage.data / "reference"
            # Low-rank pairs lie beside these parameters: without them they are the reference, as they stand.
            rows = reference.with_reference(rows, stage.model, params, batches, folder, also)
    return training.fit(stage, params, loss(stage, len(rows.groups)), rows)


def together(stage: common.StageRun) -> int:
    """Rows of a batch of the reference: as many as a step holds at once; a plan that sets rows without pictures apart
    counts by whole steps."""
    trainer = stage.get(Trainer)
    return trainer.rows // (1 if stage.get(Packing).text_batches else trainer.accumulate)


def loss(stage: common.StageRun, groups: int) -> losses.Loss:
    """The preference loss, reported by so many kinds of pairs or languages of answers."""
    return preferences.preference(stage.model, groups, stage.get(Preference))


def answers(stage: common.StageRun) -> Answers:
    """What an example of a stage is; of stages that learn no preferences, one."""
    learns = Preference.__name__ in stage.resolved.stage(stage.stage)
    return stage.get(Preference).answers if learns else "one"
