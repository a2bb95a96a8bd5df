"""What is left out of a source although nothing is wrong with the row: answers in another language, system texts that
stand in every row, and conversations that stand there twice.

InstAr-500k's users name all three (arXiv 2407.02147; English answers in rows that count as Arabic, one English system
prompt, repeated rows).
"""

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ain_jax.data.formats import IMAGE, VIDEO, Record
from ain_jax.data.languages import language_code

Systems = Literal["keep", "drop", "own"]
SYSTEMS = get_args(Systems)
# Languages by the script that they are written in, as Unicode names its letters; those that are not here are Latin.
_SCRIPTS = """
ARABIC: ar arz ary arq aeb apc afb acm ars acw acq apd ayl fa ur
CYRILLIC: bg mn ru sr uk
ETHIOPIC: am
BENGALI: bn
GREEK: el
HEBREW: he
DEVANAGARI: hi
CJK HIRAGANA KATAKANA: ja
HANGUL: ko
SINHALA: si
TAMIL: ta
TELUGU: te
THAI: th
CJK: zh
"""
SCRIPTS: dict[str, tuple[str, ...]] = {
    code: tuple(names.split())
    for names, codes in (line.split(": ") for line in _SCRIPTS.strip().splitlines())
    for code in codes.split()
}
ENOUGH = 0.5  # of an answer's letters in the script of its language
MARKS = re.compile("[\u0610-\u061a\u0640\u064b-\u065f\u0670]")  # vowel marks and tatweel
LETTERS = str.maketrans("أإآٱىة", "اااايه")  # spelt one for another


class LeftOut(ValueError):
    """The row is sound, and is not wanted."""


@dataclass(frozen=True)
class Filters:
    """What a source leaves out."""

    answers_in: str = ""  # a language; "": any
    systems: Systems = "keep"
    repeated: bool = False  # whether conversations that stood before are left out


def apply(record: Record, filters: Filters) -> Record:
    """The record as it is kept; LeftOut where it is not."""
    wanted = filters.answers_in
    if wanted and record.messages:
        last = record.messages[-1].content
        share = share_in(last, wanted)
        if share < ENOUGH:
            raise LeftOut(
                f"the answer is not in the script of {wanted!r}: {share:.0%} of its letters are ({last[:60]!r})"
            )
    first = record.messages[:1]
    if first and first[0].role == "system":
        foreign = share_in(first[0].content, wanted or record.language) < ENOUGH
        if filters.systems == "drop" or (filters.systems == "own" and foreign):
            if IMAGE in first[0].content or VIDEO in first[0].content:
                raise ValueError("the system text that Sources.systems drops shows a picture or a video")
            record = replace(record, messages=record.messages[1:])
    return record


def share_in(text: str, language: str) -> float:
    """The share of a text's letters that belong to the script of a language; 1 where it has none.

    A script tells Arabic from English, and not Arabic from Persian: for that, texts as short as "نعم" are too short.
    """
    scripts = SCRIPTS.get(language_code(language), ("LATIN",))
    letters = Counter(char for char in text if char.isalpha())
    total = letters.total()
    ours = sum(count for char, count in letters.items() if unicodedata.name(char, "").startswith(scripts))
    return ours / total if total else 1.0


def words_hash(record: Record) -> int:
    """64 bits that stand for what is said in a record, its system text left out, whatever its spelling.

    Letters that Arabic writes one for another, vowel marks, case and blanks make no difference; pictures do.
    """
    turns = [f"{m.role}:{folded(m.content)}" for m in record.messages if m.role != "system"]
    parts = [folded(record.text), *turns, folded(record.rejected)]
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    for picture in (*record.images, *(frame for video in record.videos for frame in video)):
        digest.update(picture)
    return int.from_bytes(digest.digest(), "big")


def folded(text: str) -> str:
    """A text as it is compared: "الحُرِّيَّة  Now" and "الحرية now" are one."""
    return " ".join(MARKS.sub("", text).translate(LETTERS).casefold().split())
