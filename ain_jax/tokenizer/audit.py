"""Whether an extended tokenizer is fit for use: every check that failed, with the texts that show it.

python -m ain_jax.tokenizer.audit --base FOLDER --folder EXTENDED --text ar=FILE en=FILE ...
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers

from ain_jax.tokenizer.base import Base, open_base
from ain_jax.tokenizer.chat import encode_chat, load_tokenizer
from ain_jax.tokenizer.corpus import read_texts
from ain_jax.tokenizer.folder import SPACE, Extension, processor, read_extension, read_model

SHOWN = 3  # faults of one kind that are told in full
LISTED = 20  # texts named in a note
BATCH = 1024  # texts encoded at once
ENGLISH = (
    {"role": "user", "content": "Hello there, how are you? Count to 3."},
    {"role": "assistant", "content": "I'm fine: 1, 2, 3."},
    {"role": "user", "content": "Thanks  a lot!\n"},
    {"role": "assistant", "content": "You are welcome."},
)


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


@dataclass(frozen=True)
class _Subject:
    """The base, and every form of what was made from it."""

    base: Base
    extension: Extension
    form: tokenizers.Tokenizer  # of the folder's tokenizer.json
    model: Any | None  # of the folder's tokenizer.model
    auto: Any


def audit(
    base: str | Path, extended_dir: str | Path, texts: Mapping[str, Iterable[str]], *, changed_share: float = 0.0
) -> AuditReport:
    """The report on an extended folder, from its base and texts by language, which are read once.

    Texts that hold no character of a new piece (English ones) must keep their ids, but for at most `changed_share`
    of them; all must come back from their ids wherever the base brings them back; where there is a SentencePiece
    model, it and tokenizer.json must agree wherever the base's two forms do.
    """
    if not 0 <= changed_share <= 1:
        raise ValueError(f"changed_share={changed_share}, expected a share between 0 and 1")
    report = AuditReport()
    extension, opened, folder = read_extension(extended_dir), open_base(base), Path(extended_dir)
    wrong = opened.sha256 != extension.base_sha256
    report.add(
        "the base is the one that was extended",
        1,
        [f"{base} has SHA-256 {opened.sha256[:12]}, the manifest {extension.base_sha256[:12]}"] if wrong else [],
    )
    try:
        auto = load_tokenizer(folder)
    except ValueError as error:
        report.add("AutoTokenizer opens it unchanged", 1, [str(error)])
        return report
    report.add("AutoTokenizer opens it unchanged", 1, [])
    form = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = read_model(folder / "tokenizer.model") if opened.model is not None else None
    subject = _Subject(opened, extension, form, model, auto)
    _pieces(report, subject)
    first = _texts(report, subject, texts, changed_share)
    _special(report, subject)
    _template(report, subject, first)
    return report


def _pieces(report: AuditReport, subject: _Subject) -> None:
    """Old pieces unchanged in their places; each new piece emitted, with its id, by every form."""
    base, extension = subject.base, subject.extension
    names = {index: piece for piece, index in subject.form.get_vocab(with_added_tokens=True).items()}
    old = [
        f"id {index} was {was!r}, is {names.get(index)!r}"
        for index, was in enumerate(base.pieces())
        if was and names.get(index) != was
    ]
    if max(names) + 1 != extension.size:
        old.append(f"tokenizer.json holds ids up to {max(names)}, the manifest {extension.size} ids")
    if base.model is not None and subject.model is not None:
        pairs = enumerate(zip(base.model.pieces, subject.model.pieces, strict=False))
        for index, (was, now) in pairs:
            if (was.piece, was.score, was.type) != (now.piece, now.score, now.type):
                old.append(f"id {index} was {was.piece!r}, is {now.piece!r} in tokenizer.model")
        if len(subject.model.pieces) != extension.size:
            old.append(f"the model holds {len(subject.model.pieces)} pieces, the manifest {extension.size}")
    report.add("old pieces keep their ids", base.size, old)

    new, faults = list(extension.pieces), []
    ids = range(extension.first_piece, extension.size)
    if subject.model is not None:
        for piece, index, cut in zip(new, ids, processor(subject.model, prefix=False).encode(new), strict=True):
            if cut != [index]:
                faults.append(f"SentencePiece cuts {piece!r} (id {index}) into {cut}")
    # behind a newline no blank is put before a piece; pieces that start with one bring it along
    spelt = [base.text(piece) for piece in new]
    forms = subject.form.encode_batch([f"\n{text}" for text in spelt], add_special_tokens=False)
    newline = subject.form.encode("\n", add_special_tokens=False).ids
    for piece, text, index, found in zip(new, spelt, ids, forms, strict=True):
        if text is None:
            faults.append(f"{piece!r} (id {index}) spells no whole characters")
        elif found.ids != [*newline, index]:
            faults.append(f"tokenizer.json cuts {text!r} (id {index}) into {found.ids[len(newline) :]}")
    report.add("every new piece is reachable", len(new), faults)


def _texts(report: AuditReport, subject: _Subject, texts: Mapping[str, Iterable[str]], changed_share: float) -> str:
    """Old text unchanged, round trips, the forms alike, no ▁ or Ġ left over, AutoTokenizer like tokenizer.json.

    Returns a text, to be said in a conversation.
    """
    base, form, auto = subject.base, subject.form, subject.auto
    old = processor(base.model) if base.model is not None else None
    new = processor(subject.model) if subject.model is not None else None
    blank = SPACE if base.kind == "sentencepiece" else "Ġ"
    ours = frozenset("".join(base.text(piece) or "" for piece in subject.extension.pieces)) - {" "}
    faults: dict[str, list[str]] = {}
    looked: Counter[str] = Counter()
    apart: dict[str, list[int]] = {language: [] for language in texts}
    first = ""

    def expect(check: str, good: bool, fault: str) -> None:
        looked[check] += 1
        faults.setdefault(check, [])
        if not good:
            faults[check].append(fault)

    for language, start, part in _parts(texts):
        first = first or part[0]
        opened = auto(part, add_special_tokens=False)["input_ids"]
        was, now = _ids(base.backend, part, literal=True), _ids(form, part, literal=True)
        slow_was = old.encode(part) if old else was
        slow_now = new.encode(part) if new else now
        came_back = base.backend.decode_batch(was, skip_special_tokens=False)
        slow_back = old.decode(slow_was) if old else came_back
        for number, text in enumerate(part, start):
            at, where = number - start, f"{language} text {number} ({text[:40]!r})"
            if not ours.intersection(text):
                expect("old text keeps its ids", (was[at], slow_was[at]) == (now[at], slow_now[at]), where)
            if slow_was[at] != was[at]:
                apart[language].append(number)
            elif new:
                expect("SentencePiece and tokenizer.json agree", slow_now[at] == now[at], where)
            back = auto.decode(now[at])
            if blank not in text:  # SentencePiece itself reads ▁ as a blank
                expect("no ▁ or Ġ is left over", blank not in back, where)
            if new and SPACE not in text:
                expect("round trip of SentencePiece", new.decode(slow_now[at]) == text or slow_back[at] != text, where)
            if SPACE not in text or base.kind == "byte_level":
                expect("round trip of tokenizer.json", back == text or came_back[at] != text, where)
        for number, (ids, found) in enumerate(zip(_ids(form, part, literal=False), opened, strict=True), start):
            expect("AutoTokenizer and tokenizer.json agree", ids == found, f"{language} text {number}")
    check = "old text keeps its ids"
    changed, total = len(faults.get(check, [])), looked[check]
    if changed_share and changed:
        report.notes.append(f"{changed} of {total} texts without new characters have other ids than before")
        if changed <= changed_share * total:
            faults[check] = []
    for check, found in faults.items():
        report.add(check, looked[check], found)
    for language, numbers in apart.items():
        if numbers:
            listed = ", ".join(map(str, numbers[:LISTED])) + (" ..." if len(numbers) > LISTED else "")
            report.notes.append(f"{language}: in {len(numbers)} texts the base's own two forms disagree ({listed})")
    return first or "text"


def _parts(texts: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, int, list[str]]]:
    for language, given in texts.items():
        rows, start = iter(given), 0
        while part := list(islice(rows, BATCH)):
            yield language, start, part
            start += len(part)


def _ids(form: tokenizers.Tokenizer, part: list[str], literal: bool) -> list[list[int]]:
    """The ids of texts; literal: "<s>" in a text is four characters, as SentencePiece takes it."""
    form.encode_special_tokens = literal
    try:
        return [encoding.ids for encoding in form.encode_batch(part, add_special_tokens=False)]
    finally:
        form.encode_special_tokens = False


def _special(report: AuditReport, subject: _Subject) -> None:
    """New special tokens are single ids wherever they stand, right behind the base; old ones are cut as before."""
    extension, auto, base = subject.extension, subject.auto, subject.base
    faults = []
    for place, (token, index) in enumerate(extension.special_tokens.items()):
        if index != extension.base_size + place:
            faults.append(f"{token} has id {index}, expected {extension.base_size + place}")
        for around in (token, f"a{token}b", f" {token} {token}\n"):
            ids = auto.encode(around, add_special_tokens=False)
            if ids.count(index) != around.count(token):
                faults.append(f"{around!r} becomes {ids}, expected {around.count(token)} x {index}")
    report.add("special tokens are never split", len(extension.special_tokens), faults)
    around = [f"a{token}b {token}\n" for token in sorted(base.added)]
    pairs = zip(around, _ids(base.backend, around, literal=False), _ids(subject.form, around, False), strict=True)
    report.add(
        "the base's added tokens are cut as before",
        len(around),
        [f"{text!r} was {was}, is {now}" for text, was, now in pairs if was != now],
    )


def _template(report: AuditReport, subject: _Subject, text: str) -> None:
    """The base's own template gives an English conversation the ids it had; another one can be learnt from."""
    auto, base, faults = subject.auto, subject.base, []
    own = base.chat_template is not None and auto.chat_template == base.chat_template
    try:
        if own:
            said = auto.apply_chat_template(list(ENGLISH), tokenize=False)
            was, now = _ids(base.backend, [said], literal=False), [auto.encode(said, add_special_tokens=False)]
            faults += [f"an English conversation was {was[0]}, is {now[0]}"] if was != now else []
        else:
            for token in auto.all_special_tokens:
                text = text.replace(token, "")
            pads = {"<|image_pad|>", "<image>"}.intersection(auto.get_added_vocab())  # a model that reads text has none
            content = "<image>" * bool(pads) + text.replace("<image>", "")
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
            ids, learn = encode_chat(auto, messages, (2,) if pads else ())
            faults += [] if learn.sum() >= 2 else [f"only {learn.sum()} of {len(ids)} ids are learnt"]
            for token in auto.all_special_tokens:
                index = auto.convert_tokens_to_ids(token)
                if token in auto.decode(ids) and index not in ids:
                    faults.append(f"{token} is rendered, but its id {index} is not there")
    except Exception as error:  # Jinja's errors, ours, and whatever a template raises
        faults.append(str(error))
    report.add("the chat template renders", 1, faults)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ain_jax.tokenizer.audit", description=audit.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", required=True, help="what was extended")
    parser.add_argument("--folder", required=True, help="what `extend` wrote")
    parser.add_argument("--text", required=True, nargs="+", help="FILE or NAME=FILE: .txt or .jsonl, .gz too")
    parser.add_argument("--key", default="text", help="where a .jsonl record holds its text")
    parser.add_argument("--changed-share", type=float, default=0.0, help="of the texts without new characters")
    options = parser.parse_args(arguments)
    texts: dict[str, list[str]] = {}
    for given in options.text:
        name, _, path = given.rpartition("=")
        texts.setdefault(name or Path(path).name, []).append(path)
    try:
        report = audit(
            options.base,
            options.folder,
            {name: read_texts(*paths, key=options.key) for name, paths in texts.items()},
            changed_share=options.changed_share,
        )
        for check, number in report.checked.items():
            print(f"{check:45} {number:>9,}")
        print("\n".join(report.notes), end="\n" if report.notes else "")
        report.raise_if_failed()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print("passed")


if __name__ == "__main__":
    main()
