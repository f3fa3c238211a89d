"""JSON, read strictly (a document has one meaning, or is refused) and written in one form.

Python's parser accepts duplicate keys, NaN, infinities and unpaired surrogates. Parsers disagree about such files,
and so two programs could disagree about the model: all of these are refused here.
"""

from __future__ import annotations

import codecs
import json
import math
import os
from collections import Counter
from collections.abc import Iterator

from gptconvert.containers.untrusted import explain_bytes, read_small
from gptconvert.errors import InputError

#: Maximum nesting depth: the limit of the parser inside the safetensors library.
MAX_DEPTH = 127
#: Maximum number of commas and opening brackets, which bounds the values to build: 200 bytes and a microsecond each.
#: The safetensors header of a model of 1000 tensors has 9000.
MAX_VALUES = 1_000_000


_INT64 = 1 << 63


class _BadJsonError(ValueError):
    """A fault found by the parser's hooks; the message describes it."""


def parse_json(data: bytes, path: str | os.PathLike[str], what: str, max_values: int = MAX_VALUES) -> object:
    """The value of the JSON document ``data``.

    Args:
        data: the document, UTF-8 without a byte order mark.
        path: the file it came from, used in error messages.
        what: the document's name in error messages (``safetensors header``).
        max_values: maximum number of commas and opening brackets.

    Raises:
        InputError: not UTF-8, not JSON, a duplicate key, a number beyond the range of a double, nested too deep, or
            too many values.
    """
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > max_values:
        expected, found = f"at most {max_values} commas and brackets", str(values)
        raise InputError(f"{what} has too many values", path=path, expected=expected, found=found)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_number,
            parse_int=_integer,
        )
        _check_values(value)
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 (byte {error.start})", path=path) from error
    except RecursionError as error:
        raise InputError(f"{what} is nested more than {MAX_DEPTH} deep", path=path) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{what} is not JSON: {error.msg.lower()} ({where})", path=path) from error
    except _BadJsonError as error:
        raise InputError(f"{what} is not valid: {error}", path=path) from error
    return value


def read_json_object(
    path: str | os.PathLike[str], limit: int, what: str, max_values: int = MAX_VALUES
) -> dict[str, object]:
    """The JSON object in the file ``path``, which may have at most ``limit`` bytes and ``max_values`` values.

    Raises:
        UnsafeInputError: not a regular file.
        InputError: missing, unreadable, too large, not JSON, or not an object.
    """
    data = read_small(path, limit, what).removeprefix(codecs.BOM_UTF8)  # which editors on Windows add
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{what} is UTF-16, not UTF-8", path=path, hint="save it as UTF-8")
    explained = None if data.lstrip()[:1] == b"{" else explain_bytes(data[:512], allow={"text"})
    if explained is not None:
        raise InputError(f"{what} {explained}", path=path)
    value = parse_json(data, path, what, max_values)
    if not isinstance(value, dict):
        raise InputError(
            f"{what} holds the wrong kind of value", path=path, expected="a JSON object", found=kind(value)
        )
    return value


def dump_json(value: object) -> bytes:
    """``value`` as transformers writes its JSON files: sorted keys, two-space indent, ASCII, final newline.

    Raises:
        ValueError: ``value`` contains NaN or an infinity, which JSON cannot express.
    """
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def kind(value: object) -> str:
    """The JSON type of ``value``, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        duplicates = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise _BadJsonError(f"duplicate key {', '.join(f'`{name}`' for name in duplicates[:5])}")
    return value


def _constant(name: str) -> float:
    raise _BadJsonError(f"{name} is not a JSON number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _BadJsonError(f"number {text[:40]} is out of range")
    return value


def _integer(text: str) -> int | float:
    """An integer; ``-0``, and one beyond 64 bits, becomes a float, as in parsers with types for 64-bit integers.

    Larger integers could also be chosen to have the same hash, which makes sets of them quadratic.
    """
    if text == "-0" or len(text) > 21:
        return _number(text)
    value = int(text)
    return value if -_INT64 <= value < 2 * _INT64 else float(value)


def _check_values(value: object) -> None:
    """Check depth and surrogates level by level: a recursive check could be made to overflow the stack."""
    level, depth = [value], 0
    while level:
        for text in level:
            if isinstance(text, str) and not text.isascii():
                _check_text(text)
        nested = [item for item in level if isinstance(item, (dict, list))]
        depth += bool(nested)
        if depth > MAX_DEPTH:
            raise RecursionError
        level = [child for item in nested for child in _children(item)]


def _children(item: dict[str, object] | list[object]) -> Iterator[object]:
    if isinstance(item, dict):
        yield from item
        yield from item.values()
    else:
        yield from item


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadJsonError("a string contains an unpaired surrogate") from error
