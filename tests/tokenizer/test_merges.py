"""The continued training against the textbook's loop and against the trainer of the `tokenizers` library."""

import itertools
import json
from collections import Counter

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer

from ain_jax import sample
from ain_jax.tokenizer.merges import continuation, continue_bpe


def brute_force(words, limit, min_count=2, allowed=lambda left, right: True):
    """The textbook: count all pairs, merge the most frequent (the oldest symbols at a tie), again."""
    age = {symbol: index for index, symbol in enumerate(sorted({s for word in words for s in word}))}
    merges = []
    while len(merges) < limit:
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        pairs = {pair: count for pair, count in pairs.items() if count >= min_count and allowed(*pair)}
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        merges.append((*best, pairs[best]))
        age.setdefault(best[0] + best[1], len(age))
        merged: Counter = Counter()
        for word, count in words.items():
            joined, place = [], 0
            while place < len(word):
                here = word[place : place + 2] == best
                joined.append(best[0] + best[1] if here else word[place])
                place += 2 if here else 1
            merged[tuple(joined)] += count
        words = merged
    return merges


def test_a_worked_continuation():
    assert continue_bpe({("a", "b", "c"): 3, ("a", "b"): 1}, 2) == [("a", "b"), ("ab", "c")]
    # a tie: the pair of the older symbols first, whatever was read first
    assert continue_bpe({("c", "d"): 2, ("a", "b"): 2}, 2) == [("a", "b"), ("c", "d")]
    # symbols of a base may be longer than a character, and stay what they are
    assert continue_bpe({("▁ال", "م"): 2, ("▁", "ال"): 5}, 2) == [("▁", "ال"), ("▁ال", "م")]
    assert continue_bpe({("a", "b"): 1}, 5) == [] == continue_bpe({}, 5)
    # a run joins from its left; the two ways to spell abc make one symbol
    assert list(continuation({("a", "a", "a"): 2}, 2)) == [("a", "a", 4), ("aa", "a", 2)]
    twice = {("ab", "c", "d"): 5, ("a", "bc", "d"): 4}
    assert list(continuation(twice, 4)) == [("ab", "c", 5), ("abc", "d", 5), ("a", "bc", 4), ("abc", "d", 4)]


WORDS = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "c", "de"]), min_size=1, max_size=9).map(tuple),
    st.integers(1, 9),
    min_size=1,
    max_size=8,
)
ALIKE = st.dictionaries(  # symbols that spell each other, and long runs of one
    st.lists(st.sampled_from(["a", "b", "ab", "aa", "ba"]), min_size=1, max_size=9).map(tuple),
    st.integers(1, 3),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(WORDS, ALIKE), st.integers(1, 4))
@example({("a", "a", "a", "a", "a"): 2, ("a", "b", "a", "b"): 1}, 1)
def test_merges_equal_brute_force(words, min_count):
    assert list(itertools.islice(continuation(words, min_count), 20)) == brute_force(words, 20, min_count)


@settings(max_examples=150, deadline=None)
@given(st.one_of(WORDS, ALIKE), st.sets(st.sampled_from(["ab", "bc", "aa", "dea", "ca", "abc"])), st.integers(2, 5))
def test_forbidden_pairs_never_join(words, forbidden, longest):
    def allowed(left, right):
        return left + right not in forbidden and len(left + right) <= longest

    found = continue_bpe(words, 30, 1, allowed)
    assert found == [merge[:2] for merge in brute_force(words, 30, 1, allowed)]
    assert all(allowed(*merge) for merge in found)


@pytest.fixture(scope="module")
def handbook():
    """The words of the sample's handbook as characters, with a blank in front."""
    words = Counter(word for row in sample.rows("handbook") for word in row["ar"].split())
    return {("▁", *word): count for word, count in words.items()}


def test_merges_on_real_text_equal_the_librarys(handbook):
    """The library's trainer breaks ties alike; it takes no counts, so the words are written out."""
    learner = tokenizers.Tokenizer(BPE())
    learner.pre_tokenizer = WhitespaceSplit()  # pyright: ignore
    alphabet = {symbol for word in handbook for symbol in word}
    trainer = BpeTrainer(vocab_size=len(alphabet) + 1500, min_frequency=2, show_progress=False)  # pyright: ignore
    learner.train_from_iterator((("".join(word) + " ") * count for word, count in handbook.items()), trainer)
    theirs = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    assert len(theirs) >= 1500 and continue_bpe(handbook, len(theirs)) == theirs


def test_counts_fall_and_a_prefix_is_a_smaller_training(handbook):
    merges = list(itertools.islice(continuation(handbook), 800))
    counts = [count for *_, count in merges]
    assert counts == sorted(counts, reverse=True)
    assert continue_bpe(handbook, 300) == [merge[:2] for merge in merges[:300]]


def test_counts_may_be_as_large_as_a_corpus_of_terabytes():
    many = 10**12
    assert list(continuation({("a", "b"): many, ("b", "c"): many + 1}, 2)) == [("b", "c", many + 1), ("a", "b", many)]
