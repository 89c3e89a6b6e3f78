"""``tf.train.Example``, the message in TFRecord and ArrayRecord files, without TensorFlow.

Defined as in TensorFlow's ``example.proto`` and ``feature.proto``, in a pool of its own, so that TensorFlow can be
loaded beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

_PACKAGE = "tensorflow"
_KINDS = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}


def encode_example(features: dict[str, bytes | list[int]]) -> bytes:
    """A serialized Example: bytes become a ``bytes_list`` of one value, ids an ``int64_list``."""
    example = _message_class()()
    for name, value in sorted(features.items()):
        feature = example.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.extend(value)
    return bytes(example.SerializeToString(deterministic=True))


def parse_example(record: bytes) -> dict[str, Any] | None:
    """The features of a serialized Example by name: lists of bytes, floats or integers; None for another record."""
    example = _message_class()()
    try:
        example.ParseFromString(record)
    except message.DecodeError:
        return None
    features = example.features.feature
    if not features:
        return None
    return {name: _values(features[name]) for name in features}


def _values(feature: Any) -> list[Any]:
    kind = feature.WhichOneof("kind")
    return [] if kind is None else list(getattr(feature, kind).value)


@cache
def _message_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_definition())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


def _definition() -> descriptor_pb2.FileDescriptorProto:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package=_PACKAGE, syntax="proto3")
    scalars = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, scalar in scalars.items():
        file.message_type.add(name=name).field.add(
            name="value", number=1, label=field.LABEL_REPEATED, type=scalar
        )
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(_KINDS.items(), start=1):
        _add_message(feature, name, number, kind).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    _add_message(entry, "value", 2, "Feature")
    _add_message(features, "feature", 1, "Features.FeatureEntry").label = field.LABEL_REPEATED
    _add_message(file.message_type.add(name="Example"), "features", 1, "Features")
    return file


def _add_message(owner: Any, name: str, number: int, type_name: str) -> Any:
    field = descriptor_pb2.FieldDescriptorProto
    return owner.field.add(
        name=name,
        number=number,
        label=field.LABEL_OPTIONAL,
        type=field.TYPE_MESSAGE,
        type_name=f".{_PACKAGE}.{type_name}",
    )
