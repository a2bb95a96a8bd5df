"""A base's tokenizer.json with special tokens and new pieces behind its own; every old id and merge in its place."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers

from ain_jax.tokenizer.base import Base
from ain_jax.tokenizer.folder import SPACE

if TYPE_CHECKING:
    from ain_jax.tokenizer.learn import Learnt


def grow(base: Base, learnt: "Learnt", pieces: int | None = None) -> tokenizers.Tokenizer:
    """The base's fast form with the first `pieces` new pieces (all, by default), their ids behind the base's."""
    number = len(learnt.pieces) if pieces is None else pieces
    if not 0 <= number <= len(learnt.pieces):
        raise ValueError(f"pieces={pieces}, but {len(learnt.pieces)} were learnt; ask for at most that many")
    merges = [merge for each in learnt.merges[:number] for merge in each]
    return tokenizers.Tokenizer.from_str(json.dumps(grown_data(base, (), learnt.pieces[:number], merges)))


def grown_data(
    base: Base, special_tokens: Sequence[str], pieces: Sequence[str], merges: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """The base's tokenizer.json with the special tokens and then the pieces behind `base.size`.

    The merges of a byte-level base are those that were learnt, behind all old ones. A SentencePiece encoder joins any
    two neighbours that make a piece, so there each way to cut a piece in two is a merge of the piece's rank, and
    those given are not looked at.
    """
    model, size = base.data["model"], base.size
    vocabulary = dict(model["vocab"])
    # Where an added token stands behind the vocabulary (Qwen2, Llama-3), the library gives it the next free id and not
    # the one that is written; with more pieces, that would be another. In the vocabulary it keeps its own.
    vocabulary |= {token["content"]: token["id"] for token in base.data["added_tokens"]}
    vocabulary |= {token: size + index for index, token in enumerate(special_tokens)}
    vocabulary |= {piece: size + len(special_tokens) + index for index, piece in enumerate(pieces)}
    assert len(vocabulary) == len(base.ids) + len(special_tokens) + len(pieces), "a new piece is already in the base"
    old = model["merges"]
    as_text = bool(old) and isinstance(old[0], str)  # older files write "a b"
    if base.kind == "sentencepiece":
        pairs = [merge.split(" ") for merge in old] if as_text else old
        place = len(old) - _runs_of_blanks(pairs)
        within = _cuts_of_old(vocabulary, frozenset(pieces), base.ids, pairs)
        new = _cuts(vocabulary, pieces)
    else:
        new, place, within = [list(merge) for merge in merges], len(old), {}
    grown = [*old[:place], *(" ".join(merge) if as_text else merge for merge in new), *old[place:]]
    for index, merge in sorted(within.items(), reverse=True):
        grown[index:index] = [" ".join(m) for m in merge] if as_text else merge
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": vocabulary[token], "content": token, **plain} for token in special_tokens]
    return {
        **base.data,
        "added_tokens": [*base.data["added_tokens"], *added],
        "model": {**model, "vocab": vocabulary, "merges": grown},
    }


def _cuts(vocabulary: Mapping[str, int], pieces: Sequence[str]) -> list[list[str]]:
    """Every pair of pieces that makes a new one, in the pieces' order; then by left id and right id.

    That is the order in which transformers converts a SentencePiece model.
    """
    merges = []
    for piece in pieces:
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [list(pair) for pair in sorted(known, key=lambda p: (vocabulary[p[0]], vocabulary[p[1]]))]
    return merges


def _cuts_of_old(
    vocabulary: Mapping[str, int], new: frozenset[str], old: Mapping[str, int], merges: Sequence[Sequence[str]]
) -> dict[int, list[list[str]]]:
    """The ways to cut old pieces that new pieces bring (▁ا is new, so ▁ال is ▁ا+ل as well), by place in `merges`.

    They stand among the piece's own merges, before the place they are given.
    """
    characters = frozenset("".join(new)) - {SPACE}
    found: dict[str, list[list[str]]] = {}
    for piece in old:
        if characters.isdisjoint(piece):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if (left in new or right in new) and left in vocabulary and right in vocabulary:
                found.setdefault(piece, []).append([left, right])
    places: dict[str, list[int]] = {}
    for index, (left, right) in enumerate(merges if found else ()):
        if (piece := left + right) in found:
            places.setdefault(piece, []).append(index)
    rank = lambda merge: (vocabulary[merge[0]], vocabulary[merge[1]])
    inserted: dict[int, list[list[str]]] = {}
    for piece, own in places.items():
        for merge in sorted(found[piece], key=rank):
            before = next((index for index in own if rank(merges[index]) > rank(merge)), own[-1] + 1)
            inserted.setdefault(before, []).append(merge)
    return inserted


def _runs_of_blanks(merges: Sequence[Sequence[str]]) -> int:
    """How many merges at the end make runs of blanks.

    Llama writes those pieces in by hand with the lowest of scores, so that a blank rather joins its word; new pieces
    are scored above them, and their merges stand before.
    """
    count = 0
    while count < len(merges) and set("".join(merges[-1 - count])) == {SPACE}:
        count += 1
    return count
