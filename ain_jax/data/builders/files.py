"""Anyone's files as a tensorflow-datasets builder that writes ArrayRecord, and a file of the rows that were refused.

    DATA_DIR/files/NAME-FINGERPRINT/1.0.0/     shards, dataset_info.json, groups.json, codes-SPLIT.npy, summary.json
    DATA_DIR/files/NAME-FINGERPRINT/rejects.jsonl    {"where": "talks.jsonl:17", "reason": ..., "row": shortened}

The records stand in the order of the rows, in the same bytes whatever the number of workers. A build is complete or
absent; the rejects file is kept of one that was refused too. tensorflow-datasets' own writer is not used: it sorts the
records by hash, and beyond 1 GB in files that it opens with TensorFlow.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_builder
from tensorflow_datasets.core.splits import SplitDict
from tqdm import tqdm

from ain_jax.data import files, files_text, forms, locks
from ain_jax.data.builders import convert, features, merge
from ain_jax.data.builders.records import Records, records, write_index
from ain_jax.data.builders.sources import Source, Sources

__all__ = ["Files", "Records", "Sources", "build", "fingerprint", "records", "summary"]

FIRST_ROWS = 50  # that the form of a source is told from
# Bytes of a task's files, and how many tasks there are. Rows that name pictures are short: 16 KiB are a hundred.
SMALLEST, LARGEST, MOST = 16 << 10, 8 << 20, 1024
SUMMARY = "summary.json"
# The modules that make records of rows, below ain_jax/data.
CODE = (
    "files*.py",
    "form*.py",
    "filters.py",
    "columns.py",
    "languages.py",
    "builders/coding.py",
    "builders/convert.py",
    "builders/merge.py",
)


def fingerprint(name: str, sources: Sources) -> str:
    """Ten hex digits that change with a source's files, its settings, or the code that makes records of it.

    Pictures that lie beside the files are not looked at: change the name of their folder when they change.
    """
    return _fingerprint(sources.of(name), files.find(sources.of(name).path))


def _fingerprint(source: Source, paths: list[str]) -> str:
    digest = hashlib.sha256(files.mark(paths).encode())
    settings = [getattr(source, f.name) for f in fields(source) if f.name != "path"]
    digest.update(repr(settings).encode())
    for path in sorted(path for pattern in CODE for path in Path(__file__).parents[1].glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


@dataclass(kw_only=True)
class FilesConfig(tfds.core.BuilderConfig):
    source: Source
    paths: tuple[str, ...] = ()
    bad_share: float = 0.0
    workers: int = 0
    progress: bool | None = None


class Files(dataset_builder.FileReaderBuilder):
    """One source of `Sources`."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(__file__).parent  # tensorflow-datasets looks for its own notes here; there are none

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=features.features())

    def _download_and_prepare(self, dl_manager, download_config=None):
        """Everything is written into the folder of unfinished files, which then gets its name."""
        config = self.builder_config
        assert isinstance(config, FilesConfig), "build() makes every builder with such a config"
        folder = Path(self.data_dir)
        work = folder / "unfinished"
        work.mkdir(parents=True)
        source, rejects = config.source, folder.parent / "rejects.jsonl"
        job = convert.Job(
            source=source.name,
            form=source.form or _form(source.name, list(config.paths)),
            language=source.language,
            images=source.images,
            ids=source.ids,
            sampling=source.sampling,
            filters=source.filters,
            held_out=source.held_out,
            folder=str(work),
            parent=os.getpid(),
        )
        tasks = _tasks(list(config.paths))
        done = merge.run(job, tasks, config.workers, config.progress, config.bad_share, rejects)
        repeated = merge.repeated(done)
        told = merge.told(job, done, repeated, rejects)
        _check(source.name, told, config.bad_share, rejects)
        shards, codes = merge.kept(done, repeated.all)
        missing = [s for s in ("train", "test")[: 1 + bool(source.held_out)] if s not in codes]
        if missing:
            raise ValueError(
                f"{source.name}: held_out = {source.held_out} of {_left(told)} records leaves none "
                f"for the split {missing[0]!r}; choose another share"
            )
        infos = []
        for split in codes:
            of_split = [shard for shard in shards if shard.split == split]
            template = self._get_filename_template(split_name=split)
            for i, shard in enumerate(of_split):
                os.replace(shard.path, template.sharded_filepath(shard_index=i, num_shards=len(of_split)))
            sizes = [shard.records for shard in of_split]
            size = sum(shard.bytes for shard in of_split)
            infos.append(
                tfds.core.SplitInfo(name=split, shard_lengths=sizes, num_bytes=size, filename_template=template)
            )
        write_index(folder, codes)
        (folder / SUMMARY).write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(work)
        self.info.set_splits(SplitDict(infos))

    def _log_download_bytes(self) -> None:
        """Nothing: there is no download to announce on standard output."""

    def _log_download_done(self) -> None:
        """Nothing, likewise."""


def _tasks(paths: list[str]) -> list[list[files.Part]]:
    """The parts of the files in about equal shares, the same for any number of workers.

    Small files go together, so that a folder of a million of them does not become a million shards.
    """
    sizes = {path: files_text.file_size(path) for path in paths}
    total = sum(sizes.values())
    count = max(1, min(total // SMALLEST, 64), min(total // LARGEST, MOST))
    parts = files.parts(paths, count)
    pieces = Counter(part.path for part in parts)
    tasks, size, target = [], math.inf, total / count
    for part in parts:
        share = sizes[part.path] / pieces[part.path]
        if size + share / 2 > target:
            tasks.append([])
            size = 0.0
        tasks[-1].append(part)
        size += share
    return tasks


def _form(name: str, paths: list[str]) -> str:
    """The form of a source's first rows: the one that most of them have."""
    found, faults = Counter(), []
    for part in files.parts(paths, 1):
        for row in files.rows(part):
            if row.values is None:
                faults.append(f"{row.where}: {row.fault}")
            else:
                try:
                    found[forms.detect(row.values)] += 1
                except ValueError as error:
                    faults.append(f"{row.where}: {error}")
            if found.total() + len(faults) >= FIRST_ROWS:
                break
        if found.total() + len(faults) >= FIRST_ROWS:
            break
    if not found:
        told = faults[0] if faults else "no rows"
        raise ValueError(f"{name}: the form of its rows is not known; name one in Sources.forms, or mend them. {told}")
    return found.most_common(1)[0][0]


def _left(told: Mapping[str, Any]) -> int:
    return told["rows"] - told["rejected"] - told["left_out"]


def _check(name: str, told: Mapping[str, Any], bad_share: float, rejects: Path) -> None:
    """A ValueError if more rows were rejected than may be, or nothing is left."""
    rows, rejected = told["rows"], told["rejected"]
    if rejected > bad_share * rows or not _left(told):
        allowed = "none is left" if not _left(told) else f"{int(bad_share * rows):,} may be"
        raise ValueError(
            f"{name}: {merge.counted(told)}; {allowed} (Sources.bad_share = {bad_share:g}). "
            f"Each is told in {rejects}: mend the files, name another form in Sources.forms, or raise Sources.bad_share"
        )


def build(name: str, sources: Sources, data_dir: str | Path, progress: bool | None = None) -> Files:
    """The builder of one source, its records lying under `data_dir`.

    They are written unless a finished build with the same fingerprint lies there. Then a bar (`progress`; None: where
    standard error is a terminal) and at the end a line, unless `progress` is False, go to standard error:
    "pangea: 1,234,567 rows, 12 rejected (7 x no picture in …, 5 x ...): PATH".
    """
    source = sources.of(name)
    try:
        paths = files.find(source.path)
    except ValueError as error:
        raise ValueError(f"Sources.files[{name!r}]: {error}") from None
    config = FilesConfig(
        name=f"{name}-{_fingerprint(source, paths)}",
        source=source,
        paths=tuple(paths),
        bad_share=sources.bad_share,
        workers=sources.workers,
        progress=progress,
    )
    with features.quiet():
        builder = Files(config=config, data_dir=str(data_dir), file_format="array_record")
        target = Path(builder.data_dir)
        rejects = target.parent / "rejects.jsonl"
        finished, made = target / "dataset_info.json", False  # written before the folder gets its name
        if not finished.is_file():
            with locks.building(target):
                made = not finished.is_file()  # another process may have made it, for which this one waited
                if made:
                    _clean(target)
                    builder = Files(config=config, data_dir=str(data_dir), file_format="array_record")
                    downloads = target.parent / "incomplete.downloads"  # stays empty, yet is asked for
                    try:
                        builder.download_and_prepare(download_dir=downloads)
                    finally:
                        _clean(target)
                builder = Files(config=config, data_dir=str(data_dir), file_format="array_record")
    told = summary(builder)
    _check(name, told, sources.bad_share, rejects)
    if made and progress is not False:
        tqdm.write(f"{name}: {merge.counted(told)}: {rejects}", file=sys.stderr)
    return builder


def _clean(target: Path) -> None:
    """Removes the unfinished folders of builds that were stopped."""
    for left_over in target.parent.glob("incomplete.*"):
        shutil.rmtree(left_over, ignore_errors=True)


def summary(builder: Files) -> dict[str, Any]:
    """What was counted when the source was built: rows, rejected, reasons (a kind of reason -> rows)."""
    return json.loads((Path(builder.data_dir) / SUMMARY).read_text(encoding="utf-8"))
