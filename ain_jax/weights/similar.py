"""Which old pieces a new piece resembles, measured on the user's own text: FOCUS (arXiv 2305.14481) without fastText.

The text is cut by the extended tokenizer, so that old and new pieces stand in the same contexts. A piece's vector comes
from the pieces around it (positive pointwise mutual information, its first singular vectors: Levy & Goldberg 2014 show
that word2vec factors the same matrix) and from the vectors of its character n-grams, as fastText's do. A new piece's
row is a mean of the most similar old pieces' rows, weighted by the sparsemax (arXiv 1602.02068) of their cosines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import tokenizers

from ain_jax.tokenizer.align import spellings

BLOCK = 1024  # new pieces whose cosines with all old ones are held at once


@dataclass(frozen=True)
class Similarity:
    """How vectors of pieces are made and compared."""

    width: int = 128  # of a vector
    window: int = 5  # pieces on either side that are its context, a near one counting more
    shortest: int = 2  # characters of an n-gram, the piece's borders counted
    longest: int = 5
    ngram_share: float = 0.5  # of a vector that its n-grams make; 0 leaves them out
    nearest: int = 64  # old pieces at most in a mean
    seed: int = 0

    def __post_init__(self):
        if min(self.width, self.window, self.nearest) < 1 or not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"{self}: expected width, window and nearest of 1 or more, and 1 <= shortest <= longest characters"
            )
        if not 0 <= self.ngram_share <= 1:
            raise ValueError(f"ngram_share = {self.ngram_share}: expected a share, 0 to 1")


def weights(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], first: int, count: int, settings: Similarity
) -> scipy.sparse.csr_array:
    """(count, first) float32: the share of each old piece in the row of each new piece `first`, `first + 1`, ...

    Old pieces are those that the text holds. A row is empty where the text has no such new piece, or nothing like it.
    """
    ids_T, text_T = _ids(tokenizer, texts)
    counts_V = np.bincount(ids_T, minlength=first + count)
    old, new = np.flatnonzero(counts_V[:first]), first + np.flatnonzero(counts_V[first : first + count])
    if not len(old) or not len(new):
        raise ValueError(
            f"{len(texts)} texts hold {len(old)} old and {len(new)} new pieces; expected text in the new pieces' "
            "language"
        )
    vectors_VE = vectors(ids_T, text_T, _texts(tokenizer), counts_V, settings)
    blocks = []
    for start in range(0, len(new), BLOCK):
        cosines = vectors_VE[new[start : start + BLOCK]] @ vectors_VE[old].T
        blocks.append(_nearest(cosines, settings.nearest))
    shares = scipy.sparse.coo_array(scipy.sparse.vstack(blocks))
    rows, columns = shares.coords
    placed = (shares.data.astype(np.float32), (new[rows] - first, old[columns]))
    return scipy.sparse.csr_array(scipy.sparse.coo_array(placed, shape=(count, first)))


def vectors(
    ids_T: np.ndarray, text_T: np.ndarray, pieces: Sequence[str], counts_V: np.ndarray, settings: Similarity
) -> np.ndarray:
    """(V, E) float32 of length 1, 0 for a piece that does not occur. `text_T` numbers the text of each token."""
    V = len(counts_V)
    matrix_VV = _ppmi(_neighbours(ids_T, text_T, V, settings.window))
    width = min(settings.width, V - 1)
    start = np.random.default_rng(settings.seed).standard_normal(V).astype(np.float32)  # else ARPACK draws its own
    values_E, vectors_VE = scipy.sparse.linalg.eigsh(matrix_VV, k=width, which="LM", v0=start)
    # The square root of the values weighs the axes, as in Levy, Goldberg & Dagan 2015, section 3.3.
    around_VE = _unit(vectors_VE * np.sqrt(np.abs(values_E)))
    if not settings.ngram_share:
        return around_VE
    grams_VG = _ngrams(pieces, counts_V, settings.shortest, settings.longest)
    # An n-gram's vector is the mean over the pieces that have it, by how often they occur; logarithms keep a frequent
    # piece from being all that its n-grams know.
    weighed_GV = grams_VG.T.multiply(np.log1p(counts_V)[None, :]).tocsr()
    gram_GE = (weighed_GV @ around_VE) / np.maximum(weighed_GV.sum(axis=1), 1e-9)[:, None]
    spelt_VE = _unit(grams_VG @ gram_GE)
    share = settings.ngram_share
    return _unit((1 - share) * around_VE + share * spelt_VE).astype(np.float32)


def sparsemax(scores_NK: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex to each row of scores (arXiv 1602.02068, algorithm 1).

    [0.9, 0.7, -1] -> [0.6, 0.4, 0]
    """
    sorted_NK = -np.sort(-scores_NK, axis=1)
    above_NK = np.cumsum(sorted_NK, axis=1) - 1
    size_K = np.arange(1, scores_NK.shape[1] + 1)
    support_N = (sorted_NK * size_K > above_NK).sum(axis=1)
    threshold_N = above_NK[np.arange(len(scores_NK)), support_N - 1] / support_N
    return np.maximum(scores_NK - threshold_N[:, None], 0)


def _nearest(cosines: np.ndarray, nearest: int) -> scipy.sparse.csr_array:
    """Sparsemax weights over the nearest old pieces of each row, those of no likeness left out."""
    nearest = min(nearest, cosines.shape[1])
    chosen = np.argpartition(-cosines, nearest - 1, axis=1)[:, :nearest]
    best = np.take_along_axis(cosines, chosen, axis=1)
    shares = np.where(best > 0, sparsemax(np.where(best > 0, best, -1.0)), 0)
    shares = np.where(best.max(axis=1, keepdims=True) > 0, shares, 0)
    rows = np.repeat(np.arange(len(cosines)), nearest)
    found = scipy.sparse.coo_array((shares.ravel(), (rows, chosen.ravel())), shape=cosines.shape)
    found.eliminate_zeros()
    return scipy.sparse.csr_array(found)


def _ids(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All ids of the texts, one behind the other, and the number of the text of each."""
    encoded = [np.array(e.ids, np.int64) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    lengths = [len(ids) for ids in encoded]
    return np.concatenate([np.zeros(0, np.int64), *encoded]), np.repeat(np.arange(len(encoded)), lengths)


def _texts(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """What each id spells; "" for a special token or a hole."""
    return [s.text.decode(errors="replace") if s is not None else "" for s in spellings(tokenizer)]


def _neighbours(ids_T: np.ndarray, text_T: np.ndarray, size: int, window: int) -> scipy.sparse.csr_array:
    """(V, V): how often two pieces stand near one another in a text; at distance d it counts 1/d."""
    total = scipy.sparse.csr_array((size, size), dtype=np.float32)
    for distance in range(1, window + 1):
        same = text_T[distance:] == text_T[:-distance]
        pair = (ids_T[:-distance][same], ids_T[distance:][same])
        near = np.full(len(pair[0]), 1 / distance, np.float32)
        total = total + scipy.sparse.csr_array(scipy.sparse.coo_array((near, pair), shape=(size, size)))
    return scipy.sparse.csr_array(total + total.T)


def _ppmi(near_VV: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """max(0, log p(a, b) / p(a) p(b)) where two pieces stand near one another, 0 elsewhere."""
    found = scipy.sparse.coo_array(near_VV)
    of_V = np.maximum(near_VV.sum(axis=1), 1e-9)
    a, b = found.coords
    information = np.log(found.data * of_V.sum() / (of_V[a] * of_V[b]))
    result = scipy.sparse.csr_array(
        scipy.sparse.coo_array((np.maximum(information, 0).astype(np.float32), (a, b)), shape=near_VV.shape)
    )
    result.eliminate_zeros()
    return result


def _ngrams(pieces: Sequence[str], counts_V: np.ndarray, shortest: int, longest: int) -> scipy.sparse.csr_array:
    """(V, G): which character n-grams each occurring piece has, border marks counted: "<cat>" has "<ca", "at>" ..."""
    numbers: dict[str, int] = {}
    rows, columns = [], []
    for index in np.flatnonzero(counts_V).tolist():
        text = f"<{pieces[index]}>"
        grams = {text[i : i + n] for n in range(shortest, longest + 1) for i in range(len(text) - n + 1)}
        columns += [numbers.setdefault(gram, len(numbers)) for gram in sorted(grams)]
        rows += [index] * len(grams)
    ones = np.ones(len(rows), np.float32)
    shape = (len(counts_V), max(1, len(numbers)))
    return scipy.sparse.csr_array(scipy.sparse.coo_array((ones, (rows, columns)), shape=shape))


def _unit(vectors_VE: np.ndarray) -> np.ndarray:
    """Each row at length 1; a row of zeros stays."""
    return vectors_VE / np.maximum(np.linalg.norm(vectors_VE, axis=1, keepdims=True), 1e-9)
