"""The sample as a tensorflow-datasets builder that writes ArrayRecord, and its records read back by index.

TensorFlow is neither needed nor imported. A build is complete or absent: tensorflow-datasets writes into a
folder of another name and renames it at the end, and the folder's name carries a fingerprint of the
parameters and of the data.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from etils import epath

from ain_jax import sample
from ain_jax.data import formats, locks, render
from ain_jax.data.builders import coding, features, sample_records
from ain_jax.data.builders.coding import parse
from ain_jax.data.builders.records import Records, records
from ain_jax.data.builders.sample_records import KINDS, SampleParams
from ain_jax.data.formats import Record

__all__ = ["Records", "Sample", "SampleConfig", "SampleParams", "build", "fingerprint", "parse", "records"]


def fingerprint(params: SampleParams) -> str:
    """Eight hex digits that change with the parameters, the sample's files or the code that makes records."""
    digest = hashlib.sha256(repr(dataclasses.astuple(params)).encode())
    for path in (
        sample.FOLDER / "manifest.json",
        *(Path(m.__file__ or "") for m in (formats, render, sample_records, coding)),
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@dataclasses.dataclass(kw_only=True)
class SampleConfig(tfds.core.BuilderConfig):
    kind: str = "documents"
    params: SampleParams = dataclasses.field(default_factory=SampleParams)


class Sample(tfds.core.GeneratorBasedBuilder):
    """One kind of data of the sample (a key of KINDS) under given parameters."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(__file__).parent  # tensorflow-datasets looks for its own notes here; there are none

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=features.features())

    def _split_generators(self, dl_manager):
        _, splits = KINDS[self._sample_config.kind]
        return {split: self._generate_examples(split) for split in splits}

    on_record: Callable[[Record], object] | None = None  # told of each record as it is made

    @property
    def _sample_config(self) -> SampleConfig:
        assert isinstance(self.builder_config, SampleConfig), "build() makes every builder with such a config"
        return self.builder_config

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        make, _ = KINDS[self._sample_config.kind]
        for record in make(self._sample_config.params, split):
            formats.validate(record, pictures=False)  # they have just been drawn
            if self.on_record is not None:
                self.on_record(record)
            yield record.id, features.all_features(record)

    def _log_download_bytes(self) -> None:
        """Nothing: there is no download to announce on standard output."""

    def _log_download_done(self) -> None:
        """Nothing, likewise."""


def build(
    config_name: str,
    data_dir: str | Path,
    params: SampleParams | None = None,
    on_record: Callable[[Record], object] | None = None,
) -> Sample:
    """The builder of one kind of data (a key of KINDS), its records lying under `data_dir`.

    They are written unless a finished build with the same parameters lies there; `on_record` is called with each
    record that is made, for a progress bar.
    """
    if config_name not in KINDS:
        raise ValueError(f"sample data {config_name!r}: no such kind; there are {', '.join(KINDS)}")
    params = params or SampleParams()
    config = SampleConfig(name=f"{config_name}-{fingerprint(params)}", kind=config_name, params=params)
    with features.quiet():
        builder = Sample(config=config, data_dir=str(data_dir), file_format="array_record")
        target = Path(builder.data_dir)
        finished = target / "dataset_info.json"  # written before the folder gets its name
        if not finished.is_file():
            with locks.building(target):
                builder = Sample(config=config, data_dir=str(data_dir), file_format="array_record")
                if not finished.is_file():  # another process may have made it, for which this one waited
                    for left_over in target.parent.glob("incomplete.*"):  # of a build that was killed
                        shutil.rmtree(left_over)
                    downloads = target.parent / "incomplete.downloads"  # stays empty, yet is asked for
                    builder.on_record = on_record
                    builder.download_and_prepare(download_dir=downloads)
                    shutil.rmtree(downloads, ignore_errors=True)
                    builder = Sample(config=config, data_dir=str(data_dir), file_format="array_record")
    return builder
