"""The extension against a brute-force BPE, SentencePiece's own encoder and transformers' AutoTokenizer."""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ain_jax.tokenizer import extend as extending
from ain_jax.tokenizer.chat import encode_texts
from ain_jax.tokenizer.extend import (
    SPECIAL_TOKENS,
    continue_bpe,
    extend,
    learning_words,
    padded_vocab,
    reachable,
    read_texts,
)
from ain_jax.tokenizer.folder import append, processor, read_extension, read_model

SAMPLE = Path(extending.__file__).parents[1] / "sample"
BASE = SAMPLE / "tokenizer" / "mistral_v1.model"


def sample(name, language):
    lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[language] for line in lines]


ARABIC_TEXTS = sample("udhr", "ar") + sample("handbook", "ar")[:150]
ENGLISH_TEXTS = sample("udhr", "en") + sample("handbook", "en")[:200]


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    return extend(BASE, ARABIC_TEXTS, out_dir=tmp_path_factory.mktemp("tokenizer") / "ar", pieces=200)


@pytest.fixture(scope="module")
def forms(extension):
    """SentencePiece before and after, and AutoTokenizer of the folder."""
    after = sentencepiece.SentencePieceProcessor(model_file=str(extension.folder / "tokenizer.model"))
    before = sentencepiece.SentencePieceProcessor(model_file=str(BASE))
    return before, after, AutoTokenizer.from_pretrained(str(extension.folder))


def brute_force(words, limit, min_count=2):
    """The textbook: count all pairs, merge the most frequent (the oldest symbols at a tie), again."""
    words = {tuple((symbol,) for symbol in word): count for word, count in words.items()}
    age = {symbol: index for index, symbol in enumerate(sorted({s for word in words for s in word}))}
    merges = []
    while len(age) < limit + len({symbol for symbol in age if len(symbol) == 1}):
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        if pairs[best] < min_count:
            break
        merges.append(("".join(best[0]), "".join(best[1])))
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
    assert continue_bpe({("a", "b"): 1}, 5) == []


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.lists(st.sampled_from(["a", "b", "c", "de"]), min_size=1, max_size=7).map(tuple),
        st.integers(1, 9),
        min_size=1,
        max_size=8,
    )
)
def test_merges_equal_brute_force(words):
    assert continue_bpe(words, 20) == brute_force(words, 20)


def test_merges_on_real_text_equal_brute_force(extension):
    model = read_model(BASE)
    singles = [piece for piece in extension.pieces if len(piece) == 1]
    cut = processor(append(model, singles), prefix=False)
    words: Counter = Counter()
    for text in ARABIC_TEXTS:
        for chunk in text.split(" "):
            run = []
            for symbol in [*(cut.encode("▁" + chunk, out_type=str) if chunk else []), ""]:
                arabic = symbol != "" and all(c == "▁" or re.match(LETTERS, c) for c in symbol)
                if arabic:
                    run.append(symbol)
                else:
                    words[tuple(run)] += len(run) > 1
                    run = []
    found = brute_force(+words, 50)
    assert len(found) == 50 and found == list(extension.merges[:50])


LETTERS = f"[{extending.ARABIC.letters}{extending.ARABIC.marks}]"


def test_words_to_learn_from():
    model = read_model(BASE)
    chunks = {"▁(الحر)،": 3, "▁الحر": 2, "▁كَم": 1, "▁١٢": 9, "▁the": 9, "▁ب\nب": 4}
    words = learning_words(model, chunks, extending.ARABIC, "strip", "strip")
    assert words == {("ال", "ح", "ر"): 3, ("▁ال", "ح", "ر"): 2, ("▁", "ك", "م"): 1, ("▁", "ب"): 4}


def test_a_piece_that_another_cuts_off_gives_way():
    model, (a, b, c, d) = read_model(BASE), "بتند"
    # b+c is joined before a+b and c+d are, so a+b+c+d never comes about
    merged = [b + c, a + b, c + d, a + b + c + d, d + a]
    assert reachable(model, [], merged, 4) == [b + c, a + b, c + d, d + a]
    assert reachable(model, [], merged[:4], 4) == merged[:3]


def test_special_tokens_and_pieces_stand_behind_the_base(extension, forms):
    before, after, auto = forms
    assert [after.IdToPiece(i) for i in range(32000)] == [before.IdToPiece(i) for i in range(32000)]
    assert extension.special_tokens == {token: 32000 + i for i, token in enumerate(SPECIAL_TOKENS)}
    assert (extension.first_piece, extension.size, after.GetPieceSize()) == (32007, 32207, 32207)
    assert auto.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(32000, 32007))
    assert all(after.IsControl(32000 + i) for i in range(7))
    for index, piece in enumerate(extension.pieces, 32007):
        assert after.PieceToId(piece) == auto.convert_tokens_to_ids(piece) == index
        assert all(re.match(LETTERS, c) for c in piece.lstrip("▁")) or len(piece) == 1, piece
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (1, 32001, 32006)
    assert (padded_vocab(32207), padded_vocab(64), padded_vocab(65, 8)) == (32256, 64, 72)


def test_replaced_ids_spell_the_piece(extension, forms):
    before, _after, _ = forms
    for piece, ids in zip(extension.pieces, extension.replaces, strict=True):
        spelt = before.decode([13, *ids])  # a newline first, or decoding would drop a blank
        assert spelt == "\n" + piece.replace("▁", " ") and len(ids) >= 2


def test_every_piece_is_emitted(extension, forms):
    _, after, _auto = forms
    for index, piece in enumerate(extension.pieces, 32007):
        ids = after.encode("\n" + piece.replace("▁", " "))
        assert ids[-1] == index and len(ids) == 3, (piece, ids)  # the dummy blank, the newline, the piece


def test_fewer_tokens_for_arabic_none_changed_for_english(forms):
    before, after, _ = forms
    arabic_before, arabic_after = (sum(map(len, form.encode(ARABIC_TEXTS))) for form in (before, after))
    assert arabic_after < 0.6 * arabic_before
    assert before.encode(ENGLISH_TEXTS) == after.encode(ENGLISH_TEXTS)


PLAIN = [
    "",
    " ",
    "  a",
    "a  b ",
    "\n",
    " \n\t x\r\n",
    " كتاب",
    "  كتاب   علم\nال",
    "é 日本 🙂",
    "ـــ كـتاب",
    "x" * 500,
]


def test_auto_tokenizer_equals_sentencepiece(forms):
    _before, after, auto = forms
    for text in [*PLAIN, *ARABIC_TEXTS, *ENGLISH_TEXTS]:
        assert auto.encode(text) == after.encode(text), repr(text)
        assert auto.decode(after.encode(text)) == text == after.decode(after.encode(text))


TEXTS = st.text(
    st.one_of(st.sampled_from("  \n\tابتثكمنالةىء\u064b\u064f\u0651\u0640٣،؟abz.🙂é"), st.characters(codec="utf-8")),
    max_size=40,
).filter(lambda text: "▁" not in text)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_any_text_comes_back_and_both_forms_agree(forms, text):
    before, after, auto = forms
    ids = after.encode(text)
    assert encode_texts(auto, [text])[0].tolist() == ids  # "<|pad|>" in a text is no special token
    assert after.decode(ids) == before.decode(before.encode(text))
    assert auto.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", max_codepoint=0x5FF), max_size=40))
def test_text_without_new_characters_keeps_its_ids(forms, text):
    before, after, _ = forms
    assert after.encode(text) == before.encode(text)


def test_same_arguments_give_the_same_bytes(extension, tmp_path):
    again = extend(BASE, ARABIC_TEXTS, out_dir=tmp_path / "again", pieces=200)
    assert again.fingerprint == extension.fingerprint
    for name in sorted(path.name for path in extension.folder.iterdir()):
        assert (tmp_path / "again" / name).read_bytes() == (extension.folder / name).read_bytes(), name
    assert read_extension(extension.folder) == extension
    manifest = json.loads((extension.folder / "extension.json").read_text(encoding="utf-8"))
    assert manifest["base_sha256"] == hashlib.sha256(BASE.read_bytes()).hexdigest()
    assert manifest["number_of_pieces"] == 200 and manifest["corpus"]["texts"] == len(ARABIC_TEXTS)


def test_a_changed_folder_is_noticed(extension, tmp_path):
    for path in extension.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("other")
    with pytest.raises(ValueError, match="a file was changed"):
        read_extension(tmp_path)
    (tmp_path / "extension.json").unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_extension(tmp_path)


def test_marks_and_tatweel_are_kept_or_stripped_for_learning(tmp_path):
    texts = ["كَتَبَ كَتَبَ كَتَبَ كـتـب كـتـب"] * 2
    strip = extend(BASE, texts, out_dir=tmp_path / "strip", pieces=3, marks="strip")
    keep = extend(BASE, texts, out_dir=tmp_path / "keep", pieces=9, marks="keep", tatweel="keep")
    assert "▁كتب" in strip.pieces and all("\u064e" not in piece for piece in strip.pieces)
    assert "▁كَتَبَ" in keep.pieces and any("ـ" in piece for piece in keep.pieces)


def test_digits_and_punctuation_only_enter_alone(tmp_path):
    extension = extend(BASE, ["عام ١٩٤٨؛ عام ١٩٤٨؛"] * 3, out_dir=tmp_path / "out", pieces=8)
    assert {"١", "٩", "٤", "٨", "؛"} <= set(extension.pieces)
    assert all(len(piece) == 1 or not set(piece) & set("١٩٤٨؛") for piece in extension.pieces)
    assert all(len(ids) == 2 for p, ids in zip(extension.pieces, extension.replaces, strict=True) if p == "١")


def tiny_model(tmp_path, **options):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "model_type": "bpe",
        "byte_fallback": True,
        "hard_vocab_limit": False,
    }
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.Train(input=str(text), model_prefix=str(tmp_path / "m"), **settings | options)
    return tmp_path / "m.model"


def test_a_base_without_the_blank_in_front(tmp_path):
    base = tiny_model(tmp_path, add_dummy_prefix=False, user_defined_symbols=["<tab>"])
    extension = extend(base, ["كتاب كتاب كتب"] * 3, out_dir=tmp_path / "out", pieces=8)
    after = sentencepiece.SentencePieceProcessor(model_file=str(extension.folder / "tokenizer.model"))
    auto = AutoTokenizer.from_pretrained(str(extension.folder))
    for text in ["the fox", " كتاب  كتب the", "كتاب<tab>the"]:
        assert auto.encode(text) == after.encode(text), text
        assert auto.decode(auto.encode(text)) == text
    assert "▁كتاب" in extension.pieces and {"ك", "ت", "ا", "ب"} <= set(extension.pieces)


BAD_BASES = [
    ({"model_type": "unigram"}, "type is UNIGRAM, expected BPE"),
    ({"byte_fallback": False}, "no byte fallback"),
    ({"normalization_rule_name": "nmt_nfkc"}, "rewrites text"),
    ({"treat_whitespace_as_suffix": True}, "suffixes"),
]


@pytest.mark.parametrize(("options", "message"), BAD_BASES)
def test_a_base_that_cannot_be_extended(tmp_path, options, message):
    if options.get("model_type") == "unigram":
        options = options | {"vocab_size": 290}
    with pytest.raises(ValueError, match=message):
        extend(tiny_model(tmp_path, **options), ["كتاب كتاب"], out_dir=tmp_path / "out", pieces=3)
    assert not (tmp_path / "out").exists()


FAULTS = [
    ({"texts": []}, "corpus is empty"),
    ({"texts": ["", "  "]}, "corpus is empty"),
    ({"texts": ["only English", "here"]}, "no Arabic letter"),
    ({"pieces": 100000}, r"100000 pieces were asked for, but the corpus holds \d+"),
    ({"pieces": 0}, "at least 1"),
    ({"texts": ["كتاب", "a\udcff"]}, "text 2, character 1: a lone surrogate"),
    ({"marks": "drop"}, "marks is 'drop', expected 'keep' or 'strip'"),
    ({"special_tokens": ("<s>",)}, "already in the base"),
    ({"special_tokens": ("<|im_end|>", "<|pad|>", "<|pad|>")}, "given twice"),
    ({"pad_token": "<|nothing|>"}, "pad_token is '<|nothing|>', expected one of"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faults_speak_and_write_nothing(tmp_path, change, message):
    arguments = {"texts": ["كتاب كتاب كتاب"], "pieces": 3} | change
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        extend(BASE, arguments.pop("texts"), out_dir=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        extend(BASE, ["كتاب كتاب"], out_dir=tmp_path / "out", pieces=2)
    monkeypatch.setattr(extending.folder.os, "fsync", lambda _: 1 / 0)  # as if the disk were full
    with pytest.raises(ZeroDivisionError):
        extend(BASE, ["كتاب كتاب"], out_dir=tmp_path / "new", pieces=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_are_no_model_or_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("جيد\r\n\n".encode() + b"bad \xff\n")
    texts = read_texts(tmp_path / "a.txt")
    assert next(texts) == "جيد"
    with pytest.raises(ValueError, match="line 3, byte 4: 0xff is not UTF-8"):
        next(texts)
    with pytest.raises(ValueError, match="cannot be read"):
        next(read_texts(tmp_path / "none.txt"))
    for base, message in [
        (tmp_path / "a.txt", "not a SentencePiece model"),
        (tmp_path / "none.model", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            extend(base, ["كتاب"], out_dir=tmp_path / "out")
