"""Vocabulary extension: pieces of the new language learnt, appended, audited, measured (ALLaM, section 3.1)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from tqdm import tqdm

from ain_jax.stages import common
from ain_jax.tokenizer import audit, chat, extend, folder, inspect


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The base to extend, and what with."""

    base: str  # a SentencePiece model; "sample:..." lies in the package's sample
    pieces: int = 2000  # new ids
    learn_from: tuple[str, ...] = ("documents/ar",)  # sources of the text that pieces are learnt from
    measure: tuple[str, ...] = ("documents/ar", "documents/en")  # sources whose test split is measured
    marks: Literal["keep", "strip"] = "keep"  # vowel marks while learning
    tatweel: Literal["keep", "strip"] = "strip"


def run(stage: common.StageRun) -> dict[str, Any]:
    settings = stage.get(Tokenizer)
    base = common.sample_path(settings.base)
    if not base.is_file():
        raise ValueError(f"Tokenizer.base = {settings.base!r}: no such file ({base}); give a SentencePiece model")
    bar = tqdm(total=4, desc=f"{stage.stage:16}", unit="part", dynamic_ncols=True)
    texts = [text for source in settings.learn_from for text in _texts(stage, source, "train")]
    held_out = {source.rpartition("/")[2]: _texts(stage, source, "test") for source in settings.measure}
    bar.update()
    place = stage.folder / "tokenizer"
    if place.exists():  # of a run that was stopped between this line and its result
        extension = folder.read_extension(place)
    else:
        extension = extend.extend(
            base, texts, out_dir=place, pieces=settings.pieces, marks=settings.marks, tatweel=settings.tatweel
        )
    bar.update()
    report = audit.audit(base, place, held_out)
    report.raise_if_failed()
    bar.update()
    before = inspect.fertility(folder.processor(folder.read_model(base)), held_out)
    after = inspect.fertility(chat.load_tokenizer(place), held_out)
    bar.update()
    bar.close()
    for line in inspect.table(before, after):
        print("  " + line)
    return {
        "new_pieces": len(extension.pieces),
        "size": extension.size,
        "fingerprint": extension.fingerprint,
        "audit": report.checked,
        "fertility": {
            b.language: {"before": _numbers(b), "after": _numbers(a)} for b, a in zip(before, after, strict=True)
        },
    }


def _texts(stage: common.StageRun, source: str, split: str) -> Sequence[str]:
    kind, language = common.source_parts(source)
    records, _ = stage.records(kind, split)
    texts = [r.text for r in records if r.text and (not language or r.language == language)]
    if not texts:
        raise ValueError(f"source {source!r} has no plain text in its split {split!r}; a tokenizer learns from text")
    return texts


def _numbers(row: inspect.Fertility) -> dict[str, float]:
    return {
        "tokens_per_word": round(row.tokens_per_word, 4),
        "tokens_per_byte": round(row.tokens_per_byte, 4),
        "continued_share": round(row.continued_share, 4),
        "byte_share": round(row.byte_share, 4),
    }
