"""What an experiment needs that is not here: weights, tokenizers and data, each with where to get it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ain_jax.data import files
from ain_jax.data.builders.files import Sources
from ain_jax.data.mixture import Mixture
from ain_jax.experiment import Resolved
from ain_jax.stages.common import sample_path, source_parts
from ain_jax.stages.extend_tokenizer import Tokenizer
from ain_jax.stages.model_settings import Model, absent
from ain_jax.train.watch import Watch


def missing(resolved: Resolved, root: Path, only: str | None = None) -> list[str]:
    """A line for each folder and source that a stage not yet finished will read and that is not there.

    `only` names the one stage that is to run.
    """
    lines: list[str] = []
    for stage in [only] if only else resolved.experiment.stages:
        if not (root / stage / "result.json").is_file():
            lines += _of_stage(resolved.stage(stage))
    return list(dict.fromkeys(lines))


def _of_stage(settings: Mapping[str, Any]) -> Iterator[str]:
    model: Model | None = settings.get(Model.__name__)
    if model is not None:
        for name, origin in (("folder", model.origin), ("vision_folder", model.vision_origin)):
            path = getattr(model, name)
            if path and not Path(path).is_dir():
                yield absent(f"Model.{name}", path, origin)
    tokenizer: Tokenizer | None = settings.get(Tokenizer.__name__)
    if tokenizer is not None and tokenizer.base and not sample_path(tokenizer.base).exists():
        yield absent("Tokenizer.base", tokenizer.base, tokenizer.origin, "a published model's tokenizer")
    sources: Sources | None = settings.get(Sources.__name__)
    for name in dict.fromkeys(source_parts(whole)[0] for whole in _read(settings)):
        if sources is not None and name in sources.files:
            try:
                files.find(sources.files[name])
            except ValueError as fault:
                origin = sources.origins.get(name, "")
                to_do = f": {origin}, into {sources.files[name]}" if origin else ""
                yield f"Sources.files[{name!r}]: {fault}{to_do}"


def _read(settings: Mapping[str, Any]) -> Iterator[str]:
    """The names of the sources that a stage reads."""
    if mixture := settings.get(Mixture.__name__):
        yield from mixture.weights
    if tokenizer := settings.get(Tokenizer.__name__):
        yield from (*tokenizer.learn_from, *tokenizer.keep, *tokenizer.measure)
    if watch := settings.get(Watch.__name__):
        yield from watch.texts
