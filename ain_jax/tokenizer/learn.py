"""The pieces that a base's own BPE would learn next from a corpus, if its training went on.

The base cuts the corpus with its own normaliser, pre-tokenizer and merges; the symbols it leaves are what new merges
join. So each new piece is made of pieces that the base really emits.

    SentencePiece   ▁ ا ل ح ر ي ة  ->  ▁ال ح ر ي ة          learnt  ح+ر, ▁ال+حر, ...
    byte level      ĠØ ¬ Ùħ ÙĬ ÙĦ  (" جميل")                   learnt  ĠØ+¬ (" ج"), Ùħ+ÙĬ, ...

A byte-level symbol may end inside a character. No merge makes another such symbol: what is learnt spells whole
characters, so every new piece can be shown, compared and spelt by old ones.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import tokenizers
from tqdm import tqdm

from ain_jax.tokenizer.base import Base, cutter
from ain_jax.tokenizer.corpus import ARABIC, Chunks, Script
from ain_jax.tokenizer.folder import SPACE
from ain_jax.tokenizer.grow import grown_data
from ain_jax.tokenizer.merges import continuation

BATCH = 20_000  # chunks cut at once
SPARE = 256  # merges learnt beyond those asked for before pieces that the encoder never emits are left out


@dataclass(frozen=True)
class Learnt:
    """New pieces in the order learnt; the first n of them, with their merges, are the extension by n pieces.

    `merges[i]` are the merges learnt with `pieces[i]`: first the one that makes it, then those that make earlier
    pieces out of other parts. Single characters that a SentencePiece base lacks come first and have none.
    `replaces[i]` are the base ids that spell the piece; `counts[i]` how often its merge was met (how often the
    character occurs).
    """

    pieces: tuple[str, ...]
    merges: tuple[tuple[tuple[str, str], ...], ...]
    replaces: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """Which characters may stand in a new piece together, as regular expressions over what it spells."""

    script: Script = ARABIC
    marks: str = "keep"
    tatweel: str = "strip"
    digits: str = "separate"
    min_count: int = 2
    longest: int = 16

    def __post_init__(self):
        choices = (
            ("marks", self.marks, ("keep", "strip")),
            ("tatweel", self.tatweel, ("keep", "strip")),
            ("digits", self.digits, ("separate", "join")),
        )
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, known))}")
        if self.min_count < 1 or self.longest < 2:
            raise ValueError(f"min_count={self.min_count} must be at least 1 and longest={self.longest} at least 2")

    @property
    def dropped(self) -> re.Pattern[str] | None:
        """What is taken out of the text before learning."""
        script = self.script
        body = (script.marks if self.marks == "strip" else "") + (script.tatweel if self.tatweel == "strip" else "")
        return re.compile(f"[{body}]") if body else None

    @property
    def joined(self) -> re.Pattern[str]:
        """A piece of several characters: letters (and marks) behind at most one blank, or digits alone."""
        script = self.script
        kept = script.letters + (script.marks if self.marks == "keep" else "")
        kept += script.tatweel if self.tatweel == "keep" else ""
        digits = f"|[{script.digits}]+" if self.digits == "join" else ""
        return re.compile(f" ?[{kept}]+{digits}")

    @property
    def single(self) -> re.Pattern[str]:
        """A piece of one character."""
        return re.compile(f" ?[{self.script.characters}]")


def learn(
    base: Base,
    chunks: Chunks,
    pieces: int,
    *,
    script: Script = ARABIC,
    marks: str = "keep",
    tatweel: str = "strip",
    digits: str = "separate",
    min_count: int = 2,
    longest: int = 16,
    progress: bool | None = None,
) -> Learnt:
    """The next `pieces` pieces of the base, learnt from the chunks.

    marks      vowel marks while learning: "strip" learns from bare words, "keep" lets marks join pieces
    tatweel    likewise for the lengthening stroke
    digits     "separate": each enters as one character; "join": runs of the script's digits may become pieces
    min_count  occurrences below which nothing is learnt
    longest    characters in a new piece at most, its blank counted
    progress   a bar on standard error; by default where that is a terminal
    """
    rules = Rules(script, marks, tatweel, digits, min_count, longest)
    if pieces < 1:
        raise ValueError(f"pieces={pieces}, expected at least 1")
    if not chunks.words:
        raise ValueError(f"the corpus is empty ({chunks.texts} texts, no word); give text in the language to be added")
    characters: Counter[str] = Counter()
    ours = re.compile(f"[{script.characters}]")
    for chunk, count in chunks.counts.items():
        for character in ours.findall(chunk):
            characters[character] += count
    if not any(re.match(f"[{script.letters}]", character) for character in characters):
        raise ValueError(f"the corpus holds no {script.name} letter; give text in the language to be added")
    singles = _missing(base, characters, rules)[:pieces]
    words = learning_words(base, singles, chunks.counts, rules)
    with tqdm(desc="learning", unit="piece", disable=None if progress is None else not progress) as bar:
        found = _merged(base, singles, words, pieces - len(singles), rules, bar)
    if len(singles) + len(found) < pieces:
        raise ValueError(
            f"{pieces} pieces were asked for, but the corpus holds {len(singles) + len(found)} "
            f"that occur at least {min_count} times; ask for fewer or give more text"
        )
    names = (*singles, *found)
    spelt = base.cutter.encode_batch([_spelt(base, name) for name in names], add_special_tokens=False)
    return Learnt(
        pieces=names,
        merges=(*(() for _ in singles), *(merges for merges, _ in found.values())),
        replaces=tuple(tuple(encoding.ids) for encoding in spelt),
        counts=(*(characters[c] for c in singles), *(count for _, count in found.values())),
    )


def _missing(base: Base, characters: Mapping[str, int], rules: Rules) -> list[str]:
    """Characters that a SentencePiece base has no piece for, the most frequent first; bytes always spell them.

    A byte-level base gets them by a merge of the pieces that spell them, like anything else.
    """
    if base.kind == "byte_level":
        return []
    missing = [c for c, count in characters.items() if c not in base.ids and count >= rules.min_count]
    return sorted(missing, key=lambda c: (-characters[c], c))


def _spelt(base: Base, piece: str) -> str:
    text = base.text(piece)
    assert text is not None, f"{piece!r} spells no whole characters"
    return text


def learning_words(
    base: Base, singles: Sequence[str], chunks: Mapping[str, int], rules: Rules
) -> Counter[tuple[str, ...]]:
    """The base's pieces of each part of a chunk that merges may join, and how often that part occurs.

    {" (الحر)،": 3}  ->  {("ال", "ح", "ر"): 3}
    """
    drop, ours = rules.dropped, re.compile(f"[{rules.script.characters}]")
    front = " " if base.kind == "sentencepiece" and base.prefix else ""
    plain: Counter[str] = Counter()
    for chunk, count in chunks.items():
        chunk = drop.sub("", chunk) if drop else chunk
        if ours.search(chunk):
            plain[chunk if chunk.startswith(" ") else front + chunk] += count
    encoder = cutter(grown_data(base, (), singles, ()), base.kind) if singles else base.cutter
    joinable: dict[str, bool] = {}
    words: Counter[tuple[str, ...]] = Counter()
    for symbols, count in _cut(encoder, plain).items():
        word: list[str] = []
        for symbol in (*symbols, ""):  # the empty one ends the last part
            if symbol not in joinable:
                joinable[symbol] = _joinable(base, symbol, rules)
            if joinable[symbol]:
                word.append(symbol)
                continue
            if len(word) > 1:
                words[tuple(word)] += count
            word = []
    return words


def _cut(encoder: tokenizers.Tokenizer, chunks: Mapping[str, int]) -> Counter[tuple[str, ...]]:
    """The pieces of the parts that the encoder's pre-tokenizer makes of the chunks, and how often each part occurs.

    There are fewer different parts than chunks: a vocalised word is cut at each mark by most byte-level bases.
    """
    parts: Counter[tuple[str, ...]] = Counter()
    rows = iter(chunks.items())
    while batch := list(islice(rows, BATCH)):
        encodings = encoder.encode_batch([chunk for chunk, _ in batch], add_special_tokens=False)
        for (_, count), encoding in zip(batch, encodings, strict=True):
            tokens, numbers = encoding.tokens, encoding.word_ids
            if not tokens or numbers[0] == numbers[-1]:  # the parts are numbered from left to right
                parts[tuple(tokens)] += count
                continue
            start = 0
            for end, (here, after) in enumerate(pairwise(numbers), 1):
                if here != after:
                    parts[tuple(tokens[start:end])] += count
                    start = end
            parts[tuple(tokens[start:])] += count
    return parts


def _joinable(base: Base, symbol: str, rules: Rules) -> bool:
    """Whether a base piece can be part of a new one: it spells letters, a blank, or part of a character."""
    if symbol in ("", *base.special) or symbol in base.added:
        return False
    text = base.text(symbol)
    if text is None:
        return base.kind == "byte_level"
    return text == " " or rules.joined.fullmatch(text) is not None


def _allowed(base: Base, rules: Rules) -> Callable[[str, str], bool]:
    """Whether two neighbours may become a piece: new, of whole characters, within the rules.

    Single characters (digits, punctuation) enter a byte-level base by the merge that completes them.
    """
    joined, single = rules.joined, rules.single

    def allowed(left: str, right: str) -> bool:
        text = None if left + right in base.ids else base.text(left + right)
        if text is None or len(text) > rules.longest:
            return False
        return bool(joined.fullmatch(text)) or (base.text(left) is None and bool(single.fullmatch(text)))

    return allowed


def _merged(
    base: Base, singles: Sequence[str], words: Mapping[tuple[str, ...], int], wanted: int, rules: Rules, bar: tqdm
) -> dict[str, tuple[tuple[tuple[str, str], ...], int]]:
    """The first `wanted` pieces that merges make: piece -> its merges, and the count of the first one."""
    found: dict[str, tuple[tuple[tuple[str, str], ...], int]] = {}
    supply = continuation(words, rules.min_count, _allowed(base, rules))
    limit, last = wanted + (SPARE if base.kind == "sentencepiece" else 1), ""
    while wanted > 0:
        for left, right, count in supply:
            piece = left + right
            if piece not in found:
                found[piece] = (((left, right),), count)
                last = piece
                bar.update()
            else:  # another way to an earlier piece
                found[last] = ((*found[last][0], (left, right)), found[last][1])
            if len(found) >= limit:
                break
        if base.kind == "byte_level":  # the merges are the base's own way, so each piece is reached
            break
        good = reachable(base, singles, list(found), wanted)
        if len(good) >= wanted or len(found) < limit:
            return {piece: (found[piece][0][:1], found[piece][1]) for piece in good}
        limit *= 2
    return dict(islice(found.items(), wanted))


def reachable(base: Base, singles: Sequence[str], merged: Sequence[str], wanted: int) -> list[str]:
    """The first `wanted` of the merged pieces that a SentencePiece encoder emits when it meets them alone.

    It joins any two neighbours whose concatenation is a piece, the best score first, whichever pair it was learnt
    from; a piece can so be cut off by another. Such a piece is left out and the next one takes its place.
    """
    banned: set[str] = set()
    while True:
        chosen = [piece for piece in merged if piece not in banned][:wanted]
        encoder = cutter(grown_data(base, (), [*singles, *chosen], ()), base.kind)
        cut = encoder.encode_batch([piece.replace(SPACE, " ") for piece in chosen], add_special_tokens=False)
        lost = {piece for piece, encoding in zip(chosen, cut, strict=True) if encoding.tokens != [piece]}
        if not lost:
            return chosen
        banned |= lost
