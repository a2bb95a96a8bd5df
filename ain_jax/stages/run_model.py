"""The model of a run: its tokenizer, its sizes, and its weights before and after any stage."""

import dataclasses
import functools
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ain_jax import sharding
from ain_jax.data.examples import PictureSettings, tokenizer_fingerprint
from ain_jax.data.images import ImageSettings
from ain_jax.launching import processes
from ain_jax.models import attention, lora
from ain_jax.models.config import ModelConfig
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import MultimodalModel, abstract_params, axis_names, init_params
from ain_jax.stages import model_settings
from ain_jax.stages.model_settings import Model, Start, absent
from ain_jax.stages.run_settings import EXTEND, RunSettings
from ain_jax.tokenizer import chat
from ain_jax.tokenizer import folder as tokenizer_files
from ain_jax.tokenizer.align import token_bytes
from ain_jax.tokenizer.with_template import Templated, with_template
from ain_jax.train import checkpoint, rows
from ain_jax.train.optimizer import Optimizer
from ain_jax.weights import embeddings, join, load

NEW_ROWS = "new_rows.npz"  # beside the tokenizer: the rows of its new pieces before any step


@dataclasses.dataclass(frozen=True)
class RunModel(RunSettings):
    """A stage of a run with the model that it has."""

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

    @functools.cached_property
    def tokenizer_mark(self) -> dict[str, str]:
        """What of the marks must be the same wherever weights are used: rows of another vocabulary are not these."""
        return {"tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def _saved(self, stage: str, like: Any, step: int | None) -> Any:
        return checkpoint.load_params(self.root / stage / "checkpoints", like, step, self.tokenizer_mark)
