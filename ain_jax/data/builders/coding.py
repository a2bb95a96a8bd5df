"""A Record as the bytes of a tf.train.Example, and back, without tensorflow-datasets.

Its own coding takes four times as long and opens every picture, and to import it takes each worker process two seconds.
"""

import itertools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ain_jax.data.formats import Message, Record, videos_of

TEXTS = ("id", "source", "language", "kind", "text", "rejected")


def _example_class() -> Any:
    """The message class of tf.train.Example, whose definition is public and fixed, in a pool of its own.

    message BytesList { repeated bytes value = 1; }   and so FloatList and Int64List
    message Feature { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    message Features { map<string, Feature> feature = 1; }
    message Example { Features features = 1; }
    """
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(parent: Any, name: str, *fields: tuple[str, Any, bool]) -> Any:
        made = parent.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            one = made.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".tensorflow.{kind}"
            else:
                one.type = kind
        return made

    top = file.message_type
    message(top, "BytesList", ("value", kinds.TYPE_BYTES, True))
    message(top, "FloatList", ("value", kinds.TYPE_FLOAT, True))
    message(top, "Int64List", ("value", kinds.TYPE_INT64, True))
    names = ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")
    feature = message(top, "Feature", *((field, kind, False) for field, kind in names))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message(top, "Features", ("feature", "Features.FeatureEntry", True))
    pair = ("key", kinds.TYPE_STRING, False), ("value", "Feature", False)
    entry = message(features.nested_type, "FeatureEntry", *pair)
    entry.options.map_entry = True
    message(top, "Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


Example = _example_class()


def _empty() -> bytes:
    """An Example with every feature and nothing in them: to fill it is faster than to make it each time."""
    example = Example()
    feature = example.features.feature
    for key in TEXTS:
        feature[key].bytes_list.value.append(b"")
    for key in ("messages/role", "messages/content", "images", "frames"):
        feature[key].bytes_list.SetInParent()
    feature["frame_counts"].int64_list.SetInParent()
    feature["desirable"].int64_list.value.append(-1)
    return example.SerializeToString(deterministic=True)


_EMPTY = _empty()


def serialise(record: Record) -> bytes:
    """The bytes of the tf.train.Example that tensorflow-datasets would write of the record; `parse` reads them.

    A text with half a surrogate pair, which is no Unicode, is a ValueError.
    """
    example = Example.FromString(_EMPTY)
    feature = example.features.feature
    for key in TEXTS:
        feature[key].bytes_list.value[0] = getattr(record, key).encode("utf-8")
    if record.messages:
        feature["messages/role"].bytes_list.value.extend([m.role.encode("utf-8") for m in record.messages])
        feature["messages/content"].bytes_list.value.extend([m.content.encode("utf-8") for m in record.messages])
    if record.images:
        feature["images"].bytes_list.value.extend(record.images)
    if record.videos:
        feature["frames"].bytes_list.value.extend(itertools.chain.from_iterable(record.videos))
        feature["frame_counts"].int64_list.value.extend(map(len, record.videos))
    if record.desirable is not None:
        feature["desirable"].int64_list.value[0] = int(record.desirable)
    return example.SerializeToString(deterministic=True)


def parse(serialized: bytes) -> Record:
    """The record in a serialized tf.train.Example that a builder wrote."""
    feature = Example.FromString(serialized).features.feature

    def texts(key: str) -> list[str]:
        return [value.decode("utf-8") for value in feature[key].bytes_list.value]

    verdict = feature["desirable"].int64_list.value[0]
    return Record(
        **{key: texts(key)[0] for key in TEXTS},
        messages=tuple(map(Message, texts("messages/role"), texts("messages/content"))),
        images=tuple(feature["images"].bytes_list.value),
        videos=videos_of(feature["frames"].bytes_list.value, feature["frame_counts"].int64_list.value),
        desirable=None if verdict < 0 else bool(verdict),
    )
