"""What of the training text is said in the held-out text too, by runs of eight words."""

import re
from collections.abc import Iterable, Iterator

from ain_jax.kits.texts import bare

WORDS = 8
_WORD = re.compile(r"\w+")
_SAME = str.maketrans("أإآٱىة", "اااايه")  # spellings that writers mix


def grams(text: str) -> Iterator[int]:
    """A number for each run of WORDS words, marks, case and punctuation aside; of a shorter text one for all of it.

    "A b, c" and "a B c" give one number, the same.
    """
    words = _WORD.findall(bare(text).translate(_SAME).lower())
    if len(words) < WORDS:
        return iter([hash(tuple(words))] if words else ())
    return map(hash, zip(*(words[start:] for start in range(WORDS)), strict=False))


def gram_set(texts: Iterable[str]) -> set[int]:
    return {number for text in texts for number in grams(text)}


def shares(text: str, known: set[int]) -> bool:
    return not known.isdisjoint(grams(text))
