"""Text as documents and pairs, and which of it is held out: whole books, chapters and chapters of the Quran.

Nothing that is held out shares a run of eight words with what is trained on (`overlap`): training rows that do leave.
Of the held-out book those sayings are taken that fewest training rows repeat, since the six books tell many of the same
in the same words: strictly applied to the whole book, four fifths of the other five would leave.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ain_jax import sample
from ain_jax.kits import overlap, texts
from ain_jax.kits.packages import Get, Unavailable

SURAHS = range(50, 78)  # of the Quran, held out
SAYINGS = 500  # of the held-out book
STRINGS = 500  # of Chromium
DIALECT_ROWS = 200  # of each dialect
UI = (
    "libreoffice-l10n-ar", "gimp-data", "krita-l10n", "cinnamon-l10n", "evolution-common", "vlc-l10n", "audacity-data",
    "libgtk-3-common", "gnome-control-center-data", "nautilus-data", "gedit-common", "python3-django",
)  # fmt: skip
PIECE = 1600  # characters of a row of running text


@dataclass(frozen=True)
class Row:
    """Text in one language, or in two where `other` has the second."""

    id: str
    source: str
    language: str  # of `text`: "ar", "en", "arz" ...
    text: str
    other: str = ""  # the English of a pair
    references: tuple[str, ...] = ()  # all English versions, where there are several
    marked: str = ""  # `text` with its vowel marks, where it had any


@dataclass(frozen=True)
class Texts:
    train: list[Row]
    held: list[Row]
    dropped: Counter[str]  # rows that left, by source
    left_out: dict[str, str]  # source -> why it is not here


def hadith(get: Get) -> Iterator[tuple[Row, bool]]:
    for book in (*texts.HADITH, texts.HELD_OUT_BOOK):
        for number, (arabic, english) in enumerate(texts.hadith(get, book)):
            if arabic and english:
                yield _marked(Row(f"{book}/{number}", "hadith", "ar", arabic, english)), book == texts.HELD_OUT_BOOK


def quran(get: Get) -> Iterator[tuple[Row, bool]]:
    for chapter, verse, arabic, english in texts.verses(get):
        row = Row(f"quran/{chapter}:{verse}", "quran", "ar", arabic, english[0] if english else "", tuple(english))
        yield _marked(row), chapter in SURAHS


def tafsir(get: Get) -> Iterator[tuple[Row, bool]]:
    for number, text in enumerate(texts.tafsir(get)):
        yield Row(f"tafsir/{number}", "tafsir", "ar", text), number % texts.TAFSIR_HELD_OUT == 0


def handbook(get: Get) -> Iterator[tuple[Row, bool]]:
    for row in sample.rows("handbook"):
        yield Row(row["id"], "handbook", "ar", row["ar"], row["en"]), bool(texts.CHAPTERS.fullmatch(row["document"]))


def udhr(get: Get) -> Iterator[tuple[Row, bool]]:
    for row in sample.rows("udhr"):
        if row["ar"] and row["en"]:
            yield Row(row["id"], "udhr", "ar", row["ar"], row["en"]), True


def programs(package: str) -> Callable[[Get], Iterator[tuple[Row, bool]]]:
    def rows(get: Get) -> Iterator[tuple[Row, bool]]:
        for number, (arabic, english) in enumerate(texts.gettext_pairs(get, package)):
            yield Row(f"{package}/{number}", "programs", "ar", arabic, english), False

    return rows


def chromium(get: Get) -> Iterator[tuple[Row, bool]]:
    found = dict.fromkeys(texts.chromium_pairs(get))
    prose = [pair for pair in found if 8 <= len(pair[1].split()) <= 40]
    step = max(1, len(prose) // STRINGS)
    held = set(prose[::step][:STRINGS])
    for number, pair in enumerate(found):
        yield Row(f"chromium/{number}", "chromium", "ar", *pair), pair in held


def mediawiki(get: Get) -> Iterator[tuple[Row, bool]]:
    """Of each dialect the last messages are held out, and what the other languages say there."""
    messages = texts.mediawiki(get)
    hidden = set()
    for dialect in texts.DIALECTS:
        of_words = [key for key, row in messages.items() if dialect in row and len(row["en"].split()) >= 3]
        hidden.update(of_words[-DIALECT_ROWS:])
    for key, row in messages.items():
        for language in ("ar", *texts.DIALECTS):
            if language in row and texts.ARABIC.search(row[language]):
                told = Row(f"mediawiki/{key}/{language}", "mediawiki", language, row[language], row["en"])
                yield told, key in hidden


def english(
    read: Callable[[Get], Iterator[tuple[str, str]]], source: str, held_out: int = 0
) -> Callable[[Get], Iterator[tuple[Row, bool]]]:
    """English documents in pieces; one document in `held_out` is held out, none if it is 0."""

    def rows(get: Get) -> Iterator[tuple[Row, bool]]:
        for place, (name, text) in enumerate(read(get)):
            for number, piece in enumerate(texts.pieces(text, PIECE)):
                yield Row(f"{source}/{name}/{number}", source, "en", piece), bool(held_out) and place % held_out == 0

    return rows


READERS: dict[str, Callable[[Get], Iterator[tuple[Row, bool]]]] = {
    "hadith": hadith,
    "quran": quran,
    "tafsir": tafsir,
    "handbook": handbook,
    "udhr": udhr,
    "chromium": chromium,
    "mediawiki": mediawiki,
    **{f"programs/{package}": programs(package) for package in UI},
    "commentaries": english(texts.commentaries, "commentaries"),
    "passages": english(texts.passages, "passages", held_out=100),
    "manual": english(texts.manual, "manual"),
}


def read(get: Get, say: Callable[[str], object] = print, names: Iterable[str] = tuple(READERS)) -> Texts:
    """All rows, split; a source that cannot be had is said and left out."""
    train, held, left_out = [], [], {}
    seen: set[tuple[str, str]] = set()
    for name in names:
        try:
            found = list(READERS[name](get))
        except Unavailable as error:
            left_out[name] = " ".join(str(error).split())
            say(f"{name} is left out: {left_out[name]}")
            continue
        for row, is_held in found:
            if is_held or (row.text, row.other) not in seen:  # programs share many a message
                (held if is_held else train).append(row)
                seen.add((row.text, row.other))
    held = rarest(held, train)
    train, dropped = disjoint(train, held)
    return Texts(train, held, dropped, left_out)


def rarest(held: list[Row], train: list[Row], count: int = SAYINGS, source: str = "hadith") -> list[Row]:
    """The held-out rows, and of those of `source` the `count` that fewest training rows share a run of words with."""
    of_source = [row for row in held if row.source == source]
    told = {row.id: {number for side in _sides(row) for number in overlap.grams(side)} for row in of_source}
    known = set().union(*told.values())
    repeated = defaultdict(set)  # number -> the training rows that it stands in
    for place, row in enumerate(train):
        for side in _sides(row):
            for number in known.intersection(overlap.grams(side)):
                repeated[number].add(place)
    hits = {name: len(set().union(*(repeated[n] for n in numbers if n in repeated))) for name, numbers in told.items()}
    kept = set(sorted(hits, key=lambda name: (hits[name], name))[:count])
    return [row for row in held if row.source != source or row.id in kept]


def disjoint(train: list[Row], held: list[Row]) -> tuple[list[Row], Counter[str]]:
    """(the training rows that share no run of eight words with held-out text, how many of each source left)."""
    known = overlap.gram_set(side for row in held for side in _sides(row))
    kept, dropped = [], Counter()
    for row in train:
        if any(overlap.shares(side, known) for side in _sides(row)):
            dropped[row.source] += 1
        else:
            kept.append(row)
    return kept, dropped


def _sides(row: Row) -> tuple[str, ...]:
    return tuple(filter(None, dict.fromkeys((row.text, row.other, *row.references))))


def _marked(row: Row) -> Row:
    """The row's text without vowel marks, and beside it as it was."""
    plain = re.sub(" +", " ", texts.bare(row.text)).strip()
    return replace(row, text=plain, marked=row.text if plain != row.text else "")
