"""Nothing held out is trained on, the same parameters give the same records, the files are the manifest's."""

import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ain_jax import sample
from ain_jax.data.builders import sample as builder
from ain_jax.data.builders import sample_records as made
from ain_jax.data.builders.sample import SampleParams, build, records
from ain_jax.data.formats import validate

TINY = SampleParams(
    letter_pictures=70,
    part_pictures=300,
    read_pictures=60,
    read_test_pictures=20,
    renderings=1,
    test_renderings=1,
    preference_pairs=12,
    preference_test_pairs=8,
)
SOURCES = ("udhr", "handbook", "dialect", "emoji", "names", "flags", "terms", "tokenizer", "fonts")
SPLITS = [(kind, split) for kind, (_, splits) in made.KINDS.items() for split in splits]


def make(kind, split, params=TINY):
    return list(made.KINDS[kind][0](params, split))


@pytest.fixture(scope="module")
def all_records():
    return {(kind, split): make(kind, split) for kind, split in SPLITS}


def answers(found):
    return {record.messages[-1].content for record in found}


# The committed files


def test_files_are_what_the_manifest_says():
    manifest = json.loads((sample.FOLDER / "manifest.json").read_text())
    digests = {name: hashlib.sha256((sample.FOLDER / name).read_bytes()).hexdigest() for name in manifest["files"]}
    assert digests == manifest["files"]
    lying = {p.relative_to(sample.FOLDER).as_posix() for p in sample.FOLDER.rglob("*") if p.is_file()}
    lying = {n for n in lying if not n.endswith((".py", ".pyc")) and n != "manifest.json"}
    assert lying == set(manifest["files"])
    assert sum((sample.FOLDER / name).stat().st_size for name in lying) < 3_600_000


def test_each_source_has_its_licence():
    readme = (sample.FOLDER / "README.md").read_text()
    for licence in (sample.FOLDER / "licences").glob("*.txt"):
        assert f"licences/{licence.name}" in readme
        assert len(licence.read_text()) > 900
    named = {path.name for path in (sample.FOLDER / "licences").iterdir()}
    assert named == {f"{source}.txt" for source in SOURCES}


def test_tables_hold_what_they_should():
    counts = {name: len(sample.rows(name)) for name in ("udhr", "emoji", "flags", "terms", "dialect")}
    assert counts == {"udhr": 91, "emoji": 256, "flags": 30, "terms": 300, "dialect": 120}
    assert len(sample.rows("handbook")) > 2000
    article = {row["id"]: row for row in sample.rows("udhr")}
    assert article["udhr/article-1/1"]["en"].startswith("All human beings are born free")
    assert article["udhr/article-1/1"]["ar"].startswith("يولد جميع الناس")
    assert article["udhr/preamble/4"]["ar"] == ""  # this recital has no Arabic partner
    assert article["udhr/preamble/5"]["ar"].startswith("ولما كانت شعوب الأمم المتحدة")
    for name in ("emoji", "flags"):
        rows = sample.rows(name)
        assert len({r["name_ar"] for r in rows}) == len({r["name_en"].lower() for r in rows}) == len(rows)
        assert all((sample.FOLDER / r["image"]).is_file() for r in rows)
    with pytest.raises(ValueError, match="'emojis': no such table; there are dialect, emoji"):
        sample.rows("emojis")


def test_no_registry_is_named():
    text = (sample.FOLDER / "rebuild.py").read_text() + (sample.FOLDER / "README.md").read_text()
    assert "://" not in text


# What is held out


@pytest.mark.parametrize("kind", ["documents", "parallel"])
def test_no_document_in_both_splits(kind, all_records):
    def names(split):  # "handbook/apt-cache/12/ar" -> "handbook/apt-cache"; a dialect row is its own document
        ids = [record.id.rsplit("/", 1)[0] for record in all_records[kind, split]]
        return {i if i.startswith("dialect") else i.rsplit("/", 1)[0] for i in ids}

    assert names("test") and not names("train") & names("test")


@pytest.mark.parametrize("kind", ["documents", "parallel"])
def test_no_test_paragraph_stands_in_train(kind, all_records):
    def lines(split):
        return {line for record in all_records[kind, split] for line in record.text.split("\n")}

    assert len(lines("test")) > 100
    assert not lines("train") & lines("test")


def test_no_parallel_or_translation_pair_from_a_held_out_document(all_records):
    hidden = {
        row[side]
        for table in ("handbook", "udhr", "dialect")
        for row in made.table_rows(TINY, table, "test")
        for side in ("ar", "en", "arz", "ary", "arq")
        if row.get(side)
    }
    for kind in ("documents", "parallel"):
        assert not hidden & {line for r in all_records[kind, "train"] for line in r.text.split("\n")}
    assert not hidden & answers(all_records["translate", "train"])
    assert not answers(all_records["translate", "train"]) & answers(all_records["translate", "test"])


def test_words_to_read_are_new_in_test_and_known_in_test_rendered(all_records):
    def words(split):
        spelt = " / ".join(answers(all_records["read", split]))
        return set(spelt.replace(" ", "").split("/"))

    assert not words("train") & words("test")
    assert words("test_rendered") <= words("train")
    held = made.held_out(TINY)
    assert words("test") <= set(held.words) and words("train") <= set(held.train_words)
    assert not set(held.words) & set(held.train_words)
    assert 0.06 < len(held.words) / len(held.train_words) < 0.11


def test_letters_and_parts_of_words_give_no_held_out_word_away(all_records):
    held = made.held_out(TINY)
    letters = answers(all_records["letter", "train"])
    assert all(len(letter) == 1 for letter in letters) and letters <= set("".join(held.train_words))
    drawn = Counter(
        record.messages[-1].content for record in make("letter", "train", replace(TINY, letter_pictures=200))
    )
    assert drawn.most_common(1)[0][0] == "ا"  # as often as it stands in the words, where it is the most frequent
    parts = [part.replace(" ", "") for part in answers(all_records["part", "train"])]
    assert {len(part) for part in parts} == {2, 3}
    assert all(any(part in word for word in held.train_words) for part in parts)
    assert not set(parts) & set(held.words)
    # Such words do stand within longer ones, so that the rule above has something to do.
    assert any(short in long for short in held.words if len(short) == 2 for long in held.train_words)


@pytest.mark.parametrize("kind", ["read", "name"])
def test_new_renderings_are_new_pictures(kind, all_records):
    trained = {image for record in all_records[kind, "train"] for image in record.images}
    new = {image for record in all_records[kind, "test_rendered"] for image in record.images}
    assert len(new) == len(all_records[kind, "test_rendered"])
    assert not trained & new


def test_preference_test_shows_nothing_trained_on(all_records):
    trained_pictures = {i for k, s in SPLITS if s == "train" for r in all_records[k, s] for i in r.images}
    test = all_records["preference", "test"]
    assert not trained_pictures & {image for record in test for image in record.images}
    held = set(made.held_out(TINY).words)
    for record in test:
        if record.kind == "corrupted_reading":
            answer = record.messages[-1].content
            assert {word.replace(" ", "") for word in answer.split(" / ")} <= held
    asked = {r.messages[0].content for r in test if not r.images}
    assert asked and not asked & {r.messages[0].content for r in all_records["translate", "train"]}


# What the records hold


def test_every_record_is_sound_and_named_once(all_records):
    for found in all_records.values():
        assert len({record.id for record in found}) == len(found) > 0
        for record in found:
            validate(record)


def test_counts_follow_the_parameters(all_records):
    sizes = {key: len(found) for key, found in all_records.items()}
    assert sizes["read", "train"] == 60
    assert sizes["read", "test"] == sizes["read", "test_rendered"] == 20
    assert sizes["name", "train"] == sizes["name", "test_rendered"] == 286
    assert sizes["preference", "train"] == 36 and sizes["preference", "test"] == 24
    lines = [r for r in make("read", "train", replace(TINY, read_line_share=1.0)) if r.kind == "line"]
    assert len(lines) == 60 and all(" / " in record.messages[-1].content for record in lines)


def test_fewer_objects_are_taken_evenly_and_compared_among_themselves():
    few = replace(TINY, objects=12)
    names = answers(make("name", "train", few)) | answers(make("name", "train", replace(few, renderings=2)))
    assert len(names) == 24  # in two languages
    tables = [table for table, _ in made.objects(few)]
    assert len(tables) == 12 and set(tables) == {"emoji", "flags"}
    assert {r.rejected for r in make("preference", "train", few) if r.kind == "neighbour_answer"} <= names
    with pytest.raises(ValueError, match="objects 400: the sample has 286; give no more, or 0 for all"):
        made.objects(replace(TINY, objects=400))
    with pytest.raises(ValueError, match="objects 1: expected 2 or more, or 0 for all"):
        replace(TINY, objects=1)


def test_each_side_of_held_out_text_is_large_enough(all_records):
    for kind in ("documents", "parallel"):
        sizes = {split: sum(len(r.text) for r in all_records[kind, split]) for split in ("train", "test")}
        assert 0.04 < sizes["test"] / sizes["train"] < 0.15


def test_spelling_and_corruption():
    assert made.spell(["من", "هنا"]) == "م ن / ه ن ا"
    faults = {}
    for seed in range(200):
        (worse,) = made.corrupt(["كتاب"], made.generator(TINY, "test", seed))
        assert worse != "كتاب"
        faults.setdefault(len(worse), set()).add(worse)
    assert faults[3] == {"تاب", "كاب", "كتب", "كتا"}  # a letter dropped
    assert faults[5] == {"ككتاب", "كتتاب", "كتااب", "كتابب"}  # doubled
    assert {"تكاب", "كاتب", "كتبا"} <= faults[4]  # swapped
    assert {"كثاب", "كتات", "كتإب"} <= faults[4]  # taken for a letter alike
    assert made.corrupt(["لل"], made.generator(TINY, "test"))[0] != "لل"


def test_preference_kinds(all_records):
    for record in all_records["preference", "train"]:
        better = record.messages[-1].content
        if record.kind == "wrong_language":
            assert (
                any("a" <= c.lower() <= "z" for c in better) != any("a" <= c.lower() <= "z" for c in record.rejected)
                or not record.images
            )
        if record.kind == "neighbour_answer":
            names = {row[f"name_{record.language}"] for _, row in made.objects(TINY)}
            assert {better, record.rejected} <= names
        if record.kind == "corrupted_reading":
            assert abs(len(better) - len(record.rejected)) <= 2


def test_seed_decides():
    few = replace(TINY, read_pictures=5)
    assert make("read", "train", few) == make("read", "train", few)
    assert make("read", "train", few) != make("read", "train", replace(few, seed=1))
    more = make("read", "train", replace(few, read_pictures=8))
    assert more[:5] == make("read", "train", few)  # asking for more leaves the first as they were


def test_wrong_parameters_are_told():
    with pytest.raises(ValueError, match=r"font 'Amiri\.ttf': no such file; give a path, or one of NotoNaskh"):
        SampleParams(fonts=("Amiri.ttf",))
    with pytest.raises(ValueError, match=r"held_out_share 0\.9"):
        SampleParams(held_out_share=0.9)
    with pytest.raises(ValueError, match="'reading': no such kind; there are documents, parallel"):
        build("reading", "nowhere")


# Written and read back


def test_written_and_read_back_is_what_was_made(tmp_path, all_records):
    told = []
    built = build("read", tmp_path, TINY, on_record=told.append)
    assert len(told) == 100
    assert sorted(built.info.splits) == ["test", "test_rendered", "train"]
    for split in built.info.splits:
        read_back = records(built, split)
        assert sorted(read_back, key=lambda r: r.id) == sorted(all_records["read", split], key=lambda r: r.id)
        assert read_back[-1] == read_back[len(read_back) - 1]
        assert read_back[1:3] == [read_back[1], read_back[2]]
        with pytest.raises(IndexError):
            read_back[len(read_back)]
    with pytest.raises(ValueError, match="no split 'valid'"):
        records(built, "valid")


def written(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*.array_record*")}


def test_same_bytes_for_the_same_seed_and_no_second_build(tmp_path, monkeypatch):
    build("translate", tmp_path / "a", TINY)
    build("translate", tmp_path / "b", TINY)
    assert len(written(tmp_path / "a")) == 2
    assert written(tmp_path / "a") == written(tmp_path / "b")
    monkeypatch.setattr(builder.Sample, "download_and_prepare", lambda self: pytest.fail("built again"))
    build("translate", tmp_path / "a", TINY)
    assert builder.fingerprint(TINY) != builder.fingerprint(replace(TINY, seed=1))


def test_interrupted_build_is_not_mistaken_for_a_finished_one(tmp_path, monkeypatch):
    def interrupted(params, split):
        yield from itertools.islice(made.translate(params, split), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(made.KINDS, "translate", (interrupted, ("train", "test")))
        with pytest.raises(KeyboardInterrupt):
            build("translate", tmp_path, TINY)
    left_over = next(tmp_path.glob("sample/translate-*")) / "incomplete.ABCDEF_1.0.0"
    left_over.mkdir(exist_ok=True)  # what a kill leaves behind
    built = build("translate", tmp_path, TINY)
    assert len(records(built, "train")) == len(make("translate", "train"))
    assert not left_over.exists()
    assert {path.name for path in left_over.parent.glob("[!.]*")} == {"1.0.0"}


QUIET = """
import sys
from ain_jax.data.builders.sample import SampleParams, build, records
built = build("parallel", sys.argv[1])
assert records(built, "test")[0].text
assert not {"tensorflow", "torch"} & set(sys.modules)
"""


def test_needs_no_tensorflow_and_prints_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
