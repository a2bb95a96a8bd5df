"""A stage's parameters -> a folder that transformers opens with no code of ours.

    python -m ain_jax.stages.export --run runs/ain_tiny --stage instruct --step 700 --out exported

writes any checkpoint that a run holds, at any time, beside what the run itself exports at its end. Of a stage that
trained low-rank adapters it writes these alone, as PEFT opens them, or with --merge_lora the whole model with them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ain_jax.data.examples import tokenizer_fingerprint
from ain_jax.launching import processes
from ain_jax.models.config import to_hf
from ain_jax.models.lora import Lora
from ain_jax.stages import common
from ain_jax.stages.model_settings import Start
from ain_jax.weights import export
from ain_jax.weights.adapters import save_adapters
from ain_jax.weights.load import load_config


@dataclasses.dataclass(frozen=True)
class Export:
    """What is written, and where to inside the run's folder."""

    stage: str = "prefer"  # whose last weights are exported
    folder: str = "export"
    merge_lora: bool = False  # the whole model with the stage's adapters in it, not the adapters alone
    dtype: Literal["", "float32", "bfloat16"] = ""  # of the weights written; "" as they are trained
    base: str = ""  # the published name of the model that was trained on, for the model card
    licence: str = ""
    data: str = ""  # a line for the model card


def run(stage: common.StageRun) -> dict[str, Any]:
    settings = stage.get(Export)
    place = stage.root / settings.folder
    write(stage, settings.stage, None, place, settings.merge_lora)
    processes.wait_for_all("export")
    files = sorted(p for p in Path(place).iterdir() if p.is_file())
    return {"folder": settings.folder, "files": {p.name: p.stat().st_size for p in files}}


def check(stage: common.StageRun) -> None:
    """Refuse, before anything runs, what this stage could not write."""
    if stage.base and (stage.base / "config.json").is_file():
        to_hf(load_config(stage.base))
    settings = stage.get(Export)
    _refuse(stage, settings.stage, settings.merge_lora)


def _refuse(stage: common.StageRun, trained: str, merge_lora: bool) -> None:
    training = [name for name in stage.resolved.experiment.stages if Lora.__name__ in stage.resolved.stage(name)]
    if trained not in training:
        raise ValueError(f"stage {trained!r} trains no weights: expected one of {', '.join(training)}")
    if merge_lora and not stage.of(trained).get(Lora).rank:
        raise ValueError(f"merge_lora: the stage {trained} trains the whole weights, no adapters; leave it out")


def write(stage: common.StageRun, trained: str, step: int | None, place: Path, merge_lora: bool) -> None:
    """Export what the stage `trained` had at a step, or at its newest checkpoint.

    Memory holds one parameter at a time, the layers that are stacked in it together; with adapters merged, all of them.
    """
    settings, experiment = stage.get(Export), stage.resolved.experiment
    _refuse(stage, trained, merge_lora)
    adapted = stage.of(trained).get(Lora)
    if adapted.rank and not merge_lora:
        pairs = processes.fetch(stage.trained_adapters(trained, step))
        fingerprint = tokenizer_fingerprint(stage.tokenizer)
        # What lies under an earlier stage's weights has no name that PEFT could open.
        base = "" if stage.of(trained).get(Start).stage else str(stage.base or "")
        processes.of_first(
            lambda: save_adapters(pairs, adapted, stage.config, place, base=base, tokenizer=fingerprint) and None
        )
        return
    when = f"after the stage {trained}" if step is None else f"at step {step} of the stage {trained}"
    card = export.card(
        f"{experiment.name}, {when}",
        base=settings.base or (stage.base.name if stage.base else ""),
        licence=settings.licence,
        data=settings.data,
        experiment=experiment.name,
        pictures=stage.config.vision is not None,
    )
    with stage.exported_params(trained, step) as params:
        if not processes.is_first():
            export.read_weights(params, stage.config)  # each takes part in reading, the first process writes
            return
        export.export_folder(
            params,
            stage.config,
            stage.tokenizer_folder,
            stage.images,
            place,
            model_card=card,
            dtype=settings.dtype,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint of a run as a folder that transformers opens."""
    from ain_jax.experiment import read_bindings, resolve
    from ain_jax.stages import registry

    parser = argparse.ArgumentParser(prog="python -m ain_jax.stages.export", description=main.__doc__)
    parser.add_argument("--run", required=True, type=Path, help="the folder of a run, finished or not")
    parser.add_argument("--stage", help="whose weights (default: the stage that the experiment exports)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--out", type=Path, help="the folder to write (default: RUN/export-STAGE-STEP)")
    parser.add_argument("--merge_lora", action="store_true", help="the whole model, the stage's adapters merged")
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
        write(stage, trained, given.step, place, given.merge_lora)
    except (ValueError, OSError) as fault:
        print(f"ain_jax: {fault}", file=sys.stderr)
        return 1
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
