"""The rows of a plan, laid when they are asked for, and the batches of them: numpy alone.

Worker processes import this file and what it imports: nothing here may bring jax with it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ain_jax.data.examples import KINDS, Answers, Examples, PictureSettings
from ain_jax.data.pack_plan import PackPlan
from ain_jax.data.packing import Packing, lay_row

EMPTY: Mapping[str, int] = {"feature_index_BL": -1, "pair_groups_BN": -1}  # an unused row's values; 0 elsewhere

FOUND: Mapping[Answers, str] = {
    "one": "has neither a rejected answer nor a verdict",
    "pair": "is a preference pair",
    "judged": "has a verdict on its answer",
}
WANTED: Mapping[Answers, str] = {
    "one": "would learn from bad answers too",
    "pair": "compares pairs",
    "judged": "learns from verdicts on single answers",
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a plan as a random-access source; a row is laid when it is asked for."""

    plan: PackPlan
    sources: Sequence[Examples]
    packing: Packing
    image_token: int | None  # None: a model without an image encoder
    images: PictureSettings | None
    answers: Answers = "one"
    reference_RN2: np.ndarray | None = None  # log-probabilities under the frozen policy, by row
    video_token: int | None = None
    tokens_per_second: float = 0.0  # Qwen2.5-VL's, of videos

    def __post_init__(self):
        for examples in self.sources:
            odd_E = np.flatnonzero(examples.answers() != KINDS.index(self.answers))
            if len(odd_E):
                record = examples.records[int(examples.record_S[examples.first_E[odd_E[0]]])]
                found = KINDS[examples.answers()[odd_E[0]]]
                raise ValueError(
                    f"record {record.id} {FOUND[found]}, and this stage {WANTED[self.answers]}: take its source out of "
                    "Mixture.weights"
                )
        names = self.groups
        tables = [np.array([names.index(g) for g in s.groups], np.int32) for s in self.sources]
        object.__setattr__(self, "_group_tables", tables)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names that `target_groups_BC` (or `pair_groups_BN`) counts, those of all sources together."""
        return tuple(sorted({g for s in self.sources for g in s.groups}))

    @property
    def with_pictures(self) -> bool:
        """Whether any example holds a picture."""
        return any(len(examples.grids_M3) for examples in self.sources)

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.lay(index)

    def new_patches(self, *rows: int) -> np.ndarray:
        """Zeros for the patches of a row, or of so many rows; what is never written takes no memory."""
        width = self.images.patch_values if self.images else 0
        return np.zeros((*rows, self.packing.row_patches, width), np.float32)

    def lay(self, index: int, text_only: bool = False, patches_PK: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The arrays of one row, and the count of its tokens; `text_only` leaves the arrays of patches out.

        Patches, nearly all of a row's bytes, are written into `patches_PK` where these zeros are given: a batch's own.
        """
        units = self.plan.row(int(index))
        segments, groups, patch_at = [], [], 0
        if patches_PK is None and self.packing.row_patches and not text_only:
            patches_PK = self.new_patches()
        for source, example in units:
            examples = self.sources[source]
            group = int(self._group_tables[source][examples.group_E[example]])  # type: ignore[attr-defined]
            made = examples.segments(
                int(example), self.image_token, self.images, self.video_token, self.tokens_per_second
            )
            groups.append(group)
            for segment in made:
                if segment.patches_PK is not None:
                    assert patches_PK is not None, f"row {index} of a batch without pictures holds one"
                    count = len(segment.patches_PK)
                    patches_PK[patch_at : patch_at + count] = segment.patches_PK
                    patch_at += count
                    segment = dataclasses.replace(segment, patches_PK=np.empty((count, 0), np.float32))
                segments.append(dataclasses.replace(segment, group=group))
        packing = dataclasses.replace(self.packing, row_patches=0, text_batches=False) if text_only else self.packing
        row = lay_row(segments, packing, 0, self.images.merge_size if self.images else 1)
        if patches_PK is not None:
            row["patches_BPK"] = patches_PK
        row["tokens"] = np.array(sum(len(s.tokens_L) for s in segments), np.int64)
        if self.answers != "one":
            row["pair_groups_BN"] = np.full(self.plan.max_units, -1, np.int32)
            row["pair_groups_BN"][: len(groups)] = groups
            if self.reference_RN2 is not None:
                row["reference_BN2"] = self.reference_RN2[index]
        if self.answers == "judged":
            row["desirable_BN"] = np.zeros(self.plan.max_units, np.int32)
            row["desirable_BN"][: len(units)] = [self.sources[source].desirable_E[example] for source, example in units]
        return row


@dataclasses.dataclass(frozen=True)
class Steps:
    """Step -> the stacked rows of one process, each array named as the fields of `Batch`.

    `own` says which rows of a batch are this process' own: of 4 rows (0, 1) on the first of two hosts. Nothing but
    the plan and the step decides what a row holds, so any step is made in the time of one, on any number of hosts.
    """

    rows: Rows
    rows_per_batch: int
    own: tuple[int, ...]

    def __post_init__(self):
        planned = self.rows.plan.rows_per_batch
        if planned not in (0, self.rows_per_batch):
            raise ValueError(
                f"batches of {self.rows_per_batch} rows, and the plan sets batches of {planned} rows without pictures "
                "apart: make it for that number of rows, or leave Packing.text_batches out"
            )

    def __len__(self) -> int:
        return -(-len(self.rows) // self.rows_per_batch)

    def text_only(self, step: int) -> bool:
        """Whether the plan leaves pictures out of this batch: then its arrays of patches are left out, too."""
        flags_B = self.rows.plan.text_only_B
        return bool(len(flags_B) and flags_B[step])

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        begin, text_only = step * self.rows_per_batch, self.text_only(step)
        patches = {}
        if self.rows.packing.row_patches and not text_only:
            patches["patches_BPK"] = self.rows.new_patches(len(self.own))
        laid = []
        for b, i in enumerate(self.own):
            into = patches["patches_BPK"][b] if patches else None
            laid.append(self.rows.lay(begin + i, text_only, into) if begin + i < len(self.rows) else None)
        pattern = next((r for r in laid if r is not None), None) or self.rows.lay(begin, text_only)
        names = [name for name in pattern if name not in patches]
        empty = {k: np.full_like(pattern[k], EMPTY.get(k, 0)) for k in names} if None in laid else {}
        return {k: np.stack([(r or empty)[k] for r in laid]) for k in names} | patches
