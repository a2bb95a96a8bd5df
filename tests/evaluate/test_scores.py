"""Scores against edits counted by hand and answers searched for by trying all of them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.data.builders.sample_records import spell
from ain_jax.evaluate import scores


def distance(a, b):
    """Levenshtein's, by his recursion."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row, above = [i], row
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


words = st.text("abcع", min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, st.text("abcع", max_size=6)), min_size=1, max_size=6))
def test_error_rate_is_edits_over_all_characters(pairs):
    references, answers = zip(*pairs, strict=True)
    expected = sum(distance(r, a) for r, a in pairs) / sum(map(len, references))
    assert scores.error_rate(references, answers) == pytest.approx(expected)


def test_letters_undo_the_spelling():
    for line in (["كتاب"], ["من", "هنا"], ["a"]):
        assert scores.letters(spell(line)) == " ".join(line)
    assert scores.letters("ك ت ا ب / ع") == "كتاب ع"
    assert scores.letters("كتاب/ع") == scores.letters(" / ك  تاب //ع/") == "كتاب ع"
    assert scores.letters("ا\u0653") == "\u0622"  # alef and madda are one letter, written as one code point or as two
    assert scores.letters("") == scores.letters(" / ") == ""


def test_plain_names():
    assert scores.plain(" A  Cat. ") == scores.plain("a cat") == "a cat"
    assert scores.plain("قطة。") == "قطة"
    assert scores.accuracy(["a", "b", "b"], ["a", "b", "c"]) == pytest.approx(2 / 3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=5))
def test_no_short_answer_beats_the_best_constant(references):
    answer, rate = scores.best_constant(references)
    assert rate == pytest.approx(sum(distance(answer, r) for r in references) / sum(map(len, references)))
    every = ["".join(letters) for n in range(4) for letters in itertools.product("ab", repeat=n)]
    fewest = min(sum(distance(a, r) for r in references) for a in every)
    assert rate == pytest.approx(fewest / sum(map(len, references)))


def test_most_common():
    assert scores.most_common(["cat", "dog", "cat", "bird"]) == ("cat", 0.5)
