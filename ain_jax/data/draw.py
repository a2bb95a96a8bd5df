"""One fixed order of examples from several sources: the same on every host, any stretch of it in the shares asked for.

Nothing here is as long as the draw. A small source keeps the order of its present epoch; of a large one each place is
worked out when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

CHUNK = 2**15  # draws made at once, at most
KEPT = 2**18  # examples up to which the order of an epoch is kept


def draws(
    sizes: Sequence[int], shares: Sequence[float], seeds: Sequence[Sequence[int]], begin: Sequence[int] | None = None
) -> Iterator[np.ndarray]:
    """Stretches of (source, example) rows, int32, without end: each source shuffled anew each epoch, all interleaved.

    A source of share p has its j-th example at time (j + 1/2) / p, and the draw is the order of those times: any
    stretch of it holds each source in its share. (A grain mix of shuffled and repeated sources gives the same
    guarantees, at about 2 ms an item; planning draws millions.) `begin` says how many of each source an earlier phase
    has drawn; its epochs go on from there.
    """
    assert len(sizes) == len(shares) == len(seeds), "one share and one seed per source"
    for source, size in enumerate(sizes):
        if not size:
            raise ValueError(f"source {source} of the mixture has no examples; take it out of Mixture.weights")
    epochs = [_Epochs(size, seed) for size, seed in zip(sizes, seeds, strict=True)]
    first = list(begin) if begin is not None else [0] * len(sizes)
    done = [0] * len(sizes)
    end = 0
    while True:
        end += min(max(end, 64), CHUNK)  # a short draw costs little
        times, parts = [], []
        for source, share in enumerate(shares):
            if not share:
                continue
            until = _before(end, share)
            j = np.arange(done[source], until)
            times.append((j + 0.5) / share)
            examples = epochs[source].at(first[source] + done[source], until - done[source])
            parts.append(np.stack([np.full(len(j), source, np.int32), examples], axis=1))
            done[source] = until
        order = np.argsort(np.concatenate(times), kind="stable")
        yield np.concatenate(parts)[order]


def draw(
    sizes: Sequence[int], shares: Sequence[float], seed: int, count: int, begin: Sequence[int] | None = None
) -> np.ndarray:
    """The first `count` of `draws` as one array; a longer draw begins with the shorter one."""
    parts, drawn = [np.zeros((0, 2), np.int32)], 0
    for part in draws(sizes, shares, [(seed, source) for source in range(len(sizes))], begin):
        parts.append(part)
        drawn += len(part)
        if drawn >= count:
            break
    return np.concatenate(parts)[:count]


def _before(time: int, share: float) -> int:
    """How many of a source of this share come before a time: the smallest j with (j + 1/2) / share >= time."""
    j = max(int(share * time - 0.5) - 1, 0)
    while (j + 0.5) / share < time:
        j += 1
    return j


class _Epochs:
    """The examples of one source in the order of one epoch after the other."""

    def __init__(self, size: int, seed: Sequence[int]):
        self.size, self.seed = size, tuple(seed)
        self.epoch, self.order = -1, None

    def at(self, start: int, count: int) -> np.ndarray:
        """int32: the examples at so many places from `start` on."""
        parts, done = [np.zeros(0, np.int32)], 0
        while done < count:
            epoch, place = divmod(start + done, self.size)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, _order(self.size, (*self.seed, epoch))
            assert self.order is not None
            upto = min(place + count - done, self.size)
            parts.append(self.order(place, upto))
            done += upto - place
        return np.concatenate(parts)


def _order(size: int, seed: Sequence[int]) -> Callable[[int, int], np.ndarray]:
    """The examples of one epoch at the places from one to another."""
    rng = np.random.default_rng(list(seed))
    if size <= KEPT:
        kept = rng.permutation(size).astype(np.int32)
        return lambda start, stop: kept[start:stop]
    keys = rng.integers(2**63, size=6, dtype=np.uint64)
    return lambda start, stop: scattered(np.arange(start, stop, dtype=np.uint64), size, keys).astype(np.int32)


def scattered(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a random one-to-one map of 0 .. size - 1 sends each place; uint64.

    A Feistel network (Luby and Rackoff 1988) over the next power of four, walked on wherever it leads outside (Black
    and Rogaway 2002, section 3): nothing of the size of the map is held.
    """
    half = np.uint64((int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    result = places.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= size]
    return result


def _mixed(values: np.ndarray) -> np.ndarray:
    """The bits of each value stirred: the last steps of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
