"""Text to learn pieces from: read line by line, and counted in bounded memory as chunks between single blanks.

    "في البيت في" -> {"في": 1, " البيت": 1, " في": 1}

Only the different chunks are cut into pieces later. That gives the pieces of the whole text, because no tokenizer that
can be extended here lets a piece reach over a single blank: a ▁ or Ġ stands only in front of a piece, the rules that
cut text before the merges begin a new part at a blank that is followed by something else, and they look at nothing to
the left of it.
"""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

BATCH = 4_000_000  # characters that are split before their chunks are added up
# A line read from a PDF often holds letters as they are drawn (U+FEDF for a lam at the start of a word). The words
# drawn as one sign (U+FDF0-FDFD, "God bless him") and ornate brackets are meant as they stand.
PRESENTATION_FORMS = "\ufb50-\ufd3d\ufd50-\ufdce\ufdd0-\ufdef\ufe70-\ufefc"
BIDI_CONTROLS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"


@dataclass(frozen=True)
class Script:
    """The characters new pieces may hold, as bodies of regular expression classes.

    Letters and marks may merge, digits if asked. Singles (punctuation) only enter as one-character pieces.
    """

    name: str
    letters: str
    marks: str
    tatweel: str
    digits: str
    singles: str

    @property
    def characters(self) -> str:
        return self.letters + self.marks + self.tatweel + self.digits + self.singles


ARABIC = Script(
    name="Arabic",
    letters="\u0620-\u063f\u0641-\u064a\u066e\u066f\u0671-\u06d3\u06d5\u06e5\u06e6"
    "\u06ee\u06ef\u06fa-\u06fc\u06ff\u0750-\u077f\u0870-\u0887\u0889-\u088e\u08a0-\u08c9",
    marks="\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u0898-\u089f"
    "\u08ca-\u08e1\u08e3-\u08ff",
    tatweel="\u0640",
    digits="\u0660-\u0669\u06f0-\u06f9",
    singles="\u0606-\u060f\u061b\u061d-\u061f\u060c\u066a-\u066d\u06d4\u06dd\u06de\u06e9\u06fd\u06fe",
)


@dataclass(frozen=True)
class Chunks:
    """What `count_chunks` found: the chunks that hold a character of the script, and the whole text in numbers."""

    counts: Mapping[str, int]
    sha256: str  # over all texts, in order
    texts: int
    bytes: int
    words: int  # between blanks, those without the script's characters included
    dropped: int = 0  # different chunks that were forgotten to stay within the cap ...
    dropped_words: int = 0  # ... and how often those had been seen
    odd: Mapping[str, int] = field(default_factory=dict)  # presentation forms and bidi controls among the chunks


def read_texts(*paths: str | Path, key: str = "text") -> Iterator[str]:
    """The texts of UTF-8 files, one a line, blank ones left out; the files are never whole in memory.

    Lines of .txt files are texts; those of .jsonl files are records whose `key` holds one. Either may end in .gz.
    """
    for path in map(Path, paths):
        suffixes = path.suffixes
        packed = suffixes[-1:] == [".gz"]
        records = (suffixes[-2:-1] if packed else suffixes[-1:]) in ([".jsonl"], [".ndjson"])
        try:
            with gzip.open(path, "rb") if packed else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    text = _line(path, number, line)
                    if records and text.strip():
                        text = _record(path, number, text, key)
                    if text.strip():
                        yield text
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path} cannot be read: {reason}; give the path of a UTF-8 text file") from error


def _line(path: Path, number: int, line: bytes) -> str:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no text
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}, byte {error.start}: 0x{line[error.start]:02x} is not UTF-8; "
            "convert the file, for example with iconv"
        ) from error


def _record(path: Path, number: int, line: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: no JSON ({error}); a .jsonl file holds one object a line") from error
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = f"the keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f"{path}, line {number}: expected an object with a text under {key!r}, found {has}")
    return text


def count_chunks(
    texts: Iterable[str],
    *,
    script: Script = ARABIC,
    cap: int = 4_000_000,
    odd_share: float = 0.001,
    progress: bool | None = None,
) -> Chunks:
    """How often each chunk that holds one of the script's characters occurs; its own blank stands in front.

    cap        different chunks kept at most (about 200 bytes each); past it, the rarest are forgotten and counted
    odd_share  the share of presentation forms, or of bidi controls, among the script's characters up to which the
               text is taken; 1 takes any
    progress   a bar on standard error; by default where that is a terminal
    """
    if cap < 1:
        raise ValueError(f"cap={cap} different chunks, expected at least 1")
    if not 0 <= odd_share <= 1:
        raise ValueError(f"odd_share={odd_share}, expected a share between 0 and 1")
    ours = re.compile(f"[{script.characters}{PRESENTATION_FORMS}]")
    counts: Counter[str] = Counter()
    digest, number, size, words, dropped, dropped_words = hashlib.sha256(), 0, 0, 0, 0, 0
    first: list[str] = []  # chunks at the beginning of a text
    later: list[str] = []  # those behind a single blank, without it
    waiting = 0

    def add_up() -> None:
        nonlocal words, waiting, dropped, dropped_words
        for blank, found in (("", Counter(first)), (" ", Counter(later))):
            for chunk, count in found.items():
                words += count if chunk.strip() else 0
                if ours.search(chunk):
                    counts[blank + chunk] += count
        first.clear()
        later.clear()
        waiting = 0
        if len(counts) > cap:
            lost = _drop_rare(counts, cap)
            dropped, dropped_words = dropped + len(lost), dropped_words + sum(lost)

    bar = tqdm(desc="reading", unit="B", unit_scale=True, disable=None if progress is None else not progress)
    for number, text in enumerate(texts, 1):
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {number}, character {error.start}: a lone surrogate is no valid UTF-8; "
                "decode the source strictly"
            ) from error
        digest.update(len(data).to_bytes(8, "little") + data)
        size += len(data)
        head, *rest = _split(text)
        first.append(head)
        later += rest
        waiting += len(text)
        if waiting > BATCH:
            add_up()
            bar.update(size - bar.n)
    add_up()
    bar.update(size - bar.n)
    bar.close()
    odd = _refuse_odd(counts, script, odd_share)
    return Chunks(dict(counts), digest.hexdigest(), number, size, words, dropped, dropped_words, odd)


def _split(text: str) -> list[str]:
    """The text cut at each single blank; a run of blanks stays in its chunk, since base pieces may span it."""
    if "  " not in text:
        return text.split(" ")
    head, *rest = re.split("(?<! )(?= (?! ))", text)
    return [head, *(part[1:] for part in rest)]


def _drop_rare(counts: Counter[str], cap: int) -> list[int]:
    """The counts of the rarest chunks, which are removed so that at most three quarters of the cap are left."""
    by_count = Counter(counts.values())
    kept, least = len(counts), 0
    for least in sorted(by_count):
        kept -= by_count[least]
        if kept <= cap * 3 // 4:
            break
    lost = [chunk for chunk, count in counts.items() if count <= least]
    return [counts.pop(chunk) for chunk in lost]


def _refuse_odd(counts: Mapping[str, int], script: Script, share: float) -> dict[str, int]:
    """How many presentation forms and bidi controls there are, if they are few; a ValueError otherwise."""
    ours = re.compile(f"[{script.characters}]")
    kinds = {
        "presentation forms": (
            PRESENTATION_FORMS,
            "fold each run of them with unicodedata.normalize('NFKC', run), not the whole text, or set odd_share",
        ),
        "bidi controls": (BIDI_CONTROLS, "remove them, or set odd_share"),
    }
    total = sum(len(ours.findall(chunk)) * count for chunk, count in counts.items())
    found, faults = {}, []
    for kind, (characters, cure) in kinds.items():
        pattern = re.compile(f"[{characters}]")
        rows = [(chunk, len(hits) * count) for chunk, count in counts.items() if (hits := pattern.findall(chunk))]
        found[kind] = number = sum(times for _, times in rows)
        if number > share * (total + number):
            example = max(rows, key=lambda row: row[1])[0]
            shown = "".join(f"\\u{ord(c):04x}" if pattern.match(c) else c for c in example.strip())
            faults.append(
                f"{number} {kind} beside {total} other {script.name} characters (more than {share:.2%}), "
                f"for example {shown!r}; {cure}"
            )
    if faults:
        raise ValueError("the corpus holds " + "; and ".join(faults))
    return found
