"""The graph of a large ONNX file without the weights stored in it.

A weight inside the file becomes external data at its offset in the same file, so that neither the parsed model nor
onnxruntime copies it. Only the frame of the messages is read here; onnx parses the result.
Source: onnx.proto (fields of ModelProto, GraphProto and TensorProto) and protobuf's encoding.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from gptconvert.containers.protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    MalformedError,
    bytes_field,
    integer_field,
    read_varint,
)

#: Smaller data stay in the graph, where onnxruntime may read them to optimise it (shapes, for example).
LEAST_BYTES = 1 << 16
GRAPH, INITIALIZER = 7, 5
RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 13, 14
EXTERNAL = 1

Span = tuple[int, int]


def without_weights(path: str) -> bytes:
    """The serialised model of ``path``, whose large initializers point into the file.

    Raises:
        MalformedError: the file is not a protobuf message, or holds two graphs.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        location = os.path.basename(path).encode()
        parts, graphs = bytearray(), 0
        for number, whole, content in _fields(data, (0, len(data))):
            if number == GRAPH:
                graphs += 1
                parts += bytes_field(GRAPH, _graph(data, content, location))
            else:
                parts += data[slice(*whole)]
        if graphs != 1:  # a reader would merge them
            raise MalformedError(f"has {graphs} graphs")
        return bytes(parts)


def _graph(data: mmap.mmap, span: Span, location: bytes) -> bytes:
    parts = bytearray()
    for number, whole, content in _fields(data, span):
        if number == INITIALIZER and content[1] - content[0] >= LEAST_BYTES:
            parts += bytes_field(INITIALIZER, _tensor(data, content, location))
        else:
            parts += data[slice(*whole)]
    return bytes(parts)


def _tensor(data: mmap.mmap, span: Span, location: bytes) -> bytes:
    """A TensorProto; one without large raw data, or with external data of its own, stays as it is."""
    fields = list(_fields(data, span))
    raw = [content for number, _, content in fields if number == RAW_DATA]
    external = any(number in (EXTERNAL_DATA, DATA_LOCATION) for number, *_ in fields)
    if len(raw) != 1 or external or raw[0][1] - raw[0][0] < LEAST_BYTES:
        return data[slice(*span)]
    start, end = raw[0]
    entries = {b"location": location, b"offset": b"%d" % start, b"length": b"%d" % (end - start)}
    kept = b"".join(data[slice(*whole)] for number, whole, _ in fields if number != RAW_DATA)
    external_data = (bytes_field(EXTERNAL_DATA, bytes_field(1, k) + bytes_field(2, v)) for k, v in entries.items())
    return kept + b"".join(external_data) + integer_field(DATA_LOCATION, EXTERNAL)


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span, Span]]:
    """Number, whole byte range and content's byte range of each field of the message in ``span``."""
    at, end = span
    while at < end:
        start = at
        key, at = read_varint(data, at)
        number, wire, content = key >> 3, key & 7, at
        if wire == BYTES:
            length, content = read_varint(data, at)
            at = content + length
        elif wire == VARINT:
            _, at = read_varint(data, at)
        elif wire in (FIXED32, FIXED64):
            at += 4 if wire == FIXED32 else 8
        else:
            raise MalformedError(f"has a field of wire type {wire}")
        if not number or at > end:
            raise MalformedError("ends inside a field" if number else "has a field numbered 0")
        yield number, (start, at), (content, at)
