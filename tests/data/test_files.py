"""Files of every kind give their rows once each, with their places, however they are cut, torn or compressed."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.data import files_json, files_text
from ain_jax.data.files import Part, Row, find, mark, parts, rows

VALUES = [{"id": i, "text": f'قطة "{i}" \\ [{{'} for i in range(40)]


def jsonl(values) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


def parquet(values, group=7) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values), out, row_group_size=group)
    return out.getvalue()


def arrow(values, batch=7) -> bytes:
    out, table = io.BytesIO(), pa.Table.from_pylist(values)
    with pa.ipc.new_stream(out, table.schema) as writer:
        for part in table.to_batches(max_chunksize=batch):
            writer.write_batch(part)
    return out.getvalue()


def tar(members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def samples(values) -> bytes:
    return tar(
        (f"{i:03d}.{end}", data) for i, v in enumerate(values) for end, data in [("json", jsonl([v])), ("cls", b"")]
    )


WRITERS = {
    "a.jsonl": jsonl,
    "a.ndjson": lambda values: b"\xef\xbb\xbf" + jsonl(values).replace(b"\n", b"\r\n\r\n"),  # as Windows may save it
    "a.json": lambda values: json.dumps(values, ensure_ascii=False).encode(),
    "ascii.json": lambda values: json.dumps(values, indent=1).encode(),
    "inside.json": lambda values: json.dumps({"version": [1, 2], "info": {"n": [{}]}, "data": values}).encode(),
    "lines.json": jsonl,
    "a.txt": lambda values: b"".join(value["text"].encode() + b"\n" for value in values),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "a.tar": samples,
}
NAMES = [
    *WRITERS,
    *(f"{n}.{z}" for n in ("a.jsonl", "a.json", "a.txt", "a.tar") for z in ("gz", "zst")),
    "a.tgz",
    "a.json.GZ",
]
PACK = {".gz": gzip.compress, ".GZ": gzip.compress, ".tgz": gzip.compress, ".zst": zstandard.compress}


def write(folder, name, values=VALUES) -> str:
    stem, end = os.path.splitext(name)
    data = WRITERS["a.tar" if end == ".tgz" else stem if end in PACK else name](values)
    path = folder / name
    path.write_bytes(PACK.get(end, bytes)(data))
    return str(path)


def read(path, count=1) -> list[Row]:
    return [row for part in parts([path] if isinstance(path, str) else path, count) for row in rows(part)]


def sound(found: list[Row]) -> list[dict]:
    assert [row.fault for row in found] == [""] * len(found)
    return [{k: v for k, v in (row.values or {}).items() if k != "__key__"} for row in found]


def places(name) -> list[str]:
    if "tar" in name or "tgz" in name:
        return [f"{name}/{i:03d}" for i in range(40)]
    if name.endswith((".parquet", ".arrow")) or (".json" in name and "lines" not in name and ".jsonl" not in name):
        return [f"{name}#{i}" for i in range(40)]
    return [f"{name}:{2 * i + 1 if name == 'a.ndjson' else i + 1}" for i in range(40)]


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_gives_its_rows_and_their_places(tmp_path, name):
    found = read(write(tmp_path, name))
    assert sound(found) == ([{"text": v["text"]} for v in VALUES] if ".txt" in name else VALUES)
    assert [row.where for row in found] == places(name)
    assert {row.folder for row in found} == {str(tmp_path)}


@pytest.mark.parametrize("name", WRITERS)
def test_parts_hold_every_row_once_whatever_their_number(tmp_path, name):
    path = write(tmp_path, name)
    whole = read(path)
    for count in (2, 3, 5, 16, 60, 1000):
        cut = parts([path], count)
        assert [row for part in cut for row in rows(part)] == whole
        assert len(cut) > 1 and len(cut) <= count
    sizes = [len(list(rows(part))) for part in parts([path], 3)]
    assert max(sizes) <= 21  # about a third each; tables are cut between groups of 7


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=30), st.integers(1, 40))
def test_lines_are_read_once_whatever_the_cuts(tmp_path_factory, data, count):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(b"\n".join(data))
    found = [row for part in parts([str(path)], count) for row in rows(part)]
    if data and data[0][:2] in (b"\xff\xfe", b"\xfe\xff"):
        return  # told as UTF-16
    lines = [data[0].removeprefix(b"\xef\xbb\xbf"), *data[1:]] if data else []
    told = [int(row.where.partition(":")[2]) for row in found if ":" in row.where]
    assert told == [number for number, line in enumerate(lines, 1) if line.strip()]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text('ab"\\[]{},\n'), max_size=3), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 50),
)
def test_items_of_a_list_are_those_that_json_finds(tmp_path_factory, values, count, block):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(values, indent=count % 3 or None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_text, "BLOCK", block)  # items and strings lie across blocks
        assert sound(read(str(path), count)) == values


def test_the_parts_of_several_files_are_about_equal(tmp_path):
    big, small = write(tmp_path, "a.jsonl"), write(tmp_path, "a.txt", VALUES[:4])
    cut = parts([big, small], 8)
    assert [part.path for part in cut] == [big] * 8 + [small]
    assert parts([write(tmp_path, "a.jsonl.gz")], 8) == [Part(str(tmp_path / "a.jsonl.gz"), name="a.jsonl.gz")]


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = []
    for folder in ("ar", "en"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder, "a.jsonl", VALUES[:1]))
    assert [row.where for row in read(paths)] == ["ar/a.jsonl:1", "en/a.jsonl:1"]


def test_documents_are_parted_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\r\nواحد\r\nاثنان\r\n \t\r\n\r\nثلاثة".encode())
    assert [(row.where, row.values) for row in read(str(path), 4)] == [
        ("a.txt:2", {"text": "واحد\nاثنان"}),
        ("a.txt:6", {"text": "ثلاثة"}),
    ]


def test_only_the_columns_asked_for_are_read(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        part = parts([write(tmp_path, name)], 1)[0]
        assert [row.values for row in rows(part, {"text", "other"})] == [{"text": v["text"]} for v in VALUES]


def test_samples_of_a_tar(tmp_path):
    path = tmp_path / "a.tar"
    members = [("x/1.png", b"A"), ("x/1.json", b'{"k": 1}'), ("x/1.txt", "قطة".encode()), ("x/2.a.jpg", b"B")]
    path.write_bytes(tar([*members, ("x/2.b.JPG", b"C"), ("x/.DS_Store", b""), ("x/3.npy", b"")]))
    found = read(str(path))
    assert [row.values for row in found] == [
        {"__key__": "x/1", "__members__": {"x/1.png": b"A"}, "k": 1, "txt": "قطة"},
        {"__key__": "x/2", "__members__": {"x/2.a.jpg": b"B", "x/2.b.JPG": b"C"}},
        None,
    ]
    assert found[2].fault == "no .json, .txt or picture among its members"


# What is damaged


@pytest.mark.parametrize("name", [n for n in NAMES if n != "a.parquet"])
def test_a_file_that_breaks_off_gives_what_is_whole_and_one_fault(tmp_path, name):
    values = [{"id": i, "text": os.urandom(3000).hex()} for i in range(100)]
    path = write(tmp_path, name, values)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) * 3 // 4 - 100)
    found = read(path)
    if ".txt" in name and not name.endswith((".gz", ".zst")):
        assert sum(row.fault == "" for row in found) == 75  # nothing tells that a text breaks off
        return
    assert [row.fault == "" for row in found] == [True] * (len(found) - 1) + [False]
    least = 40 if name.endswith(".zst") else 70
    assert least <= len(found) - 1 <= 75
    key = "text" if ".txt" in name else "id"
    assert [row.values and row.values[key] for row in found[:-1]] == [value[key] for value in values[: len(found) - 1]]


def test_damaged_parquet(tmp_path):
    path = write(tmp_path, "a.parquet")
    data = bytearray(Path(path).read_bytes())
    first = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data[first.data_page_offset : first.data_page_offset + 30] = b"\xff" * 30
    Path(path).write_bytes(data)
    found = read(path)
    assert [row.where for row in found if row.fault] == ["a.parquet#7"]
    assert found[7].fault.startswith("row group 1 is damaged (") and found[7].fault.endswith(
        "its other 7 rows are lost"
    )
    assert [row.values for row in found if not row.fault] == VALUES[:7] + VALUES[14:]
    assert [row.where for row in found if not row.fault] == [f"a.parquet#{i}" for i in (*range(7), *range(14, 40))]
    Path(path).write_bytes(data[:-20])
    assert [row.fault[:23] for row in read(path, 3)] == ["no whole Parquet file ("]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path, name):
    data = samples(VALUES[:3])
    at = data.index(b"002.json")
    path = tmp_path / name
    path.write_bytes(PACK.get(os.path.splitext(name)[1], bytes)(data[:at] + b"\7" * 512 + data[at + 512 :]))
    found = read(str(path))
    assert [row.where for row in found] == [f"{name}/000", name]  # what else 001 had is not known
    assert found[1].fault == "after 000: damaged or broken off behind its last whole member; get the file again"


@pytest.mark.parametrize(
    "line, fault",
    [
        (b'{"text": "\xe9"}', "not UTF-8 text (invalid continuation byte at byte 10 of the line)"),
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter"),
        (b"3", 'expected a JSON object such as {"text": ...}, found 3'),
        (b'{"a": 1, "a": 2}', "the key 'a' stands more than once"),
        (b"[" * 5_000 + b"]" * 5_000, "brackets within brackets without end"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"a": "' + b"x" * 3000 + b'"}', "in one; at most 2,000 are read: cut it into several rows"),
        (b'{"a": "' + b"\\\\\\" * 1000 + b'n"}', "in one; at most 2,000 are read"),
    ],
)
@pytest.mark.parametrize("block", [2**20, 700])
def test_reading_goes_on_behind_a_bad_row(tmp_path, monkeypatch, line, fault, block):
    monkeypatch.setattr(files_text, "MAX_LINE", 2000 if "2,000" in fault else 2**20)
    monkeypatch.setattr(files_text, "BLOCK", block)
    whole = [json.dumps(value).encode() for value in VALUES[:3]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([whole[0], line, *whole[1:]]))
    for count in (1, 3):
        found = read(str(path), count)
        assert [row.values for row in found] == [VALUES[0], None, *VALUES[1:3]]
        assert fault in found[1].fault and found[1].where == "a.jsonl:2"
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b", ".join([whole[0], line, *whole[1:]]) + b"]")
    if line.count(b"{") == line.count(b"}"):  # else where the item ends is not known
        found = read(str(path), 1)
        assert [row.values for row in found] == [VALUES[0], None, *VALUES[1:3]]
        assert fault in found[1].fault and found[1].where == "a.json#1"


def test_a_line_above_the_limit_takes_no_memory(monkeypatch):
    monkeypatch.setattr(files_text, "MAX_LINE", 10_000)
    seen = []

    def endless():
        for _ in range(1000):
            yield b"x" * 9_000
            seen.append(len(b"".join(kept) if (kept := reader.gi_frame.f_locals["kept"]) else b""))
        yield b"\nend"

    reader: Any = files_text.lines(endless())
    assert [(number, line, size) for number, line, size in reader] == [(1, None, 9_000_000), (2, b"end", 3)]
    assert max(seen) <= 10_000
    items = files_json.json_items(iter([b'{"a": "', *[b"x" * 9_000] * 1000, b'"}, {"b": 1}]']), closed=True)
    monkeypatch.setattr(files_text, "MAX_LINE", 10_000)
    assert [(end - begin, data) for begin, end, data in items] == [(9_000_009, None), (8, b'{"b": 1}')]


@pytest.mark.parametrize(
    "data, fault",
    [
        (b"", "no row in the file; get it again, or leave it out"),
        (b"\n \n", "no row in the file"),
        ('{"text": "a"}'.encode("utf-16"), "text in UTF-16; save the file as UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_file_without_rows_is_a_fault(tmp_path, name, data, fault):
    (tmp_path / name).write_bytes(data)
    found = list(rows(Part(str(tmp_path / name))))
    assert [(row.where, row.values) for row in found] == [(name, None)] and fault in found[0].fault


def test_lists_beside_the_rows_are_told(tmp_path):
    (tmp_path / "a.json").write_text('{"train": [{"text": "a"}], "test": [{"text": "b"}]}')
    first, last = read(str(tmp_path / "a.json"))
    assert first.values == {"text": "a"}
    assert last.fault == "after 0: another list follows the list of rows and is not read; keep one list in the file"
    (tmp_path / "a.json").write_text('{"tags": ["a"], "messages": [{"role": "user"}], "images": []}')
    assert [row.values for row in read(str(tmp_path / "a.json"))] == [
        {"tags": ["a"], "messages": [{"role": "user"}], "images": []}
    ]


# Which files


def refused(pattern) -> str:
    with pytest.raises(ValueError) as error:
        find(str(pattern))
    return str(error.value)


def test_files_are_found_by_path_glob_and_folder(tmp_path):
    a, b = write(tmp_path, "a.jsonl"), write(tmp_path, "lines.json")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert find(a) == [a]
    assert find(str(tmp_path / "*.json*")) == [a, b]
    assert find(str(tmp_path / "a*.jsonl")) == [a]
    assert f"{tmp_path}: holds files of several kinds (.json, .jsonl); name one as {tmp_path}/*.json" == refused(
        tmp_path
    )
    os.remove(b)
    assert find(str(tmp_path)) == [a]


def test_missing_and_empty_files_are_refused_at_once(tmp_path):
    write(tmp_path, "a.jsonl")
    assert refused(tmp_path / "b.jsonl") == f"{tmp_path}/b.jsonl: no such file or folder; did you mean 'a.jsonl'?"
    assert refused(tmp_path / "*.parquet").endswith(
        f"no file matches; look at the folder and the pattern; {tmp_path} holds a.jsonl"
    )
    assert refused(tmp_path / "none" / "a.jsonl").endswith(f"; there is no folder {tmp_path}/none")
    for name in ("c.jsonl", "d.jsonl"):
        (tmp_path / name).touch()
    told = f"{tmp_path}/c.jsonl, {tmp_path}/d.jsonl: empty (0 bytes); get the file again, or leave it out"
    assert refused(tmp_path / "*.jsonl") == told
    (tmp_path / "a.xml").write_text("x")
    assert refused(tmp_path / "a.xml").startswith(f"{tmp_path}/a.xml: no known kind of file; expected .jsonl, ")
    assert refused("") == "an empty path; expected a file, a pattern such as data/*.jsonl, or a folder"
    (tmp_path / "e").mkdir()
    assert refused(tmp_path / "e").startswith(f"{tmp_path}/e: holds no file of data; expected")


def test_a_published_folder_with_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00001-of-00002", "train-00000-of-00002"):
        (tmp_path / "data" / f"{name}.parquet").write_bytes(parquet(VALUES))
    assert [os.path.basename(path) for path in find(str(tmp_path))] == [
        f"train-0000{i}-of-00002.parquet" for i in (0, 1)
    ]
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(parquet(VALUES))
    assert refused(tmp_path) == f"{tmp_path}: holds the splits test, train; name one, as {tmp_path}/data/train*.parquet"
    assert len(find(f"{tmp_path}/data/train*.parquet")) == 2


def test_a_folder_that_datasets_saved(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
        for i, name in enumerate(names):
            (folder / name).write_bytes(arrow(VALUES[20 * i : 20 * i + 20]))
        (folder / "cache-1234.arrow").write_bytes(b"left over")
        (folder / "dataset_info.json").write_text("{}")
        state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": split}
        (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert sound(read(find(str(tmp_path / "train")), 3)) == VALUES
    assert refused(tmp_path) == f"{tmp_path}: holds 2 splits; name one of them: {tmp_path}/train or {tmp_path}/test"
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(find(str(tmp_path))) == 2


def test_paths_of_gs(monkeypatch):
    class Bucket(MemoryFileSystem):
        protocol = ("gs", "gcs")
        store: ClassVar[dict] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
        pseudo_dirs: ClassVar[list] = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).replace("gs://", "memory://"))

    monkeypatch.setenv("EPATH_USE_TF", "false")
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    bucket = fsspec.filesystem("gs")
    for name in ("a.jsonl", "a.parquet", "a.jsonl.gz", "a.tar"):
        stem, end = os.path.splitext(name)
        data = WRITERS[stem if end in PACK else name](VALUES)
        bucket.pipe_file(f"gs://box/{stem[-1]}/{name}", PACK.get(end, bytes)(data))
        path = f"gs://box/{stem[-1]}/{name}"
        assert find(path) == [path]
        assert sound(read(path)) == sound(read(path, 3)) == VALUES
        assert {row.folder for row in read(path)} == {os.path.dirname(path)}
    assert find("gs://box/a/*.jsonl") == ["gs://box/a/a.jsonl"]
    assert "no such file or folder; did you mean 'a.jsonl'" in refused("gs://box/a/b.jsonl")
    assert mark(["gs://box/a/a.jsonl"]) == mark(["gs://box/a/a.jsonl"])


def test_the_mark_changes_with_the_files(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl")
    marks = [mark([path]), mark([write(tmp_path, "a.txt")]), mark([path, str(tmp_path / "a.txt")])]
    os.utime(path, ns=(1, 1))
    assert mark([path]) == marks[0]  # small files go by their contents
    write(tmp_path, "a.jsonl", VALUES[::-1])
    marks.append(mark([path]))
    monkeypatch.setattr("ain_jax.data.files.SMALL", 10)
    marks.append(mark([path]))
    os.utime(path, ns=(2, 2))
    marks.append(mark([path]))
    assert len(set(marks)) == 6


def test_utf_16_without_its_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("هذا كتاب\nand more\n".encode("utf-16-le"))
    found = read(str(tmp_path / "a.txt"))
    assert all(row.values is None and "if the file is in UTF-16, save it as UTF-8" in row.fault for row in found[:2])
