"""What a stage of a run was told: where it writes, its settings, its seeds."""

import dataclasses
import zlib
from pathlib import Path
from typing import Any, Self, TypeVar

from ain_jax.experiment import Resolved

EXTEND = "extend_tokenizer"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shared:
    """What several runs have in common: the folder their data are built in, and what one process compiled for them."""

    data: Path
    programs: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RunSettings:
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

    def get(self, cls: type[T]) -> T:
        """The settings of this stage of one class."""
        return self.resolved.stage(self.stage)[cls.__name__]

    def of(self, stage: str) -> Self:
        """Another stage of the same run, to read its settings or what it wrote."""
        return dataclasses.replace(self, stage=stage)

    def seed(self, purpose: str) -> int:
        """A seed for one purpose of this stage, fixed by the experiment's own."""
        return zlib.crc32(f"{self.resolved.experiment.seed}/{self.stage}/{purpose}".encode())

    def kind_seed(self, purpose: str) -> int:
        """The same for all stages of one kind: on the same data they then have the same rows."""
        return self.of(self.resolved.experiment.kind(self.stage)).seed(purpose)
