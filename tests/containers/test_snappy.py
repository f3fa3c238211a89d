"""Snappy blocks are decompressed within bounds."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.containers.protobuf import MalformedError
from gptconvert.containers.snappy import decompress
from tests.containers import bundle_bytes as made


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_bytes_break_the_snappy_decoder(data: bytes) -> None:
    with suppress(MalformedError):
        assert len(decompress(data)) <= 64 * len(data)


@given(st.lists(st.sampled_from([b"a", b"bc", b"abcabcabc", b"0" * 70, bytes(range(90))]), max_size=30))
@settings(max_examples=60, deadline=None)
def test_snappy_round_trip(words: list[bytes]) -> None:
    raw = b"".join(words)
    assert decompress(made.snappy(raw)) == raw
