"""A growing vocabulary: its sizes and steps, its tokenizers, and what spelt a piece before it came into use."""

import itertools
import json

import pytest
import tiny_bases
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ain_jax.tokenizer.chat import load_tokenizer
from ain_jax.tokenizer.extend import extend
from ain_jax.tokenizer.folder import read_extension
from ain_jax.tokenizer.schedule import Vocabulary, shorter, spelt_before

PIECES = 40


@pytest.fixture(scope="module", params=["byte level", "SentencePiece"])
def extended(request, tmp_path_factory):
    """(base, extension): the same text learnt from with every size."""
    root = tmp_path_factory.mktemp("schedule")
    base = tiny_bases.byte_level(root / "base") if request.param == "byte level" else tiny_bases.MISTRAL
    return base, extend(base, tiny_bases.ARABIC, out_dir=root / "extended", pieces=PIECES)


@given(st.integers(1, 16), st.integers(16, 20_000), st.sampled_from(["exponential", "linear"]))
def test_the_sizes_rise_to_all_pieces_and_the_steps_add_up(parts, pieces, growth):
    vocabulary = Vocabulary(parts, growth)
    sizes, steps = vocabulary.sizes(pieces), vocabulary.steps(pieces)
    assert len(sizes) == len(steps) == parts and sizes[-1] == pieces and sum(steps) == pieces
    assert all(a <= b for a, b in itertools.pairwise(sizes)) and sizes[0] >= 1
    assert max(steps) - min(steps) <= 1


def test_growth_by_hand():
    assert Vocabulary(4).sizes(10_000) == [10, 100, 1000, 10_000]
    assert Vocabulary(4, "linear").sizes(100) == [25, 50, 75, 100]
    assert Vocabulary(3).steps(10) == [3, 4, 3]
    for wrong, words in ((lambda: Vocabulary(0), "parts = 0"), (lambda: Vocabulary(5).sizes(4), "has 4 pieces")):
        with pytest.raises(ValueError, match=words):
            wrong()
    with pytest.raises(ValueError, match=r"Trainer.steps = 3: expected a step or more for each part"):
        Vocabulary(5).steps(3)


@pytest.mark.parametrize("used", [1, 13, PIECES])
def test_a_shorter_vocabulary_cuts_text_as_the_smaller_extension_does(extended, used, tmp_path):
    base, extension = extended
    small = extend(base, tiny_bases.ARABIC, out_dir=tmp_path / "small", pieces=used)
    assert small.pieces == extension.pieces[:used]
    expected = tokenizers.Tokenizer.from_file(str(small.folder / "tokenizer.json"))
    found = shorter(load_tokenizer(extension.folder), extension, used)
    for text in (*tiny_bases.ARABIC[:20], *tiny_bases.ENGLISH[:5]):
        assert found.encode(text, add_special_tokens=False) == expected.encode(text, add_special_tokens=False).ids
    assert found.chat_template and found.eos_token == load_tokenizer(extension.folder).eos_token


def test_a_piece_was_spelt_by_pieces_in_use_that_join_to_it(extended):
    _, extension = extended
    data = json.loads((extension.folder / "tokenizer.json").read_text("utf-8"))
    piece = {index: piece for piece, index in data["model"]["vocab"].items()}
    assert spelt_before(extension, 0, PIECES) == [list(ids) for ids in extension.replaces]
    used = 10
    shortest = 99
    for name, ids in zip(extension.pieces[used:], spelt_before(extension, used, PIECES), strict=True):
        assert "".join(piece[i] for i in ids) == name
        assert max(ids) < extension.first_piece + used
        shortest = min(shortest, len(ids))
    assert shortest == 2  # some are made of two that were in use
    assert read_extension(extension.folder) == extension
