"""The command `python -m ain_jax.tokenizer.inspect`: text in, figures, a curve and a verdict out.

    python -m ain_jax.tokenizer.inspect --base FOLDER --text ar=a.jsonl.gz arz=b.txt en=c.txt \\
        --model FOLDER --sizes 4000,8000,16000,32000 --out DIR

Without --train the text itself is parted by document: nine documents in ten are learnt from, the tenth is measured.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ain_jax.tokenizer import display, held_out, inspect, kinds, verdict
from ain_jax.tokenizer.base import Base, open_base
from ain_jax.tokenizer.corpus import count_chunks
from ain_jax.tokenizer.grow import grow
from ain_jax.tokenizer.inspect import Fertility, Parity
from ain_jax.tokenizer.learn import Learnt, learn
from ain_jax.tokenizer.verdict import Point, Verdict

SIZES = (1000, 2000, 4000, 8000, 16000, 32000)
MEGABYTES = 20.0
UNKNOWN = verdict.Model()


@dataclass(frozen=True)
class Inspection:
    """All that was measured: what the terminal, inspect.json and the page show."""

    base: str
    kind: str  # "sentencepiece", "byte_level", or why it can be measured but not extended
    rows: Sequence[Fertility]
    after: Sequence[Fertility]  # the same texts at the verdict's size, or at the largest; empty without a curve
    parity: Sequence[Parity]
    words: Mapping[str, Sequence[tuple[str, int, list[str]]]]  # by language: word, occurrences, pieces
    notes: Sequence[str]
    before: Fertility | None = None  # of all languages in the script to be added, held-out text
    language: str = ""
    points: Sequence[Point] = field(default_factory=tuple)
    verdict: Verdict | None = None


def open_any(path: Path) -> tuple[Base | None, Any, str]:
    """(the base if it can be extended, what measures, its kind or why it cannot be extended)."""
    try:
        base = open_base(path)
        return base, base.backend, base.kind
    except ValueError as error:
        refused = str(error)
    try:
        if path.suffix == ".json":
            import tokenizers

            return None, tokenizers.Tokenizer.from_file(str(path)), refused
        if path.suffix == ".model":
            import sentencepiece

            return None, sentencepiece.SentencePieceProcessor(model_file=str(path)), refused
        from transformers import AutoTokenizer

        return None, AutoTokenizer.from_pretrained(path, local_files_only=True), refused
    except Exception as error:  # each library raises its own, tokenizers a plain Exception
        raise ValueError(f"{path} can neither be extended ({refused}) nor opened to measure it ({error})") from error


def inspect_files(
    base_path: Path, files: Sequence[held_out.Source], *, train: Sequence[Path] = (), sizes: Sequence[int] = SIZES,
    model: verdict.Model = UNKNOWN, parallel: str | None = None, planned: float = verdict.PLANNED_WORDS,
    step_tokens: int = verdict.STEP_TOKENS, megabytes: float = MEGABYTES, marks: str = "keep", tatweel: str = "strip",
    digits: str = "separate",
) -> Inspection:  # fmt: skip
    """Everything about a tokenizer and these texts; see the module's head for what is learnt from and measured."""
    base, tokenizer, kind = open_any(base_path)
    encoder = inspect.as_encoder(tokenizer)
    learnt_from = [held_out.Source("und", path) for path in train] or list(files)
    parted = bool(sizes) and base is not None and not train
    splits = held_out.held_out(files, learnt_from if base and sizes else (), parted, megabytes)
    notes = [_note(label, split, parted, megabytes) for label, split in splits.items()]
    texts = {label: split.lines for label, split in splits.items()}
    rows = inspect.fertility(encoder, texts, by_kind=True)
    parities = inspect.parity(rows)
    if parallel:
        first, second, found = held_out.pairs(parallel)
        parities = [inspect.same_content(encoder, found, first, second), *parities]
    words = {label: inspect.frequent_words(encoder, lines) for label, lines in texts.items()}
    result = Inspection(str(base_path), kind, rows, (), parities, words, notes)
    if base is None:
        return dataclasses.replace(result, notes=[*notes, f"Measured, but it cannot be extended: {kind}"])
    ours = [label for label, lines in texts.items() if kinds.mostly_arabic("".join(lines[:1000]))]
    if not ours or not sizes:
        notes.append("no text to extend for: none is mostly Arabic" if sizes else "no sizes were asked for")
        return dataclasses.replace(result, notes=notes)

    whole = {row.language: row for row in rows if row.kind == inspect.ALL}
    language = "+".join(ours)
    before = _sum(language, [whole[label] for label in ours])
    chunks = count_chunks(held_out.training(learnt_from, parted))
    learnt = _learn(base, chunks, sizes, notes, marks=marks, tatweel=tatweel, digits=digits)
    old = {label: [list(ids) for _, ids in encoder.each(lines)] for label, lines in texts.items() if label not in ours}
    points, after = [], {}
    for size in sorted({min(size, len(learnt.pieces)) for size in sizes}):
        grown = grow(base, learnt, size)
        ids = inspect.as_encoder(grown)
        changed = sum(
            new != before for label in old for (_, new), before in zip(ids.each(texts[label]), old[label], strict=True)
        )
        after[size] = inspect.fertility(ids, texts, by_kind=True)
        cut = _sum(language, [row for row in after[size] if row.kind == inspect.ALL and row.language in ours])
        counts_N = verdict.piece_counts(base, grown, chunks.counts)
        words_needed = verdict.words_to_train(counts_N, sum(chunks.counts.values()))
        points.append(verdict.point(size, before, cut, words_needed, model, base.size, changed, planned, step_tokens))
    judged = verdict.judge(language, before, points, planned)
    return dataclasses.replace(
        result, after=after[judged.size or points[-1].size], notes=notes, before=before, language=language,
        points=points, verdict=judged,
    )  # fmt: skip


def _learn(base: Base, chunks: Any, sizes: Sequence[int], notes: list[str], **settings: Any) -> Learnt:
    """The pieces of the largest of the sizes that the corpus holds."""
    for size in sorted(set(sizes), reverse=True):
        try:
            return learn(base, chunks, size, **settings)
        except ValueError as error:
            if "pieces were asked for" not in str(error) or size == min(sizes):
                raise
            notes.append(f"the size {size:,} is left out: {error}")
    raise AssertionError("sizes is not empty")


def _sum(language: str, rows: Sequence[Fertility]) -> Fertility:
    return sum(rows, Fertility(language, 0, 0, 0, 0, 0))


def _note(label: str, split: held_out.Split, parted: bool, megabytes: float) -> str:
    parts = [f"{label}: {len(split.lines):,} lines of {split.documents:,} documents are measured"]
    if parted:
        parts.append(f"the documents whose name's hash is 0 modulo {held_out.HELD_OUT}; the others are learnt from")
    if split.repeated:
        parts.append(f"{split.repeated:,} of their lines were dropped, for the training text has them too")
    if split.cut:
        parts.append(f"there are more: only the first {megabytes:g} MB were read")
    return "; ".join(parts)


def lines(found: Inspection) -> list[str]:
    """What the terminal shows."""
    out = [f"base {found.base} ({found.kind})", "", *inspect.table(found.rows, found.after or None), ""]
    out += [f"{p.language} over {p.reference}, {p.measure}: {p.ratio:.2f}" for p in found.parity]
    for label, words in found.words.items():
        out += ["", f"the most frequent {label} words, their pieces from left to right"]
        out += [f"  {count:>9,}  {display.shown(word)}  {display.row(pieces)}" for word, count, pieces in words[:10]]
    if found.before and found.points:
        out += ["", *verdict.table(found.before, found.points)]
        changed = max(point.changed_elsewhere for point in found.points)
        out += [f"texts of other languages whose ids change: {changed:,}"]
    out += ["", *found.notes]
    return [*out, "", found.verdict.sentence] if found.verdict else out


def as_json(found: Inspection) -> dict[str, Any]:
    """inspect.json: counts and ratios by language and kind, the curve with the rules behind it, the verdict."""

    def measured(row: Fertility) -> dict[str, Any]:
        ratios = ("tokens_per_word", "tokens_per_byte", "tokens_per_character", "bytes_per_token")
        return dataclasses.asdict(row) | {
            name: getattr(row, name) for name in (*ratios, "continued_share", "byte_share")
        }

    names = ("COVERED", "LEAST_SAVING", "SIGHTINGS", "TRAINED_SHARE", "ROW_ONLY", "ENOUGH")
    return verdict.rounded(
        {
            "base": found.base,
            "kind": found.kind,
            "fertility": [measured(row) for row in found.rows],
            "fertility_extended": [measured(row) for row in found.after],
            "parity": [dataclasses.asdict(each) for each in found.parity],
            "words": {label: list(map(list, words)) for label, words in found.words.items()},
            "curve": [dataclasses.asdict(point) for point in found.points],
            "rules": {name.lower(): getattr(verdict, name) for name in names},
            "verdict": dataclasses.asdict(found.verdict) if found.verdict else None,
            "notes": list(found.notes),
        }
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ain_jax.tokenizer.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--base", type=Path, required=True, help="a tokenizer's folder, tokenizer.json or .model")
    parser.add_argument("--text", **many, metavar="LANGUAGE=FILE", required=True, help=".txt or .jsonl, also .gz")
    parser.add_argument("--train", **many, type=Path, metavar="FILE", help="learn from these instead of from --text")
    parser.add_argument("--parallel", metavar="ar,en=FILE.jsonl", help="rows that say the same in both languages")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of new pieces; none: only measure")
    parser.add_argument("--model", type=Path, help="the model's folder: rows, width, tied or not, parameters")
    parser.add_argument("--width", type=int, help="of the embedding, where there is no --model")
    parser.add_argument("--rows", type=int, help="of the embedding table, spare ones included")
    parser.add_argument("--parameters", type=float, help="of the model, such as 6.7e9")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="the head shares the embedding's table")
    parser.add_argument("--words", type=float, default=verdict.PLANNED_WORDS, help="planned words of training")
    parser.add_argument("--step_tokens", type=int, default=verdict.STEP_TOKENS, help="tokens a training step")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="measured a language at most")
    for name, choices in (
        ("marks", ("keep", "strip")),
        ("tatweel", ("strip", "keep")),
        ("digits", ("separate", "join")),
    ):
        parser.add_argument(f"--{name}", choices=choices, default=choices[0], help="as the extension would be learnt")
    parser.add_argument("--out", type=Path, help="a folder for inspect.json, inspect.png and inspect.html")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    try:
        sizes = [] if options.sizes == "none" else [int(size) for size in options.sizes.split(",")]
        if any(size < 1 for size in sizes):
            raise ValueError(f"--sizes {options.sizes}: expected numbers of pieces from 1 on, or none")
        model = verdict.read_model(options.model) if options.model else verdict.Model()
        given = {"width": options.width, "rows": options.rows, "tied": options.tied, "parameters": options.parameters}
        model = dataclasses.replace(model, **{name: value for name, value in given.items() if value is not None})
        found = inspect_files(
            options.base, held_out.sources(options.text), train=options.train, sizes=sizes, model=model,
            parallel=options.parallel, planned=options.words, step_tokens=options.step_tokens,
            megabytes=options.megabytes, marks=options.marks, tatweel=options.tatweel, digits=options.digits,
        )  # fmt: skip
    except ValueError as error:
        raise SystemExit(f"{error}") from error
    print("\n".join(lines(found)))
    if options.out:
        from ain_jax.tokenizer import inspect_page  # matplotlib takes a second to load

        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(as_json(found), ensure_ascii=False, indent=1)
        (options.out / "inspect.json").write_text(text + "\n", encoding="utf-8")
        picture = inspect_page.plot(found)
        if picture:
            (options.out / "inspect.png").write_bytes(picture)
        (options.out / "inspect.html").write_text(inspect_page.render(found, picture), encoding="utf-8")
        print(f"written: {options.out}/inspect.json, .html" + (", .png" if picture else ""))


if __name__ == "__main__":
    main()
