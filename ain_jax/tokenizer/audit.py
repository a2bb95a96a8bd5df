"""Whether an extended tokenizer is fit for use: every check that failed, with the texts that show it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from ain_jax.tokenizer.chat import encode_chat, load_tokenizer
from ain_jax.tokenizer.folder import SPACE, Extension, processor, read_extension, read_model, tokenizer_json

SHOWN = 3  # faults of one kind that are told in full


@dataclass
class AuditReport:
    """Failures stop a run; notes do not; `checked` says how many things each check looked at."""

    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    def add(self, check: str, looked_at: int, faults: list[str]) -> None:
        self.checked[check] = looked_at
        more = f" ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        if faults:
            self.failures.append(f"{check}: {'; '.join(faults[:SHOWN])}{more}")

    def raise_if_failed(self) -> None:
        """A ValueError that lists every failed check."""
        if self.failures:
            raise ValueError("the tokenizer fails its audit:\n" + "\n".join(self.failures))


def audit(base: str | Path, extended_dir: str | Path, texts: Mapping[str, Iterable[str]]) -> AuditReport:
    """The report on an extended folder, from its base model file and texts by language.

    Texts that hold no character of a new piece (English ones) must keep their ids; all must come back from
    their ids wherever the base brings them back; SentencePiece and tokenizer.json must agree wherever the
    base's two forms do.
    """
    report = AuditReport()
    extension = read_extension(extended_dir)
    folder = Path(extended_dir)
    base_model, model = read_model(base), read_model(folder / "tokenizer.model")
    lines = {language: list(given) for language, given in texts.items()}
    try:
        auto = load_tokenizer(folder)
    except ValueError as error:
        report.add("AutoTokenizer opens it unchanged", 1, [str(error)])
        return report
    report.add("AutoTokenizer opens it unchanged", 1, [])
    _pieces(report, extension, base_model, model, auto)
    _texts(report, extension, base_model, model, folder, auto, lines)
    _special(report, extension, auto, next((line for given in lines.values() for line in given), "text"))
    return report


def _pieces(report: AuditReport, extension: Extension, base_model: Any, model: Any, auto: Any) -> None:
    """Old pieces unchanged in their places; each new piece emitted, with its id, by both forms."""
    old = [
        f"id {i} was {a.piece!r}, is {b.piece!r}"
        for i, (a, b) in enumerate(zip(base_model.pieces, model.pieces, strict=False))
        if (a.piece, a.score, a.type) != (b.piece, b.score, b.type)
    ]
    if len(model.pieces) != extension.size:
        old.append(f"the model holds {len(model.pieces)} pieces, the manifest {extension.size}")
    report.add("old pieces keep their ids", len(base_model.pieces), old)

    new = list(extension.pieces)
    ids = range(extension.first_piece, extension.size)
    bare, faults = processor(model, prefix=False).encode(new), []
    backend = auto.backend_tokenizer
    # behind a newline no blank is put before a piece; pieces that start with one bring it along
    behind = ["\n" + piece.replace(SPACE, " ") for piece in new]
    forms = backend.encode_batch(behind, add_special_tokens=False)
    newline = backend.encode("\n", add_special_tokens=False).ids
    for piece, index, cut, form in zip(new, ids, bare, forms, strict=True):
        if cut != [index]:
            faults.append(f"SentencePiece cuts {piece!r} (id {index}) into {cut}")
        if form.ids != [*newline, index]:
            faults.append(f"tokenizer.json cuts {piece!r} (id {index}) into {form.ids[len(newline) :]}")
    report.add("every new piece is reachable", len(new), faults)


def _texts(
    report: AuditReport, extension: Extension, base_model: Any, model: Any, folder: Path, auto: Any,
    lines: Mapping[str, list[str]],
) -> None:  # fmt: skip
    """Old text unchanged, round trips, the forms alike, no ▁ left over, AutoTokenizer like tokenizer.json."""
    old, new = processor(base_model), processor(model)
    old_form = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(base_model)))
    form = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = frozenset("".join(extension.pieces)) - {SPACE}
    faults: dict[str, list[str]] = {}
    looked: Counter[str] = Counter()
    apart = dict.fromkeys(lines, 0)

    def expect(check: str, good: bool, fault: str) -> None:
        looked[check] += 1
        faults.setdefault(check, [])
        if not good:
            faults[check].append(fault)

    def cut(backend: tokenizers.Tokenizer, part: list[str], literal: bool) -> list[list[int]]:
        backend.encode_special_tokens = literal  # SentencePiece takes "<s>" in a text for four characters
        return [encoding.ids for encoding in backend.encode_batch(part, add_special_tokens=False)]

    parts = [(language, at) for language, given in lines.items() for at in range(0, len(given), 1024)]
    for language, start in parts:
        part = lines[language][start : start + 1024]
        autos = auto(part, add_special_tokens=False)["input_ids"]
        forms = cut(old_form, part, True), cut(form, part, True)
        rows = zip(part, old.encode(part), new.encode(part), *forms, autos, strict=True)
        for number, (text, was, now, was_form, now_form, opened) in enumerate(rows, start):
            where = f"{language} text {number} ({text[:40]!r})"
            if not ours.intersection(text):
                expect("old text keeps its ids", now == was, where)
            if was != was_form:
                apart[language] += 1
            else:
                expect("SentencePiece and tokenizer.json agree", now == now_form, where)
            if SPACE not in text:  # SentencePiece itself reads ▁ as a blank
                back = auto.decode(opened)
                expect("no ▁ is left over", SPACE not in back, where)
                expect("round trip", new.decode(now) == text or old.decode(was) != text, where)
                expect("round trip of tokenizer.json", back == text, where)
        for number, (ids, opened) in enumerate(zip(cut(form, part, False), autos, strict=True), start):
            expect("AutoTokenizer and tokenizer.json agree", ids == opened, f"{language} text {number}")
    for check, found in faults.items():
        report.add(check, looked[check], found)
    report.notes += [
        f"{language}: in {count} of {len(lines[language])} texts the base's own two forms disagree"
        for language, count in apart.items()
        if count
    ]


def _special(report: AuditReport, extension: Extension, auto: Any, text: str) -> None:
    """Special tokens are single ids wherever they stand, right behind the base; the template renders."""
    faults = []
    for place, (token, index) in enumerate(extension.special_tokens.items()):
        if index != extension.base_size + place:
            faults.append(f"{token} has id {index}, expected {extension.base_size + place}")
        for around in (token, f"a{token}b", f" {token} {token}\n"):
            ids = auto.encode(around, add_special_tokens=False)
            if ids.count(index) != around.count(token):
                faults.append(f"{around!r} becomes {ids}, expected {around.count(token)} x {index}")
    report.add("special tokens are never split", len(extension.special_tokens), faults)
    faults = []
    for token in auto.all_special_tokens:
        text = text.replace(token, "")
    messages = [
        {"role": "user", "content": f"<image>{text.replace('<image>', '')}"},
        {"role": "assistant", "content": "a"},
    ]
    try:
        ids, learn = encode_chat(auto, messages, (2,))
        faults += [] if learn.sum() >= 2 else [f"only {learn.sum()} of {len(ids)} ids are learnt"]
        for token in auto.all_special_tokens:
            index = auto.convert_tokens_to_ids(token)
            if token in auto.decode(ids) and index not in ids:
                faults.append(f"{token} is rendered, but its id {index} is not there")
    except ValueError as error:
        faults.append(str(error))
    report.add("the chat template renders", 1, faults)
