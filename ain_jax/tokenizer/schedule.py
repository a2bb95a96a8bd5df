"""A vocabulary that grows while a model trains (AraLLaMA, arXiv 2412.12310, section 3: 12,800 subwords in 16 stages).

The new pieces of an extension stand in the order learnt, so the first n of them are an extension too, with the same
ids. A stage of training in parts cuts its text with more of them in each:

    4 parts of 10,000 pieces     10     100     1,000     10,000 in use

Where a part begins, the rows of the pieces that come into use are made from the rows, as trained by then, of the pieces
that spelt them until then.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tokenizers

from ain_jax.tokenizer.base import cutter, open_base
from ain_jax.tokenizer.folder import Extension


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """In how many parts of a stage the new pieces come into use; 1 has them all from the start."""

    parts: int = 1
    growth: Literal["exponential", "linear"] = "exponential"

    def __post_init__(self):
        if self.parts < 1:
            raise ValueError(f"parts = {self.parts}: expected 1 or more")

    def sizes(self, pieces: int) -> list[int]:
        """How many of the new pieces are in use in each part; all of them in the last.

        Exponential growth makes each part's number the same multiple of the one before, from 1 on.
        """
        if self.parts > 1 and pieces < self.parts:
            raise ValueError(f"parts = {self.parts}, and the extension has {pieces} pieces: ask for fewer parts")
        shares = [part / self.parts for part in range(1, self.parts + 1)]
        raw = [pieces**share if self.growth == "exponential" else pieces * share for share in shares]
        sizes = [round(size) for size in raw]
        return [max(size, part) for part, size in enumerate(sizes, 1)]

    def steps(self, steps: int) -> list[int]:
        """How many of a stage's steps each part takes: as equal as can be."""
        if steps < self.parts:
            raise ValueError(
                f"parts = {self.parts}, and Trainer.steps = {steps}: expected a step or more for each part"
            )
        ends = [round(steps * part / self.parts) for part in range(self.parts + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]


def shorter(tokenizer: Any, extension: Extension, pieces: int) -> Any:
    """The transformers tokenizer with the first `pieces` new pieces alone; every id stays."""
    if pieces == len(extension.pieces):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    data = _without(json.loads(tokenizer.backend_tokenizer.to_str()), extension.pieces[pieces:])
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(data)), **named)
    result.chat_template = tokenizer.chat_template
    return result


def spelt_before(extension: Extension, used: int, now: int) -> list[list[int]]:
    """The ids that spelt each of the pieces `used` to `now - 1` while only the first `used` were in use."""
    base = open_base(extension.folder)
    before = cutter(_without(base.data, extension.pieces[used:]), base.kind)
    texts = [base.text(piece) or "" for piece in extension.pieces[used:now]]
    return [encoding.ids for encoding in before.encode_batch(texts, add_special_tokens=False)]


def _without(data: Mapping[str, Any], pieces: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json without these pieces and without the merges that make or take them."""
    gone, model = set(pieces), data["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    kept = [gone.isdisjoint((left, right, left + right)) for left, right in pairs]
    merges = [merge for merge, keep in zip(model["merges"], kept, strict=True) if keep]
    vocab = {piece: index for piece, index in model["vocab"].items() if piece not in gone}
    return {**data, "model": {**model, "vocab": vocab, "merges": merges}}
