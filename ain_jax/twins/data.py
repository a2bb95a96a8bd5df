"""The sample as files, in the forms in which the data of the papers come.

    ain/*.json               ShareGPT with pictures: what is this, in Arabic and in English
    allam/*.jsonl            plain text by language, code, parallel text, instructions, and judged answers
    instar/*.parquet         InstAr-500k's columns, with what its users complain of: English answers in rows that
                             count as Arabic, rows that stand there twice, one English system prompt in all of them
    pangea/*.json            LLaVA's: captions for the projector; names of things in 39 languages
    names/*.jsonl            the same names asked for in words, all of them: what the notebooks learn
    held_out/*.jsonl         text of both languages that no other file has, to measure with

The code is this package's own.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

import ain_jax
from ain_jax import sample
from ain_jax.data.builders.sample_records import SampleParams, documents, translate, translation_pairs
from ain_jax.data.builders.sample_records import parallel as both_languages
from ain_jax.data.formats import Record

Row = dict[str, Any]
PARAMS = SampleParams()
MODULES = ("models", "train", "stages")  # whose code stands for code
SYSTEM = "You are a helpful assistant that answers in Arabic."
NAMED_IN = {  # as English calls the languages, for the question
    "am": "Amharic", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "fa": "Persian", "fr": "French", "ga": "Irish", "he": "Hebrew", "hi": "Hindi",
    "id": "Indonesian", "ig": "Igbo", "it": "Italian", "ja": "Japanese", "jv": "Javanese", "ko": "Korean",
    "mn": "Mongolian", "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "si": "Sinhala", "su": "Sundanese", "sw": "Swahili", "ta": "Tamil",
    "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese",
    "zh": "Chinese",
}  # fmt: skip


def write_data(out: Path) -> list[Path]:
    """The folder of each paper, out/ain, out/allam, out/instar, out/pangea, and what several have in common."""
    papers = [ain(out / "ain"), allam(out / "allam"), instar(out / "instar"), pangea(out / "pangea")]
    return [*papers, names(out / "names"), held_out(out / "held_out")]


def ain(out: Path) -> Path:
    """Two turns on each emoji of the sample: its name in one language, then in the other."""
    rows = []
    for number, row in enumerate(sample.rows("emoji")[::2]):
        asked = [("ما هذا؟", row["name_ar"]), ("What is this in English?", row["name_en"])]
        if number % 2:
            asked = [("What is this?", row["name_en"]), ("ما اسمه بالعربية؟", row["name_ar"])]
        rows.append(
            {
                "id": row["id"],
                "images": [_picture(row["image"], out)],
                "conversations": _said(f"<image>{asked[0][0]}", asked[0][1], *asked[1]),
            }
        )
    return _json(out / "conversations.json", rows)


def allam(out: Path) -> Path:
    """Text by language and kind, and what follows it."""
    records = list(documents(PARAMS, "train"))
    arabic = [r for r in records if r.language == "ar" and r.source in ("udhr", "dialect")]
    translated = [r for r in records if r.language == "ar" and r.source == "handbook"]
    english = [r for r in records if r.language == "en"]
    texts = {"arabic": arabic, "arabic_translated": translated[:150], "english": english[:150]}
    for name, found in texts.items():
        _jsonl(out / f"{name}.jsonl", ({"id": r.id, "text": r.text, "language": r.language} for r in found))
    for name, found in (("vocabulary_ar", [*arabic, *translated]), ("vocabulary_en", english)):
        _jsonl(out / f"{name}.jsonl", ({"id": r.id, "text": r.text, "language": r.language} for r in found))
    folder = Path(ain_jax.__file__).parent
    modules = sorted(path for name in MODULES for path in (folder / name).glob("*.py"))
    code = ((path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")) for path in modules)
    _jsonl(out / "code.jsonl", ({"id": name, "text": text[:4000], "language": "code"} for name, text in code if text))
    pairs = list(both_languages(PARAMS, "train"))[:300]
    _jsonl(out / "bitext.jsonl", ({"id": r.id, "text": r.text, "language": r.language} for r in pairs))
    asked = list(translate(PARAMS, "train"))[:160]
    _jsonl(out / "instructions.jsonl", ({"id": r.id, "language": r.language, "messages": _turns(r)} for r in asked))
    _jsonl(out / "preferences.jsonl", _judged(asked[:120]))
    return out


def _judged(asked: Sequence[Record]) -> Iterator[Row]:
    """A translation is better than what is asked about, repeated."""
    for record in asked:
        question, answer = record.messages[0].content, record.messages[1].content
        repeated = question.partition(": ")[2]
        if repeated and repeated != answer:
            row = {"id": record.id, "language": record.language}
            yield row | {"prompt": question, "accepted": answer, "rejected": repeated}


def instar(out: Path) -> Path:
    """Questions on the sample's terms, in the columns of the published set; every ninth answer is in English."""
    rows = []
    for number, (name, source, arabic, english) in enumerate(translation_pairs(PARAMS, "train")[:180]):
        task = ("Classification", "Closed QA", "Open QA")[number % 3]
        question, answer = f"ما معنى «{english}» بالعربية؟", arabic
        if task == "Classification":
            kind = name.split("/")[1] if source == "terms" else "handbook"
            kinds = {"territories": "بلد", "currencies": "عملة", "languages": "لغة", "handbook": "جملة"}
            question, answer = f"صنّف: {arabic}. أهي بلد أم عملة أم لغة أم جملة؟", kinds.get(kind, "جملة")
        if number % 9 == 8:
            answer = english
        row = {"instruction": question, "output": answer, "source": source, "task": task, "system": SYSTEM}
        rows.append(row | {"uuid": f"{number:08x}", "topic": "", "__index_level_0__": number})
    repeated = [row | {"uuid": f"again-{row['uuid']}"} for row in rows[::20]]
    out.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, *repeated]), out / "train-00000-of-00001.parquet")
    return out


def pangea(out: Path) -> Path:
    """Captions in English for the projector, and names in every language that has one."""
    captions = [
        {
            "id": row["id"],
            "image": _picture(row["image"], out),
            "conversations": _said("<image>\nGive a brief description of the image.", row["name_en"]),
        }
        for row in sample.rows("emoji")[:96]
    ]
    _json(out / "captions.json", captions)
    rows = sample.rows("names")
    named = [
        {
            "id": f"{row['id']}-{language}",
            "image": _picture(row["image"], out),
            "conversations": _said(f"<image>\nWhat is this? Answer in {NAMED_IN[language]}.", name),
            "language": language,
        }
        for row in (*rows[:-10:6], *rows[-10:])  # the last ten are those that all languages have
        for language, name in row["names"].items()
    ]
    return _json(out / "names.json", named)


def names(out: Path) -> Path:
    """What each thing is called in each language, without its picture: its character stands in the question."""
    rows = []
    for row in sample.rows("names"):
        character = "".join(chr(int(code, 16)) for code in row["id"].split("-"))
        for language, name in row["names"].items():
            said = [("user", f"{character} in {NAMED_IN[language]}?"), ("assistant", name)]
            messages = [{"role": role, "content": words} for role, words in said]
            rows.append({"id": f"{row['id']}-{language}", "language": language, "messages": messages})
    _jsonl(out / "names.jsonl", rows)
    return out


def held_out(out: Path) -> Path:
    """The sample's own test documents, of which nothing is in the other files."""
    records = list(documents(PARAMS, "test"))
    for language in ("ar", "en"):
        own = [r for r in records if r.language == language]
        _jsonl(out / f"{language}.jsonl", ({"id": r.id, "text": r.text, "language": language} for r in own))
    return out


def _said(*turns: str) -> list[Row]:
    return [{"from": ("human", "gpt")[i % 2], "value": words} for i, words in enumerate(turns)]


def _turns(record: Record) -> list[Row]:
    return [{"role": message.role, "content": message.content} for message in record.messages]


def _picture(image: str, out: Path) -> str:
    """A picture of the sample, copied into out/images; its name there."""
    place = out / "images" / image
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sample.FOLDER / image, place)
    return image


def _json(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    return path.parent


def _jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
