"""A stage's parameters -> a folder that transformers opens with no code of ours.

    python -m ain_jax.stages.export --run runs/ain_tiny --stage instruct --step 700 --out exported

writes any checkpoint that a run holds, at any time, beside what the run itself exports at its end.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    place = stage.root / settings.folder
    write(stage, settings.stage, None, place)
    files = sorted(p for p in Path(place).iterdir() if p.is_file())
    return {"folder": settings.folder, "files": {p.name: p.stat().st_size for p in files}}


def write(stage: common.StageRun, trained: str, step: int | None, place: Path) -> None:
    """Export what the stage `trained` had at a step, or at its newest checkpoint.

    The parameters stay on the devices as they are laid out there; the host holds one shard of the folder at a time.
    """
    settings, experiment = stage.get(Export), stage.resolved.experiment
    if trained not in experiment.stages:
        raise ValueError(f"Export.stage = {trained!r}: expected one of {', '.join(experiment.stages)}")
    params = stage.trained_params(trained, step)
    when = f"after the stage {trained}" if step is None else f"at step {step} of the stage {trained}"
    card = export.card(
        f"{experiment.name}, {when}",
        licence=settings.licence,
        data=settings.data,
        experiment=experiment.name,
        pictures=stage.config.vision is not None,
    )
    tokenizer = stage.root / "extend_tokenizer" / "tokenizer"
    export.export_folder(params, stage.config, tokenizer, stage.get(ImageSettings), place, model_card=card)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint of a run as a folder that transformers opens."""
    from ain_jax.experiment import read_bindings, resolve
    from ain_jax.stages import registry

    parser = argparse.ArgumentParser(prog="python -m ain_jax.stages.export", description=main.__doc__)
    parser.add_argument("--run", required=True, type=Path, help="the folder of a run, finished or not")
    parser.add_argument("--stage", help="whose weights (default: the stage that the experiment exports)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--out", type=Path, help="the folder to write (default: RUN/export-STAGE-STEP)")
    given = parser.parse_args(arguments)
    try:
        file = given.run / "config.gin"
        if not file.is_file():
            raise ValueError(f"{file} is not there: expected the folder of a run, as launch/local.py writes it")
        resolved = resolve(read_bindings(file), registry.SETTINGS)
        stage = common.StageRun(resolved, given.run, "export")
        if "export" not in resolved.experiment.stages:
            raise ValueError(f"{resolved.experiment.name} has no stage export, whose settings this would use")
        trained = given.stage or stage.get(Export).stage
        name = f"export-{trained}" + ("" if given.step is None else f"-{given.step}")
        place = given.out or given.run / name
        write(stage, trained, given.step, place)
    except (ValueError, OSError) as fault:
        print(f"ain_jax: {fault}", file=sys.stderr)
        return 1
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
