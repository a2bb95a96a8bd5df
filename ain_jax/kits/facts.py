"""Facts of countries in both languages: open questions to learn from, four-choice items that are the same in both.

Countries and what is known of them are world-countries'; names are CLDR's, of capitals KGeography's translators'.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ain_jax.kits.packages import Get, clean
from ain_jax.kits.pictures import generator
from ain_jax.kits.texts import ARABIC, catalog
from ain_jax.sample.rebuild import cldr_names

ASK = {  # relation -> (Arabic, English)
    "capital": ("ما عاصمة {}؟", "What is the capital of {}?"),
    "currency": ("ما عملة {}؟", "What is the currency of {}?"),
    "continent": ("في أي قارة تقع {}؟", "On which continent is {}?"),
    "language": ("ما اللغة الرسمية في {}؟", "What is an official language of {}?"),
    "neighbour": ("أي من هذه البلدان يجاور {}؟", "Which of these countries borders {}?"),
}
CONTINENTS = {"Africa": "002", "Europe": "150", "Asia": "142", "Oceania": "009", "Antarctic": "AQ"}
AMERICAS = {"South America": "005"}  # subregions; the rest of the Americas is North America
HELD_OUT = 0.6  # share of (country, relation)
Name = tuple[str, str]  # Arabic, English


@dataclass(frozen=True)
class Fact:
    id: str  # "EG/capital"
    relation: str
    country: Name
    right: tuple[Name, ...]  # all that is true; the first is asked for
    held_out: bool


@dataclass(frozen=True)
class Choice:
    """A question with four answers, `right` the number of the true one, each in both languages."""

    id: str
    question: Name
    choices: tuple[Name, ...]
    right: int


def facts(get: Get, seed: int) -> list[Fact]:
    """What both languages have a name for; which are held out is drawn by country and relation."""
    (data,) = get("world-countries", r"package/countries\.json").values()
    (data_mo,) = get("kgeography-data", r".*/ar/LC_MESSAGES/kgeography\.mo").values()
    territories, languages, currencies = (cldr_names(get, kind) for kind in ("territories", "languages", "currencies"))
    by_english = {en: (ar, en) for ar, en in languages.values()}
    capitals = {key.partition("\x04")[2]: clean(text) for key, text in catalog(data_mo).items() if ARABIC.search(text)}
    countries = json.loads(data)
    codes = {row["cca3"]: row["cca2"] for row in countries}
    found = []
    for row in sorted(countries, key=lambda row: row["cca2"]):
        code = row["cca2"]
        if code not in territories or not row["independent"]:
            continue
        continent = CONTINENTS.get(row["region"]) or AMERICAS.get(row["subregion"], "003")
        near = [territories[codes[name]] for name in row["borders"] if codes.get(name) in territories]
        right: dict[str, list[Name]] = {
            "capital": [(capitals[name], name) for name in row["capital"] if name in capitals],
            "currency": [currencies[name] for name in row["currencies"] if name in currencies],
            "continent": [territories[continent]] if continent in territories else [],
            "language": [by_english[name] for name in row["languages"].values() if name in by_english],
            "neighbour": near,
        }
        for relation, names in right.items():
            if names:
                key = f"{code}/{relation}"
                held = bool(generator(seed, f"facts/{key}").random() < HELD_OUT)
                found.append(Fact(key, relation, territories[code], tuple(dict.fromkeys(names)), held))
    return found


def choices(found: Sequence[Fact], seed: int) -> Iterator[Choice]:
    """A four-choice item of each fact: three answers that are right elsewhere and not here, in an order drawn."""
    pools: dict[str, list[Name]] = {}
    for fact in found:
        pools.setdefault(fact.relation, []).extend(fact.right)
    for fact in found:
        rng = generator(seed, f"choices/{fact.id}")
        said = {side for name in (*fact.right, fact.country) for side in name}
        pool = [name for name in dict.fromkeys(pools[fact.relation]) if not said & set(name)]
        if len(pool) < 3:
            continue
        wrong = [pool[i] for i in rng.choice(len(pool), 3, replace=False)]
        order = rng.permutation(4)
        names = [fact.right[0], *wrong]
        arabic, english = (ask.format(side) for ask, side in zip(ASK[fact.relation], fact.country, strict=True))
        yield Choice(fact.id, (arabic, english), tuple(names[i] for i in order), order.tolist().index(0))


def as_rows(item: Choice) -> Iterator[dict[str, Any]]:
    """The item in Arabic and in English, as the benchmark reads it."""
    for side, language in enumerate(("ar", "en")):
        answers = [name[side] for name in item.choices]
        yield {"id": f"{item.id}/{language}", "item": item.id, "language": language, "question": item.question[side],
               "choices": answers, "right": item.right}  # fmt: skip
