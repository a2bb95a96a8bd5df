"""The last stage's parameters -> a folder that transformers opens with no code of ours."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ain_jax.data.images import ImageSettings
from ain_jax.stages import common
from ain_jax.weights import export


@dataclasses.dataclass(frozen=True)
class Export:
    """What is written, and where to inside the run's folder."""

    stage: str = "prefer"  # whose last weights are exported
    folder: str = "export"
    licence: str = ""
    data: str = ""  # a line for the model card


def run(stage: common.StageRun) -> dict[str, Any]:
    settings = stage.get(Export)
    experiment = stage.resolved.experiment
    if settings.stage not in experiment.stages:
        raise ValueError(f"Export.stage = {settings.stage!r}: expected one of {', '.join(experiment.stages)}")
    params = jax.tree.map(np.asarray, stage.trained_params(settings.stage))
    place = stage.root / settings.folder
    card = export.card(
        f"{experiment.name}, after the stage {settings.stage}",
        licence=settings.licence,
        data=settings.data,
        experiment=experiment.name,
    )
    export.export_folder(
        params,
        stage.config,
        stage.root / "extend_tokenizer" / "tokenizer",
        stage.get(ImageSettings),
        place,
        model_card=card,
    )
    files = sorted(p for p in Path(place).iterdir() if p.is_file())
    return {"folder": settings.folder, "files": {p.name: p.stat().st_size for p in files}}
