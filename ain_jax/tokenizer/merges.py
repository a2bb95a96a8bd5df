"""Byte-pair merges learnt from words whose present symbols and counts are given: a BPE training, continued.

    words     (ال, ح, ر): 3    (ح, ر): 2
    counts    ال+ح 3, ح+ر 5
    merges    ح+ر (5 times), then ال+حر (3 times)

The trainer of the `tokenizers` library does not serve here: it takes no counts, so a large corpus would have to be
written out again word by word, and it has no rule for pairs that must not join (half characters, pieces that the base
has already). The tests compare with it, and with the textbook's loop.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice, pairwise

import numpy as np

BORDER, GONE = -1, -2  # what stands between words; a place whose symbol was joined to the one before it


def continue_bpe(
    words: Mapping[tuple[str, ...], int],
    limit: int,
    min_count: int = 2,
    allowed: Callable[[str, str], bool] | None = None,
) -> list[tuple[str, str]]:
    """The first `limit` merges of `continuation`, without their counts.

    {("a","b","c"): 3, ("a","b"): 1}, limit 2  ->  [("a","b"), ("ab","c")]
    """
    return [(left, right) for left, right, _ in islice(continuation(words, min_count, allowed), limit)]


def continuation(
    words: Mapping[tuple[str, ...], int],
    min_count: int = 2,
    allowed: Callable[[str, str], bool] | None = None,
) -> Iterator[tuple[str, str, int]]:
    """The next merges of a BPE whose present symbols are given: (left, right, count), most frequent pair first.

    Ties go to the pair whose left symbol is older, then to the one whose right symbol is older; the order of the
    first symbols is that of `sorted`. A pair that `allowed` refuses is never joined. The result may hold two merges
    with the same concatenation (ab+c and a+bc): they make the same symbol. Pairs below `min_count` end it.

    All places of one merge are joined at once by numpy, so the time depends on the number of different words, not
    on how often they occur.
    """
    names = sorted(set(chain.from_iterable(words)))
    ids = {name: index for index, name in enumerate(names)}
    symbol_P, weight_P = _laid_out(words, ids)
    after_P = np.arange(1, len(symbol_P) + 1, dtype=np.int32)  # the next place whose symbol is not gone
    before_P = np.arange(-1, len(symbol_P) - 1, dtype=np.int32)
    order = np.argsort(symbol_P, kind="stable")
    bounds = np.searchsorted(symbol_P[order], np.arange(len(names) + 1))
    places = [order[start:end] for start, end in pairwise(bounds)]  # of each symbol

    def pairs(left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places that have a symbol behind them, and the key of each pair."""
        right = symbol_P[after_P[left]]
        good = (symbol_P[left] >= 0) & (right >= 0)
        return left[good], symbol_P[left[good]].astype(np.int64) << 32 | right[good]

    left, keys = pairs(np.arange(len(symbol_P) - 1))
    counts = _sums(keys, weight_P[left])
    heap = [(-count, key) for key, count in counts.items() if count >= min_count]
    heapq.heapify(heap)
    while heap:
        negative, key = heapq.heappop(heap)
        count = counts.get(key, 0)
        if count != -negative:  # it sank since it was put there
            if count >= min_count:
                heapq.heappush(heap, (-count, key))
            continue
        a, b = key >> 32, key & 0xFFFFFFFF
        if allowed is not None and not allowed(names[a], names[b]):
            continue
        at = _places_of(a, b, symbol_P, before_P, after_P, places)
        around, old = pairs(np.unique(np.concatenate([at, before_P[at], after_P[at]])))
        product = names[a] + names[b]
        new = ids.setdefault(product, len(names))
        if new == len(names):
            names.append(product)
            places.append(at)
        else:
            places[new] = np.concatenate([places[new], at])
        change = weight_P[around]

        gone = after_P[at]
        symbol_P[at], symbol_P[gone] = new, GONE
        after_P[at] = after_P[gone]
        before_P[after_P[at]] = at
        around, fresh = pairs(np.unique(np.concatenate([at, before_P[at]])))

        del counts[key]
        for other, delta in _sums(np.concatenate([old, fresh]), np.concatenate([-change, weight_P[around]])).items():
            if other == key or delta == 0:
                continue
            counts[other] = total = counts.get(other, 0) + delta
            if total == 0:
                del counts[other]
            elif delta > 0 and total >= min_count:
                heapq.heappush(heap, (-total, other))
        yield names[a], names[b], count


def _laid_out(words: Mapping[tuple[str, ...], int], ids: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The symbols of all words in one row, a border before each word and behind the last, and each place's count."""
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    total = int(sizes.sum())
    place = np.arange(total) + 1 + np.repeat(np.arange(len(words)), sizes)
    symbol_P = np.full(total + len(words) + 1, BORDER, np.int32)
    weight_P = np.zeros(len(symbol_P), np.int64)
    symbol_P[place] = np.fromiter(map(ids.__getitem__, chain.from_iterable(words)), np.int32, total)
    weight_P[place] = np.repeat(np.fromiter(words.values(), np.int64, len(words)), sizes)
    return symbol_P, weight_P


def _places_of(
    a: int, b: int, symbol_P: np.ndarray, before_P: np.ndarray, after_P: np.ndarray, places: list[np.ndarray]
) -> np.ndarray:
    """Where `a` is followed by `b`, found from the rarer of the two; of a run a a a, every other pair."""
    rare = a if len(places[a]) <= len(places[b]) else b
    places[rare] = places[rare][symbol_P[places[rare]] == rare]  # those joined away since are forgotten
    at = places[rare] if rare == a else before_P[places[rare]]
    at = at[(symbol_P[at] == a) & (symbol_P[after_P[at]] == b)]
    if a == b and len(at):
        at = np.sort(at)
        starts = np.concatenate([[True], after_P[at[:-1]] != at[1:]])  # of runs
        index = np.arange(len(at))
        at = at[(index - np.maximum.accumulate(np.where(starts, index, 0))) % 2 == 0]
    return at


def _sums(keys: np.ndarray, values: np.ndarray) -> dict[int, int]:
    """The sum of the values of each key."""
    if not len(keys):
        return {}
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return dict(zip(keys[starts].tolist(), np.add.reduceat(values[order], starts).tolist(), strict=True))
