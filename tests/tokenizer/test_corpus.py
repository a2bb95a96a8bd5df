"""Texts read line by line and counted as chunks: against plain splitting, and against cutting whole texts."""

import gzip
import hashlib
import json
import re
from collections import Counter
from itertools import chain

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import ARABIC, ENGLISH, MISTRAL, both_forms, byte_level, llama_like

from ain_jax.tokenizer import corpus
from ain_jax.tokenizer.base import open_base
from ain_jax.tokenizer.corpus import count_chunks, read_texts


def test_chunks_are_words_with_their_blank():
    chunks = count_chunks(["في البيت  في", "في the البيت", "only English"])
    assert chunks.counts == {"في": 2, " البيت  في": 1, " البيت": 1}
    assert (chunks.texts, chunks.words, chunks.dropped) == (3, 7, 0)
    assert chunks.bytes == sum(len(text.encode()) for text in ["في البيت  في", "في the البيت", "only English"])


def test_counts_equal_plain_splitting(monkeypatch):
    texts = ARABIC + ENGLISH
    expected = Counter(chain.from_iterable(re.split("(?= )", text) for text in texts))
    ours = {c: n for c, n in expected.items() if re.search(f"[{corpus.ARABIC.characters}]", c)}
    whole = count_chunks(iter(texts))
    monkeypatch.setattr(corpus, "BATCH", 50)
    assert whole.counts == ours == count_chunks(texts).counts
    digest = hashlib.sha256(b"".join(len(t.encode()).to_bytes(8, "little") + t.encode() for t in texts))
    assert whole.sha256 == digest.hexdigest()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    norm = tokenizers.normalizers.NFC()
    return [
        open_base(path)
        for path in (
            byte_level(root / "qwen", norm=norm),
            byte_level(root / "smollm", regex=None),
            byte_level(root / "llama3", ignore_merges=True),
            llama_like(root / "llama2"),
            both_forms(root / "both"),
            MISTRAL,
        )
    ]


TEXTS = st.text(
    st.one_of(
        st.sampled_from("   \n\t\u00a0\u3000ابتثكمنالةى\u064b\u064f\u0651\u0640٣٤،؟ab'sz.1🙂é"),
        st.characters(codec="utf-8", exclude_characters="▁"),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_cutting_chunks_is_cutting_the_text(bases, text):
    """What the learner relies on: the pieces of the chunks, one after the other, are those of the text."""
    head, *rest = corpus._split(text)
    for base in bases:
        front = " " if base.kind == "sentencepiece" and base.prefix else ""
        chunks = [front + head, *(f" {chunk}" for chunk in rest)]
        cut = [base.cutter.encode(chunk, add_special_tokens=False).tokens for chunk in chunks]
        whole = base.cutter.encode(front + text, add_special_tokens=False).tokens
        if front and text.startswith(" "):
            continue  # the text's own blank is taken for the one in front of it
        assert list(chain.from_iterable(cut)) == whole, base.path
        assert base.backend.encode(text, add_special_tokens=False).tokens == (whole if text else []), base.path


def test_rare_chunks_give_way_to_a_cap(monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 1)
    letters = "ابتثجحخدذرزس"
    texts = [f"a{' كتاب' * 5}" for _ in range(40)] + [f"x {a}{b}" for a in letters for b in letters]
    chunks = count_chunks(texts, cap=20)
    assert chunks.counts[" كتاب"] == 200 and len(chunks.counts) <= 20
    # nothing is lost without being counted: here each other chunk occurs once
    assert chunks.dropped == chunks.dropped_words == 1 + len(letters) ** 2 - len(chunks.counts)
    assert count_chunks(texts, cap=10_000).dropped == 0
    assert count_chunks(texts, cap=20) == chunks


def test_the_rarest_go_first_and_no_more_than_needed():
    counts = Counter(a=1, b=2, c=2, d=2, e=9, f=9)
    assert corpus._drop_rare(counts, 4) == [1, 2, 2, 2] and counts == {"e": 9, "f": 9}
    counts = Counter(a=1, b=2, c=2, e=9)
    assert corpus._drop_rare(counts, 4) == [1] and len(counts) == 3


def test_files_of_each_kind(tmp_path):
    lines = ["\ufeffجيد\r", "", "  ", " two words "]
    data = "\n".join(lines).encode()
    records = "\n".join(json.dumps({"text": line, "id": 1}) for line in ["جيد", " ", "a"]).encode() + b"\n\n"
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl").write_bytes(records)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(records))
    names = ["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.gz"]
    expected = [*["جيد", " two words "] * 2, *["جيد", "a"] * 2]
    assert list(read_texts(*(tmp_path / name for name in names))) == expected
    (tmp_path / "e.jsonl").write_text('{"body": "b"}')
    assert list(read_texts(tmp_path / "e.jsonl", key="body")) == ["b"]


BAD_FILES = [
    ("a.txt", "جيد\r\n\n".encode() + b"bad \xff\n", "a.txt, line 3, byte 4: 0xff is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a.jsonl, line 2: .*'text', found the keys \['body'\]"),
    ("a.jsonl", b"[1]", "line 1: .* found a list"),
    ("a.jsonl", b'{"text": ', "line 1: no JSON"),
    ("a.txt.gz", b"no gzip", "a.txt.gz cannot be read"),
    ("a.txt.gz", gzip.compress(b"text\n" * 99, mtime=0)[:-9], "a.txt.gz cannot be read"),
    ("a.txt", None, "a.txt cannot be read: No such file"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES)
def test_bad_files_speak(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


def test_files_are_not_held_in_memory(tmp_path):
    """The first lines come before the end of a file is looked at: here it is missing."""
    lines = "".join(f"{number * 7919 % 100003} جيد\n" for number in range(200_000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines.encode())[:-9])
    texts = read_texts(tmp_path / "a.txt.gz")
    assert [next(texts) for _ in range(2)] == ["0 جيد", "7919 جيد"]
    with pytest.raises(ValueError, match="cannot be read"):
        list(texts)


ODD = [
    ("ﻟﻐﺔ", "3 presentation forms", "NFKC"),
    ("\u200fلغة\u200f", "2 bidi controls", "remove them"),
    ("\u202bلغة\u202c", "2 bidi controls", r"\\u202b"),
]


@pytest.mark.parametrize(("text", "found", "cure"), ODD)
def test_odd_characters_are_refused_with_an_example(text, found, cure):
    with pytest.raises(ValueError, match=rf"the corpus holds {found} beside .*for example .*{cure}"):
        count_chunks([text])
    few = count_chunks([text, *ARABIC])  # a few among many are taken
    assert sum(few.odd.values()) == int(found[0]) and text in few.counts
    assert sum(count_chunks([text], odd_share=1).odd.values()) == int(found[0])


def test_signs_that_are_meant_are_no_presentation_forms():
    assert count_chunks(["محمد ﷺ ﷲ ﴾آية﴿"]).odd == {"presentation forms": 0, "bidi controls": 0}


def test_wrong_settings_and_texts_speak():
    for settings_, message in [({"cap": 0}, "cap=0"), ({"odd_share": 2}, "odd_share=2")]:
        with pytest.raises(ValueError, match=message):
            count_chunks(["كتاب"], **settings_)
    with pytest.raises(ValueError, match="text 2, character 1: a lone surrogate"):
        count_chunks(["كتاب", "a\udcff"])
