"""Vocabulary rows for new pieces, made from the rows of the old pieces.

    mean        the mean of the rows of the old pieces that spelt it (ALLaM, arXiv 2407.15390)
    covariance  drawn around the mean of all old rows with their covariance, scaled small (Hewitt 2021; transformers'
                mean_resizing)
    similar     the mean of the most similar old pieces' rows, weighted by sparsemax (FOCUS, arXiv 2305.14481)
    distil      from "mean", trained until the model's hidden states are those under the old spelling (arXiv 2505.20133)

The input table and, where the head is not tied, its own table are made alike, each from its own old rows. Old rows stay
as they are, bit for bit. A special token, which nothing spelt, gets the mean of all old rows and a little noise.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import scipy.sparse
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict

from ain_jax.launching import processes
from ain_jax.models.config import ModelConfig
from ain_jax.tokenizer.extend import padded_vocab
from ain_jax.tokenizer.folder import Extension
from ain_jax.train.rows import TABLES, take
from ain_jax.weights import similar
from ain_jax.weights.distil import Distil, distil
from ain_jax.weights.lowered import Lowered, lower
from ain_jax.weights.similar import Similarity


@dataclass(frozen=True)
class Embeddings:
    """How the rows of new pieces are made."""

    method: Literal["mean", "covariance", "similar", "distil"] = "mean"
    spread: float = 1e-5  # covariance: what the covariance of the old rows is multiplied by (transformers has 1e-9)
    similarity: Similarity = field(default_factory=Similarity)
    distil: Distil = field(default_factory=Distil)
    # Of a head row's distance from the mean of all old rows, the share that it keeps. A mean of head rows scores too
    # high: at 0.7 SmolLM2-135M loses less on Arabic, and less on English as well, than at 1. Tied rows are head rows.
    shrink: float = 1.0
    lowered: Lowered = field(default_factory=Lowered)  # head rows, so that the pieces take little from other text
    noise: float = 0.1  # of a special token's row, in standard deviations of the old rows
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method = {self.method!r}: expected one of {', '.join(METHODS)}")
        if not 0 <= self.shrink <= 1:
            raise ValueError(f"shrink = {self.shrink}: expected a share, 0 to 1")
        if self.spread < 0 or self.noise < 0:
            raise ValueError(f"spread = {self.spread}, noise = {self.noise}: expected 0 or more")


METHODS = ("mean", "covariance", "similar", "distil")


@dataclass(frozen=True)
class Corpus:
    """What "similar", "distil" and a lowered head measure on: texts, and both tokenizers."""

    old: tokenizers.Tokenizer
    new: tokenizers.Tokenizer
    texts: Sequence[str]  # in the language of the new pieces
    kept: Sequence[str] = ()  # in the languages that the model knows
    first_token: int = 0  # what opens a document: the beginning-of-text token, or the end token where there is none


def new_rows(
    table_VD: np.ndarray,
    replaced_ids: Sequence[Sequence[int]],
    settings: Embeddings,
    similar_NV: scipy.sparse.csr_array | None = None,
) -> np.ndarray:
    """(N, D) float32: a row for each new piece, from the rows of the old pieces (padding rows left out).

    `similar_NV` are the weights of the method "similar"; a piece that has none there gets its mean.

    new_rows([[0, 2], [4, 0]], [[0, 1]], mean): [[2, 1]]
    """
    old_VD = np.asarray(table_VD).astype(np.float32)
    V, D = old_VD.shape
    spelt_NV = spelling(replaced_ids, V)
    random = np.random.default_rng(settings.seed)
    special_N = np.diff(spelt_NV.indptr) == 0
    rows_ND = np.asarray(spelt_NV @ old_VD)
    if settings.method == "covariance":
        rows_ND = _drawn(old_VD, len(replaced_ids), settings.spread, random)
    if settings.method == "similar":
        if similar_NV is None or similar_NV.shape != (len(replaced_ids), V):
            raise ValueError('method = "similar" needs its weights; use `extend_params` with a corpus')
        found_N = np.diff(similar_NV.indptr) > 0
        rows_ND[found_N] = np.asarray(similar_NV @ old_VD)[found_N]
    mean_D = old_VD.mean(axis=0)
    rows_ND = mean_D + settings.shrink * (rows_ND - mean_D) if settings.shrink < 1 else rows_ND
    noise_ND = random.standard_normal((int(special_N.sum()), D), np.float32)
    rows_ND[special_N] = mean_D + settings.noise * old_VD.std(axis=0) * noise_ND
    return rows_ND


def spelling(replaced_ids: Sequence[Sequence[int]], old_ids: int) -> scipy.sparse.csr_array:
    """(N, V): the share of each old piece in the spelling of each new one; a row of a special token is empty.

    [[1, 1, 2], []] of 3 ids  ->  [[0, 2/3, 1/3], [0, 0, 0]]
    """
    lengths_N = np.array([len(ids) for ids in replaced_ids], np.int64)
    flat = np.concatenate([np.asarray(ids, np.int64).reshape(-1) for ids in replaced_ids] or [np.zeros(0, np.int64)])
    owner = np.repeat(np.arange(len(replaced_ids)), lengths_N)
    outside = np.flatnonzero((flat < 0) | (flat >= old_ids))
    if len(outside):
        raise ValueError(
            f"new piece {owner[outside[0]]} replaces id {flat[outside[0]]}; expected ids of the old vocabulary, 0 to "
            f"{old_ids - 1}"
        )
    shares = np.repeat(1.0 / np.maximum(lengths_N, 1), lengths_N).astype(np.float32)
    return scipy.sparse.csr_array(scipy.sparse.coo_array((shares, (owner, flat)), shape=(len(replaced_ids), old_ids)))


def _drawn(old_VD: np.ndarray, count: int, spread: float, random: np.random.Generator) -> np.ndarray:
    """Draws of a normal with the mean of the old rows and `spread` times their covariance."""
    mean_D = old_VD.mean(axis=0)
    covariance_DD = np.cov(old_VD.astype(np.float64), rowvar=False).reshape(len(mean_D), -1)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)  # some values may be 0, which Cholesky would refuse
    root_DD = (vectors_DD * np.sqrt(spread * np.maximum(values_D, 0))).astype(np.float32)
    return mean_D + random.standard_normal((count, len(mean_D)), np.float32) @ root_DD.T


def extend_rows(table_VD: np.ndarray, rows_ND: np.ndarray, first: int, padded: int) -> np.ndarray:
    """The table of `padded` rows with the new ones at `first`; all other old rows stay, the model's spare ones too.

    A published table may be longer than its vocabulary: new pieces take those spare rows first. Rows behind the new
    ones that the old table did not have hold the mean of its first `first`: they are no id's, and score like an average
    word.

    extend_rows([[0], [4], [9], [9]], [[1]], 2, 6): [[0], [4], [1], [9], [2], [2]]
    """
    table_VD = np.asarray(table_VD)
    V, D = table_VD.shape
    last = first + len(rows_ND)
    if not 0 < first <= V:
        raise ValueError(f"first new row {first}: expected 1 to {V}, behind the rows of the old pieces")
    if padded < max(last, V):
        raise ValueError(
            f"padded={padded} rows cannot hold {V} old ones and the new ones up to {last}; expected {max(last, V)} or "
            "more"
        )
    extended = np.empty((padded, D), table_VD.dtype)
    extended[:V] = table_VD
    extended[V:] = table_VD[:first].astype(np.float32).mean(axis=0).astype(table_VD.dtype)
    extended[first:last] = np.asarray(rows_ND).astype(table_VD.dtype)
    return extended


def extend_params(
    params: Mapping[str, Any],
    config: ModelConfig,
    first: int,
    replaced_ids: Sequence[Sequence[int]],
    settings: Embeddings,
    corpus: Corpus | None = None,
    multiple: int = 64,
) -> tuple[dict[str, Any], ModelConfig]:
    """(parameters, config) with rows for the new ids `first`, `first + 1`, ...; all else is as it was.

    `replaced_ids` are the old ids that spelt each new one, empty for a special token: `replaced(extension)`. Where the
    table must grow it does so to a multiple of so many rows. Tables are brought to the host. Raises
    ValueError where the method needs a corpus and has none.
    """
    rows = make_rows(params, config, first, replaced_ids, settings, corpus)
    padded = padded_rows(config.text.vocabulary, first + len(replaced_ids), multiple)
    return grow_tables(params, rows, first, padded), _with_rows(config, padded)


def make_rows(
    params: Mapping[str, Any],
    config: ModelConfig,
    first: int,
    replaced_ids: Sequence[Sequence[int]],
    settings: Embeddings,
    corpus: Corpus | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> dict[str, Any]:
    """The rows of the new ids alone, float32, under the paths of their tables; see `extend_params`.

    `on_step` is told the steps of "distil", for a progress bar.
    """
    needs = [name for name, wanted in _needs(settings).items() if wanted]
    if needs and corpus is None:
        raise ValueError(f"{', '.join(needs)}: expected a corpus, the texts to measure on")
    if not replaced_ids:
        raise ValueError("no new piece; expected one or more")
    N, weights = len(replaced_ids), None
    if corpus is not None and settings.method == "similar":
        weights = similar.weights(corpus.new, corpus.texts, first, N, settings.similarity)
    flat: dict[Any, Any] = dict(flatten_dict(dict(params)))
    rows: dict[Any, Any] = {}
    paths = [path for path in TABLES if path in flat]
    for number, path in enumerate(paths):
        shrink = settings.shrink if path == paths[-1] else 1.0
        # Another seed, else both tables would get the same noise.
        one = dataclasses.replace(settings, seed=settings.seed + number, shrink=shrink)
        rows[path] = new_rows(processes.fetch(flat[path])[:first], replaced_ids, one, weights)
    made: dict[str, Any] = unflatten_dict(rows)
    if corpus is None or (settings.method != "distil" and settings.lowered.rise is None):
        return made
    padded = max(config.text.vocabulary, first + N)
    grown, config = grow_tables(params, made, first, padded), _with_rows(config, padded)
    if settings.method == "distil":
        grown = distil(
            *(grown, config, first, N, corpus.old, corpus.new, corpus.texts, corpus.first_token, settings.distil),
            on_step,
        )
    if settings.lowered.rise is not None:
        grown = lower(*(grown, config, first, N, corpus.new, corpus.kept, corpus.first_token, settings.lowered))
    return jax.tree.map(lambda rows_ND: np.asarray(rows_ND, np.float32), take(grown, first, N))


def grow_tables(params: Mapping[str, Any], rows: Mapping[str, Any], first: int, padded: int) -> dict[str, Any]:
    """`params` whose tables have `padded` rows, the new ones at `first`; see `extend_rows`."""
    flat: dict[Any, Any] = dict(flatten_dict(dict(params)))
    made: dict[Any, Any] = dict(flatten_dict(dict(rows)))
    wanted = {path for path in TABLES if path in flat}
    if wanted != made.keys():
        name = lambda paths: ", ".join(sorted("/".join(path) for path in paths)) or "none"
        raise ValueError(f"rows for {name(made)}, expected rows for {name(wanted)}: they were made for another model")
    tables = {path: extend_rows(processes.fetch(flat[path]), made[path], first, padded) for path in sorted(wanted)}
    return unflatten_dict(flat | tables)


def padded_rows(rows: int, ids: int, multiple: int) -> int:
    """How many rows a table of `rows` needs for `ids` ids: its own where they suffice, else up to a multiple.

    padded_rows(151936, 151665 + 200, 64) is 151936, padded_rows(151936, 151665 + 2000, 64) is 153728
    """
    return rows if ids <= rows else padded_vocab(ids, multiple)


def replaced(extension: Extension) -> list[Sequence[int]]:
    """The old ids that spelt each id behind the base: none for the special tokens, which come first."""
    return [*[() for _ in extension.special_tokens], *extension.replaces]


def save_rows(path: str | Path, rows: Mapping[str, Any]) -> None:
    """Rows, as `make_rows` gives them, in one .npz file, written beside and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial.npz")
    tables: dict[str, Any] = dict(flatten_dict(dict(rows), sep="/"))
    np.savez(beside, **tables)
    beside.replace(path)


def load_rows(path: str | Path) -> dict[str, Any]:
    """The rows that `save_rows` wrote."""
    with np.load(path) as arrays:
        return unflatten_dict({name: arrays[name] for name in arrays.files}, sep="/")


def _with_rows(config: ModelConfig, rows: int) -> ModelConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=rows))


def _needs(settings: Embeddings) -> dict[str, bool]:
    return {
        f"method = {settings.method!r}": settings.method in ("similar", "distil"),
        f"lowered.rise = {settings.lowered.rise}": settings.lowered.rise is not None,
    }
