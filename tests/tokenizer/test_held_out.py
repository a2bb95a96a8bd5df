"""Labelled files, parted by document without a leak."""

import gzip
import json

import pytest

from ain_jax.tokenizer import held_out
from ain_jax.tokenizer.held_out import Source


def write_jsonl(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_labels(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    for path in (a, b, c):
        path.write_text("x")
    assert held_out.sources([f"ar={a}", str(b), f"zh-Hans={c}"]) == [
        Source("ar", a),
        Source("ar", b),
        Source("zh-Hans", c),
    ]
    with pytest.raises(ValueError, match="has no language; expected LANGUAGE=FILE"):
        held_out.sources([str(a)])
    with pytest.raises(ValueError, match=r"no such file: .*missing\.txt"):
        held_out.sources([f"ar={tmp_path}/missing.txt"])


def test_lines_of_each_form(tmp_path):
    rows = [{"document": "d", "ar": "واحد\nاثنان", "en": "one"}, {"text": "ثلاثة"}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write_jsonl(tmp_path / name, rows)
        assert list(held_out.lines(Source("ar", path))) == [("d", "واحد"), ("d", "اثنان"), ("ثلاثة", "ثلاثة")]
    text = tmp_path / "a.txt"
    text.write_text("\ufeff" + "".join(f"line {i}\n\n" for i in range(120)))  # a byte order mark is no text
    found = list(held_out.lines(Source("en", text)))
    assert len(found) == 120 and found[0] == ("a.txt/0", "line 0")
    assert [name for name, _ in found].count("a.txt/1") == held_out.LINES  # blank lines do not count


def test_what_is_no_text_is_refused_by_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2, byte 4: 0xff is not UTF-8"):
        list(held_out.lines(Source("en", tmp_path / "a.txt")))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"title": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: it has neither text under 'en' nor under 'text'"):
        list(held_out.lines(Source("en", tmp_path / "a.jsonl")))
    (tmp_path / "c.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"c\.jsonl, line 1 holds a list, expected an object"):
        list(held_out.lines(Source("en", tmp_path / "c.jsonl")))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"text\n" * 1000)[:-20])
    with pytest.raises(ValueError, match=r"d\.txt\.gz cannot be read"):
        list(held_out.lines(Source("en", tmp_path / "d.txt.gz")))
    (tmp_path / "b.jsonl").write_text('{"text": \n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: Expecting value"):
        list(held_out.lines(Source("en", tmp_path / "b.jsonl")))


def test_both_sides_share_no_document_and_no_line(tmp_path):
    rows = [{"document": f"d{i}", "text": f"line {i}"} for i in range(400)]
    rows += [{"document": f"e{i}", "text": "the same everywhere"} for i in range(40)]
    source = Source("en", write_jsonl(tmp_path / "a.jsonl", rows))
    learnt = list(held_out.training([source], parted=True))
    split = held_out.held_out([source], [source], parted=True, megabytes=20)["en"]
    assert not set(learnt) & set(split.lines)
    assert set(learnt) | set(split.lines) == {row["text"] for row in rows}
    assert 20 <= split.documents <= 60 and split.repeated > 0 and not split.cut  # a tenth of 400
    again = held_out.held_out([source], [source], parted=True, megabytes=20)["en"]
    assert again == split


def test_text_of_its_own_is_measured_whole_but_for_what_was_learnt(tmp_path):
    measured, learnt = tmp_path / "a.txt", tmp_path / "b.txt"
    measured.write_text("one\ntwo\nthree\n")
    learnt.write_text("two\n")
    files = [Source("en", measured)]
    split = held_out.held_out(files, [Source("und", learnt)], parted=False, megabytes=20)["en"]
    assert (split.lines, split.repeated) == (("one", "three"), 1)
    with pytest.raises(ValueError, match="no en line is left to measure"):
        held_out.held_out([Source("en", learnt)], files, parted=False, megabytes=20)


def test_no_more_is_held_than_was_asked_for(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i:010}\n" for i in range(300)))
    split = held_out.held_out([Source("en", path)], (), parted=False, megabytes=0.001)["en"]
    assert len(split.lines) == 100 and split.cut


def test_parallel_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"ar": "س", "en": "a"}, {"ar": "", "en": "b"}])
    assert held_out.pairs(f"ar,en={path}") == ("ar", "en", [("س", "a")])
    with pytest.raises(ValueError, match="names no parallel text"):
        held_out.pairs(str(path))
    with pytest.raises(ValueError, match="missing.jsonl cannot be read: No such file"):
        held_out.pairs(f"ar,en={tmp_path}/missing.jsonl")
    with pytest.raises(ValueError, match="no row has a text under both 'ar' and 'fr'"):
        held_out.pairs(f"ar,fr={path}")
