"""What the stages share: the run's folders and settings, its data, its model, and how a stage trains."""

import dataclasses
import functools
import json
import os
import platform
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ain_jax import sample, sharding
from ain_jax.data import loader, pack_plan
from ain_jax.data.builders import files as file_builder
from ain_jax.data.builders import sample as sample_builder
from ain_jax.data.builders.files import Sources
from ain_jax.data.builders.records import Records
from ain_jax.data.builders.sample_records import KINDS, SampleParams
from ain_jax.data.examples import Answers, Examples, PictureSettings, tokenise, tokenizer_fingerprint
from ain_jax.data.images import ImageSettings
from ain_jax.data.loader import Loader
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing
from ain_jax.data.tiles import TileSettings
from ain_jax.experiment import Resolved, nearest
from ain_jax.launching import processes
from ain_jax.models import attention, lora
from ain_jax.models.config import ModelConfig, VisionConfig
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import MultimodalModel, abstract_params, axis_names, init_params
from ain_jax.stages import model_settings
from ain_jax.stages.model_settings import Model, Start, absent
from ain_jax.tokenizer import chat, schedule
from ain_jax.tokenizer import folder as tokenizer_files
from ain_jax.tokenizer.align import evenly, token_bytes
from ain_jax.tokenizer.schedule import Vocabulary
from ain_jax.tokenizer.with_template import Templated, with_template
from ain_jax.train import checkpoint, rows
from ain_jax.train.loop import Trainer
from ain_jax.train.optimizer import Optimizer
from ain_jax.weights import embeddings, join, load

EXTEND = "extend_tokenizer"
OTHERS = "others"  # the part of a source that no other part in the mixture has
NEW_ROWS = "new_rows.npz"  # beside the tokenizer: the rows of its new pieces before any step

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shared:
    """What several runs have in common: the folder their data are built in, and what one process compiled for them."""

    data: Path
    programs: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict)


# Settings that reach a stage's programs as arrays and their shapes alone, or not at all.
NOT_COMPILED = ("Sources", "SampleParams", "Mixture", "Packing", "Loader", "Start", "Watch", "Budget")


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One stage of one run: where it writes and what it was told."""

    resolved: Resolved
    root: Path
    stage: str
    profile: bool = False  # a trace of some of its steps is asked for
    shared: Shared | None = None  # with other runs

    @property
    def folder(self) -> Path:
        return self.root / self.stage

    @property
    def data(self) -> Path:
        """Where built and tokenised data lie, each under a fingerprint of all that decides it."""
        return self.shared.data if self.shared else self.root / "data"

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

    def get(self, cls: type[T]) -> T:
        """The settings of this stage of one class."""
        return self.resolved.stage(self.stage)[cls.__name__]

    def of(self, stage: str) -> "StageRun":
        """Another stage of the same run, to read its settings or what it wrote."""
        return dataclasses.replace(self, stage=stage)

    def seed(self, purpose: str) -> int:
        """A seed for one purpose of this stage, fixed by the experiment's own."""
        return zlib.crc32(f"{self.resolved.experiment.seed}/{self.stage}/{purpose}".encode())

    def kind_seed(self, purpose: str) -> int:
        """The same for all stages of one kind: on the same data they then have the same rows."""
        return self.of(self.resolved.experiment.kind(self.stage)).seed(purpose)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of this run."""
        return chat.load_tokenizer(self.tokenizer_folder)

    @property
    def base(self) -> Path | None:
        """The published folder that the model is taken from, or None."""
        folder = self.get(Model).folder
        return Path(folder) if folder else None

    @property
    def extended(self) -> bool:
        """Whether this run extends its tokenizer."""
        return EXTEND in [self.resolved.experiment.kind(stage) for stage in self.resolved.experiment.stages]

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies: the extended one of this run, or that of the published model."""
        if self.extended or self.base is None:
            folder = self.root / EXTEND / "tokenizer"
            if not folder.is_dir():
                raise ValueError(f"{folder} is not there yet: run the stage {EXTEND} first")
            return folder
        self._refuse_missing(self.base)
        return self.templated.folder if self.templated else self.base

    @functools.cached_property
    def templated(self) -> Templated | None:
        """The published model's tokenizer with the chat template that Chat names; None where it is taken as it is."""
        name = self.get(chat.Chat).template
        if not name or self.extended or self.base is None:
            return None
        base, folder = self.base, self.root / f"tokenizer_{name}"
        rows = load.load_config(base).text.vocabulary

        def make() -> Templated:
            beside = folder.with_name(f"{folder.name}.{platform.node()}.{os.getpid()}")
            made = with_template(base, name, beside, rows, self.get(Model).vocabulary_multiple)
            if folder.is_dir():
                shutil.rmtree(beside)
            else:
                beside.replace(folder)
            return dataclasses.replace(made, folder=folder)

        return processes.first(make)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The model's sizes, joined with the tokenizer's ids."""
        if self.base:
            config = self._published(self.base)
            if self.templated:
                text = dataclasses.replace(config.text, vocabulary=self.templated.rows)
                return dataclasses.replace(config, text=text, eos_token_id=self.templated.stop_token_ids)
            return self._grown(config) if self.extended else config
        if size := self.get(Model).size:
            return model_settings.drawn(size, self.tokenizer, self.get(Model).vocabulary_multiple)
        ids: dict[str, Any] = {
            f"{name}_token_id": self.token(f"<|{token}|>")
            for name, token in (
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
                ("eos", "im_end"),
                ("pad", "pad"),
            )
        }
        ids["bos_token_id"] = self.tokenizer.bos_token_id
        return model_settings.sized(self.get(Model), self.get(ImageSettings), len(self.tokenizer), **ids)

    def _published(self, folder: Path) -> ModelConfig:
        """The config of a published folder, which must hold what `Model.size` names."""
        self._refuse_missing(folder)
        config, size = load.load_config(folder), self.get(Model).size
        if vision := self.get(Model).vision_folder:
            rows = self.templated.rows if self.templated else config.text.vocabulary
            config = join.joined_config(config, Path(vision), self.tokenizer, rows)
        if size:
            model_settings.refuse_another(config, size, folder)
        return config

    def _refuse_missing(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(absent("Model.folder", str(folder), self.get(Model).origin))

    def _grown(self, config: ModelConfig) -> ModelConfig:
        """The published model's config with rows for the new ids, and the end and padding ids of its new template."""
        multiple = self.get(Model).vocabulary_multiple
        rows = embeddings.padded_rows(config.text.vocabulary, self.extension.size, multiple)
        ids: dict[str, Any] = {}
        if self.extension.special_tokens:
            for name in ("eos_token_id", "pad_token_id"):
                index = getattr(self.tokenizer, name)
                ids |= {} if index is None else {name: index}
        return dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=rows), **ids)

    @functools.cached_property
    def extension(self) -> tokenizer_files.Extension:
        """The pieces that this run's tokenizer gained."""
        return tokenizer_files.read_extension(self.tokenizer_folder)

    @functools.cached_property
    def part_tokenizers(self) -> list[Any]:
        """The tokenizer of each part of a stage whose vocabulary grows."""
        sizes = self.get(Vocabulary).sizes(len(self.extension.pieces))
        return [schedule.shorter(self.tokenizer, self.extension, size) for size in sizes]

    @functools.cached_property
    def images(self) -> PictureSettings:
        """How pictures are cut: as the published model's processor does, else as the experiment says.

        Of a published processor the experiment may bound the pixels of a picture otherwise, and nothing else.
        """
        own = self.get(ImageSettings)
        if self.base is None or self.config.vision is None:
            return own
        settings = self._processor(self.base)
        bounds = {
            n: getattr(own, n) for n in ("min_pixels", "max_pixels") if getattr(own, n) != getattr(ImageSettings, n)
        }
        other = [f.name for f in dataclasses.fields(own) if f.name not in bounds and getattr(own, f.name) != f.default]
        if other or (bounds and not isinstance(settings, ImageSettings)):
            raise ValueError(
                f"ImageSettings.{', '.join([*other, *bounds])}: the processor of {self.base} decides; of pictures of "
                "free size min_pixels and max_pixels may be set, leave the rest out"
            )
        return dataclasses.replace(settings, **bounds)

    def _processor(self, folder: Path) -> PictureSettings:
        if vision := self.get(Model).vision_folder:
            return join.joined_tiles(Path(vision), self.config)
        return load.load_image_settings(folder, self.config)

    @functools.cached_property
    def token_bytes_V(self) -> np.ndarray:
        """How many bytes of text each id stands for."""
        return token_bytes(self.tokenizer.backend_tokenizer, self.config.text.vocabulary)

    @functools.cached_property
    def model(self) -> MultimodalModel:
        images = self.images
        longest = images.max_pixels // images.patch_size**2 if isinstance(images, ImageSettings) else None
        settings = self.get(Model)
        # By the mesh's devices and not by this machine's: a plan is for devices that are not here.
        backends = attention.resolve(self.mesh.devices.flat[0].platform, settings.attention)
        return MultimodalModel(self.config, jnp.dtype(settings.dtype), settings.remat, longest, backends)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(self.get(sharding.Mesh))

    def token(self, text: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(text)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {text!r}: add it in the stage extend_tokenizer")
        return int(index)

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

    def layout(self) -> Any:
        """Shapes and shardings of the parameters."""
        stored = abstract_params(self.config, jnp.dtype(self.get(Model).param_dtype))
        return sharding.layout(axis_names(self.config), stored, self.mesh)

    def adapters_layout(self) -> Any:
        """Shapes and shardings of the low-rank pairs."""
        abstract = lora.abstract(self.get(Lora), self.config)
        return sharding.layout(lora.axis_names(abstract, axis_names(self.config)), abstract, self.mesh)

    def new_rows_layout(self) -> Any:
        """Shapes and shardings of the rows of the new pieces, which lie as the tables that they are rows of do."""
        abstract = jax.eval_shape(lambda params: rows.take(params, *self.new_rows), self.layout())
        return sharding.layout(jax.tree.map(lambda _: ("vocab", "embed"), abstract), abstract, self.mesh)

    @property
    def trains_all(self) -> bool:
        """Whether this stage saves the parameters, and not a part that stands beside them."""
        return not self.get(Lora).rank and self.get(Optimizer).rows == "all"

    @property
    def new_rows(self) -> tuple[int, int]:
        """The first row of the tokenizer's extension, special tokens among it, and how many there are."""
        return self.extension.base_size, self.extension.size - self.extension.base_size

    def initial_params(self) -> Any:
        """The parameters before any stage: the published model's, or random ones, the same for every stage."""
        if self.base:
            config, settings = load.load_config(self.base), self.get(Model)
            params = load.load_params(self.base, config, jnp.dtype(settings.param_dtype), self.mesh)
            if settings.vision_folder:
                params["visual"] = join.visual_params(
                    Path(settings.vision_folder), self.config, self._parameters_key, self.layout(), self.mesh
                )
            if self.extended:
                first, made = self.new_rows[0], embeddings.load_rows(self.root / EXTEND / NEW_ROWS)
            elif self.templated and self.templated.special_tokens:
                special = self.templated.special_tokens
                first = min(special.values())
                made = embeddings.make_rows(params, config, first, [()] * len(special), embeddings.Embeddings())
            else:
                return params
            grown = embeddings.grow_tables(params, made, first, self.config.text.vocabulary)
            return sharding.placed(grown, self.layout())
        return init_params(self.config, self._parameters_key, self.layout())

    @property
    def _parameters_key(self) -> Any:
        return jax.random.key(zlib.crc32(f"{self.resolved.experiment.seed}/parameters".encode()))

    def initial_adapters(self, params: Any) -> Any:
        """The low-rank pairs that this stage begins with, beside these parameters."""
        drawn = lora.init(self.get(Lora), self.config, jax.random.key(self.seed("adapters")), params)
        return sharding.placed(drawn, self.adapters_layout())

    def trained_adapters(self, stage: str, step: int | None = None) -> Any:
        """The low-rank pairs that a stage ended with, or had at a step."""
        return self._saved(stage, self.of(stage).adapters_layout(), step)

    def trained_params(self, stage: str, step: int | None = None) -> Any:
        """The parameters that a stage ended with, or had at a step whose checkpoint is kept; its parts put in."""
        run = self.of(stage)
        if run.trains_all:
            return self._saved(stage, self.layout(), step)
        if run.get(Lora).rank:
            whole = lora.merge(run.starting_params(), self.trained_adapters(stage, step), run.get(Lora))
        else:
            taken = self._saved(stage, run.new_rows_layout(), step)
            whole = rows.put(run.starting_params(), taken, run.new_rows[0])
        return sharding.placed(whole, self.layout())

    @contextmanager
    def exported_params(self, stage: str, step: int | None = None) -> Iterator[Any]:
        """As `trained_params`, to be read one by one where nothing has to be put in."""
        if not self.of(stage).trains_all:
            whole = self.trained_params(stage, step)
            yield jax.tree.map(lambda x: checkpoint.Leaf(x.shape, np.dtype(x.dtype), lambda: x), whole)
            return
        folder = self.root / stage / "checkpoints"
        with checkpoint.opened(folder, step, self.tokenizer_mark) as (checkpoints, found):
            yield checkpoints.leaves(found, self.layout())

    def starting_params(self) -> Any:
        """The parameters that this stage begins with."""
        stage = self.get(Start).stage
        return self.trained_params(stage) if stage else self.initial_params()

    def marks(self, data: loader.Rows) -> dict[str, str]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return {"pack_plan": data.plan.fingerprint, **self.tokenizer_mark}

    @functools.cached_property
    def tokenizer_mark(self) -> dict[str, str]:
        """What of the marks must be the same wherever weights are used: rows of another vocabulary are not these."""
        return {"tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def _saved(self, stage: str, like: Any, step: int | None) -> Any:
        return checkpoint.load_params(self.root / stage / "checkpoints", like, step, self.tokenizer_mark)


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
