"""The byte model against interpolated Kneser-Ney written with dictionaries, byte by byte."""

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.evaluate import ngram


class Plain:
    """p(byte | context) by the recursion of Chen and Goodman (1998), equation 4 with one discount."""

    def __init__(self, texts, n, discount):
        self.n, self.discount = n, discount
        grams = Counter()
        for text in texts:
            symbols = [256] * (n - 1) + list(text.encode())
            grams.update(tuple(symbols[i : i + n]) for i in range(len(symbols) - n + 1))
        self.counts = {n: grams}
        for length in range(n - 1, 0, -1):  # in how many longer grams does a shorter one end
            self.counts[length] = Counter(gram[1:] for gram in self.counts[length + 1])
        self.followers = {length: defaultdict(list) for length in self.counts}
        for length, counts in self.counts.items():
            for gram, count in counts.items():
                self.followers[length][gram[:-1]].append(count)

    def probability(self, context, byte):
        length = len(context) + 1
        lower = self.probability(context[1:], byte) if context else 1 / 256
        seen = self.followers[length].get(tuple(context))
        if not seen:
            return lower
        kept = max(self.counts[length][(*context, byte)] - self.discount, 0)
        return (kept + self.discount * len(seen) * lower) / sum(seen)

    def bits(self, texts):
        total = 0.0
        for text in texts:
            symbols = [256] * (self.n - 1) + list(text.encode())
            for i in range(self.n - 1, len(symbols)):
                total -= math.log2(self.probability(symbols[i - self.n + 1 : i], symbols[i]))
        return total


texts = st.lists(st.text("abcع \0", max_size=15), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.integers(1, 7), st.sampled_from([0.3, 0.75, 1.0]))
def test_bits_are_those_of_the_plain_recursion(trained, asked, n, discount):
    if not any(trained):
        with pytest.raises(ValueError, match="at least one byte"):
            ngram.train(trained, n, discount)
        return
    expected = Plain(trained, n, discount).bits(asked)
    assert ngram.train(trained, n, discount).bits(asked) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_plain_recursion_is_a_distribution():
    model = Plain(["abcab", "bca ع"], 3, 0.75)
    for context in ([256, 256], [256, 97], [97, 98], [98, 122], [216, 185]):
        assert sum(model.probability(context, byte) for byte in range(256)) == pytest.approx(1)


def test_by_hand():
    # "aab" as unigrams: a twice, b once, discount 1/2, two kinds of three: what is taken off goes to 1/256 each.
    model = ngram.train(["aab"], n=1, discount=0.5)
    assert model.bits(["a"]) == pytest.approx(-math.log2((1.5 + 0.5 * 2 / 256) / 3))
    assert model.bits(["b"]) == pytest.approx(-math.log2((0.5 + 0.5 * 2 / 256) / 3))
    assert model.bits(["z"]) == pytest.approx(-math.log2(0.5 * 2 / 256 / 3))
    assert model.bits([]) == model.bits([""]) == 0


def test_each_text_begins_anew():
    model = ngram.train(["ab", "ab"], n=5)
    assert model.bits(["ab", "ab"]) == pytest.approx(2 * model.bits(["ab"]))
    assert model.bits(["abab"]) > model.bits(["ab", "ab"])


@pytest.mark.parametrize("n", [0, 8])
def test_orders_that_64_bits_do_not_hold_are_refused(n):
    with pytest.raises(ValueError, match=f"n = {n}: expected 1 to 7"):
        ngram.train(["a"], n)
