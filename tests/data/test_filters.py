"""What a source leaves out although it is sound: counted by hand."""

import json

import pytest

from ain_jax.data import filters
from ain_jax.data.builders import files
from ain_jax.data.builders.sources import Sources
from ain_jax.data.filters import Filters, LeftOut
from ain_jax.data.formats import Message, Record

SYSTEM = "You answer in Arabic."


def talk(answer, system=""):
    turns = (*([Message("system", system)] if system else []), Message("user", "س؟"), Message("assistant", answer))
    return Record("id", "instar", "ar", "task", messages=turns)


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("نعم", "ar", 1.0),
        ("yes", "ar", 0.0),
        ("نعم ok", "ar", 3 / 5),  # three letters and two
        ("42 %", "ar", 1.0),  # no letter at all
        ("oui", "fr", 1.0),
        ("東京タワー!", "ja", 1.0),
        ("東京", "zh-CN", 1.0),
        ("мир", "mn", 1.0),
    ],
)
def test_shares_of_letters(text, language, share):
    assert filters.share_in(text, language) == pytest.approx(share)


def test_answers_in_another_script_are_left_out():
    wanted = Filters(answers_in="ar")
    assert filters.apply(talk("نعم"), wanted) == talk("نعم")
    with pytest.raises(LeftOut, match="not in the script of 'ar': 0% of its letters are \\('yes'\\)"):
        filters.apply(talk("yes"), wanted)
    assert filters.apply(talk("yes"), Filters()) == talk("yes")


@pytest.mark.parametrize(("systems", "foreign", "own"), [("keep", 3, 3), ("own", 2, 3), ("drop", 2, 2)])
def test_system_texts(systems, foreign, own):
    for system, turns in ((SYSTEM, foreign), ("أجب بالعربية", own)):
        kept = filters.apply(talk("نعم", system), Filters("ar", systems))
        assert len(kept.messages) == turns and kept.messages[-1].content == "نعم"


def test_the_same_words_however_they_are_spelt():
    one = filters.words_hash(talk("الحُرِّيَّة  إلى Now", SYSTEM))
    assert one == filters.words_hash(talk("الحريه الي now"))
    assert one != filters.words_hash(talk("الحرب الي now"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_source_leaves_out_and_does_not_call_it_bad(tmp_path, workers):
    """Of 8 rows: one in English, three that say what one before says, one with an id of its own kept twice."""
    answers = ["نعم", "لا", "yes", "نَعَم", "ربما", "لا", "لا", "أبدا"]
    tasks = ["Closed QA", "Open QA"] * 4
    rows = [
        {"instruction": "س؟", "output": a, "task": t, "system": SYSTEM, "uuid": f"{i}"}
        for i, (a, t) in enumerate(zip(answers, tasks, strict=True))
    ]
    rows[7]["uuid"] = "0"
    for part, some in (("a", rows[:4]), ("b", rows[4:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        (tmp_path / f"{part}.jsonl").write_text(text, "utf-8")
    sources = Sources(
        files={"instar": str(tmp_path / "*.jsonl")},
        languages={"instar": "ar"},
        answers_in={"instar": "ar"},
        systems={"instar": "own"},
        repeated={"instar": "drop"},
        bad_share=0.2,
        workers=workers,
    )
    built = files.build("instar", sources, tmp_path / "data", progress=False)
    told, kept = files.summary(built), files.records(built, "train")
    assert [r.messages[-1].content for r in kept] == ["نعم", "لا", "ربما"]
    assert [m.role for m in kept[0].messages] == ["user", "assistant"]
    assert (told["rows"], told["rejected"], told["left_out"]) == (8, 1, 4)
    assert told["reasons"]["the same is said elsewhere already"] == 3
    lines = next((tmp_path / "data").rglob("rejects.jsonl")).read_text("utf-8").splitlines()
    again = [json.loads(line) for line in lines if "is said elsewhere" in line]
    assert [line["where"][-9:] for line in again] == ["a.jsonl:4", "b.jsonl:2", "b.jsonl:3"]
    assert again[1]["reason"] == "the same is said elsewhere already, in a.jsonl:2 (Sources.repeated)"
    # A task, and what no other part has.
    assert [r.id for r in kept.select("open_qa")] == ["1"]
    assert [r.id for r in kept.without(["open_qa"])] == ["0", "4"]
    with pytest.raises(ValueError, match="no record of 'open'.* did you mean 'open_qa'"):
        kept.select("open")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"languages": {"a": "arabix"}}, "languages\\['a'\\] = 'arabix': expected a code of two or three letters; did"),
        ({"answers_in": {"a": "arabix"}}, "answers_in\\['a'\\] = 'arabix': no language of that code; did you mean"),
        ({"systems": {"a": "none"}}, "systems\\['a'\\] = 'none': expected one of 'keep', 'drop', 'own'"),
        ({"repeated": {"a": "yes"}}, "repeated\\['a'\\] = 'yes': expected one of 'keep', 'drop'"),
        ({"most": {"a": 0}}, "most\\['a'\\] = 0: expected a number of records, 1 or more"),
        ({"repeated": {"b": "drop"}}, "repeated names 'b', which files does not hold"),
    ],
)
def test_what_cannot_be_is_told(setting, words):
    with pytest.raises(ValueError, match=words):
        Sources(files={"a": "a.jsonl"}, **setting)


def test_a_system_text_with_a_picture_is_not_dropped_in_silence():
    with pytest.raises(ValueError, match="the system text that Sources.systems drops shows a picture"):
        filters.apply(talk("نعم", "<image> Look."), Filters(systems="drop"))
