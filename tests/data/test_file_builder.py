"""Files become records in their order, whoever reads them; what is refused is told; a build is complete or absent."""

import gzip
import hashlib
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ain_jax.data.builders import convert, merge
from ain_jax.data.builders import files as builder
from ain_jax.data.builders.files import Sources, build, records, summary
from ain_jax.data.builders.records import Group
from ain_jax.data.render import encode_png


def picture(shade, side=6):
    return encode_png(Image.fromarray(np.full((side, side, 3), shade, np.uint8)))


def row(i, **more):
    return {"id": f"r{i}", "text": f"نص رقم {i} " + "كلمة " * (i % 40), "language": "en" if i % 3 == 0 else "ar"} | more


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def sources(path, **more):
    return Sources(**{"files": {"mine": str(path)}, "workers": 1} | more)


def made(tmp_path, path, **more):
    return build("mine", sources(path, **more), tmp_path / "data", progress=False)


def seen(folder):
    """The names in a build's folder; the lock, which stays, is hidden."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def rejects(built_or_folder):
    folder = built_or_folder if isinstance(built_or_folder, Path) else Path(built_or_folder.data_dir).parent
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def shard_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and "shard" not in p.name}


# What comes out of the files


def test_records_are_the_rows_in_order_and_what_is_refused_is_told(tmp_path):
    rows = [row(i) for i in range(400)]
    rows[3] = "{broken"
    rows[50] = row(50, text=" ")
    rows[120] = row(7)  # an id that stands before
    rows[121] = row(7, text="another text")
    path = write(tmp_path / "rows.jsonl", rows)
    built = made(tmp_path, path, bad_share=0.02)
    read = records(built, "train")
    kept = [r for i, r in enumerate(rows) if i not in (3, 50, 120, 121)]
    assert [(r.id, r.text, r.language, r.source) for r in read] == [
        (r["id"], r["text"], r["language"], "mine") for r in kept
    ]
    told = rejects(built)
    assert [t["where"] for t in told] == [f"rows.jsonl:{n}" for n in (4, 51, 121, 122)]
    assert "not JSON" in told[0]["reason"] and told[0]["row"] is None
    assert told[1]["row"] == {"id": "r50", "text": " ", "language": "ar"}
    assert "'r7' stands in rows.jsonl:8 already" in told[2]["reason"]
    assert "'r7' stands in rows.jsonl:8 already" in told[3]["reason"] and told[3]["row"] == {"id": "r7"}
    counts = summary(built)
    assert (counts["rows"], counts["rejected"], sum(counts["reasons"].values())) == (400, 4, 4)
    assert counts["form"] == "text" and counts["reasons"][merge.DUPLICATE] == 2


def test_a_published_set_whose_rows_share_ids_is_named_by_places(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(1, text="a"), row(1, text="b")])
    read = records(made(tmp_path, path, ids={"mine": "place"}), "train")
    assert [(r.id, r.text) for r in read] == [("rows.jsonl:1", "a"), ("rows.jsonl:2", "b")]
    with pytest.raises(ValueError, match=r"ids\['mine'\] = 'line': expected 'own'"):
        sources(path, ids={"mine": "line"})


def test_same_bytes_with_one_worker_and_with_two(tmp_path, capfd):
    rows = [row(i) for i in range(1500)]
    rows[10], rows[900], rows[1400] = "[1]", row(2), row(1399)
    path = write(tmp_path / "rows.jsonl", rows)
    folders = []
    for workers in (1, 2):
        many = sources(path, held_out={"mine": 0.2}, workers=workers)
        built = build("mine", many, tmp_path / str(workers), progress=workers == 2)
        folders.append(Path(built.data_dir).parent)
    assert len(builder._tasks([path])) > 2
    assert shard_bytes(folders[0]).keys() == shard_bytes(folders[1]).keys()
    for name, data in shard_bytes(folders[0]).items():
        assert data == shard_bytes(folders[1])[name] or name == "dataset_info.json", name
    assert rejects(folders[0]) == rejects(folders[1])
    shards = {p.name: p.read_bytes() for p in folders[0].rglob("*array_record*")}
    assert shards == {p.name: p.read_bytes() for p in folders[1].rglob("*array_record*")} and len(shards) > 4
    said = capfd.readouterr().err
    assert "1500 rows" in said.replace(",", "") and f"3 rejected (2 x {merge.DUPLICATE}, 1 x" in said
    assert str(folders[1] / "rejects.jsonl") in said


def test_pictures_of_every_kind_are_carried_and_bad_ones_told(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(40 * i))
    (tmp_path / "pictures" / "cut.png").write_bytes(picture(7, 40)[:60])
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]
    rows = [{"id": name, "image": f"{name}.png", "conversations": talk} for name in ("0", "1", "cut", "gone", "2")]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(rows))
    built = made(tmp_path, path, images={"mine": str(tmp_path / "pictures")}, bad_share=0.5, languages={"mine": "arz"})
    read = records(built, "train")
    assert [(r.id, r.language, r.images) for r in read] == [(str(i), "arz", (picture(40 * i),)) for i in range(3)]
    assert [t["where"] for t in rejects(built)] == ["talks.json#2", "talks.json#3"]
    assert "broken picture" in rejects(built)[0]["reason"] and "gone.png" in rejects(built)[1]["reason"]


def test_many_small_files_go_into_few_shards(tmp_path):
    for i in range(300):
        (tmp_path / "in").mkdir(exist_ok=True)
        with gzip.open(tmp_path / "in" / f"{i:03}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps({"text": f"text {i}"}))
    built = made(tmp_path, tmp_path / "in")
    assert [r.text for r in records(built, "train")] == [f"text {i}" for i in range(300)]
    assert len(list(Path(built.data_dir).glob("*array_record*"))) == 1


def test_held_out_records_stay_where_they_are_when_files_are_added(tmp_path):
    def split_of(folder):
        built = build("mine", sources(folder, held_out={"mine": 0.3}), tmp_path / "data", progress=False)
        return {r.id: split for split in ("train", "test") for r in records(built, split)}

    write(tmp_path / "in" / "b.jsonl", [row(i) for i in range(200)])
    before = split_of(tmp_path / "in")
    write(tmp_path / "in" / "a.jsonl", [row(i) for i in range(200, 300)])
    after = split_of(tmp_path / "in")
    assert len(after) == 300 and before.items() <= after.items()
    digest = lambda name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
    assert {name for name, split in after.items() if split == "test"} == {n for n in after if digest(n) < 0.3}
    with pytest.raises(ValueError, match="leaves none for the split 'test'; choose another share"):
        build("mine", sources(tmp_path / "in", held_out={"mine": 1e-9}), tmp_path / "data", progress=False)


# Complete or absent


def test_too_many_bad_rows_stop_the_build_and_keep_the_rejects(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(i) for i in range(90)] + [row(i, text="") for i in range(90, 100)])
    with pytest.raises(ValueError, match=r"mine: 100 rows, 10 rejected \(10 x .*\); 1 may be .*rejects.jsonl: mend"):
        made(tmp_path, path)
    (folder,) = (tmp_path / "data" / "files").iterdir()
    assert seen(folder) == {"rejects.jsonl"} and len(rejects(folder)) == 10
    built = made(tmp_path, path, bad_share=0.1)
    assert len(records(built, "train")) == 90
    with pytest.raises(ValueError, match="1 may be"):  # the build is there now, and is still too bad
        made(tmp_path, path)
    with pytest.raises(ValueError, match="none is left"):
        made(tmp_path, write(tmp_path / "bad.jsonl", [row(0, text="")]), bad_share=1.0, forms={"mine": "text"})


def test_a_source_that_is_wholly_wrong_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "EARLY_ROWS", 500)
    path = write(tmp_path / "rows.jsonl", [row(i) for i in range(5000)])
    with pytest.raises(ValueError, match=r"stopped after (5\d\d) rows, of which \1 were rejected as form 'alpaca'"):
        made(tmp_path, path, forms={"mine": "alpaca"})
    (folder,) = (tmp_path / "data" / "files").iterdir()
    assert 500 <= len(rejects(folder)) < 700


def test_a_stopped_build_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [row(i) for i in range(1500)])
    convert_one = convert.convert

    def stopped(job, task, parts, tick):
        if task == 2:
            raise KeyboardInterrupt
        return convert_one(job, task, parts, tick)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, path)
    (folder,) = (tmp_path / "data" / "files").iterdir()
    assert not seen(folder)
    left_over = folder / "incomplete.ABCDEF_1.0.0" / "unfinished"  # what a kill leaves behind
    left_over.mkdir(parents=True)
    built = made(tmp_path, path)
    assert len(records(built, "train")) == 1500
    assert seen(folder) == {"1.0.0", "rejects.jsonl"}
    monkeypatch.setattr(builder.Files, "download_and_prepare", lambda *_, **__: pytest.fail("built again"))
    made(tmp_path, path, workers=2, bad_share=0.5)  # neither makes other records


def test_fingerprint_follows_files_and_settings(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(i) for i in range(10)])
    first = builder.fingerprint("mine", sources(path))
    assert first == builder.fingerprint("mine", sources(path, workers=3, bad_share=0.5))
    others = [
        sources(path, **{key: {"mine": v}}) for key, v in (("forms", "text"), ("languages", "ar"), ("images", "x"))
    ]
    marks = {builder.fingerprint("mine", other) for other in others}
    write(tmp_path / "rows.jsonl", [row(i) for i in range(1, 11)])
    marks |= {first, builder.fingerprint("mine", sources(path, held_out={"mine": 0.1}))}
    assert len(marks | {builder.fingerprint("mine", sources(path))}) == 6


def test_a_killed_worker_is_told_and_workers_import_no_jax():
    told = r"mine: a worker process ended .*SIGKILL.* Set Sources.workers to fewer"
    with pytest.raises(RuntimeError, match=told), merge._pool("mine", 1) as pool:
        names = ("ain_jax.data.builders.convert", "jax", "tensorflow_datasets")
        loaded = f"[m in __import__('sys').modules for m in {names}]"
        assert pool.submit(eval, loaded).result() == [True, False, False]
        pool.submit(os.kill, pool.submit(os.getpid).result(), signal.SIGKILL).result()


# Settings


def test_settings_tell_all_that_is_wrong_at_once():
    with pytest.raises(ValueError) as error:
        Sources(
            files={"pangea": "x.json", "a/b": "y.json", "read": "z.json"},
            forms={"pangea": "llavva", "pangaea": "text"},
            held_out={"pangea": 1.5},
            bad_share=-1,
            workers=-2,
        )
    for part in (
        "files names 'a/b': expected a plain word",
        "files names 'read', as the sample does",
        "forms names 'pangaea', which files does not hold: did you mean 'pangea'?",
        "no such form; did you mean 'llava'?",
        "held_out['pangea'] = 1.5",
        "bad_share = -1",
        "workers = -2",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no source 'pangae' in Sources.files: did you mean 'pangea'?"):
        build("pangae", Sources(files={"pangea": "x.json"}), "nowhere")
    with pytest.raises(ValueError, match=r"Sources.files\['pangea'\]: nowhere/x.json: no such file"):
        build("pangea", Sources(files={"pangea": "nowhere/x.json"}), "nowhere")


def test_a_form_that_cannot_be_told_is_asked_for(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"colour": "red", "weight": i} for i in range(5)])
    told = r"mine: the form of its rows is not known; name one in Sources.forms.* rows.jsonl:1: the keys colour"
    with pytest.raises(ValueError, match=told):
        made(tmp_path, path)


# The pieces


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=8), min_size=1, max_size=5))
def test_what_is_kept_is_what_a_dictionary_finds(tmp_path_factory, tasks):
    folder = str(tmp_path_factory.mktemp("tasks"))
    group = lambda name: Group("ar" if name % 2 else "en", f"k{name % 3}")
    done, kept, seen, repeated, number = [], {"train": [], "test": []}, {}, {}, 0
    for t, names in enumerate(tasks):
        names = [name for name, _ in names]
        shards, found = [], sorted({group(name) for name in names}, reverse=True)
        for split, test in (("train", False), ("test", True)):
            writer = convert._Shards(folder, split, t)
            for name in (name for name in names if (name < 3) == test):
                writer.write(bytes([name, t]))
            shards += writer.close()
        for name in names:
            if name in seen:
                repeated[number] = seen[name]
            else:
                seen[name] = number
                kept["test" if name < 3 else "train"].append(bytes([name, t]))
            number += 1
        done.append(
            convert.Converted(
                len(names),
                0,
                0,
                Counter(),
                np.zeros(0, np.uint64),
                np.array(names, np.uint64),
                np.array([name < 3 for name in names], bool),
                np.array([found.index(group(name)) for name in names], np.int32),
                tuple(found),
                tuple(shards),
            )
        )
    assert merge.repeated(done).all == repeated
    shards, codes = merge.kept(done, repeated)
    for split, wanted in kept.items():
        of_split = [shard for shard in shards if shard.split == split]
        assert [data for s in of_split for data in ArrayRecordReader(s.path).read_all()] == wanted
        assert sum(s.records for s in of_split) == len(wanted) and sum(s.bytes for s in of_split) == 2 * len(wanted)
        numbers, groups = codes.get(split, ([], []))
        assert [groups[code] for code in numbers] == [group(data[0]) for data in wanted]


def test_large_shards_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 30)
    writer = convert._Shards(str(tmp_path), "train", 0)
    for i in range(7):
        writer.write(bytes(10 + i))
    shards = writer.close()
    assert [(s.records, s.bytes) for s in shards] == [(2, 21), (2, 25), (2, 29), (1, 16)]
    assert [len(d) for s in shards for d in ArrayRecordReader(s.path).read_all()] == list(range(10, 17))


def test_reasons_of_one_kind_are_counted_together():
    kinds = [
        convert.reason_kind(f"picture 'a/{i}.png': broken picture of {i},000 bytes (at {i}); replace the file")
        for i in (1, 22)
    ]
    assert kinds == ["picture …: broken picture of … bytes"] * 2
    assert convert.reason_kind("no picture 'x (1).png' in /a: is it 'y'?") == "no picture … in /a: is it …?"
    assert convert.reason_kind("''") == "no reason given" and len(convert.reason_kind("x" * 500)) == 80


def test_rows_are_shortened():
    short = convert.shortened(
        {"text": "x" * 300, "data": b"abc", "list": list(range(9)), "deep": [[[[[1]]]]], "n": None}
    )
    assert short["text"] == "x" * 200 + "… (300 characters)" and short["data"] == "<3 bytes>"
    assert short["list"] == [0, 1, 2, 3, "… 9"] and short["deep"] == [[["…"]]] and short["n"] is None
    json.dumps(convert.shortened({"a": {1, 2}, "b": {str(i): i for i in range(50)}}))


def test_text_that_is_no_unicode_is_refused_not_raised(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(0), '{"id": "half", "text": "a\\ud800"}', row(1)])
    built = made(tmp_path, path, bad_share=0.5)
    assert [r.id for r in records(built, "train")] == ["r0", "r1"]
    assert rejects(built)[0]["where"] == "rows.jsonl:2" and "surrogate" in rejects(built)[0]["reason"]


def test_any_fault_of_a_row_is_that_rows(tmp_path, monkeypatch):
    to_record = convert.forms.to_record

    def odd(row, *arguments):
        if row.where.endswith(":2"):
            raise KeyError("surprise")
        return to_record(row, *arguments)

    monkeypatch.setattr(convert.forms, "to_record", odd)
    built = made(tmp_path, write(tmp_path / "rows.jsonl", [row(i) for i in range(3)]), bad_share=0.5)
    assert [t["reason"] for t in rejects(built)] == ["KeyError: 'surprise'"]
