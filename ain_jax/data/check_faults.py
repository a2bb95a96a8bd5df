"""What is wrong with records and with the examples made of them, by kind of fault: pure functions."""

import dataclasses
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ain_jax.data import formats
from ain_jax.data.examples import Examples
from ain_jax.data.formats import Record
from ain_jax.data.packing import Packing

SHOWN = 3  # places told of one kind of fault
LETTERS = 20  # a text with fewer letters says nothing of its script
SHARE = 0.1  # of the letters have to be of the language's script

# Arabic letters in a shape of their own (U+FB50 to U+FEFC): the same word has other tokens than when it is typed.
# Signs that are written by no other character are left alone, such as ﷺ.
PRESENTATION = re.compile("[\ufb50-\ufd3d\ufd50-\ufdf9\ufe70-\ufefc]")
TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")  # embeddings, overrides, isolates; the marks U+200E/F are at home
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
MOJIBAKE = re.compile("[\u00d8\u00d9][\u0080-\u00bf\u0192\u2018-\u2022\u2026\u02c6\u0160\u017d\u2030\u201e\u201a]")

_SCRIPTS = {
    "ARABIC": "ar arz ary arq aeb apc ajp afb acm ars acw acq apd ayl fa ur ps sd ug",
    "LATIN": "en fr de es it pt nl tr id ms sw vi pl cs ro hu sv da no fi ga hr jv su so rw ig ha tl az uz",
    "CYRILLIC": "ru uk bg kk ky mn",
    "CJK": "zh",
    "HANGUL": "ko",
    "DEVANAGARI": "hi mr ne",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "HEBREW": "he",
    "GREEK": "el",
    "ETHIOPIC": "am",
    "SINHALA": "si",
}
SCRIPT_OF = {language: script for script, languages in _SCRIPTS.items() for language in languages.split()}
SCRIPT_OF |= {"ja": "CJK HIRAGANA KATAKANA"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kind of fault of a source: how often it was found, and where first."""

    source: str
    what: str  # "identical rows"
    count: int
    where: tuple[str, ...]  # record: detail


class Found:
    """Faults as they come; `faults` has them by kind."""

    def __init__(self, source: str):
        self.source, self._counts, self._where = source, Counter[str](), {}

    def add(self, what: str, where: str, count: int = 1) -> None:
        self._counts[what] += count
        places = self._where.setdefault(what, [])
        if len(places) < SHOWN:
            places.append(where)

    @property
    def faults(self) -> list[Fault]:
        return [Fault(self.source, what, n, tuple(self._where[what])) for what, n in self._counts.most_common()]


def texts(record: Record) -> Iterator[tuple[str, str]]:
    """(where, text) of all that a record says."""
    if record.text:
        yield "text", record.text
    for number, message in enumerate(record.messages):
        yield f"message {number} ({message.role})", message.content
    if record.rejected:
        yield "the rejected answer", record.rejected


def of_record(record: Record, special: re.Pattern[str] | None, pictures: bool = True) -> Iterator[tuple[str, str]]:
    """(kind of fault, detail) of one record. `special` finds the tokenizer's control tokens written as text."""
    for fault in formats.faults(record, pictures=False):
        yield "not a sound record", fault
    media = [(f"picture {i}", data) for i, data in enumerate(record.images)]
    media += [
        (f"video {i}, frame {j}", data) for i, frames in enumerate(record.videos) for j, data in enumerate(frames)
    ]
    for name, data in media if pictures else ():
        try:
            formats.open_picture(data, name)
        except ValueError as error:
            yield "picture that cannot be read", str(error)
    for where, text in texts(record):
        yield from ((what, f"{where}: {detail}") for what, detail in of_text(text, special))
    for number, message in enumerate(record.messages):
        if message.role == "assistant" and not message.content.strip():
            yield "empty answer", f"message {number} of {len(record.messages)} is blank"
    detail = wrong_script(record.language, " ".join(text for _, text in texts(record)))
    if detail:
        yield "language that does not fit the script", detail


def of_text(text: str, special: re.Pattern[str] | None = None) -> Iterator[tuple[str, str]]:
    """(kind of fault, the first such place) of a text."""
    for what, pattern in (
        ("control token written as text", special),
        ("Arabic presentation forms", PRESENTATION),
        ("characters that turn the direction of text", TURNING),
        ("control characters", CONTROL),
        ("text decoded by the wrong code page", MOJIBAKE),
    ):
        found = pattern.findall(text) if pattern else []
        if found and (pattern is not MOJIBAKE or len(found) > 2):
            yield what, f"{named(found[0])}, {len(found)} of them" if len(found) > 1 else named(found[0])
    lost = text.count("\ufffd")
    if lost:
        yield "characters lost in an earlier decoding", f"{lost} U+FFFD"


def named(characters: str) -> str:
    """Characters as a message can hold them: by code and name where they are one, quoted where they can be seen."""
    if len(characters) == 1:
        return f"U+{ord(characters):04X} {unicodedata.name(characters, 'control')}"
    return repr(characters)


def wrong_script(language: str, text: str) -> str:
    """What is odd where hardly a letter is of the script in which the language is written; nothing otherwise.

    A pair such as "ar-en" is checked by either half; a language that is not known here is not checked.
    """
    halves = [half for half in re.split("[-_]", language) if half.lower() == half]
    wanted = {script for half in halves for script in SCRIPT_OF.get(half, "").split()}
    if not wanted or any(half not in SCRIPT_OF for half in halves):
        return ""
    text = text.replace(formats.IMAGE, "").replace(formats.VIDEO, "")
    scripts = Counter(unicodedata.name(c, "?").split()[0].partition("-")[0] for c in text[:4000] if c.isalpha())
    letters = scripts.total()
    if letters < LETTERS or sum(scripts[script] for script in wanted) >= SHARE * letters:
        return ""
    most, count = scripts.most_common(1)[0]
    return f"language {language!r}, and {count / letters:.0%} of {letters} letters are {most.capitalize()}"


def content_mark(record: Record) -> bytes:
    """A digest of what a record teaches, its names left out."""
    digest = hashlib.blake2b(digest_size=12)
    for _, text in texts(record):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    for picture in (*record.images, *(frame for video in record.videos for frame in video)):
        digest.update(hashlib.blake2b(picture, digest_size=12).digest())
    return digest.digest()


def of_records(
    records: Iterable[Record], found: Found, special: re.Pattern[str] | None, pictures: int
) -> dict[bytes, str]:
    """Faults of each record and of all together are added to `found`; (content, id) of each comes back.

    The pictures of the first `pictures` records that have some are opened.
    """
    ids: dict[str, int] = {}
    contents: dict[bytes, str] = {}
    for number, record in enumerate(records):
        opened = pictures > 0 and bool(record.images or record.videos)
        pictures -= opened
        for what, detail in of_record(record, special, opened):
            found.add(what, f"{record.id}: {detail}")
        if record.id in ids:
            found.add("id that stands more than once", f"{record.id}: records {ids[record.id]} and {number}")
        ids.setdefault(record.id, number)
        mark = content_mark(record)
        if mark in contents:
            found.add("identical rows", f"{record.id} and {contents[mark]}")
        contents.setdefault(mark, record.id)
    return contents


def overlap(train: dict[bytes, str], test: dict[bytes, str], found: Found) -> None:
    """Records that are trained on and tested with."""
    for mark in train.keys() & test.keys():
        found.add("row of the test split", f"{train[mark]} is {test[mark]} of the test split")


def of_examples(examples: Examples, packing: Packing, tokenizer: Any, found: Found) -> None:
    """Faults of the token arrays of a whole source are added to `found`."""
    sizes_E3, budgets = np.asarray(examples.sizes()), packing.budgets
    for e in np.flatnonzero(sizes_E3[:, 2] == 0):
        found.add("no token to learn from", record_id(examples, int(e)))
    for e in np.flatnonzero((sizes_E3 > budgets).any(axis=1)):
        tokens, patches, learnt = sizes_E3[e].tolist()
        limit = f"a row holds {budgets[0]}, {budgets[1]} and {budgets[2]}"
        detail = f"{tokens} tokens, {patches} patches, {learnt} learnt; {limit}"
        found.add("longer than a row", f"{record_id(examples, int(e))}: {detail}")
    tokens_T, learn_T = np.asarray(examples.tokens_T), np.asarray(examples.learn_T)
    starts_S = np.asarray(examples.starts_S)

    def sequences(at_T: np.ndarray, least: int = 1) -> np.ndarray:
        total = np.concatenate([[0], np.cumsum(at_T, dtype=np.int64)])
        return np.flatnonzero(np.diff(total[starts_S]) >= least)

    def told(what: str, of_S: Sequence[int] | np.ndarray) -> None:
        for s in of_S:
            found.add(what, str(examples.records[int(examples.record_S[s])].id))

    if tokenizer.bos_token_id is not None:
        told("two beginning tokens in one sequence", sequences(tokens_T == tokenizer.bos_token_id, 2))
    if tokenizer.unk_token_id is not None:
        unknown_T = tokens_T == tokenizer.unk_token_id
        told("text that the vocabulary cannot spell", sequences(unknown_T) if unknown_T.any() else ())
    first = examples.records[int(examples.record_S[0])] if len(starts_S) > 1 else None
    if first is not None and first.messages:
        special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        closes_S = sequences(learn_T & np.isin(tokens_T, special))
        never_S = np.setdiff1d(np.arange(len(starts_S) - 1), closes_S)
        told("end of turn never learnt", never_S)


def record_id(examples: Examples, example: int) -> str:
    """The id of the record that an example was made of."""
    return examples.records[int(examples.record_S[examples.first_E[example]])].id
