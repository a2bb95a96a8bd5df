"""The kind of a text, by rules that can be read and checked: plain, vocalised, code-mixed, dialect; and its numbers.

One tokenizer cuts these very differently: vowel marks cost about twice the tokens, Arabic-Indic digits often two
tokens each, so one mean over a corpus says little about any of them.
"""

import re
import unicodedata
from collections.abc import Iterator

PLAIN, VOCALISED, CODE_MIXED, DIALECT = "plain", "vocalised", "code-mixed", "dialect"
DIGITS, ARABIC_DIGITS = "digits", "Arabic-Indic digits"
TEXT_KINDS = (PLAIN, VOCALISED, DIALECT, CODE_MIXED)
NUMBER_KINDS = (DIGITS, ARABIC_DIGITS)

MIXED_SHARE = 0.1  # of the letters: less of the other script is a name or a unit in a text of one language
VOCALISED_SHARE = 0.2  # marks a letter: plain prose carries a tanwin or a shadda on one letter in fifty, the Quran 0.9
DIALECTS = re.compile(
    "aao|ab[hv]|ac[mqwxy]|adf|ae[bc]|afb|ajp|ap[cd]|arq|ars|ary|arz|auz|avl|ay[hlnp]|pga|shu|ssh"
)  # ISO 639-3, the members of "ara" but for "arb": no rule tells a dialect from its letters, so the label has to

_ARABIC = re.compile("[\u0620-\u063f\u0641-\u064a\u066e-\u06d3\u06d5\u06fa-\u06fc\u06ff\u0750-\u077f\u08a0-\u08c9]")
_LATIN = re.compile("[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]")
_MARK = re.compile("[\u064b-\u0652\u0670]")
_NUMBERS = {DIGITS: re.compile("[0-9]+"), ARABIC_DIGITS: re.compile("[\u0660-\u0669\u06f0-\u06f9]+")}


def kind_of(text: str, language: str = "") -> str:
    """The first of these that holds, so that the kinds of a corpus' texts add up to the corpus.

    code-mixed  of the Arabic and Latin letters, the fewer are at least a tenth
    vocalised   at least one vowel mark for every five Arabic letters
    dialect     the language is the ISO 639-3 code of an Arabic dialect (arz, ary, apc ...)
    plain       any other text
    """
    arabic, latin = len(_ARABIC.findall(text)), len(_LATIN.findall(text))
    if min(arabic, latin) >= MIXED_SHARE * (arabic + latin) > 0:
        return CODE_MIXED
    if arabic and len(_MARK.findall(text)) >= VOCALISED_SHARE * arabic:
        return VOCALISED
    return DIALECT if DIALECTS.fullmatch(language.partition("-")[0]) else PLAIN


def numbers(text: str) -> Iterator[tuple[str, str]]:
    """The runs of digits in a text as (kind, run): "عام 2024 أو ٢٠٢٤" gives digits 2024, Arabic-Indic digits ٢٠٢٤."""
    for kind, pattern in _NUMBERS.items():
        for run in pattern.findall(text):
            yield kind, run


def mostly_arabic(text: str) -> bool:
    """Whether more than half of the letters are Arabic."""
    letters = sum(unicodedata.category(character)[0] == "L" for character in text)
    return 2 * len(_ARABIC.findall(text)) > letters
