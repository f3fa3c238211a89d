"""Protobuf's wire format: reading inverts writing, and no bytes break the reader."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptconvert.containers.protobuf import (
    MalformedError,
    Message,
    bytes_field,
    bytes_prefix,
    fixed32_field,
    integer_field,
    read_varint,
    varint,
)
from tests.containers import bundle_bytes as made

NUMBERS = st.integers(0, (1 << 64) - 1)
FIELDS = st.integers(1, (1 << 29) - 1)


@given(NUMBERS, st.binary(max_size=3), st.binary(max_size=3))
@example(0, b"", b"")
@example(127, b"", b"")
@example(128, b"", b"")
@example((1 << 64) - 1, b"", b"")
def test_varints(value: int, before: bytes, after: bytes) -> None:
    written = varint(value)
    assert written == made.varint(value)
    assert read_varint(before + written + after, len(before)) == (value, len(before) + len(written))
    if value >> 32:
        with pytest.raises(MalformedError, match="32 bits"):
            read_varint(written, 0, 32)
    for cut in range(len(written)):
        with pytest.raises(MalformedError, match="ends inside"):
            read_varint(written[:cut], 0)


@given(
    integers=st.dictionaries(FIELDS, st.integers(0, (1 << 63) - 1), max_size=4),
    fixed=st.dictionaries(FIELDS, st.integers(0, (1 << 32) - 1), max_size=4),
    texts=st.dictionaries(FIELDS, st.binary(max_size=200), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_fields(integers: dict[int, int], fixed: dict[int, int], texts: dict[int, bytes]) -> None:
    fixed = {number: value for number, value in fixed.items() if number not in integers}
    texts = {number: value for number, value in texts.items() if number not in {**integers, **fixed}}
    message = Message(
        b"".join(integer_field(*field) for field in integers.items())
        + b"".join(fixed32_field(*field) for field in fixed.items())
        + b"".join(bytes_field(*field) for field in texts.items())
    )
    assert {number: message.integer(number) for number in integers} == integers
    assert {number: message.integer(number) for number in fixed} == fixed
    assert {number: message.raw(number) for number in texts} == texts


def test_zero_is_omitted_unless_kept() -> None:
    assert integer_field(3, 0) == b""
    assert integer_field(3, 0, keep_zero=True) == b"\x18\x00"
    assert 3 in Message(integer_field(3, 0, keep_zero=True))


def test_a_message_inside_a_message() -> None:
    inner = integer_field(1, 300)
    message = Message(bytes_field(2, inner) + bytes_field(2, b""))
    assert [each.integer(1) for each in message.messages(2)] == [300, 0]
    assert bytes_prefix(2, len(inner)) + inner == bytes_field(2, inner) == b"\x12\x03\x08\xac\x02"


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_message_breaks_the_protobuf_reader(data: bytes) -> None:
    try:
        message = Message(data)
        for field in range(1, 8):
            message.messages(field)
    except MalformedError:
        pass
