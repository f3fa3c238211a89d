"""Kinds of configuration values, each converted in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gptconvert.errors import InputError, UnsupportedError


@dataclass(frozen=True)
class Kind:
    """A kind of value, converted in both directions.

    Attributes:
        read: (key, value in the file) → value in a configuration. Raises :class:`InputError` for a value of the wrong
            kind, :class:`UnsupportedError` for a feature that is not implemented; neither needs to set the path.
        write: value in a configuration → value in the file.
        nullable: whether null is allowed and means None.
        has_synonyms: whether several values in a file mean the same; the file's own is then carried over.
    """

    read: Callable[[str, object], Any]
    write: Callable[[Any], object] = lambda value: value
    nullable: bool = False
    has_synonyms: bool = False


def wrong(key: str, expected: str, found: object) -> InputError:
    """The error for a value of the wrong kind."""
    return InputError("wrong value", item=key, expected=expected, found=repr(found)[:80])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(key: str, value: object) -> object:
    if not _is_whole(value):
        raise wrong(key, "a whole number", value)
    return value


def _positive(key: str, value: object) -> object:
    whole = _whole(key, value)
    if isinstance(whole, int) and whole < 1:
        raise wrong(key, "at least 1", value)
    return whole


def _whole_or_null(key: str, value: object) -> object:
    if not _is_whole(value):
        raise wrong(key, "a whole number or null", value)
    return value


def _size(key: str, value: object) -> object:
    return _whole_or_null(key, value) or None


def _token(key: str, value: object) -> object:
    return _whole_or_null(key, value[0] if isinstance(value, list) and value else value)


def _tokens(key: str, value: object) -> tuple[object, ...]:
    listed = value if isinstance(value, list) else [value]
    if not all(map(_is_whole, listed)):
        raise wrong(key, "a token id, a list of token ids or null", value)
    return tuple(listed)


def _plain_tokens(ids: tuple[int, ...] | None) -> object:
    return list(ids) if ids is not None and len(ids) > 1 else next(iter(ids or ()), None)


def _number(key: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise wrong(key, "a finite number", value)
    return float(value)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise wrong(key, "a string", value)
    return value


#: A whole number; 12.0 is not accepted.
WHOLE: Final = Kind(_whole)
#: A whole number, at least 1.
POSITIVE: Final = Kind(_positive)
#: A whole number or null.
OPTIONAL_WHOLE: Final = Kind(_whole_or_null, nullable=True)
#: A size; null or 0 means the default.
SIZE: Final = Kind(_size, nullable=True)
#: A token id or null. From a list, the first is used.
TOKEN: Final = Kind(_token, nullable=True)
#: Token ids: one, a list or null. One is written as a number, none as null.
TOKENS: Final = Kind(_tokens, _plain_tokens, nullable=True)
#: A finite number.
NUMBER: Final = Kind(_number)
#: A string.
TEXT: Final = Kind(_text)
#: Any value, including null: checked where it is used.
ANY: Final = Kind(lambda key, value: value, nullable=True)


def flag(on: object, off: object, *, nullable: bool = False) -> Kind:
    """True or false in the file, ``on`` or ``off`` in the configuration."""

    def read(key: str, value: object) -> object:
        if not isinstance(value, bool):
            raise wrong(key, "true or false", value)
        return on if value else off

    return Kind(read, lambda value: value == on, nullable)


FLAG: Final = flag(True, False)


def choice(table: Mapping[str, object], *, refused: Mapping[str, str] | None = None) -> Kind:
    """A word of ``table``, read as its meaning; of several words with one meaning, the first is written.

    Args:
        table: word → meaning.
        refused: other words → the reason why they are not implemented.
    """
    words = {meaning: word for word, meaning in reversed([*table.items()])}

    def read(key: str, value: object) -> object:
        if _text(key, value) not in table:
            reason = (refused or {}).get(str(value))
            raise UnsupportedError(
                f"{key} {value!r} is not implemented" + (f": {reason}" if reason else ""),
                item=key,
                expected=f"one of {', '.join(table)}",
                found=value,
            )
        return table[str(value)]

    return Kind(read, lambda meaning: words[meaning], has_synonyms=len(words) < len(table))
