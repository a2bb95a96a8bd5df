"""One stage of one run, as all stages have it: its data beside its model and its settings."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ain_jax import sample, sharding
from ain_jax.data import loader, pack_plan
from ain_jax.data.builders import files as file_builder
from ain_jax.data.builders import sample as sample_builder
from ain_jax.data.builders.files import Sources
from ain_jax.data.builders.records import Records
from ain_jax.data.builders.sample_records import KINDS, SampleParams
from ain_jax.data.examples import Answers, Examples, PictureSettings, tokenise
from ain_jax.data.loader import Loader
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing
from ain_jax.data.tiles import TileSettings
from ain_jax.experiment import nearest
from ain_jax.launching import processes
from ain_jax.models.config import VisionConfig
from ain_jax.stages.run_model import RunModel
from ain_jax.tokenizer import chat, schedule
from ain_jax.tokenizer.align import evenly
from ain_jax.tokenizer.schedule import Vocabulary
from ain_jax.train.loop import Trainer

OTHERS = "others"  # the part of a source that no other part in the mixture has

T = TypeVar("T")

# Settings that reach a stage's programs as arrays and their shapes alone, or not at all.
NOT_COMPILED = ("Sources", "SampleParams", "Mixture", "Packing", "Loader", "Start", "Watch", "Budget")


@dataclasses.dataclass(frozen=True)
class StageRun(RunModel):
    """One stage of one run: its settings, its model, its data."""

    def program(self, name: str, make: Callable[[], T], *also: Any) -> T:
        """What `make` gives, a jitted function: made once for all runs of a process that share.

        Two runs have the same program where they are of one kind of stage, one model and one tokenizer, and all
        settings agree but those of NOT_COMPILED; `also` is what it depends on beside.
        """
        if self.shared is None:
            return make()
        settings = {n: s for n, s in self.resolved.stage(self.stage).items() if n not in NOT_COMPILED}
        kind, tokenizer = self.resolved.experiment.kind(self.stage), tuple(self.tokenizer_mark.values())
        key = (name, kind, repr(settings), repr(self.config), tokenizer, *also)
        if key not in self.shared.programs:
            self.shared.programs[key] = make()
        return self.shared.programs[key]

    @functools.cached_property
    def part_tokenizers(self) -> list[Any]:
        """The tokenizer of each part of a stage whose vocabulary grows."""
        sizes = self.get(Vocabulary).sizes(len(self.extension.pieces))
        return [schedule.shorter(self.tokenizer, self.extension, size) for size in sizes]

    @functools.cached_property
    def _read(self) -> dict[tuple[str, str], tuple[Records, str]]:
        """What `records` gave already: a source may be asked for part by part."""
        return {}

    def records(self, kind: str, split: str) -> tuple[Records, str]:
        """The records of a source (one of Sources.files, or a kind of the sample) and a mark that changes with them."""
        if (kind, split) not in self._read:
            self._read[kind, split] = self._records(kind, split)
        return self._read[kind, split]

    def _records(self, kind: str, split: str) -> tuple[Records, str]:
        sources = self.get(Sources)
        if kind in sources.files:
            built = processes.first(lambda: file_builder.build(kind, sources, self.data))
            return file_builder.records(built, split), Path(built.data_dir).parent.name
        if kind not in KINDS:
            hint = nearest(kind, [*sources.files, *KINDS])
            raise ValueError(f"no source {kind!r}: {hint}; files of your own are named in Sources.files")
        params = self.get(SampleParams)
        builder = processes.first(lambda: sample_builder.build(kind, self.data, params))
        return sample_builder.records(builder, split), sample_builder.fingerprint(params)

    def part(self, name: str, split: str) -> tuple[Any, str]:
        """The records of a source named as in a mixture, of training so many as `Sources.most` leaves, taken evenly;
        and a mark that changes with them. ValueError where it has no such part.
        """
        kind, label = source_parts(name)
        records, mark = self.records(kind, split)
        try:
            if label == OTHERS:
                mixture = self.resolved.stage(self.stage).get(Mixture.__name__)
                if mixture is None:
                    raise ValueError("what the others of a mixture are is asked for in a stage that has no mixture")
                named = [part for source, part in map(source_parts, mixture.weights) if source == kind]
                records, mark = records.without(set(named) - {OTHERS}), f"{mark} without {sorted(named)}"
            elif label:
                records = records.select(label)
        except ValueError as error:
            raise ValueError(f"source {name!r}: {error}") from None
        mark, all_of_it = "/".join((mark, split, name)), len(records)
        most = self.get(Sources).most.get(kind, all_of_it) if split == "train" else all_of_it
        if most >= all_of_it:
            return records, mark
        return records.take(evenly(all_of_it, most)), f"{mark} {most} of {all_of_it}"

    def examples(
        self, name: str, split: str = "train", packing: Packing | None = None, part: int | None = None
    ) -> Examples:
        """The tokenised examples of a source named as in a mixture: "read", or a part of it.

        A part is a language, "documents/ar", or of preference pairs a kind, "preference/neighbour_answer", or a task,
        "instar/closed_qa"; "instar/others" is what no other part of it in the mixture has. Where the vocabulary grows,
        each `part` of the stage has a share of the records of its own, cut by its own tokenizer.
        """
        packing = packing or self.get(Packing)
        kind, _ = source_parts(name)
        records, mark = self.part(name, split)
        tokenizer = self.tokenizer
        if part is not None:
            tokenizer, parts = self.part_tokenizers[part], len(self.part_tokenizers)
            records = records.take(range(part, len(records), parts))
            mark += f"@{part}/{parts}"
        sources = self.get(Sources)
        with tqdm(total=len(records), desc=f"tokenise {name}", unit="record", leave=False, delay=1.0) as bar:

            def progress(done: int, _: int) -> None:
                bar.update(done - bar.n)

            make = functools.partial(
                tokenise,
                records,
                kind,
                tokenizer,
                self._pictures(packing),
                packing.row_tokens,
                mark,
                self.data / "tokenised",
                packing,
                self.get(chat.Chat),
                sources.bad_share if kind in sources.files else 0.0,
                progress,
            )
            made = processes.first(make)
        counts = {"at fault": made.bad, "longer than a row": made.dropped, "cut into several": made.split}
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        if told and processes.is_first():
            tqdm.write(f"{name}: of {len(records):,} records {told}: {made.rejects}")
        return made

    def _pictures(self, packing: Packing) -> PictureSettings | None:
        images = self.images if packing.row_patches and self.config.vision else None
        if isinstance(images, TileSettings) and packing.row_patches % images.side**2:
            raise ValueError(
                f"Packing.row_patches = {packing.row_patches}: expected whole tiles, a multiple of {images.side**2}"
            )
        if packing.row_patches and self.config.vision is None:
            raise ValueError(
                f"Packing.row_patches = {packing.row_patches}, and this {self.config.family} reads no pictures: set 0"
            )
        return images

    def rows(
        self,
        sources: Mapping[str, Examples],
        mixture: Mixture | None,
        count: int | None,
        name: str,
        answers: Answers = "one",
        packing: Packing | None = None,
        rows_per_batch: int = 0,
    ) -> loader.Rows:
        """Packed rows: `count` rows of a mixture, or as many as its epochs make, or (no mixture) every example once."""
        packing = packing or self.get(Packing)
        path, seed = self.folder / name, self.seed(name) if answers == "one" else self.kind_seed(name)
        make = functools.partial(pack_plan.plan, dict(sources), mixture, packing, count, seed, path, rows_per_batch)
        plan = processes.first(make)
        vision = self.config.vision
        return loader.Rows(
            plan,
            list(sources.values()),
            packing,
            self.config.image_token_id,
            self._pictures(packing),
            answers,
            video_token=self.config.video_token_id,
            tokens_per_second=(vision.tokens_per_second if isinstance(vision, VisionConfig) else None) or 0.0,
        )

    def training_rows(self, answers: Answers = "one") -> loader.Rows:
        """The rows of this stage's mixture, as many as its steps take."""
        mixture, trainer, vocabulary = self.get(Mixture), self.get(Trainer), self.get(Vocabulary)
        sources = {name: self.examples(name) for name in mixture.weights} if vocabulary.parts == 1 else {}
        if vocabulary.parts > 1:
            parts = range(vocabulary.parts)
            sources = {f"{name}@{part}": self.examples(name, part=part) for part in parts for name in mixture.weights}
            alone = {
                f"{name}@{part}": tuple(float(weight) if p == part else 0.0 for p in parts)
                for part in parts
                for name, weight in mixture.phase_weights(0).items()
            }
            shares = tuple(float(steps) for steps in vocabulary.steps(trainer.steps))
            mixture = dataclasses.replace(mixture, weights=alone, phases=shares)
        count = trainer.steps * trainer.rows or None
        return self.rows(sources, mixture, count, "pack_plan", answers, rows_per_batch=trainer.rows)

    def batches(self, data: loader.Rows, rows_per_batch: int, start: int = 0):
        """(batch, tokens) from a step onwards, laid over the devices of the mesh."""
        return loader.batches(data, rows_per_batch, sharding.rows(self.mesh), start, self.get(Loader))

    def marks(self, data: loader.Rows) -> dict[str, str]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return {"pack_plan": data.plan.fingerprint, **self.tokenizer_mark}


def source_parts(name: str) -> tuple[str, str]:
    """Name and part of a source: "documents/ar" is ("documents", "ar"), "documents" has no part ("")."""
    name, _, part = name.partition("/")
    return name, part


def sample_path(path: str) -> Path:
    """A path as written in an experiment; `sample:...` lies in the sample that comes with the package."""
    return sample.FOLDER / path.removeprefix("sample:") if path.startswith("sample:") else Path(path)


def write_json(path: Path, value: Any) -> None:
    """Write beside, then rename; the first process does."""
    if not processes.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
