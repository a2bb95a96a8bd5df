"""The same text under two tokenizers: places that meet, ids that stand for the same."""

import extended
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.tokenizer.align import Spelling, align, cut, is_byte_level, spellings


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return extended.vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def sentencepiece(tokenizer_folder):
    return tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


def test_ids_of_both_kinds_are_comparable(vocabulary, sentencepiece):
    theirs, ours = spellings(sentencepiece), spellings(vocabulary.old)
    assert (is_byte_level(vocabulary.old), is_byte_level(sentencepiece)) == (True, False)
    assert (
        theirs[sentencepiece.token_to_id("▁the")] == ours[vocabulary.old.token_to_id("Ġthe")] == Spelling(text=b" the")
    )
    assert (
        theirs[sentencepiece.token_to_id("<0xE2>")] == ours[vocabulary.old.token_to_id("â")] == Spelling(text=b"\xe2")
    )
    assert theirs[sentencepiece.token_to_id("A")] == ours[vocabulary.old.token_to_id("A")] == Spelling(text=b"A")
    assert theirs[sentencepiece.token_to_id("<0x41>")] == Spelling(text=b"A", is_byte=True)
    assert ours[vocabulary.old.token_to_id("<|end|>")] == Spelling(special="<|end|>")
    for found in (theirs, ours):
        known = [spelling for spelling in found if spelling is not None]
        assert len(set(known)) == len(known)


def test_all_bytes_of_a_text_are_those_of_its_ids(vocabulary, sentencepiece):
    for tokenizer, space in ((vocabulary.new, b""), (sentencepiece, b" ")):
        found = spellings(tokenizer)
        for text in (*extended.ARABIC, *extended.ENGLISH, "🙂 x"):
            parts = [found[i] for i in tokenizer.encode(text, add_special_tokens=False).ids]
            assert b"".join(part.text for part in parts if part) == space + text.encode()


def test_what_is_cut_spells_the_same(vocabulary, sentencepiece):
    texts = [" الحرية".encode(), b"\xd8", "كت".encode()[1:], b" the", "🙂".encode()]
    for tokenizer in (vocabulary.old, vocabulary.new, sentencepiece):
        found = spellings(tokenizer)
        for text, ids in zip(texts, cut(tokenizer, texts), strict=True):
            parts = [found[index] for index in ids]
            assert b"".join(part.text for part in parts if part) == text


def test_a_unigram_tokenizer_is_refused():
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)], 0, False))
    with pytest.raises(ValueError, match="type Unigram, expected BPE"):
        spellings(unigram)
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({"ab": 0, "▁": 1}, []))
    with pytest.raises(ValueError, match="neither byte fallback nor a byte alphabet"):
        spellings(plain)


PARTS = ["the", "cat", "الحرية", "هذه", "كتاب", "🙂", "ab,", "mat.", "", "\n"]
WORDS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=30)


@settings(deadline=None, max_examples=40)
@given(WORDS, st.integers(24, 60))
def test_places_that_meet_have_read_the_same_words(vocabulary, words, longest):
    text = " ".join(words)
    if not text.strip():
        return
    pairs = align(vocabulary.old, vocabulary.new, [text], 0, longest)
    assert pairs.old_tokens_NL.shape[1] % 8 == pairs.new_tokens_NM.shape[1] % 8 == 0
    assert max(pairs.old_lengths_N.max(), pairs.new_lengths_N.max()) <= longest
    seen = []
    for i in range(len(pairs)):
        row = pairs[i]
        old, new = row.old_tokens_NL[: row.old_lengths_N], row.new_tokens_NM[: row.new_lengths_N]
        assert old[0] == new[0] == 0 and not row.old_tokens_NL[row.old_lengths_N :].any()
        whole = vocabulary.old.decode(old[1:].tolist(), skip_special_tokens=False)
        assert whole == vocabulary.new.decode(new[1:].tolist(), skip_special_tokens=False)
        assert row.bytes_N == len(whole.encode())
        for at, (a, b) in enumerate(zip(row.old_ends_NC[: row.words_N], row.new_ends_NC[: row.words_N], strict=True)):
            read = vocabulary.old.decode(old[1 : a + 1].tolist())
            assert read == vocabulary.new.decode(new[1 : b + 1].tolist())
            assert read.split() == whole.split()[: at + 1]
        assert row.words_N == len(whole.split())
        seen += whole.split()
    assert seen == text.split()


def test_by_hand(vocabulary):
    pairs = align(vocabulary.old, vocabulary.new, ["the cat"], 1, 16)
    ids = [vocabulary.old.token_to_id(piece) for piece in ("the", "Ġcat")]
    assert pairs.old_tokens_NL.tolist() == [[1, *ids, 0, 0, 0, 0, 0]] == pairs.new_tokens_NM.tolist()
    assert pairs.old_ends_NC.tolist() == pairs.new_ends_NC.tolist() == [[1, 2]]
    assert (pairs.words_N.tolist(), pairs.bytes_N.tolist()) == ([2], [7])


def test_no_text_is_refused(vocabulary):
    for texts in ([], ["  "], ["الحرية" * 20]):
        with pytest.raises(ValueError, match="none with a word of fewer than 12 tokens"):
            align(vocabulary.old, vocabulary.new, texts, 0, 12)


def test_of_a_large_corpus_a_few_parts_are_taken_evenly(vocabulary):
    texts = ["the cat"] + ["cat"] * 9_998 + ["the cat the"]
    read = []

    class Corpus(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

        def __iter__(self):
            raise AssertionError("the whole corpus is cut")

    pairs = align(vocabulary.old, vocabulary.new, Corpus(texts), 0, 16, most=5)
    assert pairs.words_N.tolist() == [2, 1, 1, 1, 3]
    assert len(read) == 80 and (read[0], read[-1]) == (0, 9_999)
    assert len(align(vocabulary.old, vocabulary.new, texts[:3], 0, 16, most=5)) == 3
