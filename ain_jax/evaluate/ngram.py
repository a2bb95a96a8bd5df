"""A byte n-gram model with interpolated Kneser-Ney smoothing: the yardstick that a language model must pass.

Chen and Goodman (1998), section 2.7: one discount D for all orders, lower orders from the number of distinct
contexts. Contexts begin anew in each text. Arrays of sorted 64-bit keys, no loop over bytes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

BEGIN, SYMBOLS = 256, 257  # 256 byte values and what stands before a text


@dataclasses.dataclass(frozen=True)
class Order:
    """Counts of one order: of k-grams, and of their contexts (the first k - 1 symbols)."""

    grams: np.ndarray  # sorted keys
    counts: np.ndarray
    contexts: np.ndarray  # sorted keys
    totals: np.ndarray  # sum of the counts of a context's k-grams
    kinds: np.ndarray  # how many different k-grams begin with a context


@dataclasses.dataclass(frozen=True)
class ByteModel:
    orders: tuple[Order, ...]  # of lengths 1, 2, ..., n
    discount: float

    def bits(self, texts: Sequence[str]) -> float:
        """Bits to predict every byte of the texts, each read from its beginning."""
        keys = _keys(texts, len(self.orders))
        probability = np.full(len(keys), 1.0 / 256)
        for length, order in enumerate(self.orders, start=1):
            grams = _suffix(keys, length)
            context, seen = _find(order.contexts, grams // SYMBOLS)
            gram, known = _find(order.grams, grams)
            count = np.where(known, order.counts[gram], 0)
            total = np.where(seen, order.totals[context], 1)
            kinds = np.where(seen, order.kinds[context], 0)
            higher = (np.maximum(count - self.discount, 0) + self.discount * kinds * probability) / total
            probability = np.where(seen, higher, probability)
        return float(-np.log2(probability).sum())


def train(texts: Sequence[str], n: int = 5, discount: float = 0.75) -> ByteModel:
    """The model of `n`-grams of the UTF-8 bytes of `texts`."""
    if not 1 <= n <= 7:
        raise ValueError(f"n = {n}: expected 1 to 7, the longest key that 64 bits hold")
    keys = _keys(texts, n)
    if not len(keys):
        raise ValueError("a byte model needs at least one byte of text")
    grams, counts = np.unique(keys, return_counts=True)
    orders = []
    for length in range(n, 0, -1):
        contexts, first = np.unique(grams // SYMBOLS, return_index=True)
        totals = np.add.reduceat(counts, first)
        orders.append(Order(grams, counts, contexts, totals, np.diff(np.append(first, len(grams)))))
        # Continuation counts: in how many contexts a shorter gram was seen, not how often.
        shorter, counts = np.unique(_suffix(grams, length - 1), return_counts=True)
        grams = shorter
    return ByteModel(tuple(reversed(orders)), discount)


def _keys(texts: Sequence[str], n: int) -> np.ndarray:
    """For each byte of the texts, the n symbols that end in it as one number."""
    parts = []
    for text in texts:
        symbols = np.concatenate([np.full(n - 1, BEGIN), np.frombuffer(text.encode(), np.uint8)]).astype(np.int64)
        if len(symbols) < n:
            continue
        key = np.zeros(len(symbols) - n + 1, np.int64)
        for offset in range(n):
            key = key * SYMBOLS + symbols[offset : offset + len(key)]
        parts.append(key)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _suffix(keys: np.ndarray, length: int) -> np.ndarray:
    return keys % SYMBOLS**length


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each key stands in a sorted table, and whether it does."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys
