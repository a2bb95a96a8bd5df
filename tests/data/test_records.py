"""What was written is read back, by index, in order and in parts, and its bytes are those of tensorflow-datasets."""

import json
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.proto import tf_example_pb2

from ain_jax.data.builders import features, sample
from ain_jax.data.builders.coding import parse, serialise
from ain_jax.data.builders.files import Sources, build, records
from ain_jax.data.builders.sample_records import SampleParams
from ain_jax.data.formats import Message, Record
from ain_jax.data.render import encode_png


def picture(shade):
    return encode_png(Image.new("RGB", (6, 6), (shade, shade, shade)))


def row(i):
    return {"id": f"r{i}", "text": f"نص رقم {i}", "language": "en" if i % 3 == 0 else "ar"}


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "id": f"p{i}", "language": "ar"} for i in range(30)]
    write(folder / "rows.jsonl", [row(i) for i in range(1200)])
    write(folder / "pairs.jsonl", pairs)
    both = Sources(files={"rows": str(folder / "rows.jsonl"), "pairs": str(folder / "pairs.jsonl")}, workers=1)
    return lambda name: build(name, both, folder / "data", progress=False)


def test_parts_and_counts_are_those_that_a_scan_finds(built):
    read = records(built("rows"), "train")
    scan = [(r.language, r.kind) for r in read]
    assert read.languages() == dict(Counter(language for language, _ in scan)) == {"ar": 800, "en": 400}
    assert read.kinds() == dict(Counter(kind for _, kind in scan))
    assert {(g.language, g.kind): g.rows for g in read.groups()} == Counter(scan)
    assert [read.groups()[code].language for code in read.codes()] == [language for language, _ in scan]
    chosen = read.select("en")
    assert list(chosen) == [r for r in read if r.language == "en"] == chosen[:]
    assert chosen[-1] == read[1197] and list(chosen.take(range(1, 400, 2)))[3] == read[21]
    pairs = records(built("pairs"), "train")
    assert pairs.labels() == dict(Counter(r.kind for r in pairs))
    with pytest.raises(ValueError, match="no record of 'er' in split 'train': did you mean 'en'"):
        read.select("er")


def test_parts_of_the_sample_are_found_in_the_same_way(tmp_path):
    few = SampleParams(
        preference_pairs=6, preference_test_pairs=4, read_pictures=24, read_test_pictures=6, renderings=1
    )
    preference = sample.records(sample.build("preference", tmp_path, few), "train")
    assert preference.labels() == dict(Counter(r.kind for r in preference))
    assert list(preference.select("wrong_language")) == [r for r in preference if r.kind == "wrong_language"]
    again = sample.records(sample.build("preference", tmp_path, few), "train")
    assert again.codes().tolist() == preference.codes().tolist() and len(again.languages()) == 2


def test_read_one_by_one_in_slices_and_in_another_process_alike(built):
    read = records(built("rows"), "train")
    copy = pickle.loads(pickle.dumps(read))
    assert len(pickle.dumps(read)) < 5000 and len(pickle.dumps(read.select("en"))) < 10_000
    assert not any(copy._source._readers)  # nothing is open before the first reading
    assert copy[5] == read[5] == read[5:6][0] == list(read)[5] == read[np.int64(5)]
    assert copy[-1] == read[1199] and read[10:4:-3] == [read[10], read[7]]
    assert read.__getitems__([7, 7, 2]) == [read[7], read[7], read[2]] and read[3:3] == []
    for wrong in (1200, -1201):
        with pytest.raises(IndexError, match=f"record {wrong} of 1200"):
            read[wrong]
    with pytest.raises(ValueError, match="no split 'test'; there are train"):
        records(built("rows"), "test")


def test_a_damaged_record_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(i) for i in range(20)])
    built = build("rows", Sources(files={"rows": path}, workers=1), tmp_path / "data", progress=False)
    (shard,) = Path(built.data_dir).glob("*array_record*")
    data = ArrayRecordReader(str(shard)).read_all()
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for i, one in enumerate(data):
        writer.write(b"\xff\xff" if i == 11 else one)
    writer.close()
    read = records(built, "train")
    assert read[10].id == "r10"
    where = re.escape(str(read.folder))
    for reading in (lambda: read[11], lambda: read[5:15], lambda: list(read)):
        with pytest.raises(ValueError, match=f"record 11 of 20 in {where}, split 'train': cannot be read"):
            reading()
    shard.unlink()
    with pytest.raises(ValueError, match="no such file .*remove the folder"):
        records(built, "train")


PICTURE, FRAMES = picture(1), (picture(2), picture(3))
QUESTION = (Message("user", "ما <image>؟"), Message("assistant", "هذا"))
EVERY = [
    Record("a", "s", "ar", "text", "نص"),
    Record("b", "s", "en", "chat", messages=QUESTION, images=(PICTURE,)),
    Record("c", "s", "en", "film", messages=QUESTION, videos=(FRAMES, FRAMES[:1]), images=(PICTURE,)),
    Record("d", "s", "en", "pair", messages=QUESTION, images=(PICTURE,), rejected="لا"),
    Record("e", "s", "en", "kto", messages=QUESTION[1:], desirable=False),
    Record("f", "s", "en", "kto", messages=QUESTION[1:], desirable=True),
]


@pytest.mark.parametrize("record", EVERY, ids=lambda r: r.id)
def test_bytes_are_those_of_tensorflow_datasets(record):
    coder = features.features()
    serializer = example_serializer.ExampleSerializer(coder.get_serialized_info())
    theirs = serializer.serialize_example(coder.encode_example(features.all_features(record)))
    example = tf_example_pb2.Example
    assert example.FromString(serialise(record)) == example.FromString(theirs)
    assert parse(theirs) == parse(serialise(record)) == record
    decoded = coder.deserialize_example_np(serialise(record))  # which opens the pictures
    assert decoded["id"] == record.id.encode() and len(decoded["frames"]) == sum(map(len, record.videos))
