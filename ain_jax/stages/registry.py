"""The stages by name: which module runs each, and which settings it reads."""

from collections.abc import Callable, Mapping
from typing import Any

from ain_jax.data.builders.files import Sources
from ain_jax.data.builders.sample_records import SampleParams
from ain_jax.data.images import ImageSettings
from ain_jax.data.loader import Loader
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing
from ain_jax.models.lora import Lora
from ain_jax.plan.estimate import Budget
from ain_jax.sharding import Mesh
from ain_jax.stages import evaluate, export, extend_tokenizer, instruct, prefer, pretrain, training
from ain_jax.stages.common import StageRun
from ain_jax.stages.evaluate import Evaluation
from ain_jax.stages.export import Export
from ain_jax.stages.extend_tokenizer import Tokenizer
from ain_jax.stages.model_settings import Model, Start
from ain_jax.stages.run_settings import EXTEND, Shared
from ain_jax.tokenizer.chat import Chat
from ain_jax.tokenizer.schedule import Vocabulary
from ain_jax.train.loop import Trainer
from ain_jax.train.losses import Loss, NextToken
from ain_jax.train.optimizer import Optimizer
from ain_jax.train.preferences import Preference
from ain_jax.train.watch import Watch
from ain_jax.weights.embeddings import Embeddings

__all__ = ["CHECK", "EXTEND", "LOSS", "RUN", "SETTINGS", "Shared", "StageRun"]

_DATA = (Sources, SampleParams)
_MODEL = (*_DATA, Packing, Chat, Loader, ImageSettings, Model, Mesh)
_TRAINING = (*_MODEL, Mixture, Vocabulary, Start, Lora, Optimizer, Trainer, Watch, Budget)

SETTINGS: Mapping[str, tuple[type, ...]] = {
    "extend_tokenizer": (Tokenizer, Embeddings, *_DATA, Chat, Model, Mesh),
    "pretrain": (*_TRAINING, NextToken),
    "instruct": (*_TRAINING, NextToken),
    "prefer": (*_TRAINING, Preference),
    "evaluate": (Evaluation, *_MODEL),
    "export": (Export, Chat, ImageSettings, Model, Mesh),
}

CHECK: Mapping[str, Callable[[StageRun], None]] = {
    "extend_tokenizer": extend_tokenizer.check,
    "pretrain": training.check,
    "instruct": training.check,
    "prefer": prefer.check,
    "evaluate": evaluate.check,
    "export": export.check,
}

RUN: Mapping[str, Callable[[StageRun], dict[str, Any]]] = {
    "extend_tokenizer": extend_tokenizer.run,
    "pretrain": pretrain.run,
    "instruct": instruct.run,
    "prefer": prefer.run,
    "evaluate": evaluate.run,
    "export": export.run,
}

# Of the stages that train: their loss, reported by so many groups.
LOSS: Mapping[str, Callable[[StageRun, int], Loss]] = {
    "pretrain": training.next_token,
    "instruct": training.next_token,
    "prefer": prefer.loss,
}
