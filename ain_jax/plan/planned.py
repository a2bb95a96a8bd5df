"""A stage's run on devices that are not here: sizes without weights, shapes without data.

What the run's folders hold is used; what is not there yet is taken from the settings, and said in `assumed`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ain_jax import sharding
from ain_jax.data.batch import Batch, PairBatch
from ain_jax.data.examples import Answers, PictureSettings
from ain_jax.data.images import ImageSettings
from ain_jax.data.pack_plan import load, stored_fingerprint
from ain_jax.data.packing import Packing, lay_row
from ain_jax.data.tiles import TileSettings
from ain_jax.experiment import Resolved
from ain_jax.models.config import ClipConfig, ModelConfig, published
from ain_jax.stages import prefer
from ain_jax.stages.common import StageRun, sample_path
from ain_jax.stages.extend_tokenizer import Tokenizer
from ain_jax.stages.model_settings import Model, sized
from ain_jax.stages.run_settings import EXTEND
from ain_jax.tokenizer import base
from ain_jax.train.loop import Trainer
from ain_jax.train.preferences import Preference
from ain_jax.weights import embeddings

PAIRS = 8  # preference pairs, or judged answers, of a row where no pack plan says how many


@dataclasses.dataclass(frozen=True)
class PlannedRun(StageRun):
    """A stage whose mesh is made of described devices."""

    devices: tuple[Any, ...] = ()

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(self.get(sharding.Mesh), self.devices)

    @functools.cached_property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer of this run can be read."""
        try:
            return self.tokenizer_folder.is_dir()
        except ValueError:
            return False

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The model's sizes: from the folders that are there, else from Model.size and Tokenizer.pieces."""
        if self.has_tokenizer and not self._not_there:
            return super().config
        if self.base is None:
            return self._from_sizes()
        if not self._not_there:
            config = self._published(self.base)
        elif size := self.get(Model).size:
            config = published(size)
        else:
            raise ValueError(
                f"Model.folder = {', '.join(map(repr, self._not_there))} is not there; to plan without it name its "
                'sizes, for example Model.size = "qwen2_vl_7b"'
            )
        if not self.extended:
            return config
        # The base's spare rows are known to its tokenizer alone: counted as if there were none.
        multiple = self.get(Model).vocabulary_multiple
        rows = embeddings.padded_rows(config.text.vocabulary, config.text.vocabulary + self._pieces, multiple)
        return dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=rows))

    @property
    def _not_there(self) -> list[str]:
        """The folders of the model that hold no config."""
        folders = (self.get(Model).folder, self.get(Model).vision_folder)
        return [folder for folder in folders if folder and not (Path(folder) / "config.json").is_file()]

    def _from_sizes(self) -> ModelConfig:
        path = sample_path(self.of(EXTEND).get(Tokenizer).base)
        if size := self.get(Model).size:  # weights at random, with the rows of the extended tokenizer
            known = len(base.open_base(path).backend.get_vocab()) + self._pieces if path.exists() else 0
            config, multiple = published(size), self.get(Model).vocabulary_multiple
            rows = embeddings.padded_rows(0, known, multiple) if known else config.text.vocabulary
            return dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=rows))
        ids = len(base.open_base(path).backend.get_vocab()) + self._pieces
        names = ("image", "video", "vision_start", "vision_end", "eos", "pad")
        settings, images = self.get(Model), self.get(ImageSettings)
        return sized(settings, images, ids, **{f"{name}_token_id": number for number, name in enumerate(names)})

    @property
    def _pieces(self) -> int:
        return self.of(EXTEND).get(Tokenizer).pieces

    @property
    def new_rows(self) -> tuple[int, int]:
        if self.has_tokenizer:
            return super().new_rows
        return self.config.text.vocabulary - self._pieces, self._pieces

    def _processor(self, folder: Path) -> PictureSettings:
        if (folder / "preprocessor_config.json").is_file():
            return super()._processor(folder)
        vision = self.config.vision
        if isinstance(vision, ClipConfig):
            return TileSettings(vision.tile, vision.patch_size, vision.pinpoints)
        assert vision is not None, "a model without an image encoder asks for no processor"
        return ImageSettings(vision.patch_size, vision.merge_size, vision.temporal_patch_size)

    @functools.cached_property
    def token_bytes_V(self) -> np.ndarray:
        if self.has_tokenizer:
            return super().token_bytes_V
        # Any numbers that the compiler cannot take for one constant.
        return np.arange(self.config.text.vocabulary) % 13 + 1

    @functools.cached_property
    def pack_plan(self) -> Any | None:
        """The pack plan of this stage, where data has been planned."""
        path = self.folder / "pack_plan"
        return load(path) if stored_fingerprint(path) else None

    def batch(
        self, rows: int = 0, packing: Packing | None = None, answers: Answers | None = None, reference: bool = True
    ) -> Batch | PairBatch:
        """Shapes and shardings of a batch, as `loader.batches` lays it: of a step, or of what is given instead."""
        packing, rows = packing or self.get(Packing), rows or self.get(Trainer).rows
        images = self._pictures(packing)
        row = lay_row([], packing, images.patch_values if images else 0, images.merge_size if images else 1)
        where = sharding.rows(self.mesh)
        try:
            where.shard_shape((rows,))
        except ValueError:
            raise ValueError(
                f"{self.stage}: {rows} rows at once cannot be laid over the mesh {dict(self.mesh.shape)} equally: "
                f"change Trainer.rows = {self.get(Trainer).rows} or accumulate, or let several chips share a row, by "
                "Mesh.tensor or Mesh.sequence"
            ) from None
        place = lambda shape, dtype: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)
        batch = Batch(**{name: place(array.shape, array.dtype) for name, array in row.items()})
        answers = answers or prefer.answers(self)
        if answers == "one":
            return batch
        count = self.pack_plan.max_units if self.pack_plan else PAIRS
        counts, values = place((count,), np.dtype(np.int32)), place((count, 2), np.dtype(np.float32))
        known = values if reference and self.get(Preference).needs_reference else None
        return PairBatch(batch, counts, known, counts if answers == "judged" else None)

    @property
    def assumed(self) -> list[str]:
        """What is not there to be read, and what is taken for it."""
        faults = []
        if self._not_there:
            faults.append(f"{', '.join(self._not_there)} is not there: sizes of {self.get(Model).size}")
        if self.extended and not self.has_tokenizer:
            faults.append(f"no extended tokenizer yet: {self._pieces:,} new rows")
        if self.pack_plan is None:
            faults.append("no pack plan yet: rows are counted as full")
        return faults


def planned(resolved: Resolved, root: Path, stage: str, devices: Any) -> PlannedRun:
    """A stage on these devices, described or real."""
    return PlannedRun(resolved, root, stage, devices=tuple(devices))
