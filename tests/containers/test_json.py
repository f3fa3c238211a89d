"""JSON that two parsers could read differently is refused, and reading inverts writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.containers.json import MAX_DEPTH, dump_json, parse_json, read_json_object
from gptconvert.errors import InputError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)  # larger ones become floats, as in other readers
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(value=VALUES, plain=st.booleans())
def test_reads_what_python_writes(value: Any, plain: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=plain).encode(), "x", "file") == value


@settings(max_examples=100, deadline=None)
@given(value=VALUES)
def test_read_is_the_inverse_of_write(value: Any) -> None:
    written = dump_json(value)
    assert parse_json(written, "x", "file") == value
    assert written.isascii() and written.endswith(b"\n")


def test_objects_are_written_in_one_order() -> None:
    assert dump_json({"b": [1], "a": "é"}) == b'{\n  "a": "\\u00e9",\n  "b": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"a": float("inf")})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate key `c`"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e400]", "out of range"),
        ("[" + "9" * 400 + "]", "out of range"),
        ("[" + "9" * 5000 + "]", "out of range"),
        ('["\\ud800"]', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("[1,]", "not JSON"),
        ("{'a': 1}", "line 1, column 2"),
        ("[1] 2", "not JSON"),
        ("", "not JSON"),
        ("\ufeff{}", "not JSON"),
        ('["a\nb"]', "not JSON"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(text.encode("utf-8", "surrogatepass"), "dir/x.json", "config.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("dir/x.json: config.json is not")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    inner = "1" if opening != "[" else ""

    def nested(depth: int) -> bytes:
        return (opening * depth + inner + closing * depth).encode()

    parse_json(nested(MAX_DEPTH), "x", "file")
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(InputError, match=f"{MAX_DEPTH} deep"):
            parse_json(nested(depth), "x", "file")


def test_minus_zero_becomes_a_float() -> None:
    assert type(parse_json(b"-0", "x", "file")) is float


@pytest.mark.parametrize(("text", "value"), [("-9223372036854775809", -(2.0**63)), (str(1 << 64), 2.0**64)])
def test_integers_of_more_than_64_bits_become_floats(text: str, value: float) -> None:
    found = parse_json(text.encode(), "x", "file")
    assert type(found) is float and found == value


def test_a_byte_order_mark(tmp_path: Path) -> None:
    """Editors on Windows write one before UTF-8; PowerShell writes UTF-16."""
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json_object(path, 100, "config.json") == {"a": 1}
    path.write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(InputError, match="UTF-16, not UTF-8"):
        read_json_object(path, 100, "config.json")
