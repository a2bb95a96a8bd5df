"""What a model and a loss may see: every array with its axes, decided here once and only read afterwards.

B rows, L positions of a row, C learnt positions of a row (a capacity fixed by the pack plan), P patches,
N preference pairs of a row. A row holds several examples one after another; each is a segment.

    tokens     7 8 9 4 5 0       two examples, "7 8 9" and "4 5", and one slot left over
    segments   1 1 1 2 2 0       0 is padding
    positions  0 1 2 0 1 0       begin anew in each segment
    predict_at 1 3 .             with 9 and 5 learnt: the position before each of them,
    targets    9 5 .             the token to come there,
    target_segments 1 2 0        and whose it is; 0 marks an unused place
"""

import dataclasses
from typing import Any

import jax

Array = Any  # numpy on the host, jax.Array on the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of text and pictures."""

    tokens_BL: Array  # int32, 0 where nothing stands
    segments_BL: Array  # int32, 0 is padding, 1.. the example inside the row
    positions_B3L: Array  # int32, temporal, height and width positions (M-RoPE); equal to one another for text
    predict_at_BC: Array  # int32, the position whose hidden state predicts the target
    targets_BC: Array  # int32, the token to be predicted
    target_segments_BC: Array  # int32, 0 where the place is unused
    target_groups_BC: Array  # int32, the (source, language) group the loss is reported under
    feature_index_BL: Array | None = None  # int32, which merged picture feature stands here; -1 for a token
    patches_BPK: Array | None = None  # float32, flattened patches, 2x2 merge blocks contiguous
    patch_positions_BP2: Array | None = None  # int32, (row, column) of the patch in its picture
    patch_segments_BP: Array | None = None  # int32, 0 is padding, 1.. the picture inside the row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Two answers a place: place n of a row is its segments 2n+1 and 2n+2.

    Of a preference pair these are the better answer and the worse one. Of a judged answer they are that answer, and
    under the same question an answer to another one, which tells how far the policy has left the reference (KTO).
    """

    rows: Batch
    pair_groups_BN: Array  # int32, the kind of pair; -1 where there is none
    reference_BN2: Array = None  # float32, nats: log-probability of both under the frozen reference, if wanted
    desirable_BN: Array = None  # int32, of judged answers: 1 a good one, 0 a bad one or none
