"""Would an extension pay? Tokens a word at each size, what the new rows cost, and one plain sentence.

size    tokens/word  saved  new rows  spare used  parameters   share  words to train  tokens  steps  pays from
 8,000         2.03    60%     8,000           0   65,536,000  +1.0%           9.1 M  18.5 M     36      4.2 M
16,000         1.79    65%    16,000           0  131,072,000  +1.9%          24.0 M  43.0 M     82     10.1 M

All compute is counted by 6 operations a parameter and token in training (2 forward, 2 for the activations' gradients,
2 for the weights'), so a stage in which only the new rows learn costs two thirds of a full one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ain_jax.tokenizer import inspect
from ain_jax.tokenizer.base import Base, cutter
from ain_jax.tokenizer.inspect import Fertility

COVERED = 3.0
"""Tokens a word up to which a base already covers a language. Bases trained on Arabic lie between 2.08 and 2.32
(Falcon-H1, GPT-4o, Gemma-3, Qwen3, Command-R), those that were not at 4.11 and above (GPT-4, Mistral, Llama-2); 3.0
parts them (the SARF card's table). Below it new rows would have to learn again what the old pieces' rows know: models
extended so and trained little became worse (unsloth issue 1092), and Sailor, on such a base, added none."""
LEAST_SAVING = 0.2
"""Share of the language's tokens to be saved at least; less is lost again in what any new vocabulary unsettles."""
SIGHTINGS = 100
"""How often a row must have been a target to be trained: Adam moves a number by about the learning rate a step, so at a
row-only rate of 2e-4 a hundred steps move it by 0.02, the spread that published tables are drawn with."""
TRAINED_SHARE = 0.9
"""Share of the new rows to be seen so often. The rest are parts that longer pieces took over: they stay rare."""
ROW_ONLY = 2 / 3
"""Cost of a token while only rows learn, over its full cost: no gradients of the other weights."""
ENOUGH = 0.01
"""Of two sizes that differ by less than this in compute, the smaller is taken: its rows are better trained."""
PLANNED_WORDS = 1e9
"""Words of the language in the training to come, where no number is given; ALLaM and Jais-adapted used far more."""
STEP_TOKENS = 2**19
"""Tokens a step, where no number is given: about half a million, as for models of 1 to 7 billion parameters."""
MULTIPLE = 64  # of rows, to which a table grows


@dataclass(frozen=True)
class Model:
    """What the costs depend on; None is not known, and what follows from it is then left out."""

    rows: int | None = None  # of the embedding table, spare ones included
    width: int | None = None
    tied: bool | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Point:
    """One size on the curve."""

    size: int  # new pieces
    tokens_per_word: float  # on held-out text
    saved: float  # share of the language's tokens
    changed_elsewhere: int  # texts in other scripts whose ids changed; 0 is what an extension promises
    spare_used: int  # new ids that the table had padded rows for
    rows: int | None  # rows of the table afterwards
    new_parameters: int | None
    parameter_share: float | None  # of the model's before
    words_to_train: float  # of the language, until TRAINED_SHARE of the new rows were seen SIGHTINGS times
    tokens_to_train: float
    steps: int
    break_even: float | None  # words of training after which the extension has paid for its rows; None is never
    compute: float  # of the planned training with the extension, over that without


@dataclass(frozen=True)
class Verdict:
    pays: bool
    size: int | None
    sentence: str


def read_model(folder: Path) -> Model:
    """What a Hugging Face folder says: config.json, and the parameters if its weights lie beside it."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no readable config.json ({error}); give a model's folder, or --width"
        ) from error
    text = config.get("text_config") or config
    parameters = None
    if any(folder.glob("*.safetensors")):
        from ain_jax.weights import shards

        parameters = sum(tensor.count for tensor in shards.stored(folder))
    tied = config.get(
        "tie_word_embeddings", text.get("tie_word_embeddings", config.get("model_type", "")[:5] == "gemma")
    )
    return Model(text.get("vocab_size"), text.get("hidden_size"), bool(tied), parameters)


def piece_counts(base: Base, grown: tokenizers.Tokenizer, counts: Mapping[str, int]) -> np.ndarray:
    """How often each new piece of `grown` occurs in a corpus of counted chunks (`corpus.count_chunks`), by its place.

    A chunk at the beginning of a text has no blank before it; some bases put one there.
    """
    encoder = inspect.as_encoder(cutter(json.loads(grown.to_str()), base.kind))
    front = " " if base.kind == "sentencepiece" and base.prefix else ""
    counts_N = np.zeros(grown.get_vocab_size(with_added_tokens=True) - len(base.ids), np.int64)
    chunks = (chunk if chunk[0] == " " else front + chunk for chunk in counts)
    for count, (_, ids) in zip(counts.values(), encoder.each(chunks), strict=True):
        for index in ids:
            if index >= base.size:
                counts_N[index - base.size] += count
    return counts_N


def words_to_train(counts_N: np.ndarray, words: int) -> float:
    """Words until TRAINED_SHARE of the rows were seen SIGHTINGS times, at the rates of a corpus of `words` words.

    Ten rows seen 5, 10, 10, ... times in 1,000 words: nine of ten are seen 10 times or more, so 10,000 words.
    """
    if not len(counts_N) or not words:
        return 0.0
    seen = np.quantile(counts_N, 1 - TRAINED_SHARE, method="higher")
    return SIGHTINGS * words / max(float(seen), 1.0)


def point(
    size: int, before: Fertility, after: Fertility, to_train: float, model: Model, base_size: int,
    changed: int = 0, planned: float = PLANNED_WORDS, step_tokens: int = STEP_TOKENS,
) -> Point:  # fmt: skip
    """What `size` pieces change, from the same held-out text cut without (before) and with them (after)."""
    old, new = before.tokens_per_word, after.tokens_per_word
    grown = base_size + size
    rows = None if model.rows is None else max(model.rows, -(-grown // MULTIPLE) * MULTIPLE)
    added = size if rows is None or model.rows is None else rows - model.rows
    tables = None if model.tied is None else 1 if model.tied else 2
    parameters = added * model.width * tables if model.width and tables else None
    # A longer table makes every token's logits dearer, English ones too.
    head = 1 + (added * model.width / model.parameters if model.width and model.parameters else 0.0)
    training = ROW_ONLY * to_train * new * head  # in full-cost tokens of the base
    gain = old - new * head  # likewise, a word
    return Point(
        size=size,
        tokens_per_word=new,
        saved=1 - new / old if old else 0.0,
        changed_elsewhere=changed,
        spare_used=0 if model.rows is None else min(size, max(model.rows - base_size, 0)),
        rows=rows,
        new_parameters=parameters,
        parameter_share=parameters / model.parameters if parameters is not None and model.parameters else None,
        words_to_train=to_train,
        tokens_to_train=to_train * new,
        steps=-(-int(to_train * new) // step_tokens),
        break_even=training / gain if gain > 0 else None,
        compute=(planned * new * head + training) / (planned * old) if old else 1.0,
    )


def judge(language: str, before: Fertility, points: Sequence[Point], planned: float = PLANNED_WORDS) -> Verdict:
    """Would an extension pay, at which of the sizes, and why; a sentence for each way it can end."""
    now = before.tokens_per_word
    if not points:
        return Verdict(False, None, f"No size was measured; the base takes {now:.2f} tokens a word of {language}.")
    cheapest = min(each.compute for each in points)
    best = next(each for each in sorted(points, key=lambda p: p.size) if each.compute <= cheapest + ENOUGH)
    effect = f"{now:.2f} tokens a word of held-out {language} text to {best.tokens_per_word:.2f} ({-best.saved:+.0%})"
    what = f"{best.size:,} new pieces would cut {effect}"
    rows = "" if best.new_parameters is None else f" ({short(best.new_parameters)} parameters{_share(best)})"
    if now <= COVERED:
        return Verdict(
            False, None,
            f"No: the base already covers {language}, at {now:.2f} tokens a word (a base counts as covering it up to "
            f"{COVERED:g}). To be sure, {what}; but their rows{rows} would learn again what the old pieces' rows know, "
            "and models that were extended so and trained little became worse.",
        )  # fmt: skip
    if best.saved < LEAST_SAVING:
        return Verdict(
            False, None,
            f"No: even {what}, which saves less than {LEAST_SAVING:.0%}; "
            "learn from more text like that which is measured.",
        )  # fmt: skip
    if best.compute >= 1 or best.break_even is None:
        least = min((each.break_even for each in points if each.break_even is not None), default=None)
        more = "at no length of training" if least is None else f"from {short(least)} words of training on"
        return Verdict(
            False, None,
            f"No: {what}, but the planned {short(planned)} words do not train its rows; it pays {more}.",
        )  # fmt: skip
    return Verdict(
        True, best.size,
        f"Yes: {best.size:,} new pieces cut {effect}. They cost as many rows{rows}; nine in ten of these "
        f"have been seen {SIGHTINGS} times after {short(best.words_to_train)} words "
        f"({short(best.tokens_to_train)} tokens, {best.steps:,} steps), and the extension has paid for itself after "
        f"{short(best.break_even)} words of training. Over the planned {short(planned)} words it takes "
        f"{best.compute:.0%} of the compute that the base's own pieces would take.",
    )  # fmt: skip


def table(before: Fertility, points: Sequence[Point]) -> list[str]:
    """The curve as lines of text, the base first."""
    cells = [["pieces", "tokens/word", "saved", "spare rows used", "rows", "parameters", "share", "words to train"]]
    cells[0] += ["tokens", "steps", "pays from", "compute"]
    cells.append(["base", f"{before.tokens_per_word:.2f}", *[""] * 10])
    for p in points:
        cells.append(
            [
                f"{p.size:,}",
                f"{p.tokens_per_word:.2f}",
                f"{p.saved:.0%}",
                f"{p.spare_used:,}" if p.rows is not None else "?",
                f"{p.rows:,}" if p.rows is not None else "?",
                short(p.new_parameters) if p.new_parameters is not None else "?",
                f"{p.parameter_share:+.1%}" if p.parameter_share is not None else "?",
                short(p.words_to_train),
                short(p.tokens_to_train),
                f"{p.steps:,}",
                short(p.break_even) if p.break_even is not None else "never",
                f"{p.compute:.0%}",
            ]
        )
    return inspect.aligned(cells)


def short(number: float) -> str:
    """1234 -> "1,234", 4.5e6 -> "4.5 M", 2e9 -> "2.0 G"."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def _share(best: Point) -> str:
    return "" if best.parameter_share is None else f", {best.parameter_share:+.1%}"


def rounded(value: Any) -> Any:
    """Numbers rounded to what was measured, for inspect.json."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
