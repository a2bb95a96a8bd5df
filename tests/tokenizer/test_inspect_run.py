"""The command, from files to its table, its JSON, its plot and its page."""

import json
import subprocess
import sys

import pytest
import tokenizers

from ain_jax import sample
from ain_jax.tokenizer import inspect_page, inspect_run
from ain_jax.tokenizer.grow import grow
from ain_jax.tokenizer.inspect import fertility

MISTRAL = sample.FOLDER / "tokenizer" / "mistral_v1.model"
HANDBOOK = sample.FOLDER / "handbook.jsonl"
ROWS = sample.rows("handbook")[:700]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The Mistral base on the handbook in both languages, two sizes."""
    out = tmp_path_factory.mktemp("inspected")
    text = out / "handbook.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["--base", MISTRAL, "--text", f"ar={text}", f"en={text}", "--parallel", f"ar,en={text}"]
    arguments += ["--sizes", "900,300", "--width", "4096", "--rows", "32064", "--no-tied", "--parameters", "7.24e9"]
    inspect_run.main([str(argument) for argument in [*arguments, "--out", out]])
    return out, json.loads((out / "inspect.json").read_text())


def test_what_is_measured_was_not_learnt_from(found):
    _, result = found
    row = next(row for row in result["fertility"] if row["language"] == "ar" and row["kind"] == "all")
    words = sum(len(row["ar"].split()) for row in ROWS)
    assert 0.02 < row["words"] / words < 0.25  # a tenth of the documents
    note = next(note for note in result["notes"] if note.startswith("ar:"))
    assert "hash is 0 modulo 10; the others are learnt from" in note


def test_the_curve_falls_and_english_stays(found):
    _, result = found
    assert [point["size"] for point in result["curve"]] == [300, 900]
    base = next(row for row in result["fertility"] if row["language"] == "ar")["tokens_per_word"]
    small, large = (point["tokens_per_word"] for point in result["curve"])
    assert large < small < 0.6 * base
    extended = next(row for row in result["fertility_extended"] if row["language"] == "ar")  # at the verdict's size
    assert large == extended["tokens_per_word"]  # of Arabic alone
    assert [point["changed_elsewhere"] for point in result["curve"]] == [0, 0]
    assert [point["spare_used"] for point in result["curve"]] == [64, 64]
    assert [point["rows"] for point in result["curve"]] == [32_320, 32_960]  # to a multiple of 64
    assert result["curve"][1]["new_parameters"] == 2 * 4096 * (32_960 - 32_064)
    before = {(r["language"], r["kind"]): r["tokens"] for r in result["fertility"] if r["language"] == "en"}
    after = {(r["language"], r["kind"]): r["tokens"] for r in result["fertility_extended"] if r["language"] == "en"}
    assert before == after and before


def test_the_verdict_is_yes_for_mistral(found):
    _, result = found
    assert result["verdict"]["pays"] and result["verdict"]["size"] == 900
    assert result["rules"]["covered"] == 3.0


def test_parity_of_the_same_content(found):
    _, result = found
    ids = lambda language: sum(row.tokens for row in fertility(
        inspect_run.open_any(MISTRAL)[1], {language: [row[language] for row in ROWS]}))  # fmt: skip
    (same,) = (each for each in result["parity"] if each["measure"] == "tokens for the same content")
    assert same["ratio"] == pytest.approx(ids("ar") / ids("en"), rel=1e-5)
    assert {each["measure"] for each in result["parity"]} >= {"tokens per byte", "tokens per character"}


def test_the_page_holds_everything_and_asks_for_nothing(found):
    out, result = found
    page = (out / "inspect.html").read_text()
    assert (out / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page and result["verdict"]["sentence"].split(":")[0] in page
    assert "http" not in page.replace("http-equiv", "").replace(str(out), "") and "<script" not in page
    assert (
        '<bdi lang="ar" dir="rtl">' in page and "\u2068" not in page
    )  # bdi isolates; the marks would be a second time


def test_hostile_text_stays_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("<script>alert(1)</script> \u202eabc\n" * 3)
    result = inspect_run.inspect_files(MISTRAL, inspect_run.held_out.sources([f"en={path}"]), sizes=())
    page = inspect_page.render(result, inspect_page.plot(result))
    assert "<script" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert not any("\u202e" in line for line in inspect_run.lines(result))


def test_another_tokenizer_is_measured_and_not_extended(tmp_path, capsys):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"واحد": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("واحد اثنان\n")
    inspect_run.main(["--base", str(tmp_path / "tokenizer.json"), "--text", f"ar={tmp_path / 'a.txt'}"])
    printed = capsys.readouterr().out
    assert "Measured, but it cannot be extended" in printed and "its type is WordLevel" in printed
    assert "unknown" in printed  # one token a word, and half of them lost: no fertility to be proud of


def test_sizes_beyond_the_corpus_are_left_out_and_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"ar": row["ar"]}) + "\n" for row in sample.rows("udhr") if row["ar"]))
    result = inspect_run.inspect_files(
        MISTRAL, inspect_run.held_out.sources([f"ar={path}"]), sizes=(50, 90_000), planned=1e4
    )
    assert [point.size for point in result.points] == [50]
    assert any(note.startswith("the size 90,000 is left out: ") for note in result.notes)


def test_changed_english_is_counted(tmp_path, monkeypatch):
    def damaged(*arguments):
        grown = grow(*arguments)
        grown.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), grown.normalizer])
        return grown

    monkeypatch.setattr(inspect_run, "grow", damaged)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = inspect_run.held_out.sources([f"ar={path}", f"en={path}"])
    result = inspect_run.inspect_files(MISTRAL, files, sizes=(50,))
    english = inspect_run.held_out.held_out(files, files, parted=True, megabytes=20)["en"].lines
    assert 0 < sum(line != line.lower() for line in english) == result.points[0].changed_elsewhere


def test_nothing_to_extend_for(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"the house number {i}\n" for i in range(2000)))
    result = inspect_run.inspect_files(MISTRAL, inspect_run.held_out.sources([f"en={path}"]), sizes=(50,))
    assert result.verdict is None and "no text to extend for: none is mostly Arabic" in result.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nowhere", "--text", "ar=a"], "no such file: a"),
        (["--base", str(MISTRAL), "--text", "a.txt"], "has no language"),
        (["--base", str(MISTRAL), "--text", f"ar={HANDBOOK}", "--sizes", "0"], "--sizes 0: expected numbers"),
        (["--base", str(HANDBOOK), "--text", f"ar={HANDBOOK}"], "can neither be extended"),
        (["--base", str(MISTRAL), "--text", f"fr={HANDBOOK}"], "neither text under 'fr' nor under 'text'"),
    ],
)
def test_wrong_input_is_one_message(arguments, message):
    with pytest.raises(SystemExit, match=message):
        inspect_run.main(arguments)


def test_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "ain_jax.tokenizer.inspect", "--help"], capture_output=True, text=True, check=True
    )
    assert "--parallel" in done.stdout
