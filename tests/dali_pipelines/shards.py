"""Shards written by other libraries: Python's tarfile, TensorBoard's record writer, Google's protobuf."""

import functools
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.summary.writer.record_writer import RecordWriter


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@functools.cache
def _example() -> Any:
    """The class tf.train.Example, built from a description of its fields."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, bool, str], of: Any = None) -> Any:
        made = (of.nested_type if of else file.message_type).add(name=name)
        for field, number, kind, repeated, type_name in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=kind, label=label, type_name=type_name or None)
        return made

    message("BytesList", ("value", 1, kinds.TYPE_BYTES, True, ""))
    message("FloatList", ("value", 1, kinds.TYPE_FLOAT, True, ""))
    message("Int64List", ("value", 1, kinds.TYPE_INT64, True, ""))
    lists = [("bytes_list", 1, "BytesList"), ("float_list", 2, "FloatList"), ("int64_list", 3, "Int64List")]
    message("Feature", *((name, number, kinds.TYPE_MESSAGE, False, f".tf.{kind}") for name, number, kind in lists))
    features = message("Features", ("feature", 1, kinds.TYPE_MESSAGE, True, ".tf.Features.FeatureEntry"))
    key, value = ("key", 1, kinds.TYPE_STRING, False, ""), ("value", 2, kinds.TYPE_MESSAGE, False, ".tf.Feature")
    message("FeatureEntry", key, value, of=features).options.map_entry = True
    message("Example", ("features", 1, kinds.TYPE_MESSAGE, False, ".tf.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


def example(**features: bytes | int | float | list[Any]) -> bytes:
    """A tf.train.Example; a double underscore in a name stands for a slash."""
    made = _example()()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        feature = made.features.feature[name.replace("__", "/")]
        kind = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}[type(values[0])]
        kind.value.extend(values)
    content: bytes = made.SerializeToString()
    return content


def write_tfrecord(path: Path, records: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)
        writer.flush()
