"""Vocabulary extension: pieces of the new language learnt, appended, audited, measured (ALLaM, section 3.1).

Where the model is a published folder, the rows of the new pieces are made here too, and measured before any step.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tokenizers
from tqdm import tqdm

from ain_jax.data import examples
from ain_jax.experiment import nearest
from ain_jax.launching import processes
from ain_jax.stages import common
from ain_jax.stages.run_model import NEW_ROWS
from ain_jax.tokenizer import audit, base, chat, extend, folder, inspect, templates, with_template
from ain_jax.weights import embeddings, load, rows_report
from ain_jax.weights.embeddings import Embeddings


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The base to extend, and what with."""

    # A folder, a tokenizer.json or a SentencePiece model; "sample:..." lies in the package's sample. "" takes the
    # tokenizer of Model.folder.
    base: str = ""
    origin: str = ""  # where to get it from, told where it is not there
    pieces: int = 2000  # new ids
    learn_from: tuple[str, ...] = ("documents/ar",)  # sources of the text that pieces are learnt from
    # Source -> how many times its text counts: for a little text of the kind that matters, beside much of another.
    times: Mapping[str, int] = dataclasses.field(default_factory=dict)
    keep: tuple[str, ...] = ("documents/en",)  # sources in languages that the model knows
    measure: tuple[str, ...] = ("documents/ar", "documents/en")  # sources whose test split is measured
    marks: Literal["keep", "strip"] = "keep"  # vowel marks while learning
    tatweel: Literal["keep", "strip"] = "strip"
    digits: Literal["separate", "join"] = "separate"
    min_count: int = 2  # occurrences below which nothing is learnt
    longest: int = 16  # characters in a new piece
    changed_share: float = 0.0  # of the measured texts without a new character, that may be cut otherwise

    def __post_init__(self):
        for source, times in self.times.items():
            if source not in self.learn_from:
                raise ValueError(f"times names {source!r}: {nearest(source, self.learn_from)}")
            if type(times) is not int or times < 1:
                raise ValueError(f"times[{source!r}] = {times!r}: expected a whole number, 1 or more")


def check(stage: common.StageRun) -> None:
    """Refuse, before anything runs, no base or two of them."""
    _base(stage)


def _base(stage: common.StageRun) -> Path:
    """The tokenizer to extend; whether it is there, `needs` tells."""
    settings = stage.get(Tokenizer)
    if stage.base is not None and settings.base:
        raise ValueError(
            f"Tokenizer.base = {settings.base!r} beside Model.folder = {str(stage.base)!r}: a published model "
            "reads with its own tokenizer; leave Tokenizer.base out"
        )
    if stage.base is None and not settings.base:
        raise ValueError("Tokenizer.base is empty: give a folder, a tokenizer.json or a SentencePiece model")
    return stage.base or common.sample_path(settings.base)


def run(stage: common.StageRun) -> dict[str, Any]:
    return processes.of_first(lambda: _run(stage))  # one process does it all, on its own devices


def _run(stage: common.StageRun) -> dict[str, Any]:
    settings = stage.get(Tokenizer)
    start = _base(stage)
    bar = tqdm(total=5, desc=f"{stage.stage:16}", unit="part", dynamic_ncols=True)
    of_source = {source: _texts(stage, source, "train") for source in settings.learn_from}
    texts = [text for some in of_source.values() for text in some]
    held_out = {source.rpartition("/")[2]: _texts(stage, source, "test") for source in settings.measure}
    bar.update()
    place = stage.folder / "tokenizer"
    if place.exists():  # of a run that was stopped between this line and its result
        extension = folder.read_extension(place)
    else:
        how = {name: getattr(settings, name) for name in ("marks", "tatweel", "digits", "min_count", "longest")}
        how |= _template(start, stage.get(chat.Chat).template)
        counted = [text for source, some in of_source.items() for text in (*some,) * settings.times.get(source, 1)]
        extension = extend.extend(start, counted, out_dir=place, pieces=settings.pieces, progress=False, **how)
    bar.update()
    report = audit.audit(start, place, held_out, changed_share=settings.changed_share)
    report.raise_if_failed()
    bar.update()
    old = base.open_base(start).backend
    before = inspect.fertility(old, held_out)
    after = inspect.fertility(chat.load_tokenizer(place), held_out)
    bar.update()
    made = _rows(stage, extension, old, texts, held_out) if stage.base else {}
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
        **made,
    }


def _template(start: Path, name: str) -> dict[str, Any]:
    """What `extend` is told of the chat template that is named; nothing where the base's own stays."""
    if not name:
        return {}
    template, origin = templates.named(name), base.open_base(start)
    special, pad = with_template.missing(origin, template), origin.named.get("pad_token")
    return {
        "chat_template": template.text,
        "special_tokens": special if pad else (*special, "<|pad|>"),
        "eos_token": with_template.end_token(origin, template),
        "pad_token": pad or "<|pad|>",
    }


def _rows(
    stage: common.StageRun,
    extension: folder.Extension,
    old: tokenizers.Tokenizer,
    texts: Sequence[str],
    held_out: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The rows of the new pieces, written beside the tokenizer; what they are like and cost before any step."""
    assert stage.base is not None
    settings = stage.get(Embeddings)
    config = load.load_config(stage.base)
    mesh = stage.mesh if jax.process_count() == 1 else processes.own_mesh()
    params = load.load_params(stage.base, config, jnp.float32, mesh)
    kept = [text for source in stage.get(Tokenizer).keep for text in _texts(stage, source, "train")]
    new = tokenizers.Tokenizer.from_file(str(extension.folder / "tokenizer.json"))
    first_token = examples.first_token(stage.tokenizer)
    corpus = embeddings.Corpus(old, new, texts, kept, first_token)
    spelt = embeddings.replaced(extension)
    path = stage.folder / NEW_ROWS
    if not path.is_file():
        embeddings.save_rows(path, embeddings.make_rows(params, config, extension.base_size, spelt, settings, corpus))
    grown = embeddings.grow_tables(
        params, embeddings.load_rows(path), extension.base_size, stage.config.text.vocabulary
    )
    parts = rows_report.cut_alike(old, new, held_out, first_token)
    before = rows_report.losses(params, config, parts, extended=False)
    reports = {settings.method: rows_report.report(grown, stage.config, extension.base_size, len(spelt), parts)}
    print(rows_report.table(before, reports))
    return {"rows": rows_report.as_json(before, reports)}


def _texts(stage: common.StageRun, source: str, split: str) -> Sequence[str]:
    texts = [r.text for r in stage.part(source, split)[0] if r.text]
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
