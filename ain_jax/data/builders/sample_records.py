"""The records of the sample, made in memory: one function per kind of data, the same for the same parameters.

What is held out is decided once, in `held_out`: whole documents, words to read and terms. Nothing of it
enters a `train` split. `test_rendered` holds trained words and objects in pictures never trained on.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ain_jax import sample
from ain_jax.data.formats import IMAGE, Message, Record
from ain_jax.data.render import encode_png, missing_characters, object_picture, text_picture

Row = dict[str, Any]
LETTERS = frozenset(chr(c) for c in (*range(0x621, 0x63B), *range(0x641, 0x64B)))
LOOKALIKES = ("بتثني", "جحخ", "دذ", "رز", "سش", "صض", "طظ", "عغ", "فق", "اأإآ", "هة", "ىي", "وؤ")
DIALECTS = ("arz", "ary", "arq")

ASK_READ = {
    "ar": ("اقرأ الحروف.", "ما المكتوب؟"),
    "en": ("Read the letters.", "What is written?"),
}
ASK_NAME = {
    "ar": ("ما هذا؟", "ماذا ترى في الصورة؟"),
    "en": ("What is this?", "What do you see in the picture?"),
}
ASK_FLAG = {"ar": ("علم أي بلد هذا؟",), "en": ("Which country's flag is this?",)}
ASK_TRANSLATE = {  # by the language of the answer
    "ar": ("Translate into Arabic: {}", "ترجم إلى العربية: {}"),
    "en": ("Translate into English: {}", "ترجم إلى الإنجليزية: {}"),
}


@dataclass(frozen=True)
class SampleParams:
    """How many records are made, and how their pictures look. Sizes in pixels, angles in degrees."""

    seed: int = 0
    held_out_share: float = 0.08  # of documents, of words to read, of terms
    paragraph_characters: int = 800  # paragraphs of a document are joined up to this length
    translate_words: int = 12  # longest sentence to translate
    read_pictures: int = 6000
    read_test_pictures: int = 300  # in `test`, and again in `test_rendered`
    read_line_share: float = 0.15  # share of pictures with two or three words
    read_letters: int = 8  # longest word to read
    letter_pictures: int = 2000  # of one letter as it stands alone, to learn before words
    part_pictures: int = 2000  # of two or three letters of a word
    multiple: int = 28  # both sides of a picture are multiples of it: patch times merge of the model that reads them
    read_height: int = 28
    read_fill: tuple[float, float] = (0.65, 0.9)
    read_angle: float = 3.0
    read_jitter: float = 1.0  # share of the free room that the place of the ink is drawn from
    objects: int = 0  # how many of the emoji and flags are named, evenly taken from each; 0 is all
    renderings: int = 12  # pictures of each emoji and flag in `train`
    test_renderings: int = 2
    object_size: int = 56
    object_scale: tuple[float, float] = (0.6, 0.95)
    object_angle: float = 20.0
    preference_pairs: int = 400  # of each kind in `train`
    preference_test_pairs: int = 100
    fonts: tuple[str, ...] = (
        "NotoNaskhArabic-Regular.ttf",
        "NotoSansArabic-Regular.ttf",
    )  # in sample/fonts, or paths

    def __post_init__(self):
        if not 0 < self.held_out_share < 0.5:
            raise ValueError(f"held_out_share {self.held_out_share}: expected a share above 0 and below 0.5")
        if not 0 <= self.read_jitter <= 1:
            raise ValueError(f"read_jitter {self.read_jitter}: expected a share of the free room, 0 to 1")
        if self.objects < 0 or self.objects == 1:
            raise ValueError(f"objects {self.objects}: expected 2 or more, or 0 for all")
        if not self.fonts:
            raise ValueError("fonts is empty; name at least one font file")
        for font in self.fonts:
            if not font_path(font).is_file():
                known = ", ".join(sorted(p.name for p in (sample.FOLDER / "fonts").glob("*.ttf")))
                raise ValueError(f"font {font!r}: no such file; give a path, or one of {known}")


def font_path(name: str) -> Path:
    return sample.FOLDER / "fonts" / name  # an absolute name stays what it is


def generator(params: SampleParams, stream: str, index: int = 0) -> np.random.Generator:
    """Random numbers of one record: they depend on seed, stream and index, not on what was drawn before."""
    return np.random.default_rng([params.seed, zlib.crc32(stream.encode()), index])


# What is held out


@dataclass(frozen=True)
class HeldOut:
    documents: frozenset[tuple[str, str]]  # (table, document)
    words: tuple[str, ...]  # to read, never drawn in `train`
    train_words: tuple[str, ...]
    terms: frozenset[tuple[str, str]]  # (kind, code)


@lru_cache(maxsize=4)
def held_out(params: SampleParams) -> HeldOut:
    """Documents, words and terms that no `train` split may show."""
    documents = set()
    for table in ("handbook", "udhr"):
        sizes = Counter(row["document"] for row in sample.rows(table))
        names = sorted(sizes)
        # Until the share of the rows is reached.
        for i in generator(params, f"held out/{table}").permutation(len(names)):
            if sum(sizes[n] for t, n in documents if t == table) < params.held_out_share * sizes.total():
                documents.add((table, names[i]))
    count = max(1, round(len(sample.rows("dialect")) * params.held_out_share))
    # Neighbours resemble each other: one block.
    documents |= {("dialect", row["id"]) for row in sample.rows("dialect")[-count:]}
    flagged = {row["id"].upper() for row in sample.rows("flags")}  # their names are learnt from the flags
    terms = [
        (r["kind"], r["code"])
        for r in sample.rows("terms")
        if not (r["kind"] == "territories" and r["code"] in flagged)
    ]
    texts = [
        row["ar"]
        for table in ("handbook", "udhr")
        for row in sample.rows(table)
        if (table, row["document"]) not in documents
    ]
    words = readable_words(texts, params)
    test_words = set(_some(words, params, "held out/words"))
    return HeldOut(
        documents=frozenset(documents),
        words=tuple(w for w in words if w in test_words),
        train_words=tuple(w for w in words if w not in test_words),
        terms=frozenset(_some(terms, params, "held out/terms")),
    )


def _some(items: Sequence, params: SampleParams, stream: str) -> list:
    """The held-out share of the items, at least one, in their order."""
    count = max(1, round(len(items) * params.held_out_share))
    return [items[i] for i in sorted(generator(params, stream).choice(len(items), count, replace=False))]


def readable_words(texts: Sequence[str], params: SampleParams) -> list[str]:
    """Distinct words of 2 to `read_letters` bare Arabic letters which every font covers, sorted."""
    found = set()
    for text in texts:
        for word in text.split():
            word = word.strip("،؛؟.:!\"'()[]{}«»“”")
            if 2 <= len(word) <= params.read_letters and LETTERS.issuperset(word):
                found.add(word)
    return sorted(w for w in found if not any(missing_characters(w, font_path(f)) for f in params.fonts))


def table_rows(params: SampleParams, table: str, split: str) -> list[Row]:
    """Rows of the split's documents; a test row of which a side also stands in train is left out."""
    document = "id" if table == "dialect" else "document"
    hidden = held_out(params).documents
    train = [row for row in sample.rows(table) if (table, row[document]) not in hidden]
    if split == "train":
        return train
    seen = {row[side] for row in train for side in row if side not in ("id", "document")}
    test = [row for row in sample.rows(table) if (table, row[document]) in hidden]
    return [
        row
        for row in test
        if not any(row[side] in seen for side in row if side not in ("id", "document") and row[side])
    ]


# Text


def documents(params: SampleParams, split: str) -> Iterator[Record]:
    """Plain text in each language: paragraphs of a document joined by line breaks."""
    for table, languages in (
        ("handbook", ("ar", "en")),
        ("udhr", ("ar", "en")),
        ("dialect", ("ar", "en", *DIALECTS)),
    ):
        for language in languages:
            group: list[Row] = []
            for row in [*table_rows(params, table, split), None]:
                length = sum(len(r[language]) for r in group)
                new_document = row is None or (group and row.get("document") != group[0].get("document"))
                if group and (new_document or length + len(row[language] if row else "") > params.paragraph_characters):
                    text = "\n".join(r[language] for r in group if r[language])
                    if text:
                        yield Record(f"{group[0]['id']}/{language}", table, language, "prose", text=text)
                    group = []
                if row is not None:
                    group.append(row)


def parallel(params: SampleParams, split: str) -> Iterator[Record]:
    """Both languages of a pair in one text, in random order."""
    for table in ("handbook", "udhr", "dialect"):
        for row in table_rows(params, table, split):
            for other in ("ar", *DIALECTS):
                if row.get(other) and row["en"]:
                    name = f"{row['id']}/{other}-en"
                    sides = [row[other], row["en"]]
                    if generator(params, f"parallel/{name}").random() < 0.5:
                        sides.reverse()
                    yield Record(name, table, f"{other}-en", "parallel", text="\n".join(sides))


def translation_pairs(params: SampleParams, split: str) -> list[tuple[str, str, str, str]]:
    """(id, source, Arabic, English) of terms and of short sentences."""
    hidden = held_out(params).terms
    pairs = []
    for row in sample.rows("terms"):
        if ((row["kind"], row["code"]) in hidden) == (split == "test"):
            pairs.append((f"terms/{row['kind']}/{row['code']}", "terms", row["ar"], row["en"]))
    for row in table_rows(params, "handbook", split):
        if max(len(row["ar"].split()), len(row["en"].split())) <= params.translate_words:
            pairs.append((row["id"], "handbook", row["ar"], row["en"]))
    return pairs


def translate(params: SampleParams, split: str) -> Iterator[Record]:
    """Each pair in both directions, the question in either language."""
    for name, source, arabic, english in translation_pairs(params, split):
        for answer_language, question, answer in (("en", arabic, english), ("ar", english, arabic)):
            rng = generator(params, f"translate/{name}/{answer_language}")
            messages = _turns(_pick(ASK_TRANSLATE[answer_language], rng).format(question), answer)
            yield Record(f"{name}/{answer_language}", source, answer_language, "translate", messages=messages)


# Pictures


def spell(words: Sequence[str]) -> str:
    """Letters apart, words by a stroke: ["من", "هنا"] gives "م ن / ه ن ا"."""
    return " / ".join(" ".join(word) for word in words)


def read_words(params: SampleParams, split: str, index: int) -> list[str]:
    """The word, or the two or three words, of one picture."""
    words = held_out(params).words if split == "test" else held_out(params).train_words
    if split == "test_rendered":  # what some trained picture shows
        split = "train"
        index = int(generator(params, "read/test_rendered/which", index).integers(params.read_pictures))
    rng = generator(params, f"read/{split}/words", index)
    if rng.random() < params.read_line_share:
        return [words[i] for i in rng.integers(len(words), size=rng.integers(2, 4))]
    return [words[_order(params, split, len(words))[index % len(words)]]]  # each word once before any comes twice


@lru_cache(maxsize=8)
def _order(params: SampleParams, split: str, count: int) -> tuple[int, ...]:
    return tuple(generator(params, f"read/{split}/order").permutation(count).tolist())


def read(params: SampleParams, split: str) -> Iterator[Record]:
    """A drawn word or short line; the answer is its letters."""
    for index in range(params.read_pictures if split == "train" else params.read_test_pictures):
        rng = generator(params, f"read/{split}", index)
        yield _reading(params, f"read/{split}/{index}", read_words(params, split, index), rng)


def letter(params: SampleParams, split: str) -> Iterator[Record]:
    """One letter drawn alone, each as often as it stands in the words to read."""
    letters = "".join(held_out(params).train_words)
    for index in range(params.letter_pictures):
        rng = generator(params, f"letter/{split}", index)
        yield _reading(params, f"letter/{split}/{index}", [_pick(letters, rng)], rng)


def part(params: SampleParams, split: str) -> Iterator[Record]:
    """Two or three neighbouring letters of a word to read; never a whole word that is held out."""
    hidden = held_out(params)
    words, hidden_words = [word for word in hidden.train_words if len(word) > 2], frozenset(hidden.words)
    for index in range(params.part_pictures):
        rng = generator(params, f"part/{split}", index)
        while True:
            word, length = _pick(words, rng), int(rng.integers(2, 4))
            begin = int(rng.integers(len(word) - length + 1))
            letters = word[begin : begin + length]
            if letters not in hidden_words:
                break
        yield _reading(params, f"part/{split}/{index}", [letters], rng)


def _reading(params: SampleParams, name: str, words: list[str], rng: np.random.Generator) -> Record:
    language = _pick(("ar", "en"), rng)
    picture = text_picture(
        " ".join(words),
        font_path(_pick(params.fonts, rng)),
        rng,
        height=params.read_height,
        multiple=params.multiple,
        fill=params.read_fill,
        angle=params.read_angle,
        jitter=params.read_jitter,
    )
    messages = _turns(f"{IMAGE}\n{_pick(ASK_READ[language], rng)}", spell(words))
    kind = "line" if len(words) > 1 else "word"
    return Record(name, "read", language, kind, messages=messages, images=(encode_png(picture),))


@lru_cache(maxsize=4)
def objects(params: SampleParams) -> tuple[tuple[str, Row], ...]:
    """("emoji" or "flags", row) of what is named."""
    every = [(table, row) for table in ("emoji", "flags") for row in sample.rows(table)]
    if not params.objects:
        return tuple(every)
    if params.objects > len(every):
        raise ValueError(f"objects {params.objects}: the sample has {len(every)}; give no more, or 0 for all")
    return tuple(every[i] for i in np.linspace(0, len(every) - 1, params.objects).round().astype(int))


@lru_cache(maxsize=512)
def _cutout(image: str) -> Image.Image:
    return Image.open(sample.FOLDER / image).convert("RGBA")


def name(params: SampleParams, split: str) -> Iterator[Record]:
    """An emoji or a flag on a random ground; the answer is its name in the language of the question."""
    for number, (table, row) in enumerate(objects(params)):
        for turn in range(params.renderings if split == "train" else params.test_renderings):
            rng = generator(params, f"name/{split}/{turn}", number)
            language = ("ar", "en")[turn % 2]
            yield _naming(params, f"{table}/{row['id']}/{split}/{turn}", table, row, language, rng)


def _naming(
    params: SampleParams, record_id: str, table: str, row: Row, language: str, rng: np.random.Generator
) -> Record:
    picture = object_picture(
        _cutout(row["image"]),
        rng,
        params.object_size,
        params.multiple,
        scale=params.object_scale,
        angle=params.object_angle,
    )
    questions = ASK_FLAG if table == "flags" else ASK_NAME
    messages = _turns(f"{IMAGE}\n{_pick(questions[language], rng)}", row[f"name_{language}"])
    return Record(record_id, table, language, "name", messages=messages, images=(encode_png(picture),))


# Preference pairs


def preference(params: SampleParams, split: str) -> Iterator[Record]:
    """A conversation with its right answer, and a worse one of three kinds (the record's `kind`)."""
    pairs = translation_pairs(params, split)
    things = objects(params)
    for kind in ("wrong_language", "neighbour_answer", "corrupted_reading"):
        for index in range(params.preference_pairs if split == "train" else params.preference_test_pairs):
            rng = generator(params, f"preference/{split}/{kind}", index)
            name = f"preference/{split}/{kind}/{index}"
            language = _pick(("ar", "en"), rng)
            other = "en" if language == "ar" else "ar"
            table, row = things[rng.integers(len(things))]
            if kind == "corrupted_reading":
                words = read_words(params, "test" if split == "test" else "test_rendered", index)
                record = _reading(params, name, words, rng)
                rejected = spell(corrupt(words, rng))
            elif kind == "neighbour_answer":
                record = _naming(params, name, table, row, language, rng)
                others = [(t, r) for t, r in things if r is not row]
                near = [r for t, r in others if t == table and r.get("group") == row.get("group")]
                near = near or [r for _, r in others]
                rejected = near[rng.integers(len(near))][f"name_{language}"]
            elif rng.random() < 0.5:
                record = _naming(params, name, table, row, language, rng)
                rejected = row[f"name_{other}"]
            else:  # asked to translate, the worse answer repeats the question
                _, _, arabic, english = pairs[rng.integers(len(pairs))]
                answer, rejected = (arabic, english) if language == "ar" else (english, arabic)
                messages = _turns(_pick(ASK_TRANSLATE[language], rng).format(rejected), answer)
                record = Record(name, "preference", language, kind, messages=messages)
            yield Record(
                name,
                "preference",
                record.language,
                kind,
                messages=record.messages,
                rejected=rejected,
                images=record.images,
            )


def corrupt(words: list[str], rng: np.random.Generator) -> list[str]:
    """The words with one letter swapped with the next, dropped, doubled or taken for one of its likes."""
    words = list(words)
    which = int(rng.integers(len(words)))
    word = words[which]
    for _ in range(20):
        place, fault = int(rng.integers(len(word))), int(rng.integers(4))
        before, letter, after = word[:place], word[place], word[place + 1 :]
        if fault == 0 and after:
            changed = before + after[0] + letter + after[1:]
        elif fault == 1:
            changed = before + after
        elif fault == 2:
            changed = before + letter + letter + after
        else:
            family = next((f for f in LOOKALIKES if letter in f), letter).replace(letter, "")
            changed = before + _pick(tuple(family), rng) + after if family else word
        if changed and changed != word:
            words[which] = changed
            return words
    words[which] = word + word[-1]  # twenty tries found nothing: double the last letter
    return words


def _turns(question: str, answer: str) -> tuple[Message, ...]:
    return (Message("user", question), Message("assistant", answer))


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


KINDS = {
    "documents": (documents, ("train", "test")),
    "parallel": (parallel, ("train", "test")),
    "translate": (translate, ("train", "test")),
    "letter": (letter, ("train",)),
    "part": (part, ("train",)),
    "read": (read, ("train", "test", "test_rendered")),
    "name": (name, ("train", "test_rendered")),
    "preference": (preference, ("train", "test")),
}
