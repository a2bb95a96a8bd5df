"""What is learnt, on bases of both kinds, against a plain-Python continuation that cuts whole texts itself."""

import itertools
import json
import re
from collections import Counter

import pytest
import tokenizers
from tiny_bases import ARABIC, ENGLISH, MISTRAL, both_forms, byte_level, llama_like

from ain_jax.tokenizer.base import open_base
from ain_jax.tokenizer.corpus import count_chunks
from ain_jax.tokenizer.grow import grow
from ain_jax.tokenizer.learn import Rules, learn, learning_words, reachable

MARKS = "\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"
BYTE_LEVEL = ("qwen", "smollm", "llama3", "gaps")
SENTENCEPIECE = ("llama2", "both", "mistral")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    paths = {
        "qwen": byte_level(root / "qwen", norm=tokenizers.normalizers.NFC()),
        "smollm": byte_level(root / "smollm", regex=None),
        "llama3": byte_level(root / "llama3", ignore_merges=True),
        "gaps": byte_level(root / "gaps", gaps=True),
        "llama2": llama_like(root / "llama2"),
        "both": both_forms(root / "both"),
        "mistral": MISTRAL,
    }
    return {name: open_base(path) for name, path in paths.items()}


def spells(base, symbols):
    """The text of byte-level symbols, None if they are no whole characters; slow and independent of Base.text."""
    decoder = tokenizers.decoders.ByteLevel()
    text = decoder.decode(list(symbols))
    return None if "\ufffd" in text else text


def brute_force(base, texts, limit, min_count=2, longest=16):
    """A BPE that counts pairs in whole texts, cut by the base, and joins those that make letters; slow.

    Symbols are tuples of base pieces, so nothing is looked up by name; two of the same name are one symbol.
    """
    letter = re.compile(f" ?[{base_letters()}]+")
    single = re.compile(" ?[\u0600-\u06ff]")
    known = set(base.pieces())
    words: Counter = Counter()
    for text in texts:
        encoding = base.backend.encode(text.replace("\u0640", ""), add_special_tokens=False)
        for _, part in itertools.groupby(zip(encoding.word_ids, encoding.tokens, strict=True), lambda row: row[0]):
            words[tuple(token for _, token in part)] += 1

    def good(left, right):
        if left + right in known:
            return False
        if base.kind == "byte_level":
            text, half = spells(base, [left, right]), spells(base, [left]) is None
        elif left.startswith("<0x") or right.startswith("<0x"):
            return False
        else:
            text, half = (left + right).replace("▁", " "), False
        if text is None or len(text) > longest:
            return False
        return bool(letter.fullmatch(text) or (half and single.fullmatch(text)))

    age = {symbol: index for index, symbol in enumerate(sorted({s for word in words for s in word}))}
    merges = []
    while len(merges) < limit:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        ranked = sorted(
            (pair for pair, count in pairs.items() if count >= min_count and good(*pair)),
            key=lambda pair: (-pairs[pair], age.get(pair[0], 0), age.get(pair[1], 0)),
        )
        if not ranked:
            break
        # the order of first symbols is that of the symbols that letters can use, which is the same order
        best = ranked[0]
        merges.append(best)
        age.setdefault("".join(best), len(age))
        merged: Counter = Counter()
        for word, count in words.items():
            joined, place = [], 0
            while place < len(word):
                here = word[place : place + 2] == best
                joined.append("".join(best) if here else word[place])
                place += 2 if here else 1
            merged[tuple(joined)] += count
        words = merged
    return merges


def base_letters():
    return f"\u0620-\u063f\u0641-\u064a\u0671-\u06d3\u06d5{MARKS}"


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_merges_equal_brute_force_one_by_one(bases, name):
    base, texts = bases[name], ARABIC[:60]
    learnt = learn(base, count_chunks(texts), 60)
    found = [merge for each in learnt.merges for merge in each]
    assert len(found) >= 60 and brute_force(base, texts, len(found)) == found


def test_sentencepiece_merges_equal_brute_force_one_by_one(bases):
    base, texts = bases["mistral"], ARABIC[:60]
    learnt = learn(base, count_chunks(texts), 60)
    singles = [piece for piece in learnt.pieces if len(piece) == 1]
    assert singles == ["؛", "؟"][: len(singles)]  # Mistral lacks hardly a letter
    found = [merge for each in learnt.merges for merge in each]
    assert len(found) == 60 - len(singles) and brute_force(base, texts, len(found)) == found


@pytest.mark.parametrize("name", (*BYTE_LEVEL, *SENTENCEPIECE))
def test_every_piece_of_every_prefix_is_whole_reachable_and_spelt(bases, name):
    base = bases[name]
    learnt = learn(base, count_chunks(ARABIC), 120)
    assert len(set(learnt.pieces)) == 120 and not set(learnt.pieces) & set(base.ids)
    texts = [base.text(piece) for piece in learnt.pieces]
    assert all(re.fullmatch(" ?[\u0600-\u06ff]+", text or "") for text in texts)
    newline = base.backend.encode("\n", add_special_tokens=False).ids
    for text, ids in zip(texts, learnt.replaces, strict=True):
        assert len(ids) > 1 and base.backend.decode([*newline, *ids]).lstrip(" ") == f"\n{text}"
    for number in (1, 17, 60, 120):
        grown = grow(base, learnt, number)
        for index in range(number):
            ids = grown.encode(f"\n{texts[index]}", add_special_tokens=False).ids
            assert ids == [*newline, base.size + index], (number, texts[index], ids)
        for old, index in base.ids.items():
            assert grown.token_to_id(old) == index
    assert learn(base, count_chunks(ARABIC), 60).pieces == learnt.pieces[:60]
    with pytest.raises(ValueError, match="121.*120 were learnt"):
        grow(base, learnt, 121)


@pytest.mark.parametrize("name", (*BYTE_LEVEL, *SENTENCEPIECE))
def test_fewer_tokens_for_arabic_and_none_changed_for_english(bases, name):
    base = bases[name]
    grown = grow(base, learn(base, count_chunks(ARABIC), 300))

    def ids(tokenizer, texts):
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]  # with the base's own BOS

    assert ids(grown, ENGLISH) == ids(base.backend, ENGLISH)
    before, after = (sum(map(len, ids(form, ARABIC))) for form in (base.backend, grown))
    assert after < 0.6 * before
    for text in [*ARABIC, " كتاب", "  كتاب   علم\nال", "é 日本 🙂", "كَتَبَ ١٢٣؟"]:
        back = [form.decode(form.encode(text, add_special_tokens=False).ids) for form in (base.backend, grown)]
        assert back[0] == back[1]


def test_words_to_learn_from(bases):
    base = bases["mistral"]
    chunks = {" (الحر)،": 3, " الحر": 2, "الحر": 1, " كَم": 1, " ١٢": 9, " the": 9, " ب\nب": 4}
    words = learning_words(base, [], chunks, Rules(marks="strip"))
    assert words == {("ال", "ح", "ر"): 3, ("▁ال", "ح", "ر"): 3, ("▁", "ك", "م"): 1, ("▁", "ب"): 4}


def test_a_piece_that_another_cuts_off_gives_way(bases):
    a, b, c, d = "بتند"
    # b+c is joined before a+b and c+d are, so a+b+c+d never comes about
    merged = [b + c, a + b, c + d, a + b + c + d, d + a]
    assert reachable(bases["mistral"], [], merged, 4) == [b + c, a + b, c + d, d + a]


def test_halves_of_characters_join_only_to_whole_ones(bases):
    """A letter that the base has only as two bytes gets a piece of its own, if it is frequent enough."""
    base = bases["smollm"]
    rare = next(c for c in "ظغؤئآ" if base.piece(c) not in base.ids)
    learnt = learn(base, count_chunks([f"{rare} {rare}{rare}"] * 3 + ARABIC[:40]), 40, min_count=3)
    assert base.piece(rare) in learnt.pieces or base.piece(f" {rare}") in learnt.pieces
    assert all(base.text(piece) is not None for piece in learnt.pieces)


def test_a_piece_that_the_base_has_but_never_emits_is_not_learnt_again(tmp_path):
    """Published vocabularies hold pieces that no merge makes; what would spell one is left alone."""
    folder, chunks = byte_level(tmp_path / "base", gaps=True), count_chunks(ARABIC)
    before = learn(open_base(folder), chunks, 40)
    twice = next(p for p in before.pieces if any(p in merge for each in before.merges for merge in each))
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"][twice] = 700  # an id that was free
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    base = open_base(folder)
    learnt = learn(base, chunks, 40)
    assert twice not in learnt.pieces and len(set(learnt.pieces)) == 40
    assert not any(twice in merge or twice == "".join(merge) for each in learnt.merges for merge in each)
    assert grow(base, learnt).token_to_id(twice) == 700


# how many pieces the little corpus holds under marks="strip", under both "keep", and with digits joined
@pytest.mark.parametrize(("name", "numbers"), [("mistral", (11, 18, 19)), ("smollm", (9, 12, 9))])
def test_marks_tatweel_and_digits_are_choices(bases, name, numbers):
    base = bases[name]
    texts = ["كَتَبَ كَتَبَ كَتَبَ كـتـب كـتـب عام ١٩٤٨؛ ١٩٤٨؛ ١٩٤٨؛"] * 4
    chunks = count_chunks(texts)

    def spelt(pieces, **choices):
        return [base.text(piece) for piece in learn(base, chunks, pieces, **choices).pieces]

    bare, kept = spelt(numbers[0], marks="strip"), spelt(numbers[1], marks="keep", tatweel="keep")
    joined = spelt(numbers[2], digits="join")
    vocalised = learn(base, count_chunks(["كَتَبَ كَتَبَ"] * 4), 2, marks="strip")
    assert base.piece("كتب") in vocalised.pieces
    assert {" كتب", "١", "٩", "٤", "٨", "؛", " عام"} <= set(bare)
    assert not any("\u064e" in text or "ـ" in text for text in bare if len(text) > 1)
    assert " كـتـب" in kept and " كَتَبَ" in (kept if name == "mistral" else [" كَتَبَ"])
    assert not any("ـ" in text for text in joined)
    digits = re.compile("[٠-٩؛ ]{2,}")
    assert not any(digits.fullmatch(text) for text in (*bare, *kept))
    # digits that stand together become a piece, unless the base's own rules cut before each
    assert [text for text in joined if digits.fullmatch(text)] == (["١٩", "٤٨", "١٩٤٨"] if name == "mistral" else [])


FAULTS = [
    ({"texts": []}, r"the corpus is empty \(0 texts, no word\)"),
    ({"texts": ["", "  "]}, "the corpus is empty"),
    ({"texts": ["only English", "here"]}, "no Arabic letter"),
    ({"texts": ["١٢٣ ؟"]}, "no Arabic letter"),
    ({"pieces": 100000}, r"100000 pieces were asked for, but the corpus holds \d+ that occur at least 2 times"),
    ({"pieces": 0}, "pieces=0"),
    ({"marks": "drop"}, "marks is 'drop', expected 'keep' or 'strip'"),
    ({"digits": "keep"}, "digits is 'keep', expected 'separate' or 'join'"),
    ({"min_count": 0}, "min_count=0"),
    ({"longest": 1}, "longest=1"),
]


@pytest.mark.parametrize("name", ["mistral", "qwen"])
@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faults_speak(bases, name, change, message):
    arguments = {"texts": ["كتاب كتاب كتاب"], "pieces": 2} | change
    chunks = count_chunks(arguments.pop("texts"))
    with pytest.raises(ValueError, match=message):
        learn(bases[name], chunks, **arguments)
