"""What each training stage changed, on held-out text, pictures and pairs, beside an untrained model and constants."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from ain_jax.data import drawn
from ain_jax.data.formats import Record
from ain_jax.data.packing import Packing
from ain_jax.evaluate import likelihood, ngram, scores
from ain_jax.generate import Prompt, generate, placeholder_counts, prompt_with_images
from ain_jax.launching import processes
from ain_jax.stages import common
from ain_jax.stages.model_settings import Start
from ain_jax.tokenizer import chat

UNTRAINED = "untrained"
PNG = b"\x89PNG"  # how such a file begins


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured, and with which models: "untrained" or the name of a stage, whose last weights are taken."""

    texts: tuple[str, ...] = ("documents/ar", "documents/en")  # bits per byte on the test split
    texts_of: tuple[str, ...] = (UNTRAINED, "pretrain", "instruct", "prefer")
    answers_of: tuple[str, ...] = (UNTRAINED, "instruct", "prefer")  # reading and naming
    pairs_of: tuple[str, ...] = (UNTRAINED, "instruct", "prefer")
    ngram: int = 5  # order of the byte model trained on the same text
    rows: int = 8  # rows of a batch
    answer_tokens: int = 24  # longest answer
    shown: int = 12  # answers of each kind kept with their pictures for the report


def check(stage: common.StageRun) -> None:
    """Refuse, before anything runs, models that no stage trains."""
    training = [name for name in stage.resolved.experiment.stages if Start.__name__ in stage.resolved.stage(name)]
    for name in _models(stage.get(Evaluation)):
        if name != UNTRAINED and name not in training:
            raise ValueError(f"Evaluation names {name!r}: expected {UNTRAINED}, or a stage that trains: {training}")


def _models(settings: Evaluation) -> list[str]:
    return list(dict.fromkeys((*settings.texts_of, *settings.answers_of, *settings.pairs_of)))


def run(stage: common.StageRun) -> dict[str, Any]:
    settings = stage.get(Evaluation)
    models = _models(settings)
    quiet = not processes.is_first()
    bar = tqdm(total=len(models) + 1, desc=f"{stage.stage:16}", unit="model", dynamic_ncols=True, disable=quiet)
    with jax.set_mesh(stage.mesh):
        results: dict[str, Any] = {}
        for name in models:
            bar.set_postfix_str(name)
            results[name] = _kept(stage.folder / f"{name}.json", lambda name=name: _one_model(stage, settings, name))
            bar.update()
    bar.set_postfix_str("baselines")
    results["baselines"] = _kept(stage.folder / "baselines.json", lambda: _baselines(stage, settings))
    bar.update()
    bar.close()
    return {"models": results}


def _kept(path: Path, make: Any) -> Any:
    """A part of the result, made once: an interrupted evaluation goes on with the next part."""
    if not processes.of_first(path.exists):
        common.write_json(path, make())
    return processes.of_first(lambda: json.loads(path.read_text(encoding="utf-8")))


def _one_model(stage: common.StageRun, settings: Evaluation, name: str) -> dict[str, Any]:
    params = stage.initial_params() if name == UNTRAINED else stage.trained_params(name)
    result: dict[str, Any] = {}
    kept = lambda part, make: _kept(stage.folder / "parts" / f"{name}-{part}.json", make)
    if name in settings.texts_of:
        languages = {source.rpartition("/")[2]: source for source in settings.texts}
        result["bits_per_byte"] = {
            language: kept(f"text-{language}", partial(_bits_per_byte, stage, settings, params, source))
            for language, source in languages.items()
        }
    if name in settings.answers_of:
        result |= kept("answers", lambda: _answers(stage, settings, params, name))
    if name in settings.pairs_of:
        result["preference"] = kept("pairs", lambda: _pairs(stage, settings, params))
    return result


def _pairs(stage: common.StageRun, settings: Evaluation, params: Any) -> dict[str, Any]:
    rows = stage.rows({"preference": stage.examples("preference", "test")}, None, None, "plan_pairs", answers="pair")
    pairs = likelihood.pair_choices(stage.model, params, rows.groups, stage.batches(rows, settings.rows))
    return {kind.rpartition("/")[2]: _rounded(v) for kind, v in pairs.items()}


def _bits_per_byte(stage: common.StageRun, settings: Evaluation, params: Any, source: str) -> float:
    packing = Packing(row_tokens=stage.get(Packing).row_tokens)  # text alone
    sources = {source: stage.examples(source, "test", packing)}
    rows = stage.rows(sources, None, None, f"plan_{source.rpartition('/')[2]}", packing=packing)
    total = sum(likelihood.nats(stage.model, params, rows.groups, stage.batches(rows, settings.rows)).values())
    size = sum(len(text.encode()) for text in _texts(stage, source, "test"))
    return round(total / math.log(2) / size, 5)


def _texts(stage: common.StageRun, source: str, split: str) -> list[str]:
    texts = [record.text for record in stage.part(source, split)[0]]
    if not texts or not all(texts):
        raise ValueError(f"Evaluation.texts names {source!r}, which is not plain text alone: take it out")
    return texts


# (name in the results, kind of the sample, its split): what is asked with pictures
QUESTIONS = (
    ("reading_unseen_words", "read", "test"),
    ("reading_new_renderings", "read", "test_rendered"),
    ("naming_new_renderings", "name", "test_rendered"),
)


def _answers(stage: common.StageRun, settings: Evaluation, params: Any, model: str) -> dict[str, Any]:
    asked = {name: list(stage.records(kind, split)[0]) for name, kind, split in QUESTIONS}
    prompts = [_prompt(stage, record) for records in asked.values() for record in records]
    # All in one call, so that few shapes are compiled.
    ids = iter(generate(params, stage.config, prompts, settings.answer_tokens, stage.config.stop_ids, rows=64))
    result: dict[str, Any] = {}
    for name, kind, _ in QUESTIONS:
        records = asked[name]
        answers = [stage.tokenizer.decode(next(ids), skip_special_tokens=True).strip() for _ in records]
        references = [record.messages[-1].content for record in records]
        result[name] = _scored(kind, records, references, answers)
        _show(stage, settings, model, name, records, answers)
    return result


def _show(
    stage: common.StageRun,
    settings: Evaluation,
    model: str,
    name: str,
    records: Sequence[Record],
    answers: Sequence[str],
) -> None:
    """Keep the first answers, and the pictures that they are about, for the report."""
    folder = stage.folder / "shown"
    shown = [
        {
            "id": record.id,
            "question": record.messages[-2].content.replace("<image>", "").strip(),
            "expected": record.messages[-1].content,
            "answer": answer,
            "pictures": [_picture(folder, f"{name}-{row}-{n}", picture) for n, picture in enumerate(record.images)],
        }
        for row, (record, answer) in enumerate(list(zip(records, answers, strict=True))[: settings.shown])
    ]
    common.write_json(folder / f"{model}-{name}.json", shown)


def _picture(folder: Path, stem: str, picture: bytes) -> str:
    """The name of the file that a picture lies in; the first model that is asked about it writes it."""
    picture = drawn.as_file(picture)
    path = folder / (stem + (".png" if picture.startswith(PNG) else ".jpg"))
    if processes.is_first() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        beside.write_bytes(picture)
        beside.replace(path)
    return path.name


def _prompt(stage: common.StageRun, record: Record) -> Prompt:
    settings = stage.images
    prompt = prompt_with_images([], record.images, settings)
    counts = placeholder_counts(prompt, settings.merge_size)
    tokens = chat.encode_prompt(stage.tokenizer, record.messages[:-1], counts, stage.get(chat.Chat))
    return dataclasses.replace(prompt, tokens_L=tokens)


def _scored(
    kind: str, records: Sequence[Record], references: Sequence[str], answers: Sequence[str]
) -> dict[str, float]:
    if kind == "read":
        pairs = [(scores.letters(r), scores.letters(a)) for r, a in zip(references, answers, strict=True)]
        expected, read = [p[0] for p in pairs], [p[1] for p in pairs]
        rates = {"cer": scores.error_rate(expected, read), "exact": scores.accuracy(expected, read)}
        return _rounded(rates | {"count": len(pairs)})
    by_language: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for record, reference, answer in zip(records, references, answers, strict=True):
        by_language[record.language].append((scores.plain(reference), scores.plain(answer)))
    return _rounded(
        {lang: scores.accuracy([r for r, _ in p], [a for _, a in p]) for lang, p in sorted(by_language.items())}
        | {"accuracy": sum(r == a for p in by_language.values() for r, a in p) / len(records), "count": len(records)}
    )


def _baselines(stage: common.StageRun, settings: Evaluation) -> dict[str, Any]:
    """The best constant answers, and the byte model trained on the very text that pretraining saw."""
    result: dict[str, Any] = {"bits_per_byte": {}, "constant": {}, "ngram": settings.ngram}
    for source in settings.texts:
        language = source.rpartition("/")[2]
        test = _texts(stage, source, "test")
        model = ngram.train(_texts(stage, source, "train"), settings.ngram)
        result["bits_per_byte"][language] = round(model.bits(test) / sum(len(t.encode()) for t in test), 5)
    for name, kind, split in QUESTIONS:
        records = stage.records(kind, split)[0]
        references = {record.id: record.messages[-1].content for record in records}
        if kind == "read":
            answer, rate = scores.best_constant([scores.letters(r) for r in references.values()])
            result["constant"][name] = _rounded({"cer": rate}) | {"answer": answer}
        else:
            answer, share = scores.most_common([scores.plain(r) for r in references.values()])
            shares = {"accuracy": share}
            for language in sorted({record.language for record in records}):
                own = [scores.plain(references[record.id]) for record in records if record.language == language]
                shares[language] = scores.most_common(own)[1]
            result["constant"][name] = _rounded(shares) | {"answer": answer}
    return result


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 5) for k, v in values.items()}
