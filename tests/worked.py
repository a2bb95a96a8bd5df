"""Hand-made examples, rows and a model of a few lines, for tests that look at numbers."""

import io
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from ain_jax.data.batch import Batch, PairBatch
from ain_jax.data.examples import Examples
from ain_jax.data.formats import Message, Record
from ain_jax.data.images import ImageSettings, image_grid
from ain_jax.data.packing import Packing, Segment, lay_row
from ain_jax.models.config import tiny

CONFIG = tiny(tied=False)
IMAGES = ImageSettings(patch_size=4, min_pixels=64, max_pixels=1024)
START, END, PICTURE = CONFIG.vision_start_token_id, CONFIG.vision_end_token_id, CONFIG.image_token_id
PACKING = Packing(row_tokens=48, row_patches=64, row_targets=24, window=8)


def png(seed: int, width: int = 16, height: int = 8) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def sequence(seed: int, words: int, sizes: Sequence[tuple[int, int]] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, learn): pictures of the given (width, height) first, then random words, about half of them learnt."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = [int(rng.integers(1, 180))]
    for width, height in sizes:
        tokens += [START, *[PICTURE] * (int(np.prod(image_grid(width, height, IMAGES))) // 4), END]
    tokens += rng.integers(1, 180, words).tolist()
    learn = np.zeros(len(tokens), bool)
    learn[-words:] = rng.random(words) < 0.5
    learn[-1] = True
    return np.array(tokens, np.int32), learn


def example(seed: int, words: int, sizes: Sequence[tuple[int, int]] = (), pair: bool = False, group: str = "ar"):
    """What `examples` takes: sequences, pictures, their grids, group."""
    pictures = [png(1000 * seed + i, *size) for i, size in enumerate(sizes)]
    sequences = [sequence(seed, words, sizes)]
    if pair:
        better_tokens, _better_learn = sequences[0]
        worse_tokens, worse_learn = sequence(seed + 500, words + 1, sizes)
        head = len(better_tokens) - words
        worse_tokens[:head] = better_tokens[:head]  # one question, two answers
        sequences.append((worse_tokens, worse_learn))
    return sequences, pictures, [image_grid(*size, IMAGES) for size in sizes], group


def examples(items: Sequence[Any], name: str = "made", fingerprint: str = "") -> Examples:
    """The examples of one source."""
    records = [
        Record(f"{name}/{i}", name, group, "made", messages=(Message("assistant", "x"),), images=tuple(pictures))
        for i, (_, pictures, _, group) in enumerate(items)
    ]
    sequences = [(i, tokens, learn, grids) for i, (pair, _, grids, _) in enumerate(items) for tokens, learn in pair]
    groups = sorted({group for *_, group in items})
    starts = lambda lengths: np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Examples(
        records=records,
        tokens_T=np.concatenate([tokens for _, tokens, _, _ in sequences]).astype(np.int32),
        learn_T=np.concatenate([learn for _, _, learn, _ in sequences]).astype(bool),
        starts_S=starts([len(tokens) for _, tokens, _, _ in sequences]),
        record_S=np.array([i for i, *_ in sequences], np.int32),
        first_E=starts([len(pair) for pair, *_ in items]),
        group_E=np.array([groups.index(group) for *_, group in items], np.int32),
        grids_M3=np.array([g for *_, grids in sequences for g in grids], np.int32).reshape(-1, 3),
        grid_starts_S=starts([len(grids) for *_, grids in sequences]),
        groups=tuple(f"{name}/{group}" for group in groups),
        fingerprint=fingerprint or name,
    )


def segments(source: Examples, which: int) -> list[Segment]:
    return source.segments(which, PICTURE, IMAGES)


def batch(rows: Sequence[Sequence[Segment]], packing: Packing = PACKING) -> Batch:
    """Rows of segments as one batch."""
    laid = [lay_row(row, packing, IMAGES.patch_values, IMAGES.merge_size) for row in rows]
    return Batch(**{name: np.stack([row[name] for row in laid]) for name in laid[0]})


def pair_batch(source: Examples, rows: Sequence[Sequence[int]], pairs: int, packing: Packing = PACKING) -> PairBatch:
    """Rows of preference pairs, `pairs` places a row, the reference at 0."""
    groups_BN = np.full((len(rows), pairs), -1, np.int32)
    for b, row in enumerate(rows):
        groups_BN[b, : len(row)] = source.group_E[list(row)]
    laid = batch([[s for e in row for s in segments(source, e)] for row in rows], packing)
    return PairBatch(rows=laid, pair_groups_BN=groups_BN, reference_BN2=np.zeros((*groups_BN.shape, 2), np.float32))


class Bigram:
    """A model whose next token depends on the last one alone: logits are a row of `params["table"]`."""

    def apply(self, variables, *arguments, method, **fields):
        table_VV = variables["params"]["table"]
        if method == "hidden":
            return jnp.take(table_VV, fields["tokens_BL"], axis=0)
        if method == "head":
            return [(arguments[0], jnp.eye(len(table_VV), dtype=jnp.float32))], None
        return arguments[0]


class Once:
    """A model whose hidden states are computed once, for several losses of one batch in one program."""

    def __init__(self, model):
        self.model, self.hidden = model, None

    def apply(self, variables, *arguments, method, **fields):
        if method != "hidden":
            return self.model.apply(variables, *arguments, method=method, **fields)
        if self.hidden is None:
            self.hidden = self.model.apply(variables, method=method, **fields)
        return self.hidden


def table(size: int = 192, seed: int = 0) -> dict[str, Any]:
    return {"table": jnp.asarray(np.random.default_rng(seed).normal(size=(size, size)), jnp.float32)}


def log_table(params: Any) -> np.ndarray:
    """log p(next | last), by the definition of softmax, in float64."""
    values = np.asarray(params["table"], np.float64)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))
