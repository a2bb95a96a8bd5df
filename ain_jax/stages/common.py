"""What the stages share: the run's folders and settings, its data, its model, and how a stage trains."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from ain_jax import sample, sharding
from ain_jax.data import formats, loader, pack_plan
from ain_jax.data.builders import sample as sample_builder
from ain_jax.data.builders.sample_records import KINDS, SampleParams
from ain_jax.data.examples import Examples, tokenise, tokenizer_fingerprint
from ain_jax.data.images import ImageSettings
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing
from ain_jax.experiment import Resolved, nearest
from ain_jax.models import lora
from ain_jax.models.config import ModelConfig, TextConfig, VisionConfig
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import MultimodalModel, abstract_params, axis_names, init_params
from ain_jax.tokenizer import chat
from ain_jax.tokenizer.extend import padded_vocab
from ain_jax.train import checkpoint, metrics, optimizer, state, step
from ain_jax.train.loop import Trainer, train
from ain_jax.train.losses import Loss
from ain_jax.train.optimizer import Optimizer
from ain_jax.weights import load

EXTEND = "extend_tokenizer"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Model:
    """The model: a published folder, whose sizes, weights, tokenizer and image settings are taken, or sizes.

    Of sizes a Qwen2-VL is made; ids and the number of rows come from the extended tokenizer.
    """

    folder: str = ""  # as transformers saves it
    width: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    mlp_width: int = 0
    vision_width: int = 0
    vision_layers: int = 0
    vision_heads: int = 0
    tied: bool = True
    rope_theta: float = 10_000.0
    mrope_section: tuple[int, int, int] | None = None  # None: half the frequencies for time, a quarter for each side
    max_positions: int = 4096
    vocabulary_multiple: int = 64  # rows of the embedding are padded to a multiple
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        sizes = [f for f in dataclasses.fields(self) if f.name not in ("folder", "remat")]
        if self.folder:
            given = [f.name for f in sizes if getattr(self, f.name) != f.default]
            if given:
                raise ValueError(f"folder = {self.folder!r} has sizes of its own: leave {', '.join(given)} out")
            return
        missing = [f.name for f in sizes if f.default == 0 and getattr(self, f.name) < 1]
        if missing:
            raise ValueError(f"{', '.join(missing)}: expected 1 or more each, or folder, a published model")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is no multiple of heads = {self.heads}")


@dataclasses.dataclass(frozen=True)
class Start:
    """The weights that a stage begins with: those of an earlier stage's last step, or ("") the model's own.

    The model's own are those of `Model.folder`, or random ones.
    """

    stage: str = ""


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One stage of one run: where it writes and what it was told."""

    resolved: Resolved
    root: Path
    stage: str

    @property
    def folder(self) -> Path:
        return self.root / self.stage

    def get(self, cls: type[T]) -> T:
        """The settings of this stage of one class."""
        return self.resolved.stage(self.stage)[cls.__name__]

    def of(self, stage: str) -> "StageRun":
        """Another stage of the same run, to read its settings or what it wrote."""
        return dataclasses.replace(self, stage=stage)

    def seed(self, purpose: str) -> int:
        """A seed for one purpose of this stage, fixed by the experiment's own."""
        return zlib.crc32(f"{self.resolved.experiment.seed}/{self.stage}/{purpose}".encode())

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of this run."""
        return chat.load_tokenizer(self.tokenizer_folder)

    @property
    def base(self) -> Path | None:
        """The published folder that the model is taken from, or None."""
        folder = self.get(Model).folder
        if folder and EXTEND in self.resolved.experiment.stages:
            raise ValueError(
                f"Model.folder = {folder!r} has a tokenizer of its own, and its rows do not grow yet: "
                f"take {EXTEND} out of Experiment.stages"
            )
        return Path(folder) if folder else None

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies: the extended one of this run, or that of the published model."""
        folder = self.base or self.root / EXTEND / "tokenizer"
        if not folder.is_dir():
            raise ValueError(f"{folder} is not there" + ("" if self.base else f" yet: run the stage {EXTEND} first"))
        return folder

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The model's sizes, joined with the tokenizer's ids."""
        if self.base:
            return load.load_config(self.base)
        m, images = self.get(Model), self.get(ImageSettings)
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
        half = m.width // m.heads // 2
        text = TextConfig(
            vocabulary=padded_vocab(len(self.tokenizer), m.vocabulary_multiple),
            width=m.width,
            mlp_width=m.mlp_width,
            layers=m.layers,
            heads=m.heads,
            kv_heads=m.kv_heads,
            head_width=m.width // m.heads,
            rope_theta=m.rope_theta,
            tied=m.tied,
            max_positions=m.max_positions,
            mrope_section=m.mrope_section or (half - 2 * (half // 4), half // 4, half // 4),
        )
        vision = VisionConfig(
            width=m.vision_width,
            layers=m.vision_layers,
            heads=m.vision_heads,
            mlp_width=4 * m.vision_width,
            patch_size=images.patch_size,
            merge_size=images.merge_size,
            temporal_patch_size=images.temporal_patch_size,
        )
        return ModelConfig(text, vision, bos_token_id=self.tokenizer.bos_token_id, **ids)

    @functools.cached_property
    def images(self) -> ImageSettings:
        """How pictures are cut: as the published model's processor does, else as the experiment says."""
        if self.base is None or self.config.vision is None:
            return self.get(ImageSettings)
        settings = load.load_image_settings(self.base, self.config)
        if not isinstance(settings, ImageSettings):
            raise ValueError(f"{self.base}: training a {self.config.family} with pictures is not supported yet")
        return settings

    @functools.cached_property
    def model(self) -> MultimodalModel:
        longest = self.images.max_pixels // self.images.patch_size**2
        return MultimodalModel(self.config, remat=self.get(Model).remat, longest_image=longest)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(self.get(sharding.Mesh))

    def token(self, text: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(text)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {text!r}: add it in the stage extend_tokenizer")
        return int(index)

    def records(self, kind: str, split: str) -> tuple[Sequence[formats.Record], str]:
        """The records of one source and a mark that changes with them. `kind` is a kind of the sample, or a file."""
        if kind.endswith(".jsonl"):
            return formats.read_jsonl(Path(kind)), formats.file_mark(Path(kind))
        if kind not in KINDS:
            raise ValueError(f"no source {kind!r}: {nearest(kind, list(KINDS))}; or give the path of a .jsonl file")
        params = self.get(SampleParams)
        builder = sample_builder.build(kind, self.root / "data", params)
        return sample_builder.records(builder, split), sample_builder.fingerprint(params)

    def examples(self, name: str, split: str = "train", packing: Packing | None = None) -> Examples:
        """The tokenised examples of a source named as in a mixture: "read", or "documents/ar" for one language."""
        packing = packing or self.get(Packing)
        kind, language = source_parts(name)
        records, mark = self.records(kind, split)
        if language:
            present = sorted({r.language for r in records})
            kept = [r for r in records if r.language == language]
            if not kept:
                raise ValueError(f"source {name!r}: no record in {language!r}; {kind} has {', '.join(present)}")
            records = kept
        images = self._pictures(packing)
        label = Path(name).stem if name.endswith(".jsonl") else kind
        mark = "/".join((mark, split, name))
        cache = self.root / "data" / "tokenised"
        return tokenise(records, label, self.tokenizer, images, packing.row_tokens, mark, cache)

    def _pictures(self, packing: Packing) -> ImageSettings | None:
        if packing.row_patches and self.config.vision is None:
            raise ValueError(
                f"Packing.row_patches = {packing.row_patches}, and this {self.config.family} reads no pictures: set 0"
            )
        return self.images if packing.row_patches else None

    def rows(
        self,
        sources: Mapping[str, Examples],
        mixture: Mixture | None,
        count: int | None,
        name: str,
        pairs: bool = False,
        packing: Packing | None = None,
    ) -> loader.Rows:
        """Packed rows: `count` rows of a mixture, or every example of the sources once."""
        packing = packing or self.get(Packing)
        path = self.folder / f"{name}.npz"
        plan = pack_plan.plan(dict(sources), mixture, packing, count, self.seed(name), path)
        images = self._pictures(packing)
        return loader.Rows(plan, list(sources.values()), packing, self.config.image_token_id, images, pairs)

    def training_rows(self, pairs: bool = False) -> loader.Rows:
        """The rows of this stage's mixture, as many as its steps take."""
        mixture, trainer = self.get(Mixture), self.get(Trainer)
        sources = {name: self.examples(name) for name in mixture.weights}
        return self.rows(sources, mixture, trainer.steps * trainer.rows, "pack_plan", pairs)

    def batches(self, rows: loader.Rows, rows_per_batch: int, start: int = 0):
        """(batch, tokens) from a step onwards, laid over the devices of the mesh."""
        return loader.batches(rows, rows_per_batch, sharding.rows(self.mesh), start)

    def layout(self) -> Any:
        """Shapes and shardings of the parameters."""
        return sharding.layout(axis_names(self.config), abstract_params(self.config), self.mesh)

    def initial_params(self) -> Any:
        """The parameters before any stage: the published model's, or random ones, the same for every stage."""
        if self.base:
            return load.load_params(self.base, self.config, jnp.float32, self.mesh)
        key = jax.random.key(zlib.crc32(f"{self.resolved.experiment.seed}/parameters".encode()))
        drawn = init_params(self.config, key)
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), drawn, self.layout())

    def initial_adapters(self) -> Any:
        """The low-rank pairs that this stage begins with."""
        drawn = lora.init(self.get(Lora), self.config, jax.random.key(self.seed("adapters")))
        placed = sharding.shardings(lora.axis_names(drawn, axis_names(self.config)), drawn, self.mesh)
        return jax.tree.map(jax.device_put, drawn, placed)

    def trained_adapters(self, stage: str, step: int | None = None) -> Any:
        """The low-rank pairs that a stage ended with, or had at a step."""
        return checkpoint.load_params(self.root / stage / "checkpoints", self.of(stage).initial_adapters(), step)

    def trained_params(self, stage: str, step: int | None = None) -> Any:
        """The parameters that a stage ended with, or had at a step whose checkpoint is kept; adapters merged."""
        run = self.of(stage)
        if not run.get(Lora).rank:
            return checkpoint.load_params(self.root / stage / "checkpoints", self.layout(), step)
        merged = lora.merge(run.starting_params(), self.trained_adapters(stage, step), run.get(Lora))
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), merged, self.layout())

    @contextmanager
    def exported_params(self, stage: str, step: int | None = None) -> Iterator[Any]:
        """As `trained_params`, to be read one by one where nothing has to be merged."""
        if self.of(stage).get(Lora).rank:
            yield self.trained_params(stage, step)
            return
        with checkpoint.opened(self.root / stage / "checkpoints", step) as (checkpoints, found):
            yield checkpoints.leaves(found, self.layout())

    def starting_params(self) -> Any:
        """The parameters that this stage begins with."""
        stage = self.get(Start).stage
        if not stage:
            return self.initial_params()
        stages = self.resolved.experiment.stages
        if stage not in stages or stages.index(stage) >= stages.index(self.stage):
            raise ValueError(
                f"{self.stage}/Start.stage = {stage!r}: expected one of the stages before it, "
                f'{", ".join(stages[: stages.index(self.stage)])}, or "" for the weights of Model'
            )
        return self.trained_params(stage)

    def marks(self, rows: loader.Rows) -> dict[str, str]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return {"pack_plan": rows.plan.fingerprint, "tokenizer": tokenizer_fingerprint(self.tokenizer)}


def fit(run: StageRun, params: Any, loss: Loss, rows: loader.Rows) -> dict[str, Any]:
    """Train `params` on `rows` to the last step, from the newest checkpoint if there is one; what it came to.

    With `Lora.rank` the parameters stay, and what is trained and saved are the pairs beside them.
    """
    trainer, settings, adapted = run.get(Trainer), run.get(Optimizer), run.get(Lora)
    with jax.set_mesh(run.mesh):
        trained, frozen, aim = params, {}, loss
        if adapted.rank:
            if settings.matrix_rate:
                raise ValueError(
                    f"{run.stage}/Optimizer.matrix_rate = {settings.matrix_rate} is for whole matrices, not for the "
                    f"pairs of Lora.rank = {adapted.rank}: set it to 0"
                )
            trained, frozen = run.initial_adapters(), params
            aim = lambda pairs, base, *rest: loss(base, {"lora": lora.scaled(pairs, adapted)}, *rest)
        rates = optimizer.rate_tree(trained, settings.rates)
        transform = optimizer.make(settings, trained, trainer.steps)
        update = step.make_update(aim, transform, rates, trainer.accumulate)
        checkpoints = checkpoint.Checkpoints(run.folder / "checkpoints", trainer.keep)
        try:
            train(
                update=update,
                state=state.create(trained, transform),
                frozen=frozen,
                batches=lambda start: run.batches(rows, trainer.rows, start),
                trainer=trainer,
                key=jax.random.key(run.seed("training")),
                checkpoints=checkpoints,
                marks=run.marks(rows),
                groups=rows.groups,
                log=lambda start: metrics.Log(run.folder, run.stage, trainer.steps, start, rows.plan.filled),
            )
        finally:
            checkpoints.close()
    return training_numbers(run.folder / "metrics.jsonl", rows)


def training_numbers(path: Path, rows: loader.Rows, window: int = 20) -> dict[str, Any]:
    """Means over the first and the last `window` steps of each number of a stage, and how full its rows were."""
    lines = metrics.read(path)
    names = sorted({k for line in lines for k in line} - {"step", "filled", *metrics.TIMES})

    def mean(part: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values = [line[name] for line in part if name in line]
        return round(sum(values) / len(values), 4) if values else None

    return {
        "steps": len(lines),
        "first": {name: mean(lines[:window], name) for name in names},
        "last": {name: mean(lines[-window:], name) for name in names},
        "slots_filled": round(rows.plan.filled, 4),
        "slots_filled_at_best": round(rows.plan.best, 4),
        "patches_filled": round(rows.plan.patches_filled, 4),
        "plan": rows.plan.fingerprint,
    }


def source_parts(name: str) -> tuple[str, str]:
    """Kind and language of a source: "documents/ar" is ("documents", "ar"); a file has no part ("")."""
    kind, _, language = (name, "", "") if name.endswith(".jsonl") else name.partition("/")
    return kind, language


def sample_path(path: str) -> Path:
    """A path as written in an experiment; `sample:...` lies in the sample that comes with the package."""
    return sample.FOLDER / path.removeprefix("sample:") if path.startswith("sample:") else Path(path)


def write_json(path: Path, value: Any) -> None:
    """Write beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
