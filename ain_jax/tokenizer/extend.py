"""A SentencePiece BPE vocabulary grown by the pieces of another script, with every old id left where it was.

The base's own BPE training is continued: its pieces, as it cuts the words of the corpus, are the symbols
between which new merges are counted. So each new piece is made of pieces that the base really emits, and text
that holds none of the new characters is cut exactly as before.

    base      ▁ ا ل ح ر ي ة  ->  ▁ال ح ر ي ة          (ids 19078 29100 28947 28972 29141)
    learnt    ر+ي, ة+..., ▁ال+ح, ...                    (ids behind the base and the special tokens)
    extended  ▁الحرية                                   (one id)
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer

from ain_jax.tokenizer import folder
from ain_jax.tokenizer.chat import CHATML_TEMPLATE
from ain_jax.tokenizer.folder import CONTROL, SPACE, Extension, append, processor, read_model

SPECIAL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<|pad|>",
)  # fmt: skip
FIRST_PRIVATE = 0xF0000  # planes 15 and 16 are private use: one character a base piece, for the Rust trainer


@dataclass(frozen=True)
class Script:
    """The characters new pieces may hold, as bodies of regular expression classes.

    Letters and marks may merge. Singles (digits, punctuation) only enter as one-character pieces.
    """

    name: str
    letters: str
    marks: str
    tatweel: str
    singles: str


ARABIC = Script(
    name="Arabic",
    letters="\u0620-\u063f\u0641-\u064a\u066e\u066f\u0671-\u06d3\u06d5\u06e5\u06e6"
    "\u06ee\u06ef\u06fa-\u06fc\u06ff\u0750-\u077f\u0870-\u0887\u0889-\u088e\u08a0-\u08c9",
    marks="\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u0898-\u089f"
    "\u08ca-\u08e1\u08e3-\u08ff",
    tatweel="\u0640",
    singles="\u0606-\u060f\u061b\u061d-\u061f\u060c\u0660-\u066d\u06d4\u06dd\u06de\u06e9\u06f0-\u06f9\u06fd\u06fe",
)


def padded_vocab(size: int, multiple: int = 64) -> int:
    """The number of embedding rows: `size` rounded up to a multiple (32,007 -> 32,064)."""
    return -(-size // multiple) * multiple


def read_texts(*paths: str | Path) -> Iterator[str]:
    """The lines of UTF-8 files, one text each, without their line ends; blank lines are left out."""
    for path in paths:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; give the path of a UTF-8 text file") from error
        for number, line in enumerate(data.split(b"\n"), 1):
            try:
                text = line.decode("utf-8").rstrip("\r")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}, byte {error.start}: 0x{line[error.start]:02x} is not UTF-8; "
                    "convert the file, for example with iconv"
                ) from error
            if text.strip():
                yield text


def count_chunks(texts: Iterable[str]) -> tuple[Counter[str], str, int]:
    """How often each chunk between blanks occurs (its ▁ included), the SHA-256 and number of the texts."""
    chunks: Counter[str] = Counter()
    digest, number = hashlib.sha256(), 0
    for number, text in enumerate(texts, 1):
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {number}, character {error.start}: a lone surrogate is no valid UTF-8; "
                "decode the source strictly"
            ) from error
        digest.update(len(data).to_bytes(8, "little") + data)
        chunks.update(SPACE + chunk for chunk in text.replace(SPACE, " ").split(" ") if chunk)
    return chunks, digest.hexdigest(), number


def continue_bpe(words: Mapping[tuple[str, ...], int], limit: int, min_count: int = 2) -> list[tuple[str, str]]:
    """The next merges of a BPE whose present symbols are given, most frequent pair first, at most `limit`.

    Ties go to the pair whose left symbol is older, then to the one whose right symbol is older; the order of
    the first symbols is that of `sorted`. The result may hold two merges with the same concatenation: ab+c
    and a+bc.

        {("a","b","c"): 3, ("a","b"): 1}, limit 2  ->  [("a","b"), ("ab","c")]
    """
    symbols = sorted({symbol for word in words for symbol in word})
    private = {symbol: chr(FIRST_PRIVATE + index) for index, symbol in enumerate(symbols)}
    public = {character: symbol for symbol, character in private.items()}
    assert len(symbols) < 0x1F000, "more symbols than private characters"

    def lines() -> Iterator[str]:
        # the trainer counts words itself and takes no counts, so each is said that often
        for word, count in words.items():
            text = "".join(private[symbol] for symbol in word) + " "
            for start in range(0, count, 4096):
                yield text * min(4096, count - start)

    size = len(symbols) + limit
    trainer = BpeTrainer(vocab_size=size, min_frequency=min_count, show_progress=False)  # pyright: ignore
    learner = tokenizers.Tokenizer(BPE())
    learner.pre_tokenizer = WhitespaceSplit()  # pyright: ignore
    learner.train_from_iterator(lines(), trainer)

    def name(text: str) -> str:
        return "".join(public[character] for character in text)

    return [(name(left), name(right)) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def learning_words(
    model: Any, chunks: Mapping[str, int], script: Script, marks: str, tatweel: str
) -> Counter[tuple[str, ...]]:
    """The model's pieces of each run of the script's letters, and how often the run occurs.

    {"▁(الحر)،": 3}  ->  {("ال", "ح", "ر"): 3}
    """
    dropped, kept = "", script.letters
    for characters, choice in ((script.marks, marks), (script.tatweel, tatweel)):
        kept += characters if choice == "keep" else ""
        dropped += characters if choice == "strip" else ""
    drop = re.compile(f"[{dropped}]") if dropped else None
    ours = re.compile(f"[{kept}]")
    run = re.compile(f"{SPACE}|{SPACE}?[{kept}]+")
    plain: Counter[str] = Counter()
    for chunk, count in chunks.items():
        if ours.search(chunk):
            plain[drop.sub("", chunk) if drop else chunk] += count
    words: Counter[tuple[str, ...]] = Counter()
    cuts = processor(model, prefix=False).encode(list(plain), out_type=str)
    for count, symbols in zip(plain.values(), cuts, strict=True):
        word: list[str] = []
        for symbol in [*symbols, ""]:  # the empty one ends the last run
            if run.fullmatch(symbol):
                word.append(symbol)
                continue
            if len(word) > 1:
                words[tuple(word)] += count
            word = []
    return words


def new_pieces(
    model: Any, chunks: Mapping[str, int], pieces: int, script: Script, marks: str, tatweel: str,
    min_count: int, longest: int,
) -> tuple[list[str], list[tuple[str, str]]]:  # fmt: skip
    """The pieces to add, single characters first, then merges in the order learnt; and those merges."""
    known = {piece.piece for piece in model.pieces}
    characters: Counter[str] = Counter()
    ours = re.compile(f"[{script.letters}{script.marks}{script.tatweel}{script.singles}]")
    for chunk, count in chunks.items():
        for character in ours.findall(chunk):
            characters[character] += count
    if not any(re.match(f"[{script.letters}]", character) for character in characters):
        raise ValueError(f"the corpus holds no {script.name} letter; give text in the language to be added")
    missing = [c for c, count in characters.items() if c not in known and count >= min_count]
    singles = sorted(missing, key=lambda c: (-characters[c], c))[:pieces]

    words = learning_words(append(model, singles), chunks, script, marks, tatweel)
    wanted, limit = pieces - len(singles), pieces + 256
    while True:  # some merges repeat a piece, and some pieces are never cut: learn a few more than asked
        learnt = continue_bpe(words, limit, min_count) if wanted > 0 else []
        merges: dict[str, tuple[str, str]] = {}
        for left, right in learnt:
            if left + right not in known and len(left + right) <= longest:
                merges.setdefault(left + right, (left, right))
        found = reachable(model, singles, list(merges), wanted)
        if len(found) >= wanted:
            return [*singles, *found], [merges[piece] for piece in found]
        if len(learnt) < limit:
            raise ValueError(
                f"{pieces} pieces were asked for, but the corpus holds {len(singles) + len(found)} "
                f"that occur at least {min_count} times; ask for fewer or give more text"
            )
        limit *= 2


def reachable(model: Any, singles: Sequence[str], merged: Sequence[str], wanted: int) -> list[str]:
    """The first `wanted` of the merged pieces that the encoder emits when it meets them alone.

    SentencePiece joins any two neighbours whose concatenation is a piece, the best score first, whichever
    pair it was learnt from; a piece can so be cut off by another. Such a piece is left out and the next one
    takes its place.
    """
    banned: set[str] = set()
    while True:
        chosen = [piece for piece in merged if piece not in banned][:wanted]
        cut = processor(append(model, [*singles, *chosen]), prefix=False).encode(chosen, out_type=str)
        lost = {piece for piece, parts in zip(chosen, cut, strict=True) if parts != [piece]}
        if not lost:
            return chosen
        banned |= lost


def extend(
    base_model_path: str | Path,
    texts: Iterable[str],
    *,
    out_dir: str | Path,
    pieces: int = 2000,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    chat_template: str = CHATML_TEMPLATE,
    eos_token: str = "<|im_end|>",
    pad_token: str = "<|pad|>",
    script: Script = ARABIC,
    marks: str = "keep",
    tatweel: str = "strip",
    min_count: int = 2,
    longest: int = 16,
) -> Extension:
    """The extended tokenizer, written to `out_dir` in one piece; the same arguments give the same bytes.

    pieces    new ids for the script, single characters that the base lacks included
    marks     vowel marks while learning: "strip" learns from bare words, "keep" lets marks join pieces
    tatweel   likewise for the lengthening stroke; digits and punctuation never join others
    longest   characters in a new piece at most, the ▁ counted (the base's trainer had the same limit)
    """
    out_dir = Path(out_dir)
    for name, value in (("marks", marks), ("tatweel", tatweel)):
        if value not in ("keep", "strip"):
            raise ValueError(f"{name} is {value!r}, expected 'keep' or 'strip'")
    if pieces < 1 or min_count < 1:
        raise ValueError(f"pieces={pieces} and min_count={min_count} must both be at least 1")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} already exists and is not overwritten; remove it or give another out_dir")
    model = read_model(base_model_path)
    names = {piece.piece for piece in model.pieces}
    control = {piece.piece for piece in model.pieces if piece.type == CONTROL}
    twice = [token for token, count in Counter(special_tokens).items() if count > 1]
    wrong = twice + [token for token in special_tokens if token in names]
    if wrong:
        raise ValueError(f"special tokens {wrong} are already in the base or given twice; leave them out")
    for what, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token not in control and token not in special_tokens:
            raise ValueError(f"{what} is {token!r}, expected one of {[*special_tokens, *sorted(control)]}")

    chunks, corpus_sha256, number = count_chunks(texts)
    if not chunks:
        raise ValueError(f"the corpus is empty ({number} texts, no word); give text in the language to be added")
    added, merges = new_pieces(model, chunks, pieces, script, marks, tatweel, min_count, longest)
    replaces = processor(model, prefix=False).encode(added, out_type=int)
    grown = append(append(model, special_tokens, CONTROL), added)
    special_ids = {token: len(model.pieces) + index for index, token in enumerate(special_tokens)}
    files = folder.contents(grown, special_ids, chat_template, eos_token, pad_token)
    extension = Extension(
        folder=out_dir,
        base_sha256=hashlib.sha256(Path(base_model_path).read_bytes()).hexdigest(),
        base_size=len(model.pieces),
        special_tokens=special_ids,
        first_piece=len(model.pieces) + len(special_ids),
        pieces=tuple(added),
        replaces=tuple(map(tuple, replaces)),
        merges=tuple(merges),
        fingerprint=folder.fingerprint(files),
    )
    manifest = {key: value for key, value in vars(extension).items() if key != "folder"} | {
        "format": 1,
        "kind": "SentencePiece BPE with byte fallback",
        "size": extension.size,
        "number_of_pieces": len(added),
        "corpus": {"sha256": corpus_sha256, "texts": number},
        "settings": {"pieces": pieces, "marks": marks, "tatweel": tatweel, "min_count": min_count}
        | {"longest": longest, "script": asdict(script), "eos_token": eos_token, "pad_token": pad_token},
        "made_with": {"tokenizers": tokenizers.__version__, "sentencepiece": sentencepiece.__version__},
    }
    folder.write(out_dir, {**files, "extension.json": (json.dumps(manifest, ensure_ascii=False) + "\n").encode()})
    return extension
