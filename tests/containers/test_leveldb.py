"""LevelDB tables: reading inverts writing, and no table costs more than its size."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptconvert.containers.leveldb import read_table, write_table
from gptconvert.containers.protobuf import MalformedError
from tests.containers import bundle_bytes as made
from tests.containers.damage import damaged

ENTRY = made.entry(1, (2, 2), size=16, crc=5)
#: Keys that share prefixes, and keys without a successor.
KEYS = st.one_of(st.binary(max_size=6), st.sampled_from([b"model/h%d" % i for i in range(40)]), st.just(b"\xff\xff"))


@given(st.dictionaries(KEYS, st.binary(max_size=9), max_size=40), st.sampled_from([1, 30, 1 << 18]))
@example({}, 1 << 18)
@example({b"\xff": b""}, 1)
@settings(max_examples=200, deadline=None)
def test_read_is_the_inverse_of_write(content: dict[bytes, bytes], block_bytes: int) -> None:
    rows = sorted(content.items())
    assert list(read_table(write_table(rows, block_bytes))) == rows


@pytest.mark.parametrize(("block_bytes", "in_first"), [(1 << 18, 40), (201, 9), (200, 8), (1, 1)])
def test_a_block_ends_with_the_row_that_fills_it(block_bytes: int, in_first: int) -> None:
    rows = [(b"key/%02d" % i, b"v" * 19) for i in range(40)]  # 25 bytes each
    table = write_table(rows, block_bytes)
    assert table.startswith(made.trailed(made.block(rows[:in_first])))
    assert list(read_table(table)) == rows


@given(st.dictionaries(KEYS, st.binary(max_size=9), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_blocks_are_those_of_an_independent_writer(content: dict[bytes, bytes]) -> None:
    rows = sorted(content.items())
    assert write_table(rows).startswith(made.trailed(made.block(rows)))


def one_entry(body: bytes) -> bytes:
    """A table whose only block holds ``body`` and one restart point."""
    return made.raw_table(body + struct.pack("<II", 0, 1))


HEAD = (b"", made.header())
GROWING = b"".join(made.varint(1000 + i) + b"\1\0b" for i in range(5000))
MALFORMED: dict[str, tuple[bytes, str]] = {
    "shared prefix of nothing": (one_entry(b"\x05\x01\x00a"), "past its block"),
    "key longer than the block": (one_entry(b"\0\x7f\0a"), "past its block"),
    "value longer than the block": (one_entry(b"\0\x01\x7fa"), "past its block"),
    "length of 2^35": (one_entry(b"\0\xff\xff\xff\xff\x7f\0"), "32 bits"),
    "more restarts than bytes": (made.raw_table(b"\xff\xff\xff\x7f"), "restart points"),
    "no restart count": (made.raw_table(b"abc"), "restart count"),
    "unknown compression": (made.raw_table(made.block([HEAD]), kind=7), "compression type 7"),
    "snappy bomb": (made.raw_table(b"\xff\xff\xff\xff\x0f\0a", kind=1), "declares 4294967295 bytes"),
    "snappy copy from nowhere": (made.raw_table(b"\x08\x0d\x05", kind=1), "before its start"),
    "keys out of order": (made.raw_table(made.block([HEAD, (b"b", b""), (b"a", b"")])), "out of order"),
    "one key twice": (made.raw_table(made.block([HEAD, (b"a", b""), (b"a", b"")])), "out of order"),
    "keys that explode": (one_entry(b"\0\xe8\x07\0" + b"a" * 1000 + GROWING), "expand"),
    "one block twice": (made.raw_table(made.block([HEAD]), times=2), "overlap"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_table(name: str) -> None:
    content, message = MALFORMED[name]
    with pytest.raises(MalformedError, match=message):
        list(read_table(content))


@given(damaged(made.block([HEAD, (b"model/wte", ENTRY), (b"model/wtf", ENTRY)])))
@settings(max_examples=200, deadline=None)
def test_damaged_blocks_with_valid_checksums(block: bytes) -> None:
    with suppress(MalformedError):
        list(read_table(made.raw_table(block)))
