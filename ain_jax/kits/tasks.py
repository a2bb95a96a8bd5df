"""Rows of questions and answers: reading, naming, maps, flags, facts and translation, in the forms that a run reads.

A row is {"id", "language", "messages", "images"}; held-out rows also say what they are measured by.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ain_jax.data import render
from ain_jax.data.builders.sample_records import ASK_TRANSLATE
from ain_jax.data.formats import IMAGE
from ain_jax.kits import facts, texts
from ain_jax.kits.pictures import Map, Named, generator
from ain_jax.kits.split import Row

Json = dict[str, Any]
UNIT = 28  # pixels: sides of drawings are multiples of it, the patch of 14 times the merge of 2
LINE_HEIGHT, LINE_WIDTH = 56, 784
EM = (26.0, 40.0)
LINE_WORDS = (2, 9)
PLAIN_SHARE = 0.15  # of drawn lines, black on white
OBJECT_SIDE, STAMP_SIDE, MAP_SIDE = 84, 112, 196
SEEN = 0.0008  # least share of a map's pixels that a region asked about has
MAP_HELD_OUT = 15
TRANSLATE_WORDS = 40

ASK_LINE = {"ar": ("اقرأ السطر.", "ما المكتوب في الصورة؟"), "en": ("Read the line.", "What is written in the picture?")}
ASK_STAMP = {"ar": ("صف الصورة.",), "en": ("Describe the picture.",)}
ASK_MAP = {"ar": ("ما هذه الخريطة؟",), "en": ("What is this a map of?",)}
ASK_REGION = {"ar": ("ما اسم المنطقة الملونة؟",), "en": ("What is the name of the marked region?",)}
ASK_CAPITAL = {"ar": ("ما عاصمة المنطقة الملونة؟",), "en": ("What is the capital of the marked region?",)}
ASK_PLACE = {"ar": ("أين تقع المنطقة الملونة؟",), "en": ("Where on the map is the marked region?",)}
PLACES = {  # (row, column) of a map's three by three
    (0, 0): ("في الشمال الغربي", "in the north-west"), (0, 1): ("في الشمال", "in the north"),
    (0, 2): ("في الشمال الشرقي", "in the north-east"), (1, 0): ("في الغرب", "in the west"),
    (1, 1): ("في الوسط", "in the middle"), (1, 2): ("في الشرق", "in the east"),
    (2, 0): ("في الجنوب الغربي", "in the south-west"), (2, 1): ("في الجنوب", "in the south"),
    (2, 2): ("في الجنوب الشرقي", "in the south-east"),
}  # fmt: skip
CHOOSE = {"ar": "{}\n{}\nاختر الجواب الصحيح.", "en": "{}\n{}\nChoose the right answer."}


def turns(question: str, answer: str) -> list[Json]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pick(choices: Sequence[Any], rng: np.random.Generator) -> Any:
    return choices[int(rng.integers(len(choices)))]


def drawn_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 2**31))


# Lines to read


@dataclass(frozen=True)
class Fonts:
    folder: Path
    names: tuple[str, ...]

    def covers(self, name: str, text: str) -> bool:
        """Whether a font has every character; KACST's draw the digits 0 to 9 as those of Arabic."""
        latin = any(c.isascii() and c.isdigit() for c in text)
        return not (latin and "Kacst" in name) and not render.missing_characters(text, self.folder / "fonts" / name)

    def drawn(self, text: str, rng: np.random.Generator) -> str:
        """A font that has every character, "" if none has."""
        return next((name for i in rng.permutation(len(self.names)) if self.covers(name := self.names[i], text)), "")


def line_texts(rows: Iterable[Row], seed: int) -> Iterator[tuple[str, str]]:
    """(id, a few neighbouring words of a text in Arabic letters), one for each dozen words or so of it."""
    for row in rows:
        if row.language == "en":
            continue
        words, start, number = row.text.split(), 0, 0
        rng = generator(seed, f"lines/{row.id}")
        while start < len(words):
            length = int(rng.integers(*LINE_WORDS))
            line = " ".join(words[start : start + length]).strip("،.,;:؛-()[]{}«»\"' ")
            if len(line) >= 4 and texts.ARABIC.search(line) and not any(c.isascii() and c.isalpha() for c in line):
                yield f"{row.id}/{number}", line
            start, number = start + length + int(rng.integers(0, 8)), number + 1


def line(text: str, font: str, em: float, seed: int, folder: Path) -> Json | None:
    """The drawing of a line, as wide as it asks; None where that is too wide."""
    wide = render.text_width(text, folder / "fonts" / font, em) * (1.03 if seed else 1.0) + 8
    width = math.ceil(wide / UNIT) * UNIT
    if width > LINE_WIDTH:
        return None
    told = {"draw": "line", "text": text, "font": f"fonts/{font}", "em": round(em, 1)}
    return told | {"width": width, "height": LINE_HEIGHT, "seed": seed}


def reading(found: Iterable[tuple[str, str]], fonts: Fonts, seed: int, count: int) -> Iterator[Json]:
    """Lines in fonts drawn at random, most of them on paper of some colour; a text comes once."""
    seen: set[str] = set()
    for name, text in found:
        rng = generator(seed, f"read/{name}")
        font = fonts.drawn(text, rng) if text not in seen else ""
        if not font:
            continue
        picture = line(
            text,
            font,
            float(rng.uniform(*EM)),
            0 if rng.random() < PLAIN_SHARE else drawn_seed(rng),
            fonts.folder,
        )
        if picture is None:
            continue
        seen.add(text)
        language = pick(("ar", "en"), rng)
        yield {"id": f"read/{name}", "language": language, "images": [picture],
               "messages": turns(f"{IMAGE}\n{pick(ASK_LINE[language], rng)}", text)}  # fmt: skip
        if len(seen) == count:
            return


def reading_test(
    found: Iterable[tuple[str, str]], faces: Sequence[str], fonts: Fonts, seed: int, count: int
) -> Iterator[Json]:
    """Each line in each of the faces, twice: black on white, and on paper."""
    done = 0
    for name, text in found:
        rng = generator(seed, f"read test/{name}")
        em = float(rng.uniform(*EM))
        if not all(fonts.covers(face, text) for face in faces):
            continue
        drawn = [line(text, face, em, s, fonts.folder) for face in faces for s in (0, drawn_seed(rng))]
        if not all(drawn):
            continue
        for picture in filter(None, drawn):
            kind = "paper" if picture["seed"] else "plain"
            face = picture["font"].rpartition("/")[2].rpartition(".")[0]
            yield {"id": f"read/{name}/{face}/{kind}", "language": "ar", "font": face, "kind": kind,
                   "images": [picture], "messages": turns(f"{IMAGE}\n{ASK_LINE['ar'][0]}", text)}  # fmt: skip
        done += 1
        if done == count:
            return


# Names of pictures


def naming(found: Iterable[Named], ask: Json, side: int, seed: int, test: bool = False) -> Iterator[Json]:
    """Each picture in both languages; of a test plainly, on white."""
    for row in found:
        for language, name in (("ar", row.ar), ("en", row.en)):
            rng = generator(seed, f"name/{row.id}/{language}")
            picture = {"draw": "object", "picture": row.picture, "width": side, "height": side}
            picture["seed"] = 0 if test else drawn_seed(rng)
            question = ask[language][0] if test else pick(ask[language], rng)
            yield {"id": f"{row.id}/{language}", "language": language, "images": [picture],
                   "messages": turns(f"{IMAGE}\n{question}", name)}  # fmt: skip


# Maps


def held_out_maps(found: Sequence[Map], seed: int) -> set[str]:
    """The maps of whole countries that are held out."""
    countries = [m.id for m in found if "_" not in m.id and len(m.divisions) >= 6]
    order = generator(seed, "maps").permutation(len(countries))
    return {countries[i] for i in order[:MAP_HELD_OUT]}


def map_questions(told: Map, seed: int, again: bool = False) -> Iterator[Json]:
    """What the map is of; each region's name, capital and place, in both languages. `again`: in other colours."""
    ratio = min(1.0, MAP_SIDE / max(told.width, told.height))
    size = {
        name: max(UNIT, round(side * ratio / UNIT) * UNIT)
        for name, side in (("width", told.width), ("height", told.height))
    }
    picture = {"draw": "region", "picture": told.picture, **size}
    asked: list[tuple[str, str, Json, tuple[str, str], int]] = [("map", "map", ASK_MAP, (told.ar, told.en), 0)]
    for region in told.divisions:
        if region.share < SEEN:
            continue
        where = PLACES[min(2, int(3 * region.place[1])), min(2, int(3 * region.place[0]))]
        # A middle that lies near the line between two thirds has no clear answer.
        clear = all(abs(3 * at - line) > 0.12 for at in region.place for line in (1, 2))
        asked.append((f"name/{region.value}", "name", ASK_REGION, (region.ar, region.en), region.value))
        if region.capital:
            asked.append((f"capital/{region.value}", "capital", ASK_CAPITAL, region.capital, region.value))
        if clear:
            asked.append((f"place/{region.value}", "place", ASK_PLACE, where, region.value))
    for name, kind, ask, answers, value in asked:
        for language, answer in zip(("ar", "en"), answers, strict=True):
            rng = generator(seed, f"map/{told.id}/{name}/{language}")
            drawn = {
                **picture,
                "region": value,
                "seed": int(rng.integers(2**20)) * 5 + (4 if again else pick(range(4), rng)),
            }
            yield {"id": f"map/{told.id}/{name}/{language}", "language": language, "kind": kind, "map": told.id,
                   "images": [drawn], "messages": turns(f"{IMAGE}\n{ask[language][0]}", answer)}  # fmt: skip


# Facts and translation


def fact_questions(found: Sequence[facts.Fact], seed: int) -> Iterator[Json]:
    """Facts that are not held out, asked openly and with four choices, in both languages."""
    learnt = [fact for fact in found if not fact.held_out]
    for fact in learnt:
        for side, language in enumerate(("ar", "en")):
            if fact.relation == "neighbour":
                continue  # asked openly it has several answers
            question = facts.ASK[fact.relation][side].format(fact.country[side])
            yield {"id": f"fact/{fact.id}/{language}", "language": language,
                   "messages": turns(question, fact.right[0][side])}  # fmt: skip
    for item in facts.choices(learnt, seed):
        for row in facts.as_rows(item):
            listed = "\n".join(f"- {answer}" for answer in row["choices"])
            question = CHOOSE[row["language"]].format(row["question"], listed)
            yield {"id": f"choose/{row['id']}", "language": row["language"],
                   "messages": turns(question, row["choices"][row["right"]])}  # fmt: skip


def translation(rows: Iterable[Row], seed: int, share: float = 1.0) -> Iterator[Json]:
    """Pairs of a sentence or so, from one side into the other; dialects into English alone."""
    for row in rows:
        if not row.other or max(len(row.text.split()), len(row.other.split())) > TRANSLATE_WORDS:
            continue
        rng = generator(seed, f"translate/{row.id}")
        into = "en" if row.language != "ar" or rng.random() < 0.5 else "ar"
        question, answer = (row.text, row.other) if into == "en" else (row.other, row.text)
        if rng.random() < share:
            yield {"id": f"translate/{row.id}/{into}", "language": into,
                   "messages": turns(pick(ASK_TRANSLATE[into], rng).format(question), answer)}  # fmt: skip


def translation_test(rows: Iterable[Row]) -> Iterator[Json]:
    """Both directions with all references; dialects into English alone."""
    for row in rows:
        if row.other:
            references = list(row.references or (row.other,))
            for into in ("en", "ar") if row.language == "ar" else ("en",):
                question, wanted = (row.text, references) if into == "en" else (row.other, [row.text])
                yield {"id": f"translate/{row.id}/{into}", "source": row.source, "from": "en" if into == "ar" else
                       row.language, "into": into, "text": question,
                       "question": ASK_TRANSLATE[into][0].format(question), "references": wanted}  # fmt: skip
