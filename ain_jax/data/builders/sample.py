"""The sample as a tensorflow-datasets builder that writes ArrayRecord, and its records read back by index.

TensorFlow is neither needed nor imported. A build is complete or absent: tensorflow-datasets writes into a
folder of another name and renames it at the end, and the folder's name carries a fingerprint of the
parameters and of the data.
"""

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from etils import epath
from tensorflow_datasets.core.utils import tqdm_utils
from tensorflow_datasets.proto import tf_example_pb2

from ain_jax import sample
from ain_jax.data import formats, render
from ain_jax.data.builders import sample_records
from ain_jax.data.builders.sample_records import KINDS, SampleParams
from ain_jax.data.formats import Message, Record


def fingerprint(params: SampleParams) -> str:
    """Eight hex digits that change with the parameters, the sample's files or the code that makes records."""
    digest = hashlib.sha256(repr(dataclasses.astuple(params)).encode())
    for path in (
        sample.FOLDER / "manifest.json",
        *(Path(m.__file__ or "") for m in (formats, render, sample_records)),
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
        text = tfds.features.Text()
        features = {
            "id": text,
            "source": text,
            "language": text,
            "kind": text,
            "text": text,
            "messages": tfds.features.Sequence({"role": text, "content": text}),
            "rejected": text,
            "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="png")),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

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
            yield record.id, formats.to_example(record)

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
    with _quiet():
        builder = Sample(config=config, data_dir=str(data_dir), file_format="array_record")
        target = Path(builder.data_dir)
        if not (target / "dataset_info.json").is_file():  # written before the folder gets its name
            for left_over in target.parent.glob("incomplete.*"):  # of a build that was killed
                shutil.rmtree(left_over)
            downloads = target.parent / "incomplete.downloads"  # stays empty, yet is asked for
            builder.on_record = on_record
            builder.download_and_prepare(download_dir=downloads)
            shutil.rmtree(downloads, ignore_errors=True)
            builder = Sample(config=config, data_dir=str(data_dir), file_format="array_record")
    return builder


class Records(Sequence[Record]):
    """The records of one split by index, their pictures still encoded."""

    def __init__(self, builder: Sample, split: str):
        if split not in builder.info.splits:
            raise ValueError(
                f"{builder.info.full_name}: no split {split!r}; there are {', '.join(builder.info.splits)}"
            )
        # Raw bytes: tensorflow-datasets' own decoding takes four times as long, and opens pictures in a list.
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._source: Any = builder.as_data_source(split, deserialize_method=raw)  # pyright: ignore[reportCallIssue]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return parse(self._source[int(index) % len(self)])


def records(builder: Sample, split: str) -> Records:
    """The records of a split, by index."""
    return Records(builder, split)


def parse(serialized: bytes) -> Record:
    """The record in a serialized tf.train.Example that the builder wrote."""
    example: Any = tf_example_pb2.Example.FromString(serialized)  # pyright: ignore[reportAttributeAccessIssue]
    feature = example.features.feature

    def texts(key: str) -> list[str]:
        return [value.decode("utf-8") for value in feature[key].bytes_list.value]

    return Record(
        **{key: texts(key)[0] for key in ("id", "source", "language", "kind", "text", "rejected")},
        messages=tuple(map(Message, texts("messages/role"), texts("messages/content"))),
        images=tuple(feature["images"].bytes_list.value),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tensorflow-datasets without its bars and its warning that a config is of our making."""
    bars, level = tqdm_utils._active, absl_logging.get_verbosity()
    tfds.disable_progress_bar()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        tqdm_utils.display_progress_bar(bars)
        absl_logging.set_verbosity(level)
