"""The kit of made-up packages: what is in it, what is held out, that it is the same twice, and what is said of gaps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_packages
from PIL import Image

from ain_jax.data import drawn
from ain_jax.data.files import Row
from ain_jax.data.forms import detect, to_record
from ain_jax.kits import ain_135m, misread, overlap, split, tasks, texts
from ain_jax.kits.packages import Unavailable, getter, sha256

SIZES = ain_135m.Sizes(lines=40, test_lines=3, misread=10, test_emoji=1, test_stamps=0, test_maps=4)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    said = []
    folder = tmp_path_factory.mktemp("kit") / "data"
    made = ain_135m.make(folder, tiny_packages.getter(tiny_packages.packages()), SIZES, said.append)
    return made, said


def rows(kit, name):
    return [json.loads(line) for line in (kit[0].folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_text_stands_in_both_spellings_and_pairs_beside_each_other(kit):
    plain = {row["id"]: row["text"] for row in rows(kit, "train/text/classical/hadith_ar")}
    marked = {row["id"].removesuffix("/marked"): row["text"] for row in rows(kit, "train/text/marked/hadith_ar")}
    assert plain["sahih-al-bukhari/1"] == "سمعت رجلا" and marked["sahih-al-bukhari/1"] == "سمعتُ رجلا"
    pairs = {(row["ar"], row["en"]) for row in rows(kit, "train/parallel/programs")}
    assert pairs == {("افتح", "Open"), ("احفظ", "Save")}  # the keys' marks gone, slots left out
    assert [(row["ar"], row["en"]) for row in rows(kit, "train/parallel/chromium")] == [("أعد التشغيل", "Relaunch")]
    verse = [row["en"] for row in rows(kit, "train/parallel/quran")]
    assert verse == [f"Say {name} of 1" for name in texts.TRANSLATIONS]  # its footnote gone
    assert rows(kit, "train/text/english/commentaries_en")[0]["text"] == "Of it\nA long & plain explanation."


def test_no_training_row_shares_eight_words_with_held_out_text(kit):
    held = [
        row["text"]
        for path in (kit[0].folder / "held/text").glob("*.jsonl")
        for row in rows(kit, f"held/text/{path.stem}")
    ]
    known = overlap.gram_set(held)
    texts_of_train = [
        text
        for path in (kit[0].folder / "train").rglob("*.jsonl")
        if path.parent.name in ("text", "parallel")
        for row in rows(kit, path.relative_to(kit[0].folder).with_suffix(""))
        for text in (row.get("text"), row.get("ar"), row.get("en"))
        if text
    ]
    assert len(texts_of_train) > 1000 and not [text for text in texts_of_train if overlap.shares(text, known)]
    assert not any(tiny_packages.SHARED in text for text in texts_of_train)
    manifest = json.loads((kit[0].folder / "manifest.json").read_text())
    assert manifest["training rows that share eight words with held-out text"]["hadith"] == 1


def test_every_row_is_read_by_the_loader(kit):
    folder = kit[0].folder
    for path in [*(folder / "train").rglob("*.jsonl"), *folder.glob("held/*.jsonl")]:
        if path.stem in ("facts", "translate") and path.parent.name == "held":
            continue
        found = rows(kit, path.relative_to(folder).with_suffix(""))
        assert len({row["id"] for row in found}) == len(found), path
        for row in found[:20]:
            record = to_record(Row(path.name, row), detect(row), "kit", images=str(folder))
            for picture in record.images:
                assert drawn.draw(picture).size == drawn.size(picture)


def test_what_is_drawn_is_what_is_said(kit):
    (line, *_) = rows(kit, "train/tasks/read")
    assert line["images"][0]["text"] == line["messages"][1]["content"]
    assert line["images"][0]["width"] % tasks.UNIT == line["images"][0]["height"] % tasks.UNIT == 0
    assert {row["images"][0]["font"] for row in rows(kit, "train/tasks/read")} == {"fonts/NotoNaskhArabic-Regular.ttf"}
    tested = rows(kit, "held/read")
    assert {(row["font"], row["kind"]) for row in tested} == {
        (font, kind) for font in ("Amiri-Regular", "NotoNaskhArabic-Regular") for kind in ("plain", "paper")
    }
    assert len(tested) == 4 * SIZES.test_lines
    named = {(row["messages"][1]["content"], row["language"]) for row in rows(kit, "train/tasks/emoji")}
    assert named == {("قطة", "ar"), ("cat", "en"), ("كلب", "ar"), ("dog", "en")}
    assert len(rows(kit, "train/tasks/emoji")) == 8  # in two styles
    assert [row["messages"][1]["content"] for row in rows(kit, "train/tasks/stamps")] == ["قطة", "A cat"]


def test_a_map_is_one_value_a_region_and_its_regions_are_where_they_are(kit):
    values = np.asarray(Image.open(kit[0].folder / "maps/here.png"))
    assert values[0, 0] == drawn.SEA and values[8, 10] == drawn.BORDER
    assert values[8, 5] == drawn.FIRST and values[8, 14] == drawn.FIRST + 1
    asked = {(row["kind"], row["language"], row["messages"][1]["content"]) for row in rows(kit, "train/tasks/maps")}
    assert asked == {
        ("map", "ar", "هنا"), ("map", "en", "Here"), ("name", "ar", "اليسار"), ("name", "en", "Left"),
        ("name", "ar", "اليمين"), ("name", "en", "Right"), ("capital", "ar", "مدينة اليسار"),
        ("capital", "en", "Lefton"), ("place", "ar", "في الغرب"), ("place", "en", "in the west"),
        ("place", "ar", "في الشرق"), ("place", "en", "in the east"),
    }  # fmt: skip
    again = {row["id"]: row["images"][0]["seed"] % 5 for row in rows(kit, "held/maps_again")}
    first = {row["id"]: row["images"][0]["seed"] % 5 for row in rows(kit, "train/tasks/maps")}
    assert set(again.values()) == {4} and 4 not in first.values()


def test_held_out_verses_have_every_reference(kit):
    found = {row["id"]: row for row in rows(kit, "held/translate")}
    verse = found["translate/quran/50:1/en"]
    assert verse["references"] == [f"Say {name} of 50" for name in texts.TRANSLATIONS]
    assert found["translate/quran/50:1/ar"]["references"] == [verse["text"]]


def test_what_cannot_be_had_is_said_in_one_line_and_the_rest_is_made(kit):
    made, said = kit
    assert any(
        line == "manual is left out: manual cannot be had here" or line.startswith("manual is left out: ")
        for line in said
    )
    assert {"manual", "emoji/openmoji", "emoji/twemoji", "facts", "flags/4x3"} <= set(made.left_out)
    assert all("\n" not in line for line in said)
    assert json.loads((made.folder / "manifest.json").read_text())["left_out"] == made.left_out


def test_the_same_packages_give_the_same_bytes(kit, tmp_path):
    again = (
        "import sys, pathlib, tiny_packages; from ain_jax.kits import ain_135m; "
        "get = tiny_packages.getter(tiny_packages.packages()); "
        f"ain_135m.make(pathlib.Path(sys.argv[1]), get, ain_135m.{SIZES}, print)"
    )
    # In another process sets of words have another order.
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    seeded = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", again, tmp_path / "again"], env=seeded, check=True, capture_output=True)
    files = lambda folder: {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}
    first = files(kit[0].folder)
    assert files(tmp_path / "again") == first
    manifest = json.loads((kit[0].folder / "manifest.json").read_text())
    del first["manifest.json"]
    assert {name: told["sha256"] for name, told in manifest["files"].items()} == first
    assert "together" in "\n".join(ain_135m.table(manifest))


def test_every_package_has_a_licence_and_a_pin():
    named = [name for names in ain_135m.LICENCES.values() for name in names]
    assert sorted(named) == sorted(ain_135m.PACKAGES)
    assert all(len(package.sha256) == 64 for package in ain_135m.PACKAGES.values())


# Eight words, worked


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("a b c d e f g h", "x A, b. c d; e f g H y", True),  # case and punctuation aside
        ("a b c d e f g h", "a b c d e f g x h", False),
        ("a b c", "A  b, c!", True),  # shorter ones: all of it
        ("a b c", "a b c d", False),
        ("قُلْ هُوَ", "قل هو", True),  # vowel marks aside
        ("إلى أن", "الي ان", True),
        ("", "...", False),
    ],
)
def test_texts_share_eight_words(one, other, shared):
    assert overlap.shares(one, overlap.gram_set([other])) == shared


def test_of_a_book_those_sayings_are_held_out_that_fewest_training_rows_repeat():
    eight = " ".join("abcdefgh")
    held = [split.Row("1", "hadith", "ar", f"{eight} x"), split.Row("2", "hadith", "ar", "q r s t u v w x y")]
    train = [split.Row("3", "hadith", "ar", f"z {eight}"), split.Row("4", "tafsir", "ar", "nothing")]
    assert [row.id for row in split.rarest(held, train, count=1)] == ["2"]
    kept, dropped = split.disjoint(train, held)
    assert [row.id for row in kept] == ["4"] and dropped == {"hadith": 1}


def test_pieces_keep_every_word_and_their_length():
    text = "\n".join(" ".join(f"w{line}x{i}." for i in range(30)) for line in range(9))
    found = list(texts.pieces(text, 200))
    assert " ".join(found).split() == text.split() and max(map(len, found)) <= 200


# Tesseract


def test_a_misreading_is_the_rejected_answer_and_a_right_or_hopeless_one_is_none():
    row = {"id": "a", "language": "ar", "images": [{}], "messages": tasks.turns("<image>\nاقرأ", "السلام عليكم")}
    found = list(misread.pairs([row] * 4, ["السلام عليك", "السَّلام عليكم", "", "قهوة بلا سكر والله"]))
    assert [(pair["chosen"], pair["rejected"]) for pair in found] == [("السلام عليكم", "السلام عليك")]


def test_error_rates_are_told_by_font_and_ground():
    row = {"font": "Amiri", "kind": "plain", "messages": tasks.turns("?", "abcd")}
    assert misread.rates([row, row], ["abcd", "abxd"]) == {"Amiri/plain": {"cer": 0.125, "exact": 0.5, "lines": 2}}


def test_a_machine_without_the_program_is_told_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="apt-get install tesseract-ocr tesseract-ocr-ara"):
        misread.version()


# The packages themselves


@pytest.mark.real
@pytest.mark.skipif(not os.environ.get("AIN_JAX_REAL"), reason="AIN_JAX_REAL=1 downloads packages (12 MB)")
def test_real_packages_hold_what_was_counted(tmp_path):
    get = getter(ain_135m.PACKAGES, Path(os.environ.get("AIN_JAX_ARCHIVES", tmp_path)))
    try:
        books = {book: list(texts.hadith(get, book)) for book in (*texts.HADITH, texts.HELD_OUT_BOOK)}
    except Unavailable as error:
        pytest.skip(str(error))
    assert sum(map(len, books.values())) == 34_178
    assert len(books[texts.HELD_OUT_BOOK]) == 4_345
    assert len(texts.tafsir(get)) == 5_018
